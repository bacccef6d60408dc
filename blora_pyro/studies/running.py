"""Running a study: each fit in a run folder, its scores, and the table of results."""

import importlib.metadata
import os
import platform
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from hashlib import sha256
from pathlib import Path

import optuna
import torch

from blora_pyro import __version__
from blora_pyro.data import Examples, split_names
from blora_pyro.errors import Interrupted, UserError
from blora_pyro.evaluation import Evaluation
from blora_pyro.files import write_json
from blora_pyro.fitting.interrupts import Interrupts
from blora_pyro.languages import is_language
from blora_pyro.models import Base, base_of
from blora_pyro.options import FitConfig
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.pruning import prune
from blora_pyro.posterior.strength import at_strength
from blora_pyro.runs import fits
from blora_pyro.runs.folders import ADAPTER, TRANSCRIPTS
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.loading import Loader
from blora_pyro.runs.record import FINISHED, state_of
from blora_pyro.runs.scoring import DEV_SPLITS, NEW_DOMAIN, Scoring, compare, measure
from blora_pyro.runs.utterances import utterance_rows, write_utterances
from blora_pyro.sources import Source
from blora_pyro.studies.definition import (
    ScoreSpec,
    Setting,
    Study,
    check_study,
    deciding_words,
    to_go_on,
)
from blora_pyro.studies.methods import Candidate
from blora_pyro.studies.plan import Plan
from blora_pyro.studies.results import (
    BASE,
    DEV,
    TEST,
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


class _Steps(Listener):
    """Passes on what concerns the steps of a fit; the stages are the study's own."""

    def __init__(self, listener: Listener) -> None:
        for name in ("features", "note", "ready", "step", "fitted"):
            setattr(self, name, getattr(listener, name))


@dataclass
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

    @cached_property
    def plan(self) -> Plan:
        """Which scores are wanted."""
        return Plan(self.study, lambda spec: self.scores.get(spec.key), self.partial)

    def refresh(self) -> None:
        """Read the scores that are there: of the table, and of other processes' trials.

        Raises:
            UserError: If the table is damaged, or holds a fit of the same name with other options.
        """
        if not self.scores:
            self.scores = {one.key: one for one in read_results(self.results)}
        for trial in self.trials.of(TrialState.COMPLETE) if self.trials else ():
            for row in trial.user_attrs.get(SCORES, ()) if trial.number not in self._read else ():
                one = ScoredFit.from_row(row)
                self.scores[one.key] = one
            self._read.add(trial.number)
        self._check_scores()

    @cached_property
    def _read(self) -> set[int]:
        """Numbers of the trials that have been read."""
        return set()

    def _check_scores(self) -> None:
        """Refuse scores of the plan's names that were made in another way."""
        for spec in self.plan.wanted():
            score = self.scores.get(spec.key)
            if score is None or spec.key in self._checked or spec.candidate.method.external:
                continue
            wanted = spec.scored
            backward = {*self.study.base_config(spec.setting).backward_sets}
            if deciding_words(score.command) != deciding_words(wanted.command):
                what = f"{score.command or 'nothing'}', not '{wanted.command or 'nothing'}"
            elif score.after != wanted.after:
                what = f"{score.after or 'nothing'}', not '{wanted.after or 'nothing'}"
            elif spec.is_base and score.run not in ("", spec.run):
                what = f"{score.run}', not '{spec.run}"
            elif score.counts and {*score.backward_sets} != backward:
                what = f"{', '.join(score.backward_sets)}', not '{', '.join(backward)}"
            else:
                self._checked.add(spec.key)
                continue
            raise UserError(
                f"{self.results} has {spec.title} of '{what}'; give the same options, or another "
                "output"
            )

    @cached_property
    def _checked(self) -> set[Key]:
        return set()

    # ---- all of it

    def run(self) -> None:
        """Make scores until all are there, those of other processes included.

        Raises:
            UserError: If a score can't be made.
            Interrupted: By a signal, with what is safe and how to go on.
        """
        assert self.trials is not None
        try:
            with Interrupts(), self.trials.reached():
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
        """Load every base model once, so that one that can't be is refused before the first fit.

        Raises:
            UserError: If one can't be loaded.
        """
        for setting in reversed(self.study.settings):  # the first is used first
            self._bench(setting).base  # noqa: B018

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
        """Write the table.

        Raises:
            UserError: If it can't be written.
        """
        if self.scores:
            write_results(self.results, self.scores.values())

    # ---- one score

    def score(self, spec: ScoreSpec) -> ScoredFit:
        """Fit, unless that is done, and score, unless that is done.

        Raises:
            UserError, Interrupted: See `fit`.
        """
        bench = self._bench(spec.setting)
        folder = self.output / RUNS / spec.run
        named = replace(spec.scored, commit=commit(), machine=machine(bench.base.net.device))
        named = replace(named, run=spec.run, base_hash=bench.fingerprint)
        self._check_weights(named)
        sets = bench.sets(self.study, spec)  # before the fit: what is wrong with them is told now
        metrics_file, utterances_file = score_files(folder, spec.split, named.after)
        if spec.is_base:
            folder.mkdir(parents=True, exist_ok=True)
            before = bench.before(sets, folder, spec.split)
            write_utterances(utterances_file, utterance_rows(sets, {BASE: before}))
            write_json(metrics_file, {"split": spec.split, "sparsity": {}})
            return scored_run(named, folder)
        if folder.exists() and state_of(folder) is None:  # killed before it had begun, or damaged
            shutil.rmtree(folder)
        try:
            config = FitConfig(**to_go_on(spec.config.given_options, folder))
            steps = _Steps(self.progress)
            run = fits.fit(config, folder, evaluate=False, resume=True, progress=steps)
        except FloatingPointError as error:
            self.progress.note(f"{spec.title}: {error}")
            return replace(named, failed=str(error))
        named = replace(
            named,
            weights=run.posterior.num_weights,
            bytes=(folder / ADAPTER[1]).stat().st_size,
        )
        if not utterances_file.exists() or utterances_file.stat().st_size == 0:
            base_run = replace(spec, candidate=Candidate(self.study.methods[BASE])).run
            before = bench.before(sets, self.output / RUNS / base_run, spec.split)
            posterior = edited(run.posterior, spec.after)
            scoring = Scoring(bench.base, sets, config.normalizer, self.progress)
            after = scoring.score(posterior)
            write_json(metrics_file, compare(posterior, before, after, config, spec.split))
            rows = utterance_rows(sets, {BASE: before, "adapted": after}, posterior)
            write_utterances(utterances_file, rows)
        return scored_run(named, folder)

    def _check_weights(self, scored: ScoredFit) -> None:
        """Refuse a base whose weights are not those of the scores that are there."""
        for one in self.scores.values():
            if one.base == scored.base and one.base_hash not in ("", scored.base_hash):
                raise UserError(
                    f"{self.results} is of another base '{one.base}', whose weights have changed "
                    "since; give another output"
                )

    def _bench(self, setting: Setting) -> "_Bench":
        """Return the base of a setting; only the last one is kept in memory."""
        config = self.study.base_config(setting)
        key = (config.base, config.revision, config.dtype, config.device, config.normalizer)
        if self._benches.keys() != {key}:
            self._benches.clear()
            self._benches[key] = _Bench(config, self.progress)
        return self._benches[key]

    @cached_property
    def _benches(self) -> dict[tuple[object, ...], "_Bench"]:
        return {}


def edited(posterior: Posterior, after: dict[str, float]) -> Posterior:
    """Return the posterior after the step that follows its fit.

    Args:
        posterior: The fitted one.
        after: `sparsity`, the share of the elements of A and B to set to zero, and `strength`, by
            which ΔW is multiplied.
    """
    if sparsity := after.get("sparsity"):
        posterior = prune(posterior, sparsity=sparsity)
    return at_strength(posterior, after.get("strength", 1.0))


class _Bench:
    """A base model, and the sets on which its fits are scored, each loaded once."""

    def __init__(self, config: FitConfig, progress: Listener) -> None:
        self.config, self.progress = config, progress
        self._sets: dict[tuple[str, str], Examples] = {}
        self._before: dict[tuple[str, str], dict[str, Evaluation]] = {}

    @cached_property
    def base(self) -> Base:
        return base_of(self.config)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all weights."""
        total = sha256()
        for name, value in sorted(self.base.net.state_dict().items()):
            total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return total.hexdigest()[:12]

    @cached_property
    def _loader(self) -> Loader:
        return Loader(self.base, self.config, self.progress.features, self.progress.note)

    def sets(self, study: Study, spec: ScoreSpec) -> dict[str, Examples]:
        """Return what a fit is scored on, the new domain first."""
        found = {NEW_DOMAIN: self._load(f"data {spec.data}", study.data[spec.data], spec.split)}
        for name, source in self.config.backward_sets.items():
            language = name if is_language(name) else None
            found[name] = self._load(f"backward {name}", source, spec.split, language)
        return found

    def _load(self, name: str, source: Source, split: str, language: str | None = None) -> Examples:
        if (name, split) not in self._sets:
            known = DEV_SPLITS if split == DEV else (TEST,)
            (first, *_) = [one for one in known if one in split_names(source)]  # see check_study
            self._sets[name, split] = self._loader.load(source, first, language)
        return self._sets[name, split]

    def before(self, sets: dict[str, Examples], folder: Path, split: str) -> dict[str, Evaluation]:
        """Return the base's own errors; transcripts are kept in its run folder."""
        if (folder.name, split) not in self._before:
            folder.mkdir(parents=True, exist_ok=True)
            keep = folder / f"{split}-{TRANSCRIPTS[BASE]}"
            self._before[folder.name, split] = measure(
                self.base, sets, lambda name: None, keep, self.config.normalizer
            )
        return self._before[folder.name, split]


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
        storage: URL of a database (`sqlite:///FILE`, `postgresql+psycopg://...`); None is a file in
            the output.
        study_name: In the database; None is the output's name.
        heartbeat: See `Trials`.
        progress: Told of stages and steps.

    Raises:
        UserError: On bad options or data.
        Interrupted: By a signal.
    """
    output = Path(output)
    run = StudyRun(
        study, output, results or output / "results.csv", progress or Listener(), partial=not work
    )
    check_study(study)
    if work or storage or (output / DATABASE).exists():
        run.trials = Trials(output, METRICS, storage=storage, name=study_name, heartbeat=heartbeat)
    try:
        if work:
            run.run()
        else:
            run.refresh()
    finally:
        if run.trials is not None:
            run.trials.close()
    return run
