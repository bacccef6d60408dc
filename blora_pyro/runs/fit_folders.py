"""The folder of a fit: what it keeps on the way, what is safe at an early end, reopening."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from blora_pyro.declarations import check_names
from blora_pyro.errors import UserError
from blora_pyro.families import ROLES, check_code, check_hashes, code_hashes, is_code
from blora_pyro.files import replace_file, write_json
from blora_pyro.fitting.checkpoints import stored_step
from blora_pyro.fitting.history import Ended, Step
from blora_pyro.fitting.stopping import EarlyStopping
from blora_pyro.guides import with_prior_arguments
from blora_pyro.options import AUTO, FitConfig
from blora_pyro.posterior import Posterior
from blora_pyro.runs.chains import Previous, previous_of
from blora_pyro.runs.folders import (
    CHECKPOINT,
    RESULTS,
    SKIPPED,
    STRENGTH_PLOT,
    TRACKING,
    TRANSCRIPTS,
    UNFINISHED,
    UTTERANCES,
    claim,
    remove_files,
    save_posterior,
)
from blora_pyro.runs.loading import SkippedRow
from blora_pyro.runs.measurements import read_metrics
from blora_pyro.runs.record import (
    EVALUATING,
    FINISHED,
    FITTING,
    METRICS,
    RUN,
    Kept,
    RunRecord,
    versions,
)
from blora_pyro.runs.report_page import write_own_report
from blora_pyro.runs.shown import ShownRun
from blora_pyro.runs.strength_curves import save_strength_plot
from blora_pyro.runs.utterances import write_utterances


class FitFolder:
    """The folder of a fit, from its first second to its end.

    `run.json` is there from the start, with the options, so that the fit can go on after a kill at
    any moment; its `state` says how far it is. Without a path nothing is kept.

    Attributes:
        path: The folder, or None.
        config: The options of the fit.
        record: What `run.json` holds.
        previous: The run whose posterior is the prior of a fit that is to go on, if any.
    """

    def __init__(
        self,
        path: Path | None,
        config: FitConfig,
        record: RunRecord,
        previous: Previous | None = None,
    ) -> None:
        """See `create` and `reopen`."""
        self.path, self.config, self.record, self.previous = path, config, record, previous
        self._occupied = False  # by an earlier run, which stays whole until `begin`
        self._skipped: SkippedRows | None = None

    @classmethod
    def create(
        cls,
        path: Path | None,
        config: FitConfig,
        overwrite: bool,
        previous: Previous | None = None,
    ) -> "FitFolder":
        """Make a folder for a new fit. An earlier run in it stays whole until `begin`.

        Raises:
            UserError: See `claim`; or if it is the folder of the run that is continued.
        """
        record = RunRecord(options=config.to_json())
        if previous is not None:
            if path is not None and path.resolve() == Path(previous.folder).resolve():
                raise UserError(f"output and prior_from are both {path}; give another output")
            record.chain = previous.link(config.prior_inflation)
        folder = cls(path, config, record, previous)
        # A prior that can't be is refused before anything is written.
        names = {role: getattr(folder.with_prior, role) for role in ROLES}
        record.code_sha256 = code_hashes(names) or None
        if path is not None:
            claim(path, overwrite)
            folder._occupied = any((path / name).exists() for name in (RUN, *RESULTS))
            try:
                if not folder._occupied:
                    record.write(path)
            except OSError as error:
                why = error.strerror
                raise UserError(f"output '{path}' can't be written ({why}); give another") from None
        return folder

    @classmethod
    def reopen(cls, path: Path, config: FitConfig, trust_prior_file: bool = False) -> "FitFolder":
        """Open the folder of a fit that has been started.

        Args:
            path: The folder.
            config: Its given options must be those of the fit. A prior or guide that is a user's
                file must be among them: its code is run only where it is named.
            trust_prior_file: It need not be among them.

        Raises:
            UserError: If there is none, it is damaged, an option is another, or the run that it
                continues has changed before it was fitted.
        """
        given = config.given_options
        record = RunRecord.read(path, "start again with --overwrite")
        resolved = {} if record.config is None else record.config.to_json()
        stored = record.options or resolved
        if not stored:
            raise UserError(f"{path / RUN} is damaged (no options); start again with --overwrite")
        # objects of Python, which are texts in the file, are given again
        check_names(FitConfig, stored, str(path / RUN))
        try:
            FitConfig(**stored)
        except UserError as error:
            raise UserError(
                f"{path / RUN} is damaged ({error}); start again with --overwrite"
            ) from None
        options = {**stored, **given}
        if options.get("language_map", AUTO) == AUTO:  # which is chosen once
            options["language_map"] = resolved.get("language_map", AUTO)
        config = FitConfig(**options)
        wanted, stored, resolved = json.loads(json.dumps([config.to_json(), stored, resolved]))
        for name in given:
            if wanted[name] not in (stored.get(name), resolved.get(name)):
                raise UserError(
                    f"the fit in {path} has {name} = {stored.get(name)}, not {wanted[name]}; leave "
                    "the option out, or start another fit in another output"
                )
        named = [given[role] for role in ROLES if role in given]
        for names in (stored, resolved):
            if not trust_prior_file:
                check_code(names, named, "the run", "name it with --{role} to run it")
            check_hashes(names, record.code_sha256, "the run")
        going_on = record.state == FITTING
        previous = previous_of(config, record.chain or []) if going_on else None
        return cls(path, config, record, previous)

    @classmethod
    def follow(cls, content: Mapping[str, Any], config: FitConfig) -> "FitFolder":
        """Return the view that a process which writes nothing has of the main process's folder.

        Raises:
            UserError: If the run that is continued can't be read here.
        """
        config = FitConfig(**{**content["options"], **config.given_options})
        record = RunRecord(**content)
        return cls(None, config, record, previous_of(config, record.chain or []))

    @cached_property
    def with_prior(self) -> FitConfig:
        """The options with every argument of the prior, and the guide's name.

        Raises:
            UserError: If the prior can't be loaded, or takes no such argument.
        """
        return with_prior_arguments(self.config)

    @property
    def state(self) -> str:
        """`fitting`, `evaluating` or `finished`."""
        return self.record.state

    def begin(
        self,
        config: FitConfig,
        language: str,
        utterances: int | None,
        tokens: int | None,
        weights: int,
        domain_languages: Sequence[str] = (),
    ) -> None:
        """Keep the resolved configuration, and remove an earlier run's results.

        Args:
            config: The resolved configuration.
            language: Language of the training data.
            utterances: Number of training utterances; None if unknown, of a stream.
            tokens: Number of their target tokens, likewise.
            weights: Number of adapter weights.
            domain_languages: Language of each domain's training data, if each has an adapter.
        """
        if self.state != FITTING:
            return
        if self.path is not None and self._occupied:
            remove_files(self.path, *UNFINISHED)
        apart = dict(zip(config.domains, domain_languages, strict=True)) if domain_languages else {}
        self.record.config, self.record.language = config, language
        self.record.domain_languages = apart or None
        self.record.training_utterances, self.record.training_tokens = utterances, tokens
        self.record.temperature = None if tokens is None else float(config.beta) * tokens
        self.record.adapter_weights, self.record.versions = weights, versions()
        if self.path is not None:
            self.record.write(self.path)
            kept = () if self._occupied else (SKIPPED, TRACKING)  # its own; a fit has no results
            remove_files(self.path, *(name for name in RESULTS if name not in kept))
        self._occupied = False

    def list_skipped(self, rows: Sequence[SkippedRow]) -> str:
        """Add rows to the list of those left out; return its path, "" if there is none."""
        if self.path is None or not rows:
            return ""
        if self.state == FITTING and not self._occupied:
            self._skipped = self._skipped or SkippedRows(self.path / SKIPPED)
            self._skipped.add(rows)
        return str(self.path / SKIPPED)

    def save(
        self,
        fitted: Posterior,
        history: list[Step],
        stopping: EarlyStopping | None,
        seconds: float,
        alarm: Ended | None = None,
    ) -> None:
        """Keep the posterior of the fit, which is done now."""
        if self.path is not None:
            save_posterior(self.path, fitted)
        record = self.record
        steps = stopping.errors[-1].step if stopping and stopping.errors else record.resolved.steps
        if alarm is not None:
            steps, record.ended_by, record.alarm = alarm["step"], "alarm", alarm
        record.state, record.seconds = EVALUATING, {"fit": round(seconds, 3)}
        record.skipped_steps, record.history = steps - len(history), history
        record.dev = stopping.to_json(alarm is not None) if stopping and stopping.errors else None
        if self.path is not None:
            record.write(self.path)
            remove_files(self.path, CHECKPOINT)

    def keep(self, posterior: Posterior, kept: Kept) -> None:
        """Keep the posterior at the strength that was chosen, and how it was."""
        self.record.kept = kept
        if self.path is None:
            return
        save_strength_plot(self.path / STRENGTH_PLOT, kept["curve"])
        save_posterior(self.path, posterior)
        self.record.write(self.path)

    def finish(
        self,
        metrics: Mapping[str, Any],
        rows: Sequence[dict[str, Any]],
        seconds: float,
        posterior: Posterior | None = None,
    ) -> None:
        """Keep the metrics and the rows of all utterances, and `tidy`.

        If there are rows, the report shows them, with what the posterior says.
        """
        if self.path is None:
            return
        write_utterances(self.path / UTTERANCES, rows)
        write_json(self.path / METRICS, metrics)
        self.record.seconds = {**(self.record.seconds or {}), "total": round(seconds, 3)}
        if rows and posterior is not None:
            run = ShownRun(str(self.path), FINISHED, self.record, posterior, {**metrics}, [*rows])
            write_own_report(self.path, run)
        self.record.state = FINISHED
        self.record.write(self.path)
        self.tidy()

    def tidy(self) -> None:
        """Remove the files that an unfinished fit goes on with."""
        if self.path is not None:
            remove_files(self.path, *UNFINISHED)

    def transcripts(self, state: str) -> Path | None:
        """Return the file that keeps a state's transcripts until the run is finished."""
        return None if self.path is None else self.path / TRANSCRIPTS.replace("*", state)

    def safe(self) -> str:
        """Return what is safe on disk now, in words."""
        if self.path is None:
            return "nothing was to be kept on disk"
        if self._occupied:
            return f"what was in {self.path} before is as it was"
        if self.state != FITTING:
            return f"the posterior is safe in {self.path}"
        step = stored_step(self.path / CHECKPOINT)
        if step is None:
            return f"no step is in {self.path} yet"
        return f"the checkpoint of step {step} is safe in {self.path}"

    def way_on(self) -> str:
        """Return how to go on, in words."""
        if self.path is None or self._occupied:
            return "start again"
        files = [(role, getattr(self.config, role)) for role in ROLES]
        options = [f"--{name} {shlex.quote(file)}" for name, file in files if is_code(file)]
        line = ["blora-pyro fit --resume --output", shlex.quote(str(self.path)), *options]
        return f"go on with: {' '.join(line)}"

    @property
    def resolved(self) -> FitConfig:
        """Return the resolved configuration, once it is kept."""
        config = self.record.resolved
        return replace(config, backward=config.backward_sets)

    def fitted(self) -> tuple[Posterior, list[Step]]:
        """Return posterior and history, once they are kept.

        Raises:
            UserError: If they are damaged.
        """
        assert self.path is not None
        loaded, config = Posterior.load(self.path), self.resolved
        if {*loaded.family.files} <= {config.prior, config.guide}:  # which `reopen` let pass
            loaded = replace(loaded, family=loaded.family.trusted())
        if self.record.history is None:
            raise UserError(f"{self.path}/{RUN} is damaged (no 'history'); fit again")
        return loaded, self.record.history

    def metrics(self) -> dict[str, Any]:
        """Return what was measured, once it is kept.

        Raises:
            UserError: If it is damaged.
        """
        assert self.path is not None
        return read_metrics(self.path, self.record)


class SkippedRows:
    """The list of rows that were left out, JSON lines; a row is in it once, also after a kill."""

    def __init__(self, path: Path) -> None:
        """Read and write nothing yet."""
        self.path = path
        self._listed: dict[str, None] | None = None

    def add(self, rows: Iterable[SkippedRow]) -> None:
        """Add the rows that are not in the list."""
        if self._listed is None:
            self._listed = _whole_lines(self.path)
            replace_file(self.path, "".join(self._listed).encode())
        lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows]
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(line for line in lines if line not in self._listed)
        self._listed |= dict.fromkeys(lines)


def _whole_lines(path: Path) -> dict[str, None]:
    """Return a file's lines without the half one of a killed process; none if there is no file."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return {}
    return dict.fromkeys(f"{line}\n" for line in lines[:-1])
