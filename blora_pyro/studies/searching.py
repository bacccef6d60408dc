"""Running a search: its fits, shared by any processes, and their errors on the dev sets."""

import json
import math
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from blora_pyro.data import Examples
from blora_pyro.declarations import check_names
from blora_pyro.errors import Interrupted, UserError, check_positive
from blora_pyro.evaluation import Evaluation, change_summary, rate_summary
from blora_pyro.files import write_json
from blora_pyro.fitting.interrupts import Interrupts
from blora_pyro.models import Base, base_of
from blora_pyro.options import FitConfig
from blora_pyro.runs import fits
from blora_pyro.runs.chains import continued
from blora_pyro.runs.folders import TRANSCRIPTS
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.loading import Loader
from blora_pyro.runs.record import RUN
from blora_pyro.runs.scoring import NEW_DOMAIN, compare, evaluation_sets, measure
from blora_pyro.runs.utterances import utterance_rows, write_utterances
from blora_pyro.studies.definition import to_go_on
from blora_pyro.studies.results import BASE, DEV, score_files
from blora_pyro.studies.search import (
    BACKWARD,
    FORGETTING,
    PLOT,
    RESULT,
    SEARCH,
    Ranges,
    Search,
    SearchedFit,
    agreed_options,
    dev_config,
    ranges_of,
    rounded,
    with_values,
)
from blora_pyro.studies.search_report import search_plot
from blora_pyro.studies.trials import RUN_FOLDER, Trials, quiet_optuna

METRICS = ("new-domain error", "backward error")
FAILURE, OPTIONS = "failure", "options"  # attributes of a trial, and of the study


@dataclass
class _Searcher:
    """Makes the fits of a search; base and dev sets are loaded once, when first needed."""

    trials: Trials
    config: FitConfig  # by which the dev sets are read
    options: Mapping[str, Any]
    ranges: Ranges
    total: int
    progress: Listener = field(default_factory=Listener)

    @cached_property
    def base(self) -> Base:
        return base_of(self.config)

    @cached_property
    def sets(self) -> dict[str, Examples]:
        return dev_sets(self.base, self.config, self.progress)

    @cached_property
    def before(self) -> dict[str, Evaluation]:
        """The base on the dev sets; transcripts are kept in the output."""
        found = self._measure(BASE, self.trials.output / TRANSCRIPTS[BASE])
        errors = _errors(found)
        for name, error in errors.items():
            if error["rate"] is None:
                raise UserError(f"a dev set ({name}) has no words to err in; give another")
        self.trials.study.set_user_attr(BASE, errors)
        return found

    def _measure(self, what: str, keep: Path | None = None) -> dict[str, Evaluation]:
        sets = self.sets
        self.progress.stage(f"{what} on the dev sets")
        return measure(self.base, sets, lambda name: None, keep, self.config.normalizer)

    def settle(self, name: str) -> None:
        """Keep the options that the search is begun with, or check that they are those.

        Raises:
            UserError: If one is another.
        """
        wanted = json.loads(json.dumps(agreed_options(self.config, self.ranges)))
        begun = self.trials.of()  # before the options, which are set before a trial
        known = self.trials.study.user_attrs.get(OPTIONS)
        if known is None and begun:
            raise UserError(f"study '{name}' is of something else; give another study name")
        if known is None:
            self.trials.study.set_user_attr(OPTIONS, wanted)
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
        before = self.before
        shown = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        self.progress.stage(f"trial {trial.number}: {shown}")
        try:
            about = self._fit(trial.number, folder, values, before)
        except FloatingPointError as error:
            trial.set_user_attr(FAILURE, str(error))
            raise
        for name, value in about.items():
            trial.set_user_attr(name, value)
        return about[NEW_DOMAIN]["rate"], about[BACKWARD]["rate"]

    def _fit(
        self,
        number: int,
        folder: Path,
        values: Mapping[str, float],
        before: dict[str, Evaluation],
    ) -> dict[str, Any]:
        """Return errors, sparsity and seconds of a fit, which is made or goes on in its folder."""
        config = FitConfig(**to_go_on(with_values(self.options, values), folder))
        run = fits.fit(config, folder, evaluate=False, resume=True, progress=self.progress)
        with run.posterior.applied(self.base.net):
            after = self._measure(f"trial {number}")
        metrics_file, utterances_file = score_files(folder, DEV)
        write_json(metrics_file, compare(run.posterior, before, after, self.config, DEV))
        rows = utterance_rows(self.sets, {BASE: before, "adapted": after}, run.posterior)
        write_utterances(utterances_file, rows)
        names = [name for name in before if name != NEW_DOMAIN]
        pairs = [before[name] for name in names], [after[name] for name in names]
        fitted = json.loads((folder / RUN).read_text(encoding="utf-8"))
        return {
            **_errors(after),
            FORGETTING: change_summary(*pairs),
            "sparsity": run.posterior.sparsity(),
            "seconds": fitted["seconds"]["fit"],
        }

    def found(self) -> Search:
        """Return what is known now."""
        diverged = [one for one in self.finished() if FAILURE in one.user_attrs]
        return Search(
            self.trials.output,
            self.trials.study.study_name,
            self.options,
            self.ranges,
            self.trials.study.user_attrs.get(BASE),
            tuple(SearchedFit.of(one) for one in self.trials.of(TrialState.COMPLETE)),
            tuple(
                {
                    "number": one.number,
                    "values": rounded(one.params),
                    "failure": one.user_attrs[FAILURE],
                }
                for one in diverged
            ),
            len(self.trials.of(TrialState.RUNNING)),
        )


def dev_sets(base: Base, config: FitConfig, progress: Listener) -> dict[str, Examples]:
    """Return the dev sets, by name.

    Raises:
        UserError: If there are none, or one can't be read.
    """
    progress.stage("loading the dev sets")
    loader = Loader(base, config, progress.features, progress.note)
    sets = evaluation_sets(base, config, loader, split=DEV)
    loader.report_skipped()
    return sets


def _errors(found: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Return new-domain error and backward error, with intervals."""
    backward = [one for name, one in found.items() if name != NEW_DOMAIN]
    return {NEW_DOMAIN: rate_summary([found[NEW_DOMAIN]]), BACKWARD: rate_summary(backward)}


# ---- all of it


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
    several processes may share one (see `trials`); all of them wait for its last trial. What came
    of it is in `sweep.json` and `sweep.png` in the output.

    Args:
        options: Of `FitConfig`, for all fits; `dev` needs no `eval_every` here. The seed is the
            sampler's, too.
        output: Folder of the search; every fit is a run folder in it.
        trials: How many are to be finished in all, those of earlier calls among them.
        search: An option that is a number, or an argument of the prior -> lowest and highest value,
            above 0; None is `SEARCH`, and with `prior_from` its beta alone.
        storage: URL of a database (`sqlite:///FILE`, `postgresql+psycopg://...`); None is the file
            `study.db` in the output.
        study_name: In the database; None is the output's name.
        timeout: Seconds after which no further trial begins.
        heartbeat: See `Trials`.
        dry_run: Load the base and the dev sets, so that all checks are made, and fit nothing.
        progress: Told of stages and steps.

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
    read_by, folder = dev_config(options, ranges), Path(output)
    if dry_run:
        dev_sets(base_of(read_by), read_by, progress or Listener())
        return Search(folder, study_name or folder.name, options, ranges, None, ())
    queue = Trials(folder, METRICS, storage=storage, name=study_name, heartbeat=heartbeat)
    try:
        searcher = _Searcher(queue, read_by, options, ranges, trials, progress or Listener())
        with Interrupts(), queue.reached():
            searcher.settle(queue.study.study_name)
            searcher.run(until)
            found = searcher.found()
    except KeyboardInterrupt as error:
        raise Interrupted(
            getattr(error, "signum", signal.SIGINT),
            f"interrupted; {len(searcher.finished())} of {trials} trials are finished and safe in "
            f"{folder}; go on with the same command",
        ) from None
    finally:
        queue.close()
    write_json(folder / RESULT, found.to_json())
    if found.trials:
        search_plot(found).savefig(folder / PLOT, dpi=200)
    return found
