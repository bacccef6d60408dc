"""A fit of a comparison: in a folder of its own, by whatever kind of program."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from blora_pyro.comparison.methods import PROGRAM
from blora_pyro.comparison.rivals import WEIGHTS, fit_rival
from blora_pyro.comparison.rows import FORMAT, hash_of
from blora_pyro.errors import UserError
from blora_pyro.guides import with_prior_arguments
from blora_pyro.metrics import sparsity
from blora_pyro.models import Base
from blora_pyro.options import FitConfig
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.pruning import prune
from blora_pyro.posterior.strength import at_strength
from blora_pyro.runs import fits
from blora_pyro.runs.folders import ADAPTER
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.record import RUN, state_of

# What changes no weight that a fit finds: where it computes, who is told, how texts are scored.
_INDIFFERENT = (
    "base",
    "revision",
    "local_files_only",
    "device",
    "normalizer",
    "test",
    "dev",
    "track",
)


@dataclass(frozen=True)
class Fit:
    """What decides a fit.

    Attributes:
        kind: `PROGRAM`, `FULL` or `PEFT`.
        options: Of `FitConfig`.
        base: Fingerprint of the base model.
    """

    kind: str
    options: Mapping[str, Any]
    base: str

    @cached_property
    def config(self) -> FitConfig:
        """The configuration.

        Raises:
            UserError: If it is not possible.
        """
        known = {one.name for one in fields(FitConfig)}
        if unknown := self.options.keys() - known:
            raise UserError(f"a fit has no option '{min(unknown)}'; leave its method out")
        return with_prior_arguments(FitConfig(**self.options))

    @cached_property
    def key(self) -> str:
        """A hash of all that decides the weights: options, base model, format.

        An option that is switched off by default, and is not switched on, does not count: so the
        options that `FitConfig` gains leave the fits as they are. Data count by their names.
        """
        content = self.config.to_json()
        for one in fields(FitConfig):
            off = one.default is not MISSING and not one.default
            if one.name in _INDIFFERENT or (off and content[one.name] == one.default):
                del content[one.name]
        return hash_of({**content, "kind": self.kind, "base": self.base, "format": FORMAT})


@dataclass(frozen=True)
class Edit:
    """What is done to a fit afterwards.

    Attributes:
        factor: ΔW is multiplied by it, see `at_strength`.
        sparsity: The share of the elements of A and B that is set to zero before, see `prune`.
    """

    factor: float = 1.0
    sparsity: float = 0.0

    def __call__(self, posterior: Posterior) -> Posterior:
        """The posterior after it."""
        sparse = prune(posterior, sparsity=self.sparsity) if self.sparsity else posterior
        return at_strength(sparse, self.factor)


class Adapted(Protocol):
    """What a fit found."""

    def applied(self, net: nn.Module, edit: Edit) -> AbstractContextManager[None]:
        """`net` adapted inside a `with`, after an edit."""

    def sparsity(self, edit: Edit) -> dict[str, float | None]:
        """Share of elements below 1e-3 of A, B and ΔW after the edit; None where none is."""

    def size(self) -> dict[str, int]:
        """Number of weights, and the bytes of the file that holds them."""


class Nothing:
    """The base model as it is."""

    def applied(self, net: nn.Module, edit: Edit) -> AbstractContextManager[None]:
        """The net."""
        return nullcontext()

    def sparsity(self, edit: Edit) -> dict[str, float | None]:
        """None."""
        return {"A": None, "B": None, "delta_w": None}

    def size(self) -> dict[str, int]:
        """Zero."""
        return {"weights": 0, "bytes": 0}


class LowRank:
    """The posterior of a folder, at its mean."""

    def __init__(self, folder: Path) -> None:
        """Read it.

        Raises:
            UserError: If it is damaged.
        """
        self.folder, self.posterior = folder, Posterior.load(folder)

    def applied(self, net: nn.Module, edit: Edit) -> AbstractContextManager[None]:
        """The posterior mean in place."""
        return edit(self.posterior).applied(net)

    def sparsity(self, edit: Edit) -> dict[str, float | None]:
        """See `Posterior.sparsity`."""
        return {**edit(self.posterior).sparsity()}

    def size(self) -> dict[str, int]:
        """Of the PEFT adapter."""
        return {
            "weights": self.posterior.num_weights,
            "bytes": (self.folder / ADAPTER[1]).stat().st_size,
        }


class NewWeights:
    """All weights of a net, trained: W0 + ΔW."""

    def __init__(self, folder: Path, net: nn.Module) -> None:
        """Read them.

        Args:
            folder: Of the fit.
            net: The base, which is left as it is.

        Raises:
            UserError: If they are damaged or of another net.
        """
        self.path = folder / WEIGHTS
        parameters = dict(net.named_parameters())
        try:
            self.weights = load_file(self.path)
            fits = [value.shape == parameters[name].shape for name, value in self.weights.items()]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{self.path} is damaged ({error}); remove {folder}") from None
        if not all(fits):
            raise UserError(f"{self.path} is of another base model; remove {folder}")
        self._old = {name: parameters[name].detach() for name in self.weights}

    def _new(self, name: str, edit: Edit) -> Tensor:
        old = self._old[name]
        new = self.weights[name].to(old.device, old.dtype)
        return new if edit.factor == 1 else old + edit.factor * (new - old)

    @contextmanager
    def applied(self, net: nn.Module, edit: Edit) -> Iterator[None]:
        """The net with these weights; its own come back, to the bit."""
        parameters = dict(net.named_parameters())
        try:
            for name, old in self._old.items():
                parameters[name].data = self._new(name, edit).view_as(old)
            yield
        finally:
            for name, old in self._old.items():
                parameters[name].data = old

    def sparsity(self, edit: Edit) -> dict[str, float | None]:
        """Of ΔW, over all weights that were trained."""
        deltas = (
            (edit.factor * (new - self._old[name].cpu())).float()
            for name, new in self.weights.items()
        )
        return {"A": None, "B": None, "delta_w": sparsity(deltas)}

    def size(self) -> dict[str, int]:
        """Of the whole net: there is no adapter."""
        return {
            "weights": sum(value.numel() for value in self.weights.values()),
            "bytes": self.path.stat().st_size,
        }


def make_fit(folder: Path, fit: Fit, base: Base, progress: Listener) -> tuple[Adapted, float]:
    """The fit of a folder: made there, gone on with, or read if it is finished.

    Args:
        folder: Of the fit, named by its key.
        fit: What decides it.
        base: The base model, left as it is.
        progress: Told of steps.

    Returns:
        What it found, and the seconds that it took (a fit that was interrupted: since then).

    Raises:
        UserError, FloatingPointError, Interrupted: See `fit`.
    """
    if folder.exists() and state_of(folder) is None:  # killed before it had begun, or damaged
        shutil.rmtree(folder)
    adapted: Adapted
    if fit.kind == PROGRAM:
        fits.fit(FitConfig(**fit.options), folder, evaluate=False, resume=True, progress=progress)
        adapted = LowRank(folder)
    else:
        fit_rival(fit.kind, folder, fit.config, base, progress)
        adapted = (
            LowRank(folder) if (folder / ADAPTER[1]).exists() else NewWeights(folder, base.net)
        )
    about = json.loads((folder / RUN).read_text(encoding="utf-8"))
    return adapted, float(about["seconds"]["fit"])


def fingerprint(base: Base) -> str:
    """A hash of all weights of a base model."""
    total = sha256()
    for name, value in sorted(base.net.state_dict().items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total.update(raw.numpy().data)
    return total.hexdigest()[:12]
