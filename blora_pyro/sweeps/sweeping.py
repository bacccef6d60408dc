"""Searching beta and the prior: a front of what is gained and what is forgotten, and its knee."""

import math
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from blora_pyro.errors import Interrupted, check_positive
from blora_pyro.files import write_json
from blora_pyro.fitting.interrupts import Interrupts
from blora_pyro.metrics.pareto import knee, pareto_front
from blora_pyro.options import FitConfig, fit_command
from blora_pyro.runs.chains import continued
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.outcomes import NEW_DOMAIN
from blora_pyro.sweeps.plot import sweep_plot
from blora_pyro.sweeps.searching import (
    SEARCH,
    Ranges,
    agreed_options,
    dev_config,
    ranges_of,
    with_values,
)
from blora_pyro.sweeps.storages import quiet_optuna
from blora_pyro.sweeps.studies import FAILURE, SharedStudy
from blora_pyro.sweeps.trials import BACKWARD, BASE, Objective, Trial

RESULT, PLOT = "sweep.json", "sweep.png"
PATIENCE = 2.0  # seconds until other processes' trials are looked for again


@dataclass(frozen=True)
class Sweep:
    """What is known of a sweep.

    Attributes:
        output: Its folder.
        study: Name in the storage.
        options: Of every fit, as given.
        ranges: What is searched.
        base: Its errors on the dev sets, `new_domain` and `backward`; None before any trial.
        trials: Those that have ended well, by number.
        diverged: Number, values and failure of the fits that came to no end.
        running: How many trials other processes are at.
    """

    output: Path
    study: str
    options: Mapping[str, Any]
    ranges: Ranges
    base: Mapping[str, Any] | None
    trials: tuple[Trial, ...]
    diverged: tuple[dict[str, Any], ...] = ()
    running: int = 0

    @cached_property
    def front(self) -> list[Trial]:
        """The trials that none beats in both errors, by their new-domain error."""
        return [self.trials[i] for i in pareto_front([one.errors for one in self.trials])]

    @cached_property
    def knee(self) -> Trial | None:
        """The trial at the knee of the front, see `pareto.knee`; None if none has ended."""
        points = [one.errors for one in self.trials]
        base = self.base
        index = knee(points, (base[NEW_DOMAIN]["rate"], base[BACKWARD]["rate"]) if base else None)
        return None if index is None else self.trials[index]

    def command(self, trial: Trial) -> str:
        """The `blora-pyro fit` of a trial."""
        return fit_command(FitConfig(**with_values(self.options, trial.values)))

    def to_json(self) -> dict[str, Any]:
        """The content of `sweep.json`."""
        best = self.knee
        return {
            "study": self.study,
            "options": agreed_options(dev_config(self.options, self.ranges), self.ranges),
            "base": self.base,
            "front": [one.number for one in self.front],
            "knee": best and {"number": best.number, "command": self.command(best)},
            "trials": [asdict(one) for one in self.trials],
            "diverged": list(self.diverged),
            "running": self.running,
        }


def sweep(
    output: str | Path,
    *,
    trials: int = 20,
    search: Mapping[str, tuple[float, float]] | None = None,
    storage: str | None = None,
    study_name: str | None = None,
    timeout: float | None = None,
    progress: Listener | None = None,
    **options: Any,
) -> Sweep:
    """Fit again and again, in search of low errors on the dev sets: new domain and backward.

    Optuna's TPE sampler for several objectives (Ozaki et al., "Multiobjective Tree-Structured
    Parzen Estimator", JAIR 73, 2022) chooses the values on a logarithmic scale, the first ten at
    random. Test sets are not touched. The same call goes on with a sweep that was stopped, and
    several processes may be at one sweep (see `studies`), and all of them wait for its last trial.
    What came of it is in `sweep.json` and `sweep.png` in the output.

    Args:
        output: Folder of the sweep; every fit is a run folder in it.
        trials: How many are to be finished in all, those of earlier calls among them.
        search: `beta`, `lr`, `prior_scale` or an argument of the prior -> lowest and highest
            value, above 0; None is `searching.SEARCH`, and with `prior_from` its beta alone.
        storage: URL of a database for the study (`sqlite:///FILE`, `postgresql+psycopg://...`);
            None is the file `study.log` in the output.
        study_name: In the storage; None is the output's name.
        timeout: Seconds after which no further trial begins.
        progress: Told of stages and steps.
        **options: The attributes of `FitConfig`, for all fits; `dev` needs no `eval_every` here.
            The seed is the sampler's, too.

    Raises:
        UserError: On bad options or data, or options other than those of the sweep in `output`.
        Interrupted: By a signal.
    """
    check_positive(trials=trials, timeout=timeout)
    until = time.monotonic() + (math.inf if timeout is None else timeout)
    config, previous = continued(FitConfig(**options))
    options = config.given_options
    if search is None:  # an earlier posterior has no scale
        search = {name: ends for name, ends in SEARCH.items() if not previous or name == "beta"}
    ranges = ranges_of(search, options)
    config = dev_config(options, ranges)
    folder = Path(output)
    with quiet_optuna():
        study = SharedStudy(folder, storage, study_name, config.seed)
        study.settle(agreed_options(config, ranges))
        objective = Objective(study, config, options, ranges, progress or Listener())
        try:
            with Interrupts():
                while time.monotonic() < until and len(study.finished()) < trials:
                    if not study.run_next(objective, trials):
                        time.sleep(PATIENCE)  # others are at the last ones, and may die
        except KeyboardInterrupt as error:
            raise Interrupted(
                getattr(error, "signum", signal.SIGINT),
                f"interrupted; {len(study.finished())} of {trials} trials are finished and safe in "
                f"{folder}; go on with the same command",
            ) from None
        found = _found(study, options, ranges)
    write_json(folder / RESULT, found.to_json())
    if found.trials:
        sweep_plot(found).savefig(folder / PLOT, dpi=200)
    return found


def _found(study: SharedStudy, options: Mapping[str, Any], ranges: Ranges) -> Sweep:
    """What the study holds now."""
    diverged = [one for one in study.finished() if FAILURE in one.user_attrs]
    return Sweep(
        study.folder,
        study.study.study_name,
        options,
        ranges,
        study.study.user_attrs.get(BASE),
        tuple(Trial.of(one) for one in study.trials(TrialState.COMPLETE)),
        tuple(
            {"number": one.number, "values": one.params, "failure": one.user_attrs[FAILURE]}
            for one in diverged
        ),
        len(study.trials(TrialState.RUNNING)),
    )
