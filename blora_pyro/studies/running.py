"""Running a study: each fit in a run folder, its scores, and the table of results."""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import optuna

from blora_pyro.data import Examples
from blora_pyro.errors import Interrupted, UserError
from blora_pyro.files import read_json
from blora_pyro.fitting.interrupts import Interrupts
from blora_pyro.posterior import Posterior
from blora_pyro.runs.folders import ADAPTER
from blora_pyro.runs.listeners import Listener, heard_by
from blora_pyro.runs.record import FINISHED, state_of
from blora_pyro.studies.base_fits import BaseFits, commit, edited, machine
from blora_pyro.studies.definition import ScoreSpec, Setting, Study, check_study, deciding_words
from blora_pyro.studies.methods import BASE, Candidate
from blora_pyro.studies.plan import Plan
from blora_pyro.studies.results import (
    Key,
    ScoredFit,
    read_results,
    score_files,
    scored_run,
    write_results,
)
from blora_pyro.studies.trials import DATABASE, RUN_FOLDER, Trials, TrialState, quiet_optuna

METRICS = ("balanced error",)
SCORES = "scores"  # attribute of a trial: rows of the table
RUNS = "fits"  # folder of the run folders


@dataclass(repr=False)
class StudyRun:
    """A study in its output folder, as far as it has come.

    Attributes:
        study: What is run.
        output: Folder of the fits, and of the database if no storage is given.
        results: The table (CSV).
        scores: What is there, by key; see `refresh`.
        partial: Choose among the scores that are there, instead of waiting for all.
    """

    study: Study
    output: Path
    results: Path
    progress: Listener = field(default_factory=Listener)
    partial: bool = False
    scores: dict[Key, ScoredFit] = field(default_factory=dict)
    trials: Trials | None = None

    def __post_init__(self) -> None:
        """Make the plan: which scores are wanted."""
        self.plan = Plan(self.study, lambda spec: self.scores.get(spec.key), self.partial)
        self._read: set[int] = set()  # numbers of trials
        self._checked: set[Key] = set()
        self._fits: dict[object, BaseFits] = {}  # only of the last base

    def __repr__(self) -> str:
        """Tell what is run, and how far it has come."""
        return f"{self.study!r}\nin {self.output}, {len(self.scores)} rows in {self.results}"

    def refresh(self) -> None:
        """Read the scores that are there: of the table, and of other processes' trials."""
        if not self.scores:
            self.scores = {one.key: one for one in read_results(self.results)}
        for trial in self.trials.of(TrialState.COMPLETE) if self.trials else ():
            for row in trial.user_attrs.get(SCORES, ()) if trial.number not in self._read else ():
                one = ScoredFit.from_row(row)
                self.scores[one.key] = one
            self._read.add(trial.number)
        self._check_scores()

    def _check_scores(self) -> None:
        """Refuse scores of the plan's names that were made in another way."""
        for spec in self.plan.wanted():
            score = self.scores.get(spec.key)
            if score is None or spec.key in self._checked or spec.candidate.method.external:
                continue
            wanted, backward = spec.scored, self.study.base_config(spec.setting).backward_sets
            command, run = score.command, spec.run if spec.is_base else ""
            alike = deciding_words(command) == deciding_words(wanted.command)
            for found, expected in (
                (wanted.command if alike else command, wanted.command),
                (score.after, wanted.after),
                (score.run if spec.is_base and score.run else run, run),
                (", ".join(sorted(score.backward_sets or backward)), ", ".join(sorted(backward))),
            ):
                if found != expected:
                    raise UserError(
                        f"{self.results} has {spec.title} of '{found or 'nothing'}', not "
                        f"'{expected or 'nothing'}'; give the same options, or another output"
                    )
            self._checked.add(spec.key)

    # ---- all of it

    def run(self) -> None:
        """Make scores until all are there, those of other processes included."""
        assert self.trials is not None
        try:
            with Interrupts():
                self.trials.end_stale()
                self.refresh()
                if self.plan.missing():
                    self.load_bases()
                while missing := self.plan.missing():
                    self._next(missing)
                    self.refresh()
                    self.save()
                self.save()
        except KeyboardInterrupt as error:
            raise Interrupted(
                getattr(error, "signum", signal.SIGINT),
                f"interrupted; {len(self.scores)} rows are safe in {self.output}; start the same "
                "command again to go on",
            ) from None

    def load_bases(self) -> None:
        """Load every base model once, so that one that can't be is refused before the first fit."""
        for setting in reversed(self.study.settings):  # the first is used first
            self._fits_of(setting)

    def _next(self, missing: Sequence[ScoreSpec]) -> None:
        """Make the scores of one fit, or wait for other processes."""
        assert self.trials is not None
        taken, runs = self.trials.open_runs(), {spec.run: spec for spec in reversed(missing)}
        free = [run for run in reversed(runs) if run not in taken]
        waiting = {one.user_attrs.get(RUN_FOLDER) for one in self.trials.of(TrialState.WAITING)}
        if free:  # fits that are finished here come first: other machines have to make them
            nearest = min(free, key=lambda run: not self._is_finished(run))
            self.trials.run_next(self._make, {RUN_FOLDER: nearest})
        elif waiting & {*runs}:
            self.trials.run_next(self._make)
        else:
            self.trials.wait()

    def _is_finished(self, run: str) -> bool:
        return state_of(self.output / RUNS / run) == FINISHED

    def finished_runs(self) -> list[str]:
        """Return the names of the run folders whose fits are finished."""
        folder = self.output / RUNS
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return [name for name in names if self._is_finished(name)]

    def _make(self, trial: optuna.Trial) -> float:
        """Make the missing scores of a trial's fit; returns their mean balanced error."""
        assert self.trials is not None
        self.refresh()
        run, missing = trial.user_attrs.get(RUN_FOLDER), self.plan.missing()
        specs = [spec for spec in missing if spec.run == run]
        if not specs or not self.trials.is_first(trial):
            raise optuna.TrialPruned
        made = []
        for spec in specs:
            self.progress.stage(f"{spec.title}; {len(missing)} rows to do are known")
            made.append(self.score(spec))
        trial.set_user_attr(SCORES, [one.to_row() for one in made])
        return sum(one.balanced_error for one in made) / len(made)

    def save(self) -> None:
        """Write the table."""
        if self.scores:
            write_results(self.results, self.scores.values())

    # ---- one score

    def score(self, spec: ScoreSpec) -> ScoredFit:
        """Fit, unless that is done, and score, unless that is done."""
        base_fits, folder = self._fits_of(spec.setting), self.output / RUNS / spec.run
        named = replace(spec.scored, commit=commit(), machine=machine(base_fits.base.net.device))
        named = replace(named, run=spec.run, base_hash=base_fits.fingerprint)
        self._check_weights(named)
        source = self.study.data[spec.data]
        sets = base_fits.sets(spec.split, data=(source,))  # what is wrong with them is told now
        if spec.is_base:
            base_fits.score_base(sets, folder, spec.split)
            return scored_run(named, folder)
        try:
            posterior = base_fits.fit(spec.config, folder)
        except FloatingPointError as error:
            self.progress.note(f"{spec.title}: {error}")
            return replace(named, failed=str(error))
        size = (folder / ADAPTER[1]).stat().st_size
        files = score_files(folder, spec.split, named.after)
        changed = edited(posterior, spec.after)
        if not _are_scores_of(files, changed, sets):
            files[1].unlink(missing_ok=True)  # a kill leaves no pair of two adapters
            base = replace(spec, candidate=Candidate(self.study.methods[BASE]))
            before = base_fits.before(sets, spec.split, self.output / RUNS / base.run)
            base_fits.score(changed, sets, before, spec.config, spec.split, files)
        return scored_run(replace(named, weights=posterior.num_weights, bytes=size), folder)

    def _check_weights(self, scored: ScoredFit) -> None:
        """Refuse a base whose weights are not those of the scores that are there."""
        for one in self.scores.values():
            if one.base == scored.base and one.base_hash not in ("", scored.base_hash):
                raise UserError(
                    f"{self.results} is of another base '{one.base}', whose weights have changed "
                    "since; give another output"
                )

    def _fits_of(self, setting: Setting) -> BaseFits:
        """Return the fits to the base of a setting; only the last base is kept in memory."""
        config = self.study.base_config(setting)
        names = ("base", "revision", "dtype", "device", "normalizer", "trim_audio")
        key = tuple(getattr(config, name) for name in names)
        if self._fits.keys() != {key}:
            self._fits.clear()
            self._fits[key] = BaseFits(config, self.progress)
        return self._fits[key]


def _are_scores_of(
    files: tuple[Path, Path], posterior: Posterior, sets: Mapping[str, Examples]
) -> bool:
    """Return whether metrics and utterances are there, of this adapter and these sets."""
    try:
        found = read_json(files[0])
    except (OSError, ValueError):
        return False
    wanted = posterior.fingerprint, {name: one.fingerprint for name, one in sets.items()}
    is_whole = files[1].is_file() and files[1].stat().st_size > 0
    return is_whole and (found.get("adapter"), found.get("sets")) == wanted


# ---- from a definition to its results


@quiet_optuna()
def run_study(
    study: Study,
    output: str | Path,
    *,
    results: Path | None = None,
    work: bool = True,
    storage: str | None = None,
    study_name: str | None = None,
    heartbeat: int | None = None,
    progress: Listener | None = None,
) -> StudyRun:
    """Choose every knob on the dev sets, score the chosen values on the test sets.

    Scores are made once: started again, a study goes on where it was, also with further methods,
    data, seeds or settings. Started several times at once, the processes share the fits. With a
    `storage`, machines without a common folder do: all rows come to all of them, a fit stays where
    it was made, and one whose machine dies is made again by another.

    Args:
        study: What is compared.
        output: Folder for the fits, which are run folders.
        results: The table (CSV); None is `results.csv` in the output.
        work: Make what is missing; otherwise what is there is taken.
        storage: See `Trials`, as of the next two.
        study_name: Its `name`.
        heartbeat: Seconds.
        progress: Told of stages and steps; None is bars in a notebook, else nothing.

    Raises:
        UserError: On bad options or data.
        Interrupted: By a signal.
    """
    output = Path(output)
    run = StudyRun(
        study, output, results or output / "results.csv", heard_by(progress), partial=not work
    )
    check_study(study)
    if not (work or storage or (output / DATABASE).exists()):
        run.refresh()
        return run
    with Trials(output, METRICS, storage=storage, name=study_name, heartbeat=heartbeat) as trials:
        run.trials = trials
        if work:
            run.run()
        else:
            run.refresh()
    return run
