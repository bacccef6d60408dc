"""A search for options: fits shared by any processes, and a Pareto front of their dev errors."""

import json
import math
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from blora_pyro.declarations import check_names, declarations, value_types
from blora_pyro.errors import Interrupted, UserError, check_positive
from blora_pyro.fitting.interrupts import Interrupts
from blora_pyro.guides import describe_prior, with_prior_arguments
from blora_pyro.metrics.pareto import knee, pareto_front
from blora_pyro.options import MACHINE_OPTIONS, FitConfig, fit_command
from blora_pyro.runs.chains import continued
from blora_pyro.runs.listeners import Listener, heard_by
from blora_pyro.runs.record import RunRecord
from blora_pyro.runs.scoring import NEW_DOMAIN
from blora_pyro.studies.base_fits import BaseFits
from blora_pyro.studies.estimates import BACKWARD
from blora_pyro.studies.methods import BASE
from blora_pyro.studies.results import DEV, score_files
from blora_pyro.studies.standings import FORGETTING
from blora_pyro.studies.trials import RUN_FOLDER, Trials, quiet_optuna

Ranges = dict[str, tuple[float, float]]  # name -> lowest and highest value

SEARCH: Ranges = {"beta": (1e-6, 1e-3), "prior_scale": (0.01, 0.3)}
METRICS = ("new-domain error", "backward error")
FAILURE, OPTIONS, FOUND = "failure", "options", "found"  # attributes of a trial, and of the study


@dataclass(frozen=True)
class Search:
    """What is known of a search.

    A fit in `trials` has the `number` of its trial, its run `folder`, the searched `values` by
    name, and of the dev sets `new_domain` and `backward` (`rate` and `interval`), `forgetting`
    (`difference` and `interval`), `sparsity`, and the `seconds` of the fit.

    Attributes:
        output: Its folder.
        study: Name in the database.
        options: Of every fit, as given.
        ranges: What is searched.
        base: The base's errors on the dev sets, `new_domain` and `backward`; None before any trial.
        trials: Fits that have ended well, by number.
        diverged: Number, values and failure of the fits whose loss was not finite.
        running: How many trials other processes work on.
    """

    output: Path
    study: str
    options: Mapping[str, Any]
    ranges: Ranges
    base: Mapping[str, Any] | None
    trials: Sequence[Mapping[str, Any]]
    diverged: Sequence[Mapping[str, Any]] = ()
    running: int = 0

    @property
    def front(self) -> list[Mapping[str, Any]]:
        """The fits that none beats in both errors, by their new-domain error."""
        return [self.trials[i] for i in pareto_front([*map(errors_of, self.trials)])]

    @property
    def knee(self) -> Mapping[str, Any] | None:
        """The fit at the knee of the front, see `pareto.knee`; None if none has ended."""
        base = errors_of(self.base) if self.base else None
        index = knee([*map(errors_of, self.trials)], base)
        return None if index is None else self.trials[index]

    def command(self, trial: Mapping[str, Any]) -> str:
        """Return the `blora-pyro fit` of a trial."""
        return fit_command(FitConfig(**with_values(self.options, trial["values"])))

    def to_json(self) -> dict[str, Any]:
        """Return the content of `sweep.json`."""
        best = self.knee
        return {
            "study": self.study,
            "options": agreed_options(dev_config(self.options, self.ranges), self.ranges),
            "base": self.base,
            "front": [one["number"] for one in self.front],
            "knee": best and {"number": best["number"], "command": self.command(best)},
            "trials": list(self.trials),
            "diverged": list(self.diverged),
            "running": self.running,
        }


def errors_of(fit: Mapping[str, Any]) -> tuple[float, float]:
    """Return new-domain error and backward error, of a fit or of the base."""
    return fit[NEW_DOMAIN]["rate"], fit[BACKWARD]["rate"]


# ---- what is searched


def ranges_of(search: Mapping[str, tuple[float, float]], options: Mapping[str, Any]) -> Ranges:
    """Return what is to be searched, checked against the options of the fits.

    In `search` an option of a fit that is a number, or an argument of the prior, has a range.
    """
    prior = options.get("prior", FitConfig.prior)
    arguments = [one.name for one in describe_prior(prior)[1]]
    given = {_one_name(name) for name in (*options, *options.get("prior_args", {}))}
    ranges = {_one_name(name): (float(low), float(high)) for name, (low, high) in search.items()}
    if not ranges:
        raise UserError("nothing is to be searched; name something, such as beta")
    for name, (low, high) in ranges.items():
        key = "scale" if name == "prior_scale" else name
        if key not in arguments and (name == "prior_scale" or not _is_searched_option(name)):
            takes = ", ".join(arguments) or "none"
            raise UserError(
                f"prior {prior} has no '{key}' to be searched; search beta, lr, another option "
                f"that is a number, or an argument of the prior ({takes})"
            )
        if not 0 < low < high < math.inf:
            raise UserError(f"search of {name} is from {low} to {high}; give 0 < low < high")
        if name in given:
            raise UserError(f"{name} is searched and given, too; leave one of them out")
    return ranges


def _is_searched_option(name: str) -> bool:
    return name in declarations(FitConfig) and float in value_types(FitConfig, name)


def _one_name(name: str) -> str:
    return "prior_scale" if name == "scale" else name


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    """Return the values that a fit takes: those of the sampler to three digits, to be copied."""
    return {name: float(f"{value:.3g}") for name, value in values.items()}


def with_values(options: Mapping[str, Any], values: Mapping[str, float]) -> dict[str, Any]:
    """Return options of a fit with searched values; `dev` only where the fit itself needs it."""
    own = {name: value for name, value in values.items() if _is_searched_option(name)}
    arguments = {name: value for name, value in values.items() if name not in own}
    given = {**options, **own}
    if arguments:
        given["prior_args"] = {**options.get("prior_args", {}), **arguments}
    if given.get("eval_every") is None:
        given.pop("dev", None)
    return given


def dev_config(options: Mapping[str, Any], ranges: Ranges) -> FitConfig:
    """Return the configuration by which dev sets are read: a fit at the lowest values.

    Refused if no fit could be made at the lowest or the highest ones, or nothing can be forgotten.
    """
    lowest, highest = ({name: ends[end] for name, ends in ranges.items()} for end in (0, 1))
    with_prior_arguments(FitConfig(**with_values(options, highest)))
    given = with_values(options, lowest)
    if options.get("dev") is not None and "dev" not in given:
        given |= {"dev": options["dev"], "eval_every": 1}  # a fit takes it with both only
    config = with_prior_arguments(FitConfig(**given))
    if config.pooling is not None:
        raise UserError(
            f"pooling is {config.pooling}, and a sweep looks at the error of one domain; give "
            "pooling complete"
        )
    if not config.backward_sets:
        raise UserError(
            f"base {config.base} has no backward sets, of what it already knows; give some: "
            "--backward NAME=SOURCE"
        )
    return config


def agreed_options(config: FitConfig, ranges: Ranges) -> dict[str, Any]:
    """Return what all processes of one search must agree on, as JSON has it; see `dev_config`."""
    searched = {*ranges, "scale"} if "prior_scale" in ranges else {*ranges}
    content = config.to_json()
    arguments = {name: one for name, one in content["prior_args"].items() if name not in searched}
    left_out = {*MACHINE_OPTIONS, *ranges}
    content = {name: value for name, value in content.items() if name not in left_out}
    ends = {name: list(ends) for name, ends in ranges.items()}
    return {**content, "prior_args": arguments, "search": ends}


# ---- running it


@dataclass
class _Searcher:
    """Makes the fits of a search; base and dev sets are loaded once, when first needed."""

    trials: Trials
    config: FitConfig  # by which the dev sets are read
    options: Mapping[str, Any]
    ranges: Ranges
    total: int
    progress: Listener
    base_fits: BaseFits | None = None

    def settle(self) -> None:
        """Keep the options that the search is begun with, or refuse others."""
        wanted = json.loads(json.dumps(agreed_options(self.config, self.ranges)))
        study = self.trials.study
        begun = self.trials.of()  # before the options, which are set before a trial
        known = study.user_attrs.get(OPTIONS)
        if known is None and begun:
            raise UserError(
                f"study '{study.study_name}' is of something else; give another study name"
            )
        if known is None:
            study.set_user_attr(OPTIONS, wanted)
            return
        for option in {**known, **wanted}:
            if known.get(option) != wanted.get(option):
                raise UserError(
                    f"the sweep in {self.trials.output} has {option} = {known.get(option)}, not "
                    f"{wanted.get(option)}; give the same, or start another sweep in another output"
                )

    def finished(self) -> list[FrozenTrial]:
        """Return the trials with an outcome: two errors, or a fit that diverged."""
        ended = self.trials.of(TrialState.COMPLETE, TrialState.FAIL)
        return [one for one in ended if one.values or FAILURE in one.user_attrs]

    def run(self, until: float) -> None:
        """Make fits until `total` are finished, those of other processes included."""
        while time.monotonic() < until and len(done := self.finished()) < self.total:
            self.trials.end_stale()
            if len(done) + len(self.trials.of(TrialState.RUNNING)) < self.total:
                self.trials.run_next(self)
            else:
                self.trials.wait()  # others work on the last ones, and may die

    def _is_surplus(self, trial: optuna.Trial) -> bool:
        """Return whether other processes have taken as many trials as are wanted before this one.

        All processes see the same order, so of two that begin the last trial one goes on.
        """
        running = self.trials.of(TrialState.RUNNING)
        taken = {one.number for one in running if one.number < trial.number}
        return len(taken | {one.number for one in self.finished()}) >= self.total

    def __call__(self, trial: optuna.Trial) -> tuple[float, float]:
        """Return new-domain error and backward error of a trial."""
        if self._is_surplus(trial):
            raise optuna.TrialPruned
        entropy = np.random.SeedSequence([self.config.seed, trial.number])
        seed = int(entropy.generate_state(1)[0])  # no two trials share it, whoever runs them
        trial.study.sampler = optuna.samplers.TPESampler(seed=seed)
        drawn = {
            name: trial.suggest_float(name, *ends, log=True) for name, ends in self.ranges.items()
        }
        values = rounded(drawn)
        if RUN_FOLDER not in trial.user_attrs:  # otherwise it goes on with that of a dead process
            trial.set_user_attr(RUN_FOLDER, f"trial-{trial.number}")
        folder = self.trials.output / trial.user_attrs[RUN_FOLDER]
        try:
            found = self._fit(trial.number, folder, values)
        except FloatingPointError as error:
            trial.set_user_attr(FAILURE, str(error))
            raise
        trial.set_user_attr(FOUND, found)
        return errors_of(found)

    def _fit(self, number: int, folder: Path, values: Mapping[str, float]) -> dict[str, Any]:
        """Return what `Search.trials` has of a fit, and errors of the base, under `base`."""
        self.base_fits = own = self.base_fits or BaseFits(self.config, self.progress)
        self.progress.stage("base on the dev sets")
        sets = own.sets(DEV)
        before = own.before(sets, DEV, self.trials.output)
        for name, one in before.items():
            if math.isnan(one.main.rate):
                raise UserError(f"a dev set ({name}) has no words to err in; give another")
        shown = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        self.progress.stage(f"trial {number}: {shown}")
        posterior = own.fit(FitConfig(**with_values(self.options, values)), folder)
        self.progress.stage(f"trial {number} on the dev sets")
        files = score_files(folder, DEV)
        metrics = own.score(posterior, sets, before, self.config, DEV, files)
        new, backward = metrics[NEW_DOMAIN], metrics["backward_error"]
        errors = {
            state: {NEW_DOMAIN: new[state][new[state]["metric"]], BACKWARD: backward[state]}
            for state in (BASE, "adapted")
        }
        return {
            **errors["adapted"],
            FORGETTING: backward["change"],
            "sparsity": metrics["sparsity"],
            "seconds": (RunRecord.read(folder).seconds or {}).get("fit"),
            BASE: errors[BASE],
        }

    def found(self) -> Search:
        """Return what is known now."""
        ended = self.trials.of(TrialState.COMPLETE)
        trials = [
            {
                "number": one.number,
                "folder": one.user_attrs[RUN_FOLDER],
                "values": rounded(one.params),
            }
            | {name: value for name, value in one.user_attrs[FOUND].items() if name != BASE}
            for one in ended
        ]
        diverged = [
            {
                "number": one.number,
                "values": rounded(one.params),
                "failure": one.user_attrs[FAILURE],
            }
            for one in self.finished()
            if FAILURE in one.user_attrs
        ]
        base = ended[0].user_attrs[FOUND][BASE] if ended else None
        about = (self.trials.output, self.trials.study.study_name, self.options, self.ranges, base)
        return Search(*about, trials, diverged, len(self.trials.of(TrialState.RUNNING)))


@quiet_optuna()
def sweep(
    options: Mapping[str, Any],
    output: str | Path,
    *,
    trials: int = 20,
    search: Mapping[str, tuple[float, float]] | None = None,
    storage: str | None = None,
    study_name: str | None = None,
    timeout: float | None = None,
    heartbeat: int | None = None,
    dry_run: bool = False,
    progress: Listener | None = None,
) -> Search:
    """Fit again and again, in search of low errors on the dev sets: new domain and backward.

    Optuna's TPE sampler for several objectives (Ozaki et al., "Multiobjective Tree-Structured
    Parzen Estimator", JAIR 73, 2022) chooses the values on a logarithmic scale, the first ten at
    random. Test sets are not touched. The same call goes on with a search that was stopped, and
    several processes may share one (see `trials`); all of them wait for its last trial.

    Args:
        options: Of `FitConfig`, for all fits; `dev` needs no `eval_every` here. The seed is the
            sampler's, too.
        output: Folder of the search; every fit is a run folder in it.
        trials: How many are to be finished in all, those of earlier calls among them.
        search: An option that is a number, or an argument of the prior -> lowest and highest value,
            above 0; None is `SEARCH`, and with `prior_from` its beta alone.
        storage: See `Trials`, as of the next two.
        study_name: Its `name`.
        heartbeat: Seconds.
        timeout: Seconds after which no further trial begins.
        dry_run: Load the base and the dev sets, so that all checks are made, and fit nothing.
        progress: Told of stages and steps; None is bars in a notebook, else nothing.

    Raises:
        UserError: On bad options or data, or options other than those of the search in `output`.
        Interrupted: By a signal.
    """
    check_positive(trials=trials, timeout=timeout)
    check_names(FitConfig, options, "a fit")
    until = time.monotonic() + (math.inf if timeout is None else timeout)
    dev = {"dev": options["dev"]} if "dev" in options else {}  # a fit takes it with eval_every
    rest = {name: value for name, value in options.items() if name != "dev"}
    asked = FitConfig(**rest)
    asked.check_base()
    config, previous = continued(asked)
    options = {**config.given_options, **dev}
    if search is None:  # an earlier posterior has no scale
        search = {name: ends for name, ends in SEARCH.items() if not previous or name == "beta"}
    ranges = ranges_of(search, options)
    read_by, folder, progress = dev_config(options, ranges), Path(output), heard_by(progress)
    if dry_run:
        BaseFits(read_by, progress).sets(DEV)
        return Search(folder, study_name or folder.name, options, ranges, None, ())
    with Trials(folder, METRICS, storage=storage, name=study_name, heartbeat=heartbeat) as queue:
        searcher = _Searcher(queue, read_by, options, ranges, trials, progress)
        try:
            with Interrupts():
                searcher.settle()
                searcher.run(until)
                found = searcher.found()
        except KeyboardInterrupt as error:
            done = len(searcher.finished())
            raise Interrupted(
                getattr(error, "signum", signal.SIGINT),
                f"interrupted; {done} of {trials} trials are finished and safe in {folder}; "
                "go on with the same command",
            ) from None
    return found
