"""Which rows a comparison is made of, and which value of every knob is chosen.

The plan unfolds as rows come in: what is scored on the test sets depends on what was chosen on the
dev sets, and a derived method waits for the choice of the method that it is `of`. It is worked out
anew from the rows that are there, so that a comparison can be stopped and started at any moment.
"""

from collections.abc import Callable, Mapping, Sequence

from blora_pyro.comparison.candidates import Candidate
from blora_pyro.comparison.methods import BASE, BAYESIAN, LORA, METHODS, Method, Setting
from blora_pyro.comparison.rows import DEV, TEST, Row, RowSpec

RowOf = Callable[[RowSpec], Row | None]


class Plan:
    """Two stages: all values on dev with the first domain and seed, then the chosen ones on test.

    Attributes:
        methods: By name, parents before children; `base` among them.
        settings: Of the fits.
        domains: Names.
        seeds: Of the fits.
    """

    def __init__(
        self,
        methods: Mapping[str, Method],
        settings: Sequence[Setting],
        domains: Sequence[str],
        seeds: Sequence[int],
        row_of: RowOf,
        *,
        only_choose: bool = False,
        neighbours: bool = True,
        partial: bool = False,
    ) -> None:
        """A plan.

        Args:
            methods: From `choose_methods`.
            settings: One or more.
            domains: One or more; the first is that of the first stage.
            seeds: One or more; the first is that of the first stage.
            row_of: The row of a specification, None if it is not there yet.
            only_choose: End after the first stage.
            neighbours: Score the two values beside the chosen one on the test sets, too.
            partial: Choose among the rows that are there, instead of waiting for all.
        """
        self.methods, self.settings = methods, tuple(settings)
        self.domains, self.seeds = tuple(domains), tuple(seeds)
        self.row_of, self.partial = row_of, partial
        self._only_choose, self._neighbours = only_choose, neighbours

    # ---- the first stage

    def candidates(self, name: str, setting: Setting) -> list[Candidate]:
        """A method at every value of its knob; [] while the choice of its parent is open."""
        method = self.methods[name]
        parent = self.chosen(method.of, setting) if method.of else None
        if method.of and parent is None:
            return []
        return [Candidate(method, value, parent) for value in method.choices]

    def dev_row(self, candidate: Candidate, setting: Setting) -> RowSpec:
        """What a candidate is chosen by."""
        return RowSpec(candidate, setting, self.domains[0], self.seeds[0], DEV)

    def chosen(self, name: str, setting: Setting) -> Candidate | None:
        """The candidate of lowest balanced error on dev, of equals the first; None while open.

        None, too, if every fit failed.
        """
        candidates = self.candidates(name, setting)
        rows = [self.row_of(self.dev_row(one, setting)) for one in candidates]
        if not self.partial and None in rows:
            return None
        found = [
            (row.balanced_error, place)
            for place, row in enumerate(rows)
            if row is not None and not row.failed
        ]
        return candidates[min(found)[1]] if found else None

    # ---- the second stage

    def scored(self, name: str, setting: Setting) -> list[Candidate]:
        """What is scored on the test sets of a method: the chosen candidate, then its neighbours.

        LoRA is scored at the learning rates of the chosen Bayesian candidates, too.
        """
        chosen = self.chosen(name, setting)
        if chosen is None:
            return []
        values = chosen.method.choices
        place = values.index(chosen.value)
        beside = [place - 1, place + 1] if self._neighbours else []
        found = [chosen.value, *(values[one] for one in beside if 0 <= one < len(values))]
        if name == LORA:
            found += [rate for rate in self._bayesian_rates(setting) if rate in values]
        return [Candidate(chosen.method, one, chosen.parent) for one in dict.fromkeys(found)]

    def _bayesian_rates(self, setting: Setting) -> list[float]:
        """Learning rates of the chosen Bayesian candidates."""
        names = [name for name, one in self.methods.items() if one.family in BAYESIAN]
        chosen = [self.chosen(name, setting) for name in names]
        return [one.options["lr"] for one in chosen if one is not None and "lr" in one.options]

    def test_rows(self, candidate: Candidate, setting: Setting) -> list[RowSpec]:
        """A candidate on every domain with every seed; the base model once a domain."""
        seeds = self.seeds[:1] if candidate.method.name == BASE else self.seeds
        return [
            RowSpec(candidate, setting, domain, seed, TEST)
            for seed in seeds
            for domain in self.domains
        ]

    def rows(self) -> list[RowSpec]:
        """All rows that are known to be wanted, in the order in which to make them.

        First those of the first stage; of the second those of chosen values before those of their
        neighbours, and a seed after the other, so that early on there is a whole table.
        """
        known, second = [], []
        for setting in self.settings:
            for name in self.methods:
                known += [self.dev_row(one, setting) for one in self.candidates(name, setting)]
                if self._only_choose:
                    continue
                for place, one in enumerate(self.scored(name, setting)):
                    rows = self.test_rows(one, setting)
                    second += [(place > 0, self.seeds.index(row.seed), row) for row in rows]
        return known + [row for *_, row in sorted(second, key=lambda entry: entry[:2])]

    def waiting(self) -> list[str]:
        """Methods whose first stage is not known yet, since that of their parents is not done."""
        return [
            name
            for name in self.methods
            if not all(self.candidates(name, setting) for setting in self.settings)
        ]

    def most_test_rows(self) -> int:
        """How many rows the second stage can come to, LoRA's further learning rates left out."""
        if self._only_choose:
            return 0
        total = 0
        for method in self.methods.values():
            values = min(len(method.choices), 3 if self._neighbours else 1)
            total += values * (1 if method.name == BASE else len(self.seeds))
        return total * len(self.domains) * len(self.settings)


class RowPlan(Plan):
    """One candidate, as given: nothing is chosen, and it is scored on the test sets."""

    def __init__(
        self,
        candidate: Candidate,
        settings: Sequence[Setting],
        domains: Sequence[str],
        seeds: Sequence[int],
        row_of: RowOf,
    ) -> None:
        """The plan of a candidate, and of the base model beside it."""
        given = (Candidate(METHODS[BASE]), candidate)
        self._given = {one.method.name: one for one in given}
        methods = {name: one.method for name, one in self._given.items()}
        super().__init__(methods, settings, domains, seeds, row_of, neighbours=False)

    def candidates(self, name: str, setting: Setting) -> list[Candidate]:
        """The one that is given."""
        return [self._given[name]]

    def chosen(self, name: str, setting: Setting) -> Candidate | None:
        """The one that is given."""
        return self._given[name]

    def scored(self, name: str, setting: Setting) -> list[Candidate]:
        """The one that is given, which may be at a value that is not among its method's."""
        return [self._given[name]]

    def rows(self) -> list[RowSpec]:
        """Test rows alone."""
        return [
            row
            for setting in self.settings
            for one in self._given.values()
            for row in self.test_rows(one, setting)
        ]
