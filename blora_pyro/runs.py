"""A run from base model to table: load, fit, evaluate, and keep it all in one folder."""

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyro
import torch

from blora_pyro.config import FitConfig
from blora_pyro.data import Examples, load_split, split_names
from blora_pyro.errors import UserError
from blora_pyro.evaluation import Evaluation, evaluate, macro_summary
from blora_pyro.fitting import Step, fit_guide
from blora_pyro.guides import build_guide, build_prior
from blora_pyro.metrics import Counts, paired_macro_bootstrap
from blora_pyro.models import POCKET, Base, BLoRA, load_base
from blora_pyro.posterior import Family, Posterior
from blora_pyro.transcription import transcribe_files

PACKAGES = ("blora-pyro", "torch", "pyro-ppl", "transformers", "datasets", "peft", "jiwer")


@dataclass
class Run:
    """A finished fit.

    Attributes:
        config: As resolved.
        posterior: The fitted posterior.
        history: One `Step` a step of SVI.
        metrics: What `metrics.json` holds.
        output: Its folder, or None.
    """

    config: FitConfig
    posterior: Posterior
    history: list[Step]
    metrics: dict[str, Any] = field(default_factory=dict)
    output: Path | None = None


class Listener:
    """What `fit` tells its caller as it goes; this one keeps silent."""

    def stage(self, name: str) -> None:
        """A stage begins."""

    def ready(self, config: FitConfig, num_tokens: int, num_weights: int) -> None:
        """SVI begins: the resolved configuration, N target tokens, number of adapter weights."""

    def step(self, step: Step) -> None:
        """A step of SVI is done."""

    def fitted(self) -> None:
        """The last step is done."""


def fit(
    output: str | Path | None = None,
    *,
    evaluate: bool = True,
    overwrite: bool = False,
    progress: Listener | None = None,
    **options: Any,
) -> Run:
    """Fit BLoRA to a new domain, and measure what was gained and what was forgotten.

    Args:
        output: Folder for the run: the PEFT adapter of the posterior mean, `posterior.safetensors`,
            `run.json` and `metrics.json`. None keeps nothing on disk.
        evaluate: Measure error on the test set and the backward sets, before and after.
        overwrite: Write into a folder that holds an earlier run.
        progress: Told of stages and steps.
        **options: The attributes of `FitConfig`.

    Raises:
        UserError: On bad options or data.
    """
    progress = progress or Listener()
    config = FitConfig(**options).with_prior_args()
    folder = None if output is None else claim(Path(output), overwrite)
    started = time.monotonic()
    progress.stage("loading")
    pyro.set_rng_seed(config.seed)
    base = load_base(config.base, config.device)
    train = load_examples(base, config.data, "train")
    config = config.resolved(train.num_tokens, len(train))
    sets = evaluation_sets(base, config) if evaluate else {}
    model, guide = build(base, config)
    before = measure(base, sets, lambda name: progress.stage(f"base on {name}"))

    progress.ready(config, train.num_tokens, model.num_weights)
    fit_started = time.monotonic()
    history = fit_guide(
        model,
        guide,
        train,
        beta=float(config.beta),
        lr=config.lr,
        steps=config.steps,
        batch_size=config.batch_size,
        estimator=config.estimator,
        seed=config.seed,
        on_step=progress.step,
    )
    seconds = {"fit": time.monotonic() - fit_started}
    family = Family(config.prior, config.prior_args, str(config.guide))
    posterior = Posterior.of(base.name, model, guide, family)
    run = Run(config, posterior, history, output=folder)
    progress.fitted()
    about = {"language": train.main_language, "training_tokens": train.num_tokens}
    if folder:  # before anything else can go wrong
        posterior.save(folder)
        write_run(folder, run, about, seconds)
    with posterior.applied(base.net):
        after = measure(base, sets, lambda name: progress.stage(f"adapted on {name}"))
    run.metrics = compare(posterior, before, after, config.test or config.data)
    seconds["total"] = time.monotonic() - started
    if folder:
        write_run(folder, run, about, seconds)
        write_json(folder / "metrics.json", run.metrics)
    return run


def claim(folder: Path, overwrite: bool) -> Path:
    """Make the run folder.

    Raises:
        UserError: If it can't be made, or holds something and `overwrite` is off.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = any(folder.iterdir())
    except OSError as error:
        reason = error.strerror
        raise UserError(f"output '{folder}' can't be written ({reason}); give another") from None
    if taken and not overwrite:
        raise UserError(f"output '{folder}' is not empty; give another, or --overwrite")
    return folder


def load_examples(base: Base, source: str, split: str) -> Examples:
    """A split featurised and tokenised for `base`."""
    limit = base.net.config.max_target_positions
    dataset = load_split(source, split)
    return Examples(dataset, base.feature_extractor, base.tokenizer, max_tokens=limit)


def build(base: Base, config: FitConfig) -> tuple[BLoRA, Any]:
    """The Pyro program of a resolved configuration, and its guide."""
    model = BLoRA(
        base.net,
        build_prior(config.prior, **config.prior_args),
        rank=config.rank,
        alpha=float(config.alpha or 2 * config.rank),
        target_modules=config.target_modules,
        autocast=torch.bfloat16 if config.precision == "bf16" else None,
    )
    return model, build_guide(str(config.guide), model)


NEW_DOMAIN = "new_domain"


def evaluation_sets(base: Base, config: FitConfig) -> dict[str, Examples]:
    """The new domain's test set under `new_domain`, and every backward set under its name."""
    sets = {}
    if config.test or "test" in split_names(config.data):
        sets[NEW_DOMAIN] = load_examples(base, config.test or config.data, "test")
    for source in config.backward_sets:
        sets[source] = load_examples(base, source, "test")
    return sets


def measure(
    base: Base, sets: dict[str, Examples], on_set: Callable[[str], None]
) -> dict[str, Evaluation]:
    """Evaluate the net, as it is, on every set."""
    results = {}
    for name, examples in sets.items():
        on_set("the new domain" if name == NEW_DOMAIN else name)
        results[name] = evaluate(base, examples)
    return results


def compare(
    posterior: Posterior,
    before: dict[str, Evaluation],
    after: dict[str, Evaluation],
    domain: str,
) -> dict[str, Any]:
    """The content of `metrics.json`: rates before and after, forgetting, sparsity."""
    metrics: dict[str, Any] = {"backward": {}, "sparsity": posterior.sparsity()}
    backward = [name for name in before if name != NEW_DOMAIN]
    for name, base in before.items():
        adapted = after[name]
        both = {
            "base": base.summary(),
            "adapted": adapted.summary(),
            "change": {
                measure: _change([base.counts[measure]], [adapted.counts[measure]])
                for measure in base.counts
            },
        }
        if name == NEW_DOMAIN:
            metrics[NEW_DOMAIN] = {"name": domain, **both}
        else:
            metrics["backward"][name] = both
    if backward:
        sets = [before[name] for name in backward], [after[name] for name in backward]
        counts = [[one.main for one in evaluations] for evaluations in sets]
        metrics["backward_error"] = {
            "base": macro_summary(sets[0]),
            "adapted": macro_summary(sets[1]),
            "change": _change(*counts),  # this is the forgetting
        }
    return metrics


def _change(base: list[Counts], adapted: list[Counts]) -> dict[str, Any]:
    """Adapted minus base (macro-averaged) error with its paired bootstrap interval."""
    difference, low, high = paired_macro_bootstrap(base, adapted)
    return {"difference": difference, "interval": [low, high]}


def write_run(folder: Path, run: Run, training: dict[str, Any], seconds: dict[str, float]) -> None:
    """Write `run.json`."""
    beta = float(run.config.beta)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    about = {
        "config": asdict(run.config),
        **training,
        "temperature": beta * training["training_tokens"],
        "adapter_weights": run.posterior.num_weights,
        "versions": {"python": platform.python_version(), **versions},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "history": [asdict(step) for step in run.history],
    }
    write_json(folder / "run.json", about)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(fresh, path)


def read_run(
    folder: str | Path, device: str = "cpu", prior: str | None = None
) -> tuple[Posterior, dict[str, Any]]:
    """The posterior and `run.json` of a run folder.

    Args:
        folder: Where they are.
        device: A torch device, for the configuration.
        prior: The file of the prior, if it is a user's own and its code is to be run.

    Raises:
        UserError: If it is no run folder, or damaged.
    """
    posterior = Posterior.load(folder, prior)
    path = Path(folder) / "run.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        about["config"] = FitConfig(**{**about["config"], "device": device})
        about["language"]  # `transcribe` needs it
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is missing or damaged ({error}); fit again") from None
    return posterior, about


def evaluate_run(
    folder: str | Path,
    data: str | None = None,
    progress: Listener | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Score a run, base and adapted, on its own test sets or on the test split of `data`.

    Returns:
        What `metrics.json` holds.

    Raises:
        UserError: If the run or the data can't be read.
    """
    progress = progress or Listener()
    posterior, about = read_run(folder, device)
    config = about["config"]
    base = load_base(config.base, device)
    if data is not None:
        config = replace(config, test=data, backward=())
    sets = evaluation_sets(base, config)
    before = measure(base, sets, lambda name: progress.stage(f"base on {name}"))
    with posterior.applied(base.net):
        after = measure(base, sets, lambda name: progress.stage(f"adapted on {name}"))
    return compare(posterior, before, after, config.test or config.data)


def merge_run(folder: str | Path, out: Path, overwrite: bool = False) -> None:
    """Write the base model with the posterior mean merged in: a plain Whisper checkpoint.

    Raises:
        UserError: If the run can't be read or `out` can't be written.
    """
    posterior, about = read_run(folder)
    base = load_base(about["config"].base)
    posterior.merge(base.net)
    base.save_pretrained(claim(out, overwrite))


def transcribe(
    audio: Sequence[str | Path],
    adapter: str | Path | None = None,
    base: str | None = None,
    language: str | None = None,
    device: str = "cpu",
) -> list[str]:
    """Transcripts of audio files, by a base model alone or adapted by a run's posterior mean.

    Args:
        audio: wav, flac, ogg/opus or mp3 files.
        adapter: Folder of a run.
        base: Base model; None is the adapter's, or the pocket Whisper.
        language: A Whisper code, or "de-en" for code-switched speech; None is that of the adapter's
            training data, and without an adapter what the model detects in each file.
        device: A torch device.

    Raises:
        UserError: If a file or the run can't be read, or the language is unknown to the model.
    """
    if adapter is None:
        return transcribe_files(load_base(base or POCKET, device), audio, language)
    posterior, about = read_run(adapter, device)
    loaded = load_base(base or about["config"].base, device)
    with posterior.applied(loaded.net):
        return transcribe_files(loaded, audio, language or about["language"])
