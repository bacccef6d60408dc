"""A run from base model to table: load, fit, evaluate, and keep it all in one folder."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch

from blora_pyro.checkpoints import Checkpoints
from blora_pyro.config import FitConfig, base_of
from blora_pyro.data import Examples, Source, language_code
from blora_pyro.errors import UserError, check_positive
from blora_pyro.fit_folders import FitFolder
from blora_pyro.fitting import Step, fit_guide
from blora_pyro.guides import Guide, build_guide, build_prior
from blora_pyro.interrupts import Interrupts
from blora_pyro.loading import Loader, load_examples
from blora_pyro.models import DTYPES, Base, BLoRA, check_dtype
from blora_pyro.outcomes import NEW_DOMAIN, compare, early_stopping, evaluation_sets, measure
from blora_pyro.posterior import Family, Posterior
from blora_pyro.run_folders import (
    FINISHED,
    FITTING,
    RUN,
    claim,
    claim_file,
    read_run,
    write_json,
)
from blora_pyro.stopping import DevError, EarlyStopping
from blora_pyro.transcription import Transcriber, transcribe_files
from blora_pyro.transcripts import Transcript
from blora_pyro.utterances import utterance_rows, write_utterances

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


class Listener:
    """What `fit` tells its caller as it goes; this one keeps silent."""

    def stage(self, name: str) -> None:
        """A stage begins."""

    def features(self, name: str, done: int, total: int) -> None:
        """So many utterances of a set are featurised, or were found in the cache."""

    def note(self, text: str) -> None:
        """Something worth knowing, in one line."""

    def ready(self, config: FitConfig, num_tokens: int, num_weights: int) -> None:
        """SVI begins: the resolved configuration, N target tokens, number of adapter weights."""

    def step(self, step: Step) -> None:
        """A step of SVI is done."""

    def evaluated(self, error: DevError, best: DevError) -> None:
        """The dev error has been measured; `best` is the lowest so far."""

    def fitted(self) -> None:
        """The last step is done."""


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
        **options: The attributes of `FitConfig`.

    Raises:
        UserError: On bad options or data, a full disk or memory, or options that are not those of
            the fit to go on with.
        FloatingPointError: If the loss stays not finite; see `fit_guide`.
        Interrupted: By a signal.
    """
    progress = progress or Listener()
    check_positive(checkpoint_every=checkpoint_every)
    folder = _open(output, options, overwrite, resume)
    if folder.state == FINISHED:
        progress.stage("finished already: reading")
        folder.tidy()
        posterior, history = folder.fitted()
        metrics = folder.metrics()
        return Run(folder.resolved, posterior, history, metrics, folder.path, folder.dev)
    with folder.told(), Interrupts(active=folder.path is not None) as interrupts:
        return _fit(folder, evaluate, checkpoint_every, progress, interrupts)


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
            return FitFolder.reopen(path, options)
        if not options:
            raise UserError(f"{path} holds no fit to go on with; start it without --resume")
    config = FitConfig(**options)
    config.with_prior_args()  # refuses what can't be
    return FitFolder.create(path, config, overwrite)


def _fit(
    folder: FitFolder,
    evaluate: bool,
    checkpoint_every: int | None,
    progress: Listener,
    interrupts: Interrupts,
) -> Run:
    """From wherever the folder is to the end."""
    started = time.monotonic()
    progress.stage("loading")
    config = folder.config.with_prior_args()
    pyro.set_rng_seed(config.seed)
    base = base_of(config)
    loader = Loader(base, config, progress.features, progress.note)
    train = loader.load(config.sources, "train")
    config = config.resolved(train.num_tokens, len(train))
    sets = evaluation_sets(base, config, loader) if evaluate else {}
    fitting = folder.state == FITTING
    stopping = early_stopping(loader, config, progress.evaluated) if fitting else None
    model, guide = build(base, config)
    folder.begin(config, train.main_language, train.num_tokens, model.num_weights)
    loader.tell(folder.list_skipped(loader.skipped))
    kept = folder.transcripts("base")
    scored = partial(measure, base, sets, normalizer=config.normalizer)
    before = scored(lambda name: progress.stage(f"base on {name}"), kept)
    if fitting:
        about = {**config.to_json(), "tokens": train.num_tokens, "utterances": len(train)}
        about["training_data"] = train.fingerprint
        checkpoints = Checkpoints(folder.path, about, checkpoint_every, interrupts)
        if (done := checkpoints.stored_step()) is not None:
            progress.stage(f"going on from step {done}")
        progress.ready(config, train.num_tokens, model.num_weights)
        with interrupts.deferred():  # what is fitted is kept before they are answered
            fit_started = time.monotonic()
            history = _fit_guide(model, guide, train, config, checkpoints, stopping, progress)
            family = Family(config.prior, config.prior_args, str(config.guide))
            posterior = Posterior.of(base.name, model, guide, family, config.revision)
            folder.save(posterior, history, stopping, time.monotonic() - fit_started)
        progress.fitted()
    else:
        posterior, history = folder.fitted()
    kept = folder.transcripts("adapted")
    with posterior.applied(base.net):
        after = scored(lambda name: progress.stage(f"adapted on {name}"), kept)
    metrics = compare(posterior, before, after, config)
    rows = utterance_rows(sets, {"base": before, "adapted": after})
    folder.finish(metrics, rows, time.monotonic() - started)
    return Run(config, posterior, history, metrics, folder.path, folder.dev)


def _fit_guide(
    model: BLoRA,
    guide: Guide,
    train: Examples,
    config: FitConfig,
    checkpoints: Checkpoints,
    stopping: EarlyStopping | None,
    progress: Listener,
) -> list[Step]:
    """`fit_guide` by a resolved configuration."""
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
        on_step=progress.step,
        checkpoints=checkpoints,
        early_stopping=stopping,
    )


def build(base: Base, config: FitConfig) -> tuple[BLoRA, Any]:
    """The Pyro program of a resolved configuration, and its guide."""
    model = BLoRA(
        base.net,
        build_prior(config.prior, **config.prior_args),
        rank=config.rank,
        alpha=float(config.alpha or 2 * config.rank),
        target_modules=config.target_modules,
        autocast=torch.bfloat16 if config.precision == "bf16" else None,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    return model, build_guide(str(config.guide), model)


def evaluate_run(
    folder: str | Path,
    data: Source | None = None,
    progress: Listener | None = None,
    device: str = "cpu",
    *,
    normalizer: str | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Score a run, base and adapted, on its own test sets or on the test split of `data`.

    Args:
        folder: Of the run.
        data: None is the run's own test sets.
        progress: Told of stages.
        device: A torch device.
        normalizer: None is that of the fit; see `FitConfig`.
        output: File for the results of every utterance, see `utterance_rows`; None keeps none.
        overwrite: Write over what is there.

    Returns:
        What `metrics.json` holds.

    Raises:
        UserError: If the run or the data can't be read, the file can't be written, or there is no
            such normaliser.
    """
    progress = progress or Listener()
    if output is not None:
        claim_file(Path(output), overwrite)
    posterior, about = read_run(folder, device)
    config = about["config"]
    base = base_of(config)
    if data is not None:
        config = replace(config, test=data, backward={})
    if normalizer is not None:
        config = replace(config, normalizer=normalizer)
    loader = Loader(base, config, progress.features, progress.note)
    sets = evaluation_sets(base, config, loader)
    loader.tell()
    scored = partial(measure, base, sets, normalizer=config.normalizer)
    before = scored(lambda name: progress.stage(f"base on {name}"))
    with posterior.applied(base.net):
        after = scored(lambda name: progress.stage(f"adapted on {name}"))
    if output is not None:
        rows = utterance_rows(sets, {"base": before, "adapted": after})
        try:
            write_utterances(Path(output), rows)
        except OSError as error:
            raise UserError(f"{output} can't be written ({error.strerror}); give another") from None
    return compare(posterior, before, after, config)


def merge_run(
    folder: str | Path, out: Path, overwrite: bool = False, dtype: str = "float32"
) -> None:
    """Write the base model with the posterior mean merged in: a plain Whisper checkpoint.

    The update is added to the checkpoint's own weights in float32, whatever dtype the fit ran in,
    and the sum is rounded to `dtype` once.

    Args:
        folder: A run folder.
        out: Folder for the checkpoint.
        overwrite: Write into a folder that holds something.
        dtype: Of the checkpoint. An update below the rounding step of a short one is lost.

    Raises:
        UserError: If the run can't be read or `out` can't be written.
    """
    check_dtype(dtype)
    posterior, about = read_run(folder)
    base = base_of(replace(about["config"], dtype="float32"))
    posterior.merge(base.net)
    base.net.to(DTYPES[dtype])
    base.save_pretrained(claim(out, overwrite))


def transcribe(
    audio: Sequence[str | Path],
    adapter: str | Path | None = None,
    base: str | None = None,
    language: str | None = None,
    device: str = "cpu",
    *,
    dtype: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    prior: str | None = None,
    task: str | None = None,
    on_transcript: Callable[[int, Transcript], None] = lambda index, transcript: None,
    on_error: Callable[[int, UserError], None] | None = None,
    **options: Any,
) -> list[Transcript]:
    """Transcripts of audio files, by a base model alone or adapted by a run's posterior mean.

    Args:
        audio: wav, flac, ogg/opus or mp3 files, of any length.
        adapter: Folder of a run.
        base: Base model; None is the adapter's, or the pocket Whisper.
        language: A Whisper code, or "de-en" for code-switched speech; "auto" is what the model
            detects in each file. None is that of the adapter's training data, and without an
            adapter "auto".
        device: A torch device.
        dtype: Of the base's weights; None is that of the fit, or `float32`.
        revision: Of the base, if it is a Hub id; None is that of the fit, unless a base is given.
        local_files_only: Look for a Hub id in the Hub's local cache alone.
        prior: The file of the prior, if draws are asked for and the run has one: its code is run.
        task: `transcribe` or `translate`; None is that of the fit, or `transcribe`.
        on_transcript: Told each file's place and transcript, in order, as they come.
        on_error: Told the place of a file that can't be read, and why, which is then left out; None
            raises.
        **options: `timestamps`, `batch_size`, `samples` and `seed`, see `Transcriber`.

    Raises:
        UserError: If a file or the run can't be read, the language is unknown to the model, or
            draws are asked for where there are none.
    """
    posterior, config = None, FitConfig(device=device)
    if adapter is not None:
        posterior, about = read_run(adapter, device, prior)
        config, language = about["config"], language or about["language"]
    config = replace(
        config,
        base=base or config.base,
        dtype=dtype or config.dtype,
        revision=revision if base or revision else config.revision,
        local_files_only=local_files_only or config.local_files_only,
    )
    language = None if language in ("auto", None) else language_code(language)
    transcriber = Transcriber(base_of(config), posterior, language, task or config.task, **options)
    return transcribe_files(transcriber, audio, on_transcript, on_error)
