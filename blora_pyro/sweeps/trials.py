"""A trial of a sweep: a fit, and its errors on the dev sets."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from blora_pyro.data import Examples
from blora_pyro.errors import UserError
from blora_pyro.evaluation import Evaluation, change_summary, rate_summary
from blora_pyro.models import Base, base_of
from blora_pyro.options import FitConfig
from blora_pyro.runs import fits
from blora_pyro.runs.folders import TRANSCRIPTS
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.loading import Loader
from blora_pyro.runs.outcomes import NEW_DOMAIN, evaluation_sets, measure
from blora_pyro.runs.record import RUN
from blora_pyro.sweeps.searching import ANYWHERE, Ranges, with_values
from blora_pyro.sweeps.studies import SharedStudy, folder_of

BACKWARD, FORGETTING = "backward", "forgetting"
BASE = "base"  # attribute of a study: the errors of the base


@dataclass(frozen=True)
class Trial:
    """A fit with values of its own, and its errors on the dev sets.

    Attributes:
        number: In the study.
        folder: Of its run, in that of the sweep.
        values: By name, of what was searched.
        new_domain: Error as a fraction, `rate`, with its 95% bootstrap `interval`.
        backward: Macro-average over the backward sets, likewise.
        forgetting: Backward error minus that of the base, `difference`, with its paired `interval`.
        sparsity: See `Posterior.sparsity`.
        seconds: That the fit itself took, since it was last begun or resumed.
    """

    number: int
    folder: str
    values: dict[str, float]
    new_domain: dict[str, Any]
    backward: dict[str, Any]
    forgetting: dict[str, Any]
    sparsity: dict[str, float]
    seconds: float

    @classmethod
    def of(cls, one: FrozenTrial) -> "Trial":
        """A trial of a study that has ended well."""
        names = (NEW_DOMAIN, BACKWARD, FORGETTING, "sparsity", "seconds")
        about = {name: one.user_attrs[name] for name in names}
        return cls(one.number, folder_of(one), one.params, **about)

    @property
    def errors(self) -> tuple[float, float]:
        """New-domain error and backward error."""
        return self.new_domain["rate"], self.backward["rate"]


class Objective:
    """What a study calls for every trial; base and dev sets are loaded once, when first needed."""

    def __init__(
        self,
        study: SharedStudy,
        config: FitConfig,
        options: Mapping[str, Any],
        ranges: Ranges,
        progress: Listener,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            study: Whose objective it is.
            config: By which the dev sets are read.
            options: Of every fit.
            ranges: What is searched.
            progress: Told of stages and steps.
        """
        self.study, self.config = study, config
        self.options, self.ranges = options, ranges
        self.progress = progress

    @cached_property
    def base(self) -> Base:
        """The base on which posteriors are measured."""
        return base_of(self.config)

    @cached_property
    def sets(self) -> dict[str, Examples]:
        """The dev sets, by name."""
        self.progress.stage("loading the dev sets")
        loader = Loader(self.base, self.config, self.progress.features, self.progress.note)
        sets = evaluation_sets(self.base, self.config, loader, split="dev")
        loader.tell()
        return sets

    @cached_property
    def before(self) -> dict[str, Evaluation]:
        """The base on the dev sets, transcribed by whichever process comes first.

        Raises:
            UserError: If there are no words to err in.
        """
        with self.study.locked():
            found = self._measure("base", self.study.folder / TRANSCRIPTS["base"])
            errors = _errors(found)
            for name, error in errors.items():
                if error["rate"] is None:
                    raise UserError(f"a dev set ({name}) has no words to err in; give another")
            self.study.study.set_user_attr(BASE, errors)
        return found

    def _measure(self, what: str, keep: Path | None = None) -> dict[str, Evaluation]:
        sets = self.sets
        self.progress.stage(f"{what} on the dev sets")
        return measure(self.base, sets, lambda _: None, keep, self.config.normalizer)

    def __call__(self, trial: optuna.Trial, folder: Path) -> tuple[float, float]:
        """New-domain error and backward error of a trial, whose fit is or is begun in `folder`."""
        values = {
            name: trial.suggest_float(name, *ends, log=True) for name, ends in self.ranges.items()
        }
        before = self.before
        shown = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        self.progress.stage(f"trial {trial.number}: {shown}")
        given = with_values(self.options, values)
        if (folder / RUN).exists():  # a dead process began it, which may have computed elsewhere
            given = {name: value for name, value in given.items() if name not in ANYWHERE}
        run = fits.fit(
            FitConfig(**given), folder, evaluate=False, resume=True, progress=self.progress
        )
        with run.posterior.applied(self.base.net):
            after = self._measure(f"trial {trial.number}")
        errors = _errors(after)
        names = [name for name in before if name != NEW_DOMAIN]
        pairs = [before[name] for name in names], [after[name] for name in names]
        fitted = json.loads((folder / RUN).read_text(encoding="utf-8"))
        about = {
            **errors,
            FORGETTING: change_summary(*pairs),
            "sparsity": run.posterior.sparsity(),
            "seconds": fitted["seconds"]["fit"],
        }
        for name, value in about.items():
            trial.set_user_attr(name, value)
        return errors[NEW_DOMAIN]["rate"], errors[BACKWARD]["rate"]


def _errors(found: Mapping[str, Evaluation]) -> dict[str, Any]:
    """New-domain error and backward error, with intervals."""
    backward = [one for name, one in found.items() if name != NEW_DOMAIN]
    return {NEW_DOMAIN: rate_summary([found[NEW_DOMAIN]]), BACKWARD: rate_summary(backward)}
