"""Which scores a study wants, in which order, and which value of each knob is chosen.

The plan unfolds as scores come in: what is scored on the test sets depends on what was chosen on
the dev sets, and a method that builds on another waits for that choice. It is worked out anew from
the scores that are there, so that a study can be stopped and started at any moment.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from blora_pyro.studies.definition import ScoreSpec, Setting, Study
from blora_pyro.studies.methods import BASE, BAYESIAN, LORA, Candidate
from blora_pyro.studies.results import DEV, TEST, Key, ScoredFit


@dataclass(frozen=True)
class Plan:
    """Two stages: all values on dev with the first data set and seed, then the chosen on test.

    Attributes:
        study: What is compared.
        score_of: Returns the score of a specification, None if it is not there yet.
        partial: Choose among the scores that are there, instead of waiting for all.
    """

    study: Study
    score_of: Callable[[ScoreSpec], ScoredFit | None]
    partial: bool = False

    @property
    def names(self) -> list[str]:
        """Names of the methods, parents before children."""
        row = self.study.row
        return (
            [*self.study.methods] if row is None else list(dict.fromkeys([BASE, row.method.name]))
        )

    # ---- the first stage

    def candidates(self, name: str, setting: Setting) -> list[Candidate]:
        """Return a method at every value of its knob; [] while the choice of its parent is open."""
        row = self.study.row
        if row is not None and name == row.method.name:
            return [row]
        method = self.study.methods[name]
        parent = self.chosen(method.of, setting) if method.of else None
        if method.of and parent is None:
            return []
        return [Candidate(method, value, parent) for value in method.choices]

    def dev_score(self, candidate: Candidate, setting: Setting) -> ScoreSpec:
        """Return what a candidate is chosen by."""
        data = next(iter(self.study.data))
        return ScoreSpec(self.study, setting, candidate, data, self.study.seeds[0], DEV)

    def chosen(self, name: str, setting: Setting) -> Candidate | None:
        """Return the candidate of lowest balanced error on dev, of equals the first.

        None while that is open, or if every fit failed.
        """
        candidates = self.candidates(name, setting)
        if self.study.row is not None:
            return candidates[0]
        scores = [self.score_of(self.dev_score(one, setting)) for one in candidates]
        waits = not (self.partial or self.study.methods[name].external)
        if waits and None in scores:
            return None
        found = [
            (score.balanced_error, place)
            for place, score in enumerate(scores)
            if score is not None and not score.failed
        ]
        return candidates[min(found)[1]] if found else None

    # ---- the second stage

    def scored(self, name: str, setting: Setting) -> list[Candidate]:
        """Return what is scored on the test sets: the chosen candidate, then its neighbours.

        LoRA is scored at the learning rates of the chosen Bayesian candidates, too.
        """
        chosen = self.chosen(name, setting)
        if chosen is None or self.study.row is not None:
            return [] if chosen is None else [chosen]
        values = chosen.method.choices
        place = values.index(chosen.value)
        near = [place - 1, place + 1] if self.study.neighbours else []
        found = [chosen.value, *(values[one] for one in near if 0 <= one < len(values))]
        if name == LORA and chosen.method.knob == "lr":
            found += [rate for rate in self._bayesian_rates(setting) if rate in values]
        return [Candidate(chosen.method, one, chosen.parent) for one in dict.fromkeys(found)]

    def _bayesian_rates(self, setting: Setting) -> list[float]:
        bayesian = [name for name in self.names if self.study.methods[name].family in BAYESIAN]
        chosen = [self.chosen(name, setting) for name in bayesian]
        return [one.options["lr"] for one in chosen if one is not None and "lr" in one.options]

    def test_scores(self, candidate: Candidate, setting: Setting) -> list[ScoreSpec]:
        """Return a candidate on every data set with every seed; the base once a data set."""
        study = self.study
        seeds = study.seeds[:1] if candidate.method.name == BASE else study.seeds
        return [
            ScoreSpec(study, setting, candidate, data, seed, TEST)
            for seed in seeds
            for data in study.data
        ]

    def wanted(self) -> list[ScoreSpec]:
        """Return all scores that are known to be wanted, in the order in which to make them.

        First those of the first stage; of the second, those of chosen values before those of their
        neighbours, and one seed after another, so that early on there is a whole table.
        """
        first: list[ScoreSpec] = []
        second: list[tuple[bool, int, ScoreSpec]] = []
        study = self.study
        for setting in study.settings:
            for name in self.names:
                if study.row is None:
                    first += [
                        self.dev_score(one, setting) for one in self.candidates(name, setting)
                    ]
                if study.only_choose:
                    continue
                for place, one in enumerate(self.scored(name, setting)):
                    specs = self.test_scores(one, setting)
                    second += [(place > 0, study.seeds.index(one.seed), one) for one in specs]
        ordered = first + [spec for *_, spec in sorted(second, key=lambda entry: entry[:2])]
        unique: dict[Key, ScoreSpec] = {}
        for spec in ordered:  # the base's is wanted in every setting
            unique.setdefault(spec.key, spec)
        return [*unique.values()]

    def missing(self) -> list[ScoreSpec]:
        """Return the wanted scores that are not there and are to be made here."""
        return [
            one
            for one in self.wanted()
            if self.score_of(one) is None and not one.candidate.method.external
        ]

    def waiting(self) -> list[str]:
        """Return the methods that wait for the choice of what they build on."""
        settings = self.study.settings
        return [
            name for name in self.names if not all(self.candidates(name, one) for one in settings)
        ]

    def describe(self, finished_runs: Sequence[str]) -> Iterator[str]:
        """Yield lines for `--dry-run`: what is done and to do.

        Args:
            finished_runs: Names of the run folders whose fits are finished.
        """
        study, wanted, missing = self.study, self.wanted(), self.missing()
        settings = ", ".join(dict.fromkeys(one.name or one.base for one in study.settings))
        yield (
            f"{len(self.names)} methods, settings {settings}, data {', '.join(study.data)}, "
            f"seeds {', '.join(map(str, study.seeds))}"
        )
        runs = {one.run for one in missing if not one.is_base} - {*finished_runs}
        done = len(wanted) - len(missing)
        yield f"rows known: {done} done, {len(missing)} to do, with {len(runs)} fits to make"
        if waiting := self.waiting():
            yield f"not known yet, until what they build on is chosen: {', '.join(waiting)}"
        if most := self.most_test_scores():
            yield f"the second stage comes to {most} rows or so"
        yield from (f"to do: {one.title}" for one in missing)

    def most_test_scores(self) -> int:
        """Return how many scores the second stage can come to, LoRA's further rates left out."""
        study = self.study
        if study.only_choose or study.row is not None:
            return 0
        total = 0
        for method in study.methods.values():
            values = min(len(method.choices), 3 if study.neighbours else 1)
            total += values * (1 if method.name == BASE else len(study.seeds))
        return total * len(study.data) * len(study.settings)
