"""The tables of a comparison, for a terminal and as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from blora_pyro.comparison.measures import Against, Estimate
from blora_pyro.comparison.standing import Standing

NONE = "–"
MEASURES = (
    "new domain: WER in %, or MER where a language is written without spaces; PIER: of it, at "
    "words of the embedded language; backward: mean error of the held-out sets; forgetting: that "
    "less the base's, in points; ± standard deviation over seeds, [95% interval over utterances]"
)
AGAINST = (
    "backward gain: share of LoRA's backward error that is gone; new-domain drop: by how much the "
    "error on the new domain is higher, as a share of LoRA's; forgetting removed: share of LoRA's "
    "forgetting; in %, paired intervals"
)
MATCHED = (
    "against the curve through the base and all values of a method that were scored, straight "
    "between them: by how many points the backward error is lower at the same new-domain error, "
    "and the other way round; –: the curve does not get there; paired intervals"
)
CHOICE = "balanced: mean of new-domain and backward error, the lowest is chosen; errors in %"


@dataclass(frozen=True)
class Sheet:
    """A table of texts.

    Attributes:
        title: Above it.
        columns: Heads.
        rows: Of as many cells.
        note: Below it.
        marked: Which rows stand out.
        names: How many columns are names, before the figures.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    marked: frozenset[int] = frozenset()
    names: int = 1

    def to_rich(self) -> Group:
        """For a terminal."""
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for place, name in enumerate(self.columns):
            is_name = place < self.names
            table.add_column(name, justify="left" if is_name else "right", no_wrap=place > 0)
        for place, row in enumerate(self.rows):
            cells = [escape(cell.replace(" [", "\n[")) for cell in row]  # else they are too wide
            table.add_row(*cells, style="bold" if place in self.marked else "")
        # A title or a caption of the table's own would be as narrow as the table.
        note = [Text(self.note, style="dim")] if self.note else []
        return Group(Text(f"\n{self.title}", style="bold"), table, *note)

    def to_markdown(self) -> str:
        """As GitHub renders it."""
        head = f"| {' | '.join(self.columns)} |"
        rule = "|".join(
            ["", *["---"] * self.names, *["---:"] * (len(self.columns) - self.names), ""]
        )
        rows = [
            [f"**{cell}**" if cell and place in self.marked else cell for cell in row]
            for place, row in enumerate(self.rows)
        ]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        note = ["", self.note] if self.note else []
        return "\n".join([f"### {self.title}", "", head, rule, *lines, *note, ""])


def sheets(standing: Standing) -> list[Sheet]:
    """All tables of one setting, those that have a row."""
    found = [
        errors_sheet(standing),
        costs_sheet(standing),
        against_sheet("against LoRA at its best learning rate", standing, standing.against_lora),
        against_sheet(
            "against LoRA at the same learning rate, as in the paper", standing, standing.same_rate
        ),
        matched_sheet(standing),
        sets_sheet(standing),
        choice_sheet(standing),
    ]
    return [one for one in found if one.rows]


def errors_sheet(standing: Standing) -> Sheet:
    """A row a method at its chosen value: errors."""
    columns = ("method", "knob", "new domain", "PIER", "backward", "forgetting")
    rows = [
        (
            one.candidate.method.title,
            one.candidate.label,
            spread(one.new_domain),
            spread(one.pier),
            spread(one.backward),
            spread(one.forgetting, "+.1f"),
        )
        for one in standing.chosen_results
    ]
    return Sheet(_title(standing, _amount(standing)), columns, rows, MEASURES, names=2)


def costs_sheet(standing: Standing) -> Sheet:
    """A row a method at its chosen value: sparsity, size, time."""
    columns = ("method", "A", "B", "ΔW", "weights", "MB", "fit, s")
    rows = [
        (
            one.candidate.method.title,
            *(percent(one.sparsity[part]) for part in ("A", "B", "delta_w")),
            f"{one.weights:,}" if one.weights else NONE,
            f"{one.bytes / 1e6:.1f}" if one.bytes else NONE,
            f"{one.seconds:.0f}" if one.weights else NONE,
        )
        for one in standing.chosen_results
    ]
    note = "A, B, ΔW: share of elements below 1e-3 in magnitude, in %; the adapter's file as PEFT's"
    return Sheet(_title(standing, "sparsity, size, time"), columns, rows, note)


def against_sheet(what: str, standing: Standing, found: Mapping[str, Against]) -> Sheet:
    """A row a method at its chosen value, against some LoRA."""
    columns = ("method", "LoRA's knob", "backward gain", "new-domain drop", "forgetting removed")
    rows = [
        (
            one.candidate.method.title,
            one.other.label,
            spread(one.backward_gain, "+.1f"),
            spread(one.new_domain_drop, "+.1f"),
            spread(one.forgetting_removed, "+.1f"),
        )
        for one in found.values()
    ]
    return Sheet(_title(standing, what), columns, rows, AGAINST, names=2)


def matched_sheet(standing: Standing) -> Sheet:
    """A row a Bayesian method at its chosen value and a method that is not, at equal error."""
    columns = ("method", "against", "lower backward error", "lower new-domain error")
    rows = [
        (
            one.candidate.method.title,
            standing.chosen[one.method].method.title,
            spread(one.backward, "+.1f"),
            spread(one.new_domain, "+.1f"),
        )
        for one in standing.matched
    ]
    return Sheet(_title(standing, "at equal error"), columns, rows, MATCHED, names=2)


def sets_sheet(standing: Standing) -> Sheet:
    """A row a method at its chosen value: the error of every set."""
    results = standing.chosen_results
    domains = _names(one.domains for one in results)
    backward = _names(one.sets for one in results)
    rows = [
        (
            one.candidate.method.title,
            *(percent(one.domains.get(name)) for name in domains),
            *(percent(one.sets.get(name)) for name in backward),
        )
        for one in results
    ]
    return Sheet(_title(standing, "error by set, in %"), ("method", *domains, *backward), rows)


def choice_sheet(standing: Standing) -> Sheet:
    """A row a candidate: what was chosen by."""
    columns = ("method", "knob", "new domain", "backward", "balanced", "")
    rows = [
        (
            one.candidate.method.title,
            one.candidate.label,
            *(
                "failed" if error is None else percent(error)
                for error in (one.new_domain, one.backward, one.balanced)
            ),
            "chosen" if one.is_chosen else "",
        )
        for one in standing.choices
    ]
    marked = frozenset(place for place, one in enumerate(standing.choices) if one.is_chosen)
    title = f"{standing.setting.title}: the choice, on dev"
    return Sheet(title, columns, rows, CHOICE, marked, names=2)


def _title(standing: Standing, what: str) -> str:
    on = "" if standing.split == "test" else f" (on {standing.split})"
    return f"{standing.setting.title}: {what}{on}"


def _amount(standing: Standing) -> str:
    """Of how many domains and seeds."""
    places = [place for one in standing.chosen_results for place in one.places]
    domains = list(dict.fromkeys(domain for domain, _ in places))
    seeds = len({seed for _, seed in places})
    return f"{', '.join(domains)}, {seeds} seed{'s' if seeds != 1 else ''}"


def _names(columns: Iterable[Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for one in columns for name in one))


def percent(share: float | None, form: str = ".1f") -> str:
    """A share in percent."""
    return NONE if share is None else format(100 * share, form)


def spread(one: Estimate | None, form: str = ".1f") -> str:
    """A figure in percent, ± deviation and [interval] as far as there are."""
    if one is None or one.value is None:
        return NONE
    text = percent(one.value, form)
    if one.stddev is not None:
        text += f" ±{percent(one.stddev)}"
    if one.interval is not None:
        text += f" [{', '.join(percent(end) for end in one.interval)}]"
    return text
