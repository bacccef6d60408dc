"""A comparison from its options to its last row, by any number of processes."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blora_pyro.comparison.candidates import read_candidate
from blora_pyro.comparison.methods import SETTINGS, Method, choose_methods, read_setting
from blora_pyro.comparison.plan import Plan, RowPlan
from blora_pyro.comparison.rows import RowSpec
from blora_pyro.comparison.study import Study
from blora_pyro.data import DOMAINS
from blora_pyro.errors import Interrupted, UserError
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.record import FINISHED, state_of
from blora_pyro.sources import Source, named_sources
from blora_pyro.sweeps.storages import quiet_optuna

SEEDS = (0, 1, 2)
PATIENCE = 2.0  # seconds until another process's rows are looked for again


@dataclass(frozen=True)
class Comparison:
    """A comparison as far as it has come.

    Attributes:
        study: What its rows have in common.
        plan: Its rows, and what was chosen.
    """

    study: Study
    plan: Plan

    def unmade(self) -> list[RowSpec]:
        """Rows that are known to be wanted and are not there, each once."""
        self.study.store.refresh()
        found: dict[str, RowSpec] = {}
        for spec in self.plan.rows():
            if self.study.row_of(spec) is None:
                found.setdefault(self.study.key_of(spec), spec)
        return [*found.values()]

    def made(self) -> int:
        """How many of the rows that are known to be wanted are there."""
        keys = {self.study.key_of(spec) for spec in self.plan.rows()}
        return sum(self.study.store.get(key) is not None for key in keys)

    def run(self) -> None:
        """Make rows until all are there, those of other processes included.

        Raises:
            UserError: If a row can't be made.
            Interrupted: By a signal, with what is safe and how to go on.
        """
        with self._told():
            while todo := self.unmade():
                if not any(self._try(spec, len(todo)) for spec in self._nearest_first(todo)):
                    time.sleep(PATIENCE)  # all of them are another process's

    def _nearest_first(self, todo: Sequence[RowSpec]) -> list[RowSpec]:
        """Rows whose fit is in the output, then those of new fits, then of fits made elsewhere.

        Fits stay on the machine that made them; another one makes them again, sooner than wait.
        """
        rows = [self.study.row_of(spec) for spec in self.plan.rows()]
        fits = {row.about.get("fit") for row in rows if row is not None}

        def distance(spec: RowSpec) -> int:
            fit = self.study.lock_of(spec)
            here = state_of(self.study.output / "fits" / fit) == FINISHED
            return 0 if here else 1 + (fit in fits)

        return sorted(todo, key=distance)

    def _try(self, spec: RowSpec, left: int) -> bool:
        """Make a row, unless another process does; whether it was made here."""
        study = self.study
        with study.store.locked(study.lock_of(spec)) as mine:
            if not mine:
                return False
            if study.row_of(spec) is None:  # else it was made since we looked
                study.progress.stage(f"{spec.title}; {left} rows to do are known")
                study.make(spec)
            return True

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Interrupted as error:
            message = f"interrupted; {self.made()} rows are safe in {self.study.output}"
            again = "start the same command again to go on"
            raise Interrupted(error.signum, f"{message}; {again}") from None


@quiet_optuna()
def compare_methods(
    output: str | Path,
    *,
    methods: Sequence[str | Method] | None = None,
    domains: Mapping[str, Source] | Sequence[str] = DOMAINS,
    seeds: Sequence[int] = SEEDS,
    settings: Sequence[str] = SETTINGS,
    row: str | None = None,
    only_choose: bool = False,
    neighbours: bool = True,
    work: bool = True,
    storage: str | None = None,
    study_name: str | None = None,
    progress: Listener | None = None,
    **options: Any,
) -> Comparison:
    """Compare methods: choose every knob on dev, score the chosen values on test.

    Rows lie in `output`, and are made once: started again, a comparison goes on where it was, also
    with further methods, domains, seeds or settings. Started several times at once, the processes
    share the work. With a `storage`, machines without a common folder do: all rows come to all of
    them, a fit stays where it was made, and one whose machine dies is made again by another.

    Args:
        output: Folder for rows and fits.
        methods: Of `METHODS`, or of one's own; None is all of them. The base model and LoRA, and
            what a derived method is `of`, are always among them.
        domains: New domains: names of sources, or sources by name. Each needs the splits train,
            dev and test. The first is the one that knobs are chosen on.
        seeds: Of the fits; the first is the one that knobs are chosen with.
        settings: UTTERANCESxSTEPS.
        row: A candidate, METHOD:VALUE, that is scored on the test sets without any choosing.
        only_choose: End after the choice on dev.
        neighbours: Score the two values beside the chosen one on test, too.
        work: Make the rows; off, those that are there are taken.
        storage: URL of a database (`sqlite:///FILE`, `postgresql+psycopg://...`) for an Optuna
            study whose trials are the rows; None is the output alone.
        study_name: In the storage; None is the output's name.
        progress: Told of stages and steps.
        **options: Of `FitConfig`, for all fits: `base`, `backward` (each set with dev and test,
            for replay and EWC with train), `rank`, ...

    Raises:
        UserError: On bad options or data.
        Interrupted: By a signal.
    """
    wanted = [read_setting(one) for one in settings]
    named, seeds = named_sources(domains), list(dict.fromkeys(seeds))
    if not (named and seeds and wanted):
        raise UserError("no domain, seed or setting is given; give one of each, or more")
    study = Study(Path(output), named, options, progress or Listener(), storage, study_name)
    plan: Plan
    if row is not None:
        plan = RowPlan(read_candidate(row), wanted, [*named], seeds, study.row_of)
    else:
        plan = Plan(
            choose_methods(methods),
            wanted,
            [*named],
            seeds,
            study.row_of,
            only_choose=only_choose,
            neighbours=neighbours,
            partial=not work,
        )
    comparison = Comparison(study, plan)
    if work:
        comparison.run()
    return comparison
