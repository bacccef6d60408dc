"""A run from base model to table: load, fit, evaluate, and keep it all in one folder."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch

from blora_pyro.chains import Previous, carried_on, previous_of
from blora_pyro.checkpoints import Checkpoints
from blora_pyro.config import FitConfig, base_of
from blora_pyro.data import Examples, Stream, describe_source, is_language, split_names
from blora_pyro.distillation import Distillation
from blora_pyro.elastic import ElasticPenalty, fisher_information
from blora_pyro.encoder_cache import EncoderCache
from blora_pyro.errors import UserError, check_positive
from blora_pyro.finished_runs import evaluate_run, merge_run, transcribe
from blora_pyro.fit_folders import FitFolder
from blora_pyro.fitting import Step, Teacher, fit_guide
from blora_pyro.guides import Guide, build_guide, build_prior
from blora_pyro.interrupts import Interrupts
from blora_pyro.listeners import Listener
from blora_pyro.loading import Loader, SkippedRow, load_examples
from blora_pyro.models import Base, BLoRA, PooledBLoRA
from blora_pyro.outcomes import (
    NEW_DOMAIN,
    compare,
    early_stopping,
    evaluation_sets,
    measure,
    measure_adapted,
)
from blora_pyro.posterior import Family, Posterior
from blora_pyro.processes import Processes
from blora_pyro.run_folders import FINISHED, FITTING, RUN, claim, read_run, write_json
from blora_pyro.stopping import EarlyStopping
from blora_pyro.tracking import check_trackers, tracked
from blora_pyro.utterances import utterance_rows

__all__ = [
    "NEW_DOMAIN",
    "Listener",
    "Run",
    "build",
    "claim",
    "compare",
    "evaluate_run",
    "evaluation_sets",
    "fit",
    "load_examples",
    "measure",
    "merge_run",
    "read_run",
    "transcribe",
    "write_json",
]


@dataclass
class Run:
    """A finished fit.

    Attributes:
        config: As resolved.
        posterior: The fitted posterior.
        history: One `Step` a step of SVI.
        metrics: What `metrics.json` holds.
        output: Its folder, or None.
        dev: What `run.json` holds of the dev error: every one, the best step, and what ended the
            fit; None without `eval_every`.
    """

    config: FitConfig
    posterior: Posterior
    history: list[Step]
    metrics: dict[str, Any] = field(default_factory=dict)
    output: Path | None = None
    dev: dict[str, Any] | None = None


def fit(
    output: str | Path | None = None,
    *,
    evaluate: bool = True,
    overwrite: bool = False,
    resume: bool = False,
    checkpoint_every: int | None = None,
    progress: Listener | None = None,
    **options: Any,
) -> Run:
    """Fit BLoRA to a new domain, and measure what was gained and what was forgotten.

    Started by `accelerate launch` or `torchrun`, several processes fit as one, see `fit_guide`; the
    first of them, the main one, reads, measures and writes, and has the metrics at the end.

    With an output, checkpoints are written on the way, and SIGINT and SIGTERM end the fit after the
    step that they come in, with a checkpoint (in the main thread; `Interrupted` is raised).

    Args:
        output: Folder for the run: the PEFT adapter of the posterior mean, `posterior.safetensors`,
            `run.json` and `metrics.json`. None keeps nothing on disk.
        evaluate: Measure error on the test set and the backward sets, before and after.
        overwrite: Write into a folder that holds an earlier run, which is removed once base and
            data are loaded.
        resume: Go on with the fit in `output`, whose options need not be given again; the result is
            bit by bit that of a fit that was never interrupted. A finished one is returned. Where
            none has been started, `options` start one.
        checkpoint_every: Steps between two checkpoints; None is by time, see `Checkpoints`.
        progress: Told of stages and steps.
        **options: The attributes of `FitConfig`. With `prior_from`, base, revision, rank, alpha and
            target_modules are that run's unless given, and must be the same.

    Raises:
        UserError: On bad options or data, a full disk or memory, or options that are not those of
            the fit to go on with.
        FloatingPointError: If the loss stays not finite; see `fit_guide`.
        Interrupted: By a signal.
    """
    check_positive(checkpoint_every=checkpoint_every)
    processes = Processes.join(_device(output, options))
    progress = (processes.is_main and progress) or Listener()
    try:
        folder = _open_together(processes, output, options, overwrite, resume)
        if folder.state == FINISHED or (folder.state != FITTING and not processes.is_main):
            progress.stage("finished already: reading")
            if processes.is_main:
                folder.tidy()
            return _read(folder)
        together = processes.count > 1
        track = folder.config.track if processes.is_main else None
        with (
            folder.told(),
            Interrupts(active=together or folder.path is not None) as interrupts,
            tracked(progress, track, folder.path) as listener,
        ):
            return _fit(folder, evaluate, checkpoint_every, listener, interrupts, processes)
    finally:
        processes.leave()


def _device(output: str | Path | None, options: dict[str, Any]) -> str:
    """That of the options, or of the fit that goes on."""
    if "device" in options or output is None:
        return str(options.get("device", "cpu"))
    try:
        return str(
            json.loads((Path(output) / RUN).read_text(encoding="utf-8"))["options"]["device"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "cpu"  # that of a new fit; what is damaged is refused later


def _read(folder: FitFolder) -> Run:
    """A fit that is done."""
    posterior, history = folder.fitted()
    metrics = folder.metrics() if folder.state == FINISHED else {}
    return Run(folder.resolved, posterior, history, metrics, folder.path, folder.dev)


def _open_together(
    processes: Processes,
    output: str | Path | None,
    options: dict[str, Any],
    overwrite: bool,
    resume: bool,
) -> FitFolder:
    """The folder in the main process; in the others what they need to know of it."""
    opened: list[FitFolder] = []

    def open_folder() -> dict[str, Any]:
        opened.append(_open(output, options, overwrite, resume))
        return {name: opened[0].about.get(name) for name in ("state", "options", "chain")}

    about = processes.told_by_main(open_folder)
    if opened:
        return opened[0]
    if about["state"] != FITTING:
        return FitFolder.reopen(Path(str(output)), options)
    return FitFolder.follow(about, options)


def _open(
    output: str | Path | None, options: dict[str, Any], overwrite: bool, resume: bool
) -> FitFolder:
    """The folder of a new fit, or of one that is to go on."""
    path = None if output is None else Path(output)
    if resume and (path is None or overwrite):
        wrong = "no output" if path is None else "overwrite"
        raise UserError(f"resume is given with {wrong}; give the output of a fit and resume")
    if resume and path is not None:
        if (path / RUN).exists():
            folder = FitFolder.reopen(path, options)
            if folder.state != FINISHED:
                check_trackers(folder.config.track, path)
            return folder
        if not options:
            raise UserError(f"{path} holds no fit to go on with; start it without --resume")
    options, previous = carried_on(options)
    config = FitConfig(**options)
    config.with_prior_args()  # refuses what can't be
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
    """From wherever the folder is to the end."""
    started = time.monotonic()
    progress.stage("loading")
    config = folder.config.with_prior_args()
    pyro.set_rng_seed(config.seed)
    fitting, evaluate = folder.state == FITTING, evaluate and processes.is_main
    with processes.main_first():  # which leaves features in the cache
        base = base_of(config)
        loader = Loader(base, config, progress.features, progress.note)
        train, size = training_set(loader, lambda row: folder.list_skipped([row]))
        config = config.resolved(size["tokens"], size["utterances"])
        sets = evaluation_sets(base, config, loader) if evaluate else {}
        if fitting:
            stopping = early_stopping(loader, config, progress.evaluated, processes.once)
            model, guide = build(base, config, folder.previous)
            regularise(model, loader, progress.stage)
            teacher = teacher_of(base, model, config, size["utterances"])
            languages = train.source_languages if isinstance(train, Examples) else ()
            counts = size["utterances"], size["tokens"], model.num_weights
            folder.begin(config, train.main_language, *counts, languages if config.pooled else ())
            progress.built(model, guide)
    loader.tell(folder.list_skipped(loader.skipped))
    kept = folder.transcripts("base")
    stage = lambda name: progress.stage(f"base on {name}")  # noqa: E731
    before = measure(base, sets, stage, kept, config.normalizer)
    if fitting:
        about = {**config.to_json(), **size, "training_data": train.fingerprint}
        checkpoints = Checkpoints(folder.path, about, checkpoint_every, interrupts)
        if (done := checkpoints.stored_step()) is not None:
            progress.stage(f"going on from step {done}")
        progress.ready(config, size["tokens"], model.num_weights)
        with interrupts.deferred():  # what is fitted is kept before they are answered
            fit_started = time.monotonic()
            around = checkpoints, stopping, teacher, processes
            history = _fit_guide(model, guide, train, config, around, progress)
            loader.tell(folder.list_skipped(loader.skipped))  # what a stream had
            family = Family(config.prior, config.prior_args, str(config.guide))
            posterior = Posterior.of(base.name, model, guide, family, config.revision)
            folder.save(posterior, history, stopping, time.monotonic() - fit_started)
        progress.fitted()
    else:
        posterior, history = folder.fitted()
    kept = folder.transcripts("adapted")
    stage = lambda name: progress.stage(f"adapted on {name}")  # noqa: E731
    after = measure_adapted(base, posterior, sets, stage, kept, config.normalizer)
    metrics = compare(posterior, before, after, config)
    rows = utterance_rows(sets, {"base": before, "adapted": after})
    folder.finish(metrics, rows, time.monotonic() - started)
    progress.measured(metrics, history[-1].step if history else 0)
    return Run(config, posterior, history, metrics, folder.path, folder.dev)


def _fit_guide(
    model: BLoRA,
    guide: Guide,
    train: Examples | Stream,
    config: FitConfig,
    around: tuple[Checkpoints, EarlyStopping | None, Teacher | None, Processes],
    progress: Listener,
) -> list[Step]:
    """`fit_guide` by a resolved configuration."""
    checkpoints, stopping, teacher, processes = around
    return fit_guide(
        model,
        guide,
        train,
        beta=float(config.beta),
        lr=config.lr,
        steps=config.steps,
        batch_size=config.batch_size,
        schedule=config.schedule,
        warmup_steps=config.warmup_steps,
        estimator=config.estimator,
        gradient_accumulation=config.gradient_accumulation,
        max_grad_norm=config.max_grad_norm,
        spec_augment=config.spec_augment,
        seed=config.seed,
        weights=config.data_weights,
        average_from=config.average_from,
        on_step=progress.step,
        checkpoints=checkpoints,
        early_stopping=stopping,
        teacher=teacher,
        processes=processes,
    )


def training_set(
    loader: Loader, on_skipped: Callable[[SkippedRow], object]
) -> tuple[Examples | Stream, dict[str, int | None]]:
    """The training data, and the number of their target `tokens` and `utterances`, if it is known.

    Args:
        loader: Of the fit's configuration.
        on_skipped: See `Loader.stream`.
    """
    config = loader.config
    if config.streaming:
        stream = loader.stream(config.sources[0], on_skipped)
        return stream, {"tokens": None, "utterances": None}
    examples = loader.load(config.sources, "train", limit=config.max_utterances)
    return examples, {"tokens": examples.num_tokens, "utterances": len(examples)}


def teacher_of(
    base: Base, model: BLoRA, config: FitConfig, utterances: int | None
) -> Teacher | None:
    """What batches get besides audio and text: states of the encoder, what the base says.

    Raises:
        UserError: See `EncoderCache` and `Distillation`.
    """
    teacher: Teacher | None = None
    if config.distillation:
        languages, weight = config.taught_languages, config.distillation
        teacher = Distillation(base, model.adapters, languages, weight, config.seed, config.task)
    if not config.cache_encoder:
        return teacher
    assert utterances is not None  # a stream can't have it
    return EncoderCache(model, utterances, teacher)


def regularise(
    model: BLoRA, loader: Loader, on_stage: Callable[[str], object] = lambda stage: None
) -> None:
    """Give the program the penalty of its configuration, if it has one: EWC.

    Raises:
        UserError: If a backward set has no train split: one set for all would be learned from and
            scored.
    """
    config = loader.config
    if not config.ewc:
        return
    on_stage("Fisher information")
    for source in config.backward_sets.values():
        if "train" not in split_names(source):
            raise UserError(
                f"backward set {describe_source(source)} has no train split, which ewc "
                "takes its Fisher information from; give a folder or a Hub data set with train and "
                "test, or leave ewc out"
            )
    sets = [
        loader.load(source, "train", name if is_language(name) else None)
        for name, source in config.backward_sets.items()
    ]
    fisher = fisher_information(model.net, model.groups, sets, config.seed)
    model.penalty = ElasticPenalty(model.groups, model.adapters.scaling, fisher, config.ewc)


def build(base: Base, config: FitConfig, previous: Previous | None = None) -> tuple[BLoRA, Any]:
    """The Pyro program of a resolved configuration, and its guide.

    Args:
        base: The base model.
        config: As resolved.
        previous: The run that is carried on; None reads it, if the configuration names one.

    Raises:
        UserError: If prior, guide or target layers can't be, or are not those of that run.
    """
    previous = previous or previous_of(config)
    prior = (
        build_prior(config.prior, **config.prior_args)
        if previous is None
        else previous.prior(config.prior_inflation)
    )
    pooling = config.pooled
    program: Any = BLoRA if pooling is None else partial(PooledBLoRA, pooling=pooling)
    model = program(
        base.net,
        prior,
        rank=config.rank,
        alpha=float(config.alpha or 2 * config.rank),
        target_modules=config.target_modules,
        autocast=torch.bfloat16 if config.precision == "bf16" else None,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    if previous is not None:
        previous.check(model.groups, config.target_modules)
    guide: Any = build_guide(str(config.guide), model)
    if previous is not None:
        previous.start(guide)
    if pooling is not None:
        pooling.start(guide)
    return model, guide
