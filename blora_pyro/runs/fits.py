"""A run from base model to table: load, fit, evaluate, and keep it all in one folder."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from blora_pyro.declarations import check_value, known_keywords
from blora_pyro.errors import Interrupted, ProcessLost, UserError, is_out_of_memory
from blora_pyro.files import read_json
from blora_pyro.fitting.alarms import Alarms
from blora_pyro.fitting.checkpoints import Checkpoints
from blora_pyro.fitting.history import DevErrors, Step
from blora_pyro.fitting.interrupts import Interrupts
from blora_pyro.fitting.processes import Processes
from blora_pyro.fitting.svi import fit_guide
from blora_pyro.models import check_device, on_this_machine
from blora_pyro.options import FitConfig, OutputOptions
from blora_pyro.posterior import Family, Posterior
from blora_pyro.posterior.strength import BASE, SCALE, at_strength
from blora_pyro.runs.chains import continued
from blora_pyro.runs.contracts import keep_contract, verdict
from blora_pyro.runs.fit_folders import FitFolder
from blora_pyro.runs.folders import writing
from blora_pyro.runs.listeners import Listener, check_trackers, heard_by, tracked
from blora_pyro.runs.parts import Parts
from blora_pyro.runs.record import FINISHED, FITTING, RUN, state_of
from blora_pyro.runs.report import (
    NOTHING_MEASURED,
    alarm_line,
    dev_line,
    error_changes,
    fit_tables,
    kept_line,
)
from blora_pyro.runs.scoring import Scoring, compare
from blora_pyro.runs.shown import in_words, options_table
from blora_pyro.runs.strength_curves import used_directions
from blora_pyro.runs.utterances import utterance_rows
from blora_pyro.sources import Source
from blora_pyro.tables import described, described_html, report_text


@dataclass(repr=False)
class Run:
    """A finished fit; its `table` shows what was gained and what was forgotten.

    Attributes:
        config: Its resolved options.
        posterior: The fitted posterior.
        history: One `Step` for each step of SVI.
        metrics: The content of `metrics.json`.
        output: Its folder, or None.
        dev: The content of `dev` in `run.json`: all dev errors, the best step, and what ended the
            fit; None without `eval_every`.
    """

    config: FitConfig
    posterior: Posterior
    history: list[Step]
    metrics: dict[str, Any] = field(default_factory=dict)
    output: Path | None = None
    dev: DevErrors | None = None

    @property
    def table(self) -> str:
        """The table of errors before and after, and the lines below it, as text."""
        return report_text(fit_tables(self.metrics)) if self.metrics else NOTHING_MEASURED

    @property
    def _facts(self) -> dict[str, object]:
        config, facts = self.config, {"output": self.output} if self.output else {}
        return {
            **facts,
            "base": config.base,
            "data": ", ".join(config.domains),
            "prior": f"{config.prior}, beta {in_words(config.beta)}",
            "steps": self.history[-1].step if self.history else 0,
            "errors in %": ", ".join(error_changes(self.metrics)) or "not measured",
        }

    def __repr__(self) -> str:
        """Tell of the fit, and what it changed, in a few lines."""
        return described("Run", self._facts)

    def _repr_html_(self) -> str:
        """Tell the same in a notebook, with sections that can be opened."""
        errors = fit_tables(self.metrics) if self.metrics else [NOTHING_MEASURED]
        dev = [dev_line(self.dev)] if self.dev else []
        sections = {
            "Errors": [*errors, *dev],
            "Options": [options_table(self.config.to_json())],
            "Posterior": self.posterior.layer_tables(),
        }
        return described_html("Run", self._facts, sections)


@known_keywords("fit()", FitConfig)
def fit(
    config: FitConfig | None = None,
    output: str | Path | None = None,
    *,
    base: str | None = None,
    data: Source | Sequence[Source] | Mapping[str, Source] | None = None,
    prior: str | None = None,
    beta: float | Literal["auto", "elbo"] | None = None,
    rank: int | None = None,
    lr: float | None = None,
    steps: int | None = None,
    seed: int | None = None,
    evaluate: bool = True,
    overwrite: bool = False,
    resume: bool = False,
    checkpoint_every: int | None = None,
    progress: Listener | None = None,
    trust_prior_file: bool = False,
) -> Run:
    """Fit BLoRA to a new domain, and measure what was gained and what was forgotten.

    Started by `accelerate launch` or `torchrun`, several processes fit as one, see `fit_guide`; the
    first of them, the main one, reads, measures and writes, and has the metrics at the end.

    With an output, checkpoints are written on the way, and SIGINT and SIGTERM end the fit after the
    step that they come in, with a checkpoint (in the main thread; `Interrupted` is raised).

        run = fit(FitConfig(data="calls", spec_augment=True), "runs/calls", beta=1e-5)

    Args:
        config: Everything that decides the fit; None is the defaults. With `prior_from`, base,
            revision, rank, alpha and target_modules are that run's unless given, and must be the
            same.
        output: Folder for the run: the PEFT adapter of the posterior mean, `posterior.safetensors`,
            `run.json` and `metrics.json`. None keeps nothing on disk.
        base: This option and those that follow replace those of the configuration; see `FitConfig`.
        data: See `FitConfig`.
        prior: See `FitConfig`.
        beta: See `FitConfig`.
        rank: See `FitConfig`.
        lr: See `FitConfig`.
        steps: See `FitConfig`.
        seed: See `FitConfig`.
        evaluate: Measure error on the test set and the backward sets, before and after.
        overwrite: Write into a folder that holds an earlier run, which is removed once base and
            data are loaded.
        resume: Go on with the fit in `output`, whose options need not be given again; the result is
            bit by bit that of a fit that was never interrupted. A finished one is returned. Where
            none has been started, the configuration starts one.
        checkpoint_every: Steps between two checkpoints; None is by time, see `Checkpoints`.
        progress: Is called with stages and steps; None is bars in a notebook, else nothing.
        trust_prior_file: Run the files of code that the fit in `output` names as its prior or
            guide. Without it they are run only if they are among the options of this call, and in
            any case only if they are those that the fit was started with, by their SHA-256.

    Raises:
        UserError: On bad options or data, a full disk or memory, or options that are not those of
            the fit to go on with.
        FloatingPointError: If the loss stays not finite; see `fit_guide`.
        Interrupted: By a signal.
    """
    check_value(OutputOptions, "checkpoint_every", checkpoint_every)
    keywords: dict[str, Any] = {
        **{"base": base, "data": data, "prior": prior, "beta": beta},
        **{"rank": rank, "lr": lr, "steps": steps, "seed": seed},
    }
    given = {name: value for name, value in keywords.items() if value is not None}
    if config is None:
        config = FitConfig(**given)
    elif not isinstance(config, FitConfig):
        raise UserError(f"config is {config!r:.60}; give a FitConfig, or options by name: data=...")
    elif given:
        config = config.with_options(**given)
    config = on_this_machine(config)
    processes = Processes.join(_device(output, config))
    progress = heard_by(progress) if processes.is_main else Listener()
    with ExitStack() as ends:
        ends.callback(processes.leave)
        folder = _open_together(
            processes, output, config, overwrite, resume, trust_prior_file, ends
        )
        if folder.state == FINISHED or (folder.state != FITTING and not processes.is_main):
            progress.stage("finished already: reading")
            if processes.is_main:
                folder.tidy()
            return _read(folder)
        together = processes.count > 1
        track = folder.config.track if processes.is_main else None
        with (
            explained_ends(folder),
            Interrupts(active=together or folder.path is not None) as interrupts,
            tracked(progress, track, folder.path) as listener,
        ):
            return _fit(folder, evaluate, checkpoint_every, listener, interrupts, processes)


def _device(output: str | Path | None, config: FitConfig) -> str:
    """Return the device of the options, or of the fit that is resumed."""
    if "device" in config.given or output is None:
        return config.device
    try:
        return str(read_json(Path(output) / RUN)["options"]["device"])
    except (OSError, ValueError, KeyError, TypeError):
        return config.device  # that of a new fit; what is damaged is refused later


def _read(folder: FitFolder) -> Run:
    """Return a fit that is done."""
    posterior, history = folder.fitted()
    metrics = folder.metrics() if folder.state == FINISHED else {}
    return Run(folder.resolved, posterior, history, metrics, folder.path, folder.record.dev)


def _open_together(
    processes: Processes,
    output: str | Path | None,
    config: FitConfig,
    overwrite: bool,
    resume: bool,
    trust_prior_file: bool,
    ends: ExitStack,
) -> FitFolder:
    """Return the folder in the main process, and in the others what they need to know of it.

    The main process holds its lock until `ends`, unless there is a finished fit to be read.
    """
    opened: list[FitFolder] = []

    def open_folder() -> dict[str, Any]:
        if output is not None and not (resume and state_of(Path(output)) == FINISHED):
            ends.enter_context(writing(Path(output)))
        opened.append(_open(output, config, overwrite, resume, trust_prior_file))
        return {name: getattr(opened[0].record, name) for name in ("state", "options", "chain")}

    about = processes.from_main(open_folder)
    if opened:
        return opened[0]
    if about["state"] != FITTING:
        return FitFolder.reopen(Path(str(output)), config, trust_prior_file)
    return FitFolder.follow(about, config)


def _open(
    output: str | Path | None,
    config: FitConfig,
    overwrite: bool,
    resume: bool,
    trust_prior_file: bool,
) -> FitFolder:
    """Return the folder of a new fit, or of one that is to go on."""
    path = None if output is None else Path(output)
    if resume and (path is None or overwrite):
        wrong = "no output" if path is None else "overwrite"
        raise UserError(f"resume is given with {wrong}; give the output of a fit and resume")
    if resume and path is not None:
        if (path / RUN).exists():
            folder = FitFolder.reopen(path, config, trust_prior_file)
            if folder.state != FINISHED:
                check_device(folder.config.device)
                check_trackers(folder.config.track, path)
            return folder
        if not config.given:
            raise UserError(f"{path} holds no fit to go on with; start it without --resume")
    config.check_base()
    config, previous = continued(config)
    check_device(config.device)
    check_trackers(config.track, path)
    return FitFolder.create(path, config, overwrite, previous)


def _fit(
    folder: FitFolder,
    evaluate: bool,
    checkpoint_every: int | None,
    progress: Listener,
    interrupts: Interrupts,
    processes: Processes,
) -> Run:
    """Do what the folder does not have yet: load, score the base, fit, score, keep."""
    started = time.monotonic()
    with processes.main_first():  # which leaves features in the cache
        parts = Parts.load(folder, evaluate and processes.is_main, progress, processes)
    before = parts.scoring.score(None, "base", folder.transcripts("base"))
    if folder.state == FITTING:
        with interrupts.deferred():  # what is fitted is kept before they are answered
            data = {**parts.size, "training_data": parts.train.fingerprint}
            identity = {**parts.config.to_json(), **data}
            checkpoints = Checkpoints(
                folder.path, identity, checkpoint_every, interrupts, FitConfig().to_json()
            )
            posterior, history = _fit_and_keep(folder, parts, checkpoints, progress, processes)
        progress.fitted()
    else:
        posterior, history = folder.fitted()
    if parts.dev is not None:
        posterior = _keep_contract(folder, parts, parts.dev, posterior)
    after = parts.scoring.score(posterior, "adapted", folder.transcripts("adapted"))
    metrics = compare(posterior, before, after, parts.config)
    if folder.record.kept is not None:
        metrics |= verdict(folder.record.kept, metrics)
    if folder.record.alarm:
        metrics["alarm"] = folder.record.alarm
    rows = [*utterance_rows(parts.scoring.sets, {"base": before, "adapted": after}, posterior)]
    folder.finish(metrics, rows, time.monotonic() - started, posterior)
    progress.measured(metrics, history[-1].step if history else 0)
    return Run(parts.config, posterior, history, metrics, folder.path, folder.record.dev)


def _fit_and_keep(
    folder: FitFolder,
    parts: Parts,
    checkpoints: Checkpoints,
    progress: Listener,
    processes: Processes,
) -> tuple[Posterior, list[Step]]:
    """Fit the guide from its first step or its checkpoint, and keep the posterior."""
    assert parts.fit is not None
    model, guide, teacher, stopping = parts.fit
    config, started = parts.config, time.monotonic()
    if (done := checkpoints.stored_step()) is not None:
        progress.stage(f"going on from step {done}")
    progress.ready(config, parts.size["tokens"], model.num_weights)
    alarms = Alarms() if config.alarms else None
    history = fit_guide(
        model,
        guide,
        parts.train,
        config,
        on_step=progress.step,
        checkpoints=checkpoints,
        early_stopping=stopping,
        teacher=teacher,
        processes=processes,
        alarms=alarms,
    )
    parts.loader.report_skipped(folder.list_skipped(parts.loader.skipped))  # of a stream
    family = Family.of(config.prior, config.prior_args, str(config.guide))
    base, allowed = parts.scoring.base, parts.unsuppressed
    posterior = Posterior.from_guide(
        base.name, model, guide, family, config.revision, allowed, base.language_map
    )
    ended = alarms.ended if alarms else None
    folder.save(posterior, history, stopping, time.monotonic() - started, ended)
    if ended:
        progress.note(alarm_line(ended))
    if skipped := folder.record.skipped_steps:
        progress.note(
            f"{skipped} of {skipped + len(history)} steps were skipped, because their loss or "
            "gradient was not finite; try a smaller --lr"
        )
    return posterior, history


def _keep_contract(
    folder: FitFolder, parts: Parts, dev: Scoring, posterior: Posterior
) -> Posterior:
    """Turn the fit down to the strength that keeps its contract on the dev sets, and keep that."""
    config, directions = parts.config, None
    if config.strength_by == BASE:
        directions = used_directions(dev.base, config, posterior, dev.progress)
    kept = keep_contract(dev, posterior, config, folder.transcripts, directions=directions)
    by = config.strength_by or SCALE
    posterior = at_strength(posterior, kept["strength"], by, directions)
    folder.keep(posterior, kept)
    dev.progress.note(kept_line(kept))
    return posterior


# ---- early ends


@contextmanager
def explained_ends(folder: FitFolder) -> Iterator[None]:
    """Make the error that ends a fit early say in one line what happened, what is safe, what to do.

    Raises:
        Interrupted: By a signal.
        FloatingPointError: If the loss is not finite.
        UserError: If the folder can't be written any more, memory is full, or one of several
            processes is gone.
    """
    try:
        yield
    except ProcessLost as error:
        raise UserError(f"{error}; {folder.safe()}; {folder.way_on()}") from None
    except Interrupted as error:
        message = f"interrupted; {folder.safe()}; {folder.way_on()}"
        raise Interrupted(error.signum, message) from None
    except FloatingPointError as error:
        again = "" if folder.path is None else f"; {folder.safe()}, and the same comes of going on"
        raise FloatingPointError(f"{error}{again}") from None
    except OSError as error:
        if folder.path not in Path(str(error.filename)).parents:
            raise
        raise UserError(
            f"{error.filename} can't be written ({error.strerror}); {folder.safe()}; put that "
            f"right, then {folder.way_on()}"
        ) from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory; {folder.safe()}; free some and {folder.way_on()} (or start another "
            "fit with gradient_accumulation, gradient_checkpointing or a smaller batch_size)"
        ) from None
