"""What the rows of a comparison have in common, and how one is made."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from blora_pyro.comparison.fits import Adapted, Edit, Fit, Nothing, fingerprint, make_fit
from blora_pyro.comparison.methods import BASE, FACTOR, FULL, SHARE, SPARSITY
from blora_pyro.comparison.rows import (
    DEV,
    FORMAT,
    TEST,
    Row,
    RowSpec,
    RowStore,
    counts_to_json,
    hash_of,
)
from blora_pyro.comparison.shared_rows import SharedRows
from blora_pyro.data import Examples, split_names
from blora_pyro.errors import UserError
from blora_pyro.languages import is_language
from blora_pyro.models import Base, base_of
from blora_pyro.options import FitConfig
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.loading import Loader
from blora_pyro.runs.outcomes import DEV_SPLITS, NEW_DOMAIN, measure
from blora_pyro.sources import Source, describe_source


class _Fits(Listener):
    """Of a fit, the steps alone are told: a comparison has stages of its own."""

    def __init__(self, told: Listener) -> None:
        self.features, self.note = told.features, told.note  # type: ignore[method-assign]
        self.ready, self.step, self.fitted = told.ready, told.step, told.fitted  # type: ignore


class Study:
    """What the rows of one comparison have in common, and how one is made.

    Attributes:
        store: Of the rows.
        domains: Name -> source.
        backward: Name -> source of the held-out sets.
    """

    def __init__(
        self,
        output: Path,
        domains: Mapping[str, Source],
        options: Mapping[str, Any],
        progress: Listener,
        storage: str | None = None,
        study_name: str | None = None,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            output: Folder of the comparison.
            domains: Name -> source.
            options: Of `FitConfig`, for all fits.
            progress: Told of stages and steps.
            storage: URL of a database by which machines share rows; None is the output alone.
            study_name: In the storage; None is the output's name.

        Raises:
            UserError: If an option is not possible, there are no backward sets, or the storage
                can't be opened.
        """
        self.output, self.domains, self.options = output, dict(domains), dict(options)
        self.progress = progress
        self.common = FitConfig(**self.options)
        self.backward = self.common.backward_sets
        if not self.backward:
            raise UserError(
                f"base '{self.common.base}' has no backward sets of its own, and none is given; "
                "give sets of what it already knows as backward"
            )
        self.store = SharedRows(output, storage, study_name) if storage else RowStore(output)
        self._keys: dict[str, str] = {}
        self._sets: dict[tuple[str, str], Examples] = {}

    @cached_property
    def base(self) -> Base:
        """The base model."""
        return base_of(self.common)

    @cached_property
    def fingerprint(self) -> str:
        """Of the base model's weights."""
        return fingerprint(self.base)

    @cached_property
    def _loader(self) -> Loader:
        return Loader(self.base, self.common, self.progress.features, self.progress.note)

    # ---- what a row is

    def fit_of(self, spec: RowSpec) -> tuple[Fit | None, Edit]:
        """The fit of a row, None for the base model, and what is done to it afterwards.

        Raises:
            UserError: If full fine-tuning, which has no A and B, is to be pruned.
        """
        candidate = spec.candidate
        if candidate.method.name == BASE:
            return None, Edit()
        options = {**self.options, **spec.setting.options, **candidate.options, "seed": spec.seed}
        edit = Edit(float(options.pop(FACTOR, 1.0)), float(options.pop(SPARSITY, 0.0)))
        if edit.sparsity and candidate.kind == FULL:
            raise UserError(
                f"method {candidate.method.name} prunes A and B, and full fine-tuning has none; "
                "let it be of a LoRA or BLoRA"
            )
        share = options.pop(SHARE, None)
        options["data"] = (self.domains[spec.domain],)
        if share is not None:  # of the draws, divided among the backward sets' train splits
            options["data"] += tuple(self.backward.values())
            count = len(self.backward)
            options["data_weights"] = (1.0 - share, *[share / count] * count)
        return Fit(candidate.kind, options, self.fingerprint), edit

    def key_of(self, spec: RowSpec) -> str:
        """A hash of all that decides a row. Equal rows of two methods have one key."""
        if spec.title not in self._keys:
            fit, edit = self.fit_of(spec)
            common = self.common.to_json()
            content = {
                "format": FORMAT,
                "fit": fit.key if fit else f"{BASE} {self.fingerprint}",
                **_told(edit),
                "domain": describe_source(self.domains[spec.domain]),
                "backward": {name: describe_source(one) for name, one in self.backward.items()},
                "split": spec.split,
                **{name: common[name] for name in ("normalizer", "language", "task", "on_bad_row")},
            }
            self._keys[spec.title] = hash_of(content)
        return self._keys[spec.title]

    def row_of(self, spec: RowSpec) -> Row | None:
        """The row, if it is there."""
        return self.store.get(self.key_of(spec))

    # ---- how a row is made

    def lock_of(self, spec: RowSpec) -> str:
        """Rows of one fit have one lock."""
        fit, _ = self.fit_of(spec)
        return fit.key if fit else self.key_of(spec)

    def make(self, spec: RowSpec) -> None:
        """Fit, if that is not done, score, and keep the row.

        Raises:
            UserError, Interrupted: See `make_fit`.
        """
        fit, edit = self.fit_of(spec)
        about: dict[str, Any] = {
            "method": spec.candidate.method.name,
            "candidate": spec.candidate.text,
            "setting": spec.setting.name,
            "domain": spec.domain,
            "seed": spec.seed,
            "split": spec.split,
            "fit": fit.key if fit else None,
            "options": {} if fit is None else _as_text(fit.options),
            **_told(edit),
            "machine": machine(),
        }
        sets = self.sets(spec)  # before the fit: what is wrong with them is told at once
        try:
            adapted, seconds = self._adapted(fit)
        except FloatingPointError as error:
            self.store.put(self.key_of(spec), {**about, "failed": str(error), "sets": {}})
            self.progress.note(f"{spec.title}: {error}")
            return
        with adapted.applied(self.base.net, edit):
            results = measure(self.base, sets, lambda name: None, normalizer=self.common.normalizer)
        content = {
            "sparsity": adapted.sparsity(edit),
            "adapter": adapted.size(),
            "seconds": {"fit": seconds},
            "sets": counts_to_json(results),
        }
        self.store.put(self.key_of(spec), {**about, **content})

    def _adapted(self, fit: Fit | None) -> tuple[Adapted, float]:
        if fit is None:
            return Nothing(), 0.0
        return make_fit(self.output / "fits" / fit.key, fit, self.base, _Fits(self.progress))

    def sets(self, spec: RowSpec) -> dict[str, Examples]:
        """What a row is scored on, `new_domain` first; each set is loaded once.

        Raises:
            UserError: If a source lacks the split, or has none of its own.
        """
        domain = self.domains[spec.domain]
        found = {NEW_DOMAIN: self._set(f"domain {spec.domain}", domain, spec.split, None)}
        for name, source in self.backward.items():
            language = name if is_language(name) else None
            found[name] = self._set(f"backward {name}", source, spec.split, language)
        return found

    def _set(self, name: str, source: Source, split: str, language: str | None) -> Examples:
        if (name, split) not in self._sets:
            splits = DEV_SPLITS if split == DEV else (TEST,)
            found = [one for one in splits if one in split_names(source)]
            if not found:
                raise UserError(
                    f"{describe_source(source)} has no {split} split; a comparison chooses on dev "
                    "and reports on test: give a folder or data set with train, dev and test"
                )
            self._sets[name, split] = self._loader.load(source, found[0], language)
        return self._sets[name, split]


def _told(edit: Edit) -> dict[str, float]:
    """An edit in rows and in their keys; one that rows did not always have, only if it is there."""
    return {"factor": edit.factor} | ({"pruned": edit.sparsity} if edit.sparsity else {})


def _as_text(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON has them."""
    content = FitConfig(**options).to_json()
    return {name: content[name] for name in options}


def machine() -> dict[str, Any]:
    """What a row was made on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
    }
