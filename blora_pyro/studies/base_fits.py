"""Fits to one base model: made in their run folders or gone on with, then edited and scored."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from blora_pyro import __version__
from blora_pyro.data import Examples
from blora_pyro.evaluation import Evaluation
from blora_pyro.files import write_json
from blora_pyro.models import Base, base_of
from blora_pyro.models.encoder_states import weights_hash
from blora_pyro.options import MACHINE_OPTIONS, FitConfig
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.pruning import prune
from blora_pyro.posterior.strength import at_strength
from blora_pyro.runs import fits
from blora_pyro.runs.folders import TRANSCRIPTS
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.loading import Loader
from blora_pyro.runs.record import RUN, state_of
from blora_pyro.runs.scoring import Scoring, compare, evaluation_sets
from blora_pyro.runs.utterances import utterance_rows, write_utterances
from blora_pyro.studies.methods import BASE
from blora_pyro.studies.results import score_files


class _Loader(Loader):
    """Loads a set once."""

    def load(
        self, source: Any, split: str, language: str | None = None, limit: int | None = None
    ) -> Examples:
        """Return a split of a source, the same one if it has been loaded."""
        loaded = self.__dict__.setdefault("loaded", {})
        key = (source if isinstance(source, str) else id(source), split, language, limit)
        if key not in loaded:
            loaded[key] = super().load(source, split, language, limit)
        return loaded[key]


class _Steps(Listener):
    """Passes on what concerns the steps of a fit; the stages are the study's own."""

    def __init__(self, listener: Listener) -> None:
        for name in ("features", "note", "ready", "step", "evaluated", "fitted"):
            setattr(self, name, getattr(listener, name))


class BaseFits:
    """A base model with the sets on which its fits are scored; each is loaded once.

    Attributes:
        base: The base model.
        config: What its fits share.
    """

    def __init__(self, config: FitConfig, progress: Listener) -> None:
        """Load the base model."""
        self.base: Base = base_of(config)
        self.config, self.progress = config, progress
        self._loader = _Loader(self.base, config, progress.features, progress.note)
        self._before: dict[Path, dict[str, Evaluation]] = {}

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all weights."""
        return weights_hash(self.base.net)[:12]

    def sets(self, split: str, **options: Any) -> dict[str, Examples]:
        """Return a split of what a fit is scored on; see `evaluation_sets`.

        `options` replace those of the configuration, such as `data`.
        """
        config = self.config.with_options(**options)
        found = evaluation_sets(self.base, config, self._loader, split)
        self._loader.report_skipped()
        return found

    def before(self, sets: dict[str, Examples], split: str, folder: Path) -> dict[str, Evaluation]:
        """Return the base's own errors; their transcripts are kept in a folder."""
        keep = folder / f"{split}-{TRANSCRIPTS.replace('*', BASE)}"
        if keep not in self._before:
            folder.mkdir(parents=True, exist_ok=True)
            self._before[keep] = self._scoring(sets).score(None, keep=keep)
        return self._before[keep]

    def _scoring(self, sets: dict[str, Examples]) -> Scoring:
        return Scoring(self.base, sets, self.config.normalizer, self.progress)

    def fit(self, config: FitConfig, folder: Path) -> Posterior:
        """Make a fit in its run folder, go on with it, or read it; raises as `fit` does."""
        if folder.exists() and state_of(folder) is None:  # killed before it had begun, or damaged
            shutil.rmtree(folder)
        options = config.given_options
        if (folder / RUN).exists():  # machines may differ in these
            options = {name: one for name, one in options.items() if name not in MACHINE_OPTIONS}
        steps = _Steps(self.progress)
        run = fits.fit(FitConfig(**options), folder, evaluate=False, resume=True, progress=steps)
        return run.posterior

    def score(
        self,
        posterior: Posterior,
        sets: dict[str, Examples],
        before: dict[str, Evaluation],
        config: FitConfig,
        split: str,
        files: tuple[Path, Path],
    ) -> dict[str, Any]:
        """Score a posterior, write metrics and utterances into two files, return the metrics."""
        adapted = self._scoring(sets).score(posterior)
        metrics = compare(posterior, before, adapted, config, split)
        write_json(files[0], metrics)
        rows = utterance_rows(sets, {BASE: before, "adapted": adapted}, posterior)
        write_utterances(files[1], rows)
        return metrics

    def score_base(self, sets: dict[str, Examples], folder: Path, split: str) -> None:
        """Score the base as it is, into the same files."""
        before = self.before(sets, split, folder)
        metrics_file, utterances_file = score_files(folder, split)
        write_utterances(utterances_file, utterance_rows(sets, {BASE: before}))
        write_json(metrics_file, {"split": split, "sparsity": {}})


def edited(posterior: Posterior, after: Mapping[str, float]) -> Posterior:
    """Return a fitted posterior after the step that follows its fit.

    That is `sparsity`, the share of the elements of A and B to set to zero, and then `strength`, by
    which ΔW is multiplied.
    """
    if sparsity := after.get("sparsity"):
        posterior = prune(posterior, sparsity=sparsity)
    return at_strength(posterior, after["strength"]) if "strength" in after else posterior


# ---- where a score was made


@cache
def commit() -> str:
    """Return the commit of the code, with "+" if it has changed since, or its version."""
    folder = Path(__file__).parents[2]

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not (folder / ".git").exists():
            return f"v{__version__}"
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "blora_pyro")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return f"v{__version__}"


def machine(device: torch.device) -> str:
    """Return what a fit was made on: processor, threads and versions."""
    where = platform.processor() or platform.machine()
    if device.type == "cuda":
        where += f", {torch.cuda.get_device_name(device)}"
    versions = f"python {platform.python_version()}, torch {importlib.metadata.version('torch')}"
    return f"{where}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, {versions}"
