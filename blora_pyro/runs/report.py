"""Tables of a run's metrics, for terminal and model card, and its errors word by word."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from blora_pyro.errors import printable
from blora_pyro.options import AVERAGE
from blora_pyro.posterior.strength import SCALE
from blora_pyro.runs.scoring import NEW_DOMAIN, OTHER_DATA
from blora_pyro.runs.utterances import worst
from blora_pyro.tables import Part, Percent, Table, figure_columns, number, percent, text_columns

FREQUENT = 8  # kinds of errors that are counted in the last line
LABELS = ("REF", "HYP", "")
INSERTIONS = 12  # running that are shown of a loop
GAP = "  "
NOTHING_MEASURED = "no test set and no backward sets: nothing was measured"
STATES = ("base", "adapted", "change")  # of the rates in `metrics.json`

AlignedWord = tuple[str, str, str]  # reference, hypothesis, and the kind of error, one above other


def fit_tables(metrics: Mapping[str, Any], sizes: bool = False) -> list[Part]:
    """Return table and lines of `metrics.json`: rates in percent with 95% bootstrap intervals.

    Args:
        metrics: Its content.
        sizes: Show how many utterances and words every set has.
    """
    alarm = [alarm_line(metrics["alarm"])] if "alarm" in metrics else []
    parts = [*alarm, *_rate_tables(metrics, ("base", "adapted"), sizes)]
    if len(parts) == len(alarm):
        return [*alarm, NOTHING_MEASURED]
    if "strength" in metrics:
        parts.append(f"adapted: at strength {metrics['strength']:g} by {metrics['strength_by']}")
    if contract := metrics.get("contract"):
        parts += contract_lines(contract, metrics.get("split", "test"))
    if average := metrics.get("backward_error"):
        change, _, interval = str(Percent.of(average["change"])).partition(" ")
        figures = f"{change} points {interval}".strip()
        parts.append(f"forgetting: {figures} on the backward average")
    shares = metrics["sparsity"]
    parts.append(
        "sparsity (share of |w| < 1e-3 at the posterior mean): "
        f"A {shares['A']:.1%}, B {shares['B']:.1%}, ΔW {shares['delta_w']:.1%}"
    )
    return [*parts, *beyond_tables(metrics["beyond"])] if "beyond" in metrics else parts


BEYOND = {  # measures of `measure_beyond`, and what they count
    "language": "language taken for another",
    "capital": "no capital at the start",
    "punctuation": "no punctuation at the end",
    "timestamps": "last timestamp off the base's by over 0.2 s",
    "silence": "words in silence or noise",
}


def beyond_tables(beyond: Mapping[str, Any]) -> list[Part]:
    """Return a table of `measure_beyond`: shares in percent, and the chrF of translations."""
    table = Table(
        [*text_columns("beyond the words"), *figure_columns("base", "adapted", "change")],
        "share of utterances in % [95% interval]",
        grid=True,
    )
    for key, title in BEYOND.items():
        if found := beyond.get(key):
            table.add_row(
                title, *(Percent.of(found[one]) if one in found else None for one in STATES)
            )
    for name, score in beyond.get("translation", {}).items():
        table.add_row(f"translation of {name}: chrF to the base's", 100.0, round(score, 1), None)
    counts = sum(beyond["utterances"].values())
    return [table, f"beyond the words: {counts} utterances of the backward sets, evenly spaced"]


def contract_lines(contract: Mapping[str, Any], split: str = "test") -> list[Part]:
    """Return lines on whether a contract holds on the sets of a split, and at which strength."""
    strength, lost = contract["strength"], contract["losses"]
    sets = {name: loss for name, loss in lost.items() if name != AVERAGE}
    worst = max(sets, key=lambda name: sets[name])
    held = "kept" if contract["holds"] else "NOT kept"
    own = "".join(
        f", {name} {percent(lost[name], '+.1f')}"
        for name in contract["limits"]
        if name in sets and name != worst
    )
    return [
        f"contract: {limits_text(contract['limits'])}; strength {strength:g} was chosen on dev"
        + ("" if strength else ": the base, for none other keeps it and gains on the new domain"),
        f"contract on {split}: {held}; average {percent(lost[AVERAGE], '+.1f')} points, the most "
        f"on {worst}, {percent(sets[worst], '+.1f')}{own}",
    ]


def limits_text(limits: Mapping[str, float]) -> str:
    """Return the limits of a contract, fractions by name, in words."""
    parts = [f"{name} at most +{100 * limit:g}" for name, limit in limits.items()]
    return f"{', '.join(parts)} points"


def kept_line(kept: Mapping[str, Any]) -> str:
    """Return a line on the strength that was chosen on dev; see `contracts.keep_contract`."""
    limits, chosen = limits_text(kept["limits"]), kept["strength"]
    if not chosen:
        return (
            f"no strength keeps the contract ({limits}) on dev and lowers the new domain's error: "
            "the base comes out"
        )
    point = next(one for one in kept["curve"]["points"] if one["strength"] == chosen)
    error, lost = point["new_domain"]["rate"], kept["losses"][AVERAGE]
    how = kept["curve"].get("strength_by", SCALE)
    by = "" if how == SCALE else f" by {how}"
    return (
        f"strength {chosen:g}{by} keeps the contract ({limits}) on dev: average "
        f"{percent(lost, '+.1f')} points, new domain {percent(error)}%"
    )


def error_changes(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Yield the main errors before and after, in percent: "WER 44.7 -> 15.4"."""
    both = metrics.get(NEW_DOMAIN)
    if both is not None:
        measure = both["base"]["metric"]
        rates = [both[state][measure] for state in ("base", "adapted")]
        yield f"{measure.upper()} {' -> '.join(percent(rate['rate']) for rate in rates)}"
    if average := metrics.get("backward_error"):
        rates = [average[state] for state in ("base", "adapted")]
        yield f"backward {' -> '.join(percent(rate['rate']) for rate in rates)}"


def alarm_line(alarm: Mapping[str, Any]) -> str:
    """Return a line on the alarm that ended a fit."""
    kept = f"the posterior of step {alarm['kept_step']}" if alarm["kept_step"] else "its start"
    return f"ALARM, the fit ended early at step {alarm['step']} with {kept}: {alarm['reason']}"


def dev_line(dev: Mapping[str, Any]) -> str:
    """Return a line on the best step of a fit with a dev set, and how far the fit went."""
    errors = {one["step"]: one["error"] for one in dev["errors"]}
    best, last = dev["best_step"], max(errors)
    end = "of" if dev["ended_by"] == "steps" else "stopped early, after"
    return f"dev error {errors[best]:.1%} after step {best}, the best; {end} {last} steps"


def prune_tables(metrics: Mapping[str, Any], sizes: bool = False) -> list[Part]:
    """Return rates of the full and of the pruned adapter, and their sizes; see `fit_tables`."""
    full, pruned = metrics["size"]["full"], metrics["size"]["pruned"]
    share = 1 - pruned["nonzero_weights"] / full["adapter_weights"]
    size = (
        f"{pruned['nonzero_weights']:,} of {full['adapter_weights']:,} adapter weights are left "
        f"({share:.1%} pruned): {pruned['directions']:,} of {full['directions']:,} directions, in "
        f"{pruned['layers']} of {full['layers']} layers"
    )
    rates = _rate_tables(metrics, ("full", "pruned"), sizes) if "backward" in metrics else []
    return [*rates, size]


def combine_line(found: Mapping[str, Any]) -> str:
    """Return a line on the adapter of `combine_runs`, and how much of the updates it keeps."""
    how = found["method"]
    if found["weights"] is not None:
        how += " by " + ", ".join(f"{one:g}" for one in found["weights"])
    return (
        f"{how} of {len(found['from'])} runs at rank {found['rank']}, "
        f"{found['adapter_weights']:,} adapter weights: {found['kept_norm']:.2%} of the Frobenius "
        "norm of ΔW is kept"
    )


def strength_tables(curve: Mapping[str, Any]) -> list[Part]:
    """Return a table of a strength curve, with a row for each strength."""
    domain = f"new domain {curve['new_domain']}\n{curve['metric'].upper()}"
    heads = ["strength", domain, "backward average", "forgetting", "forgetting\nremoved"]
    loops = [sum(point.get("loops", {}).values()) for point in curve["points"]]
    heads += ["loops"] if any(loops) else []
    title = f"error in % [95% interval] on the {curve['split']} sets, by {curve['strength_by']}"
    table = Table(figure_columns(*heads, wrap=True), title, grid=True)
    names = {0.0: "base 0", 1.0: "fit 1"}
    for point, count in zip(curve["points"], loops, strict=True):
        table.add_row(
            names.get(point["strength"], f"{point['strength']:g}"),
            *(Percent.of(point[key]) for key in ("new_domain", "backward_error", "forgetting")),
            number(point["forgetting_removed"], ".0%"),
            *([count] if any(loops) else []),
        )
    notes = []
    for point in curve["points"]:
        sets = {"the new domain": point["new_domain"], **point.get("backward", {})}
        shown = f"strength {point['strength']:g}"
        notes += [above_all(shown, name) for name, one in sets.items() if is_above_all(one)]
    fit = next(one["forgetting"] for one in curve["points"] if one["strength"] == 1)
    low = fit["interval"][0]
    doubt = "" if low is None or low > 0 else "; the fit's own forgetting may be chance"
    removed = f"forgetting removed: of that at strength 1{doubt}"
    return [table, *notes, removed, *([f"plot: {curve['plot']}"] if "plot" in curve else [])]


def _rate_tables(
    metrics: Mapping[str, Any], states: tuple[str, str], sizes: bool = False
) -> list[Part]:
    """Return rates of two states of the model, and their change; nothing if none was measured."""
    domains = {f"domain {name}": one for name, one in metrics.get("domains", {}).items()}
    if domain := metrics.get(NEW_DOMAIN):
        domains[f"new domain {domain['name']}"] = domain
    if other := metrics.get(OTHER_DATA):
        domains[other["name"]] = other
    if not domains and not metrics["backward"]:
        return []
    sets = " on the dev sets" if metrics.get("split") == "dev" else ""
    table = Table(
        [*text_columns("set", "measure"), *figure_columns(*states, "change", wrap=True)],
        f"error in % [95% interval]{sets}, before and after",
        grid=True,
    )
    for name, domain in domains.items():
        for index, measure in enumerate(domain["change"]):
            rates = [domain[state][measure] for state in STATES]
            shown = "" if index else _sized(name, domain) if sizes else name
            _add_rates(table, shown, measure.upper(), rates)
        _add_loops(table, domain)
        table.add_section()
    for name, both in metrics["backward"].items():
        measure = both["base"]["metric"]
        shown = f"drift ({measure.upper()})" if both.get("drift") else measure.upper()
        label = _sized(f"backward {name}", both) if sizes else f"backward {name}"
        _add_rates(table, label, shown, [both[state][measure] for state in STATES])
        _add_loops(table, both)
    if average := metrics.get("backward_error"):
        _add_rates(table, "backward average", "", [average[state] for state in STATES])
    measured = domains | {f"backward {name}": both for name, both in metrics["backward"].items()}
    notes = list(_above_all(measured, states))
    if any(both.get("drift") for both in metrics["backward"].values()):
        notes.append("drift: against what the base itself says, for the set has no texts")
    if heard := metrics.get("heard"):  # runs of old versions do not say it
        notes.append(f"heard: {heard}")
    if not (normalizer := metrics.get("normalizer")):  # runs of old versions had no choice
        return [table, *notes]
    return [table, *notes, f"normalizer: {normalizer}; raw is without it, shown where that differs"]


def _sized(name: str, both: Mapping[str, Any]) -> str:
    """Return the name of a set with its numbers of utterances and words, as far as they are known.

    The words are those of the references, counted by the set's measure.
    """
    about, units = both["base"], {"cer": "characters", "mer": "words and characters"}
    counts = {
        "utterances": about.get("utterances"),
        units.get(about["metric"], "words"): about.get("length"),
    }
    known = [f"{count:,} {unit}" for unit, count in counts.items() if count is not None]
    return f"{name} ({', '.join(known)})" if known else name


def _add_rates(table: Table, name: str, measure: str, rates: Sequence[Mapping[str, Any]]) -> None:
    """Add a row of normalised rates, and below it one of the raw rates, if they differ."""
    cells = [Percent.of(rate) for rate in rates]
    table.add_row(name, measure, *cells)
    raw = [Percent.of(rate["raw"]) for rate in rates] if all("raw" in one for one in rates) else []
    if raw and [*map(str, raw)] != [*map(str, cells)]:
        table.add_row("", f"raw {measure}".strip(), *raw, emphasis="dim")


def _add_loops(table: Table, both: Mapping[str, Any]) -> None:
    """Add a row with the number of transcripts that repeat themselves, if there are any."""
    counts = [both[state].get("loops", 0) for state in STATES[:2]]
    if any(counts):
        texts = [f"{count} loop{'s' * (count != 1)}" for count in counts]
        table.add_row("", "", *texts, f"{counts[1] - counts[0]:+d}", emphasis="dim")


def _above_all(sets: Mapping[str, Mapping[str, Any]], states: Sequence[str]) -> Iterator[str]:
    """Yield a line for each set of which a state has more errors than there is to say."""
    for name, both in sets.items():
        for state, shown in zip(STATES, states, strict=False):
            if is_above_all(both[state][both[state]["metric"]]):
                yield above_all(shown, name)


def is_above_all(rate: Mapping[str, Any]) -> bool:
    """Tell whether there are more errors than there is to say."""
    return rate["rate"] is not None and rate["rate"] > 1


def above_all(what: str, name: str) -> str:
    """Return the line on an error rate above 100% of a model on a set."""
    return f"above 100%: {what} on {name}, which makes up more than was said"


class ShownStep(NamedTuple):
    """A step of an alignment in printable words; `mark` is `S`, `D` or `I`, or "" if it is right.

    `is_point` says that it counts in PIER.
    """

    mark: str
    reference: str
    hypothesis: str
    is_point: bool


def shown_steps(row: Mapping[str, Any]) -> list[ShownStep]:
    """Return the steps of a row of `utterance_rows`, of a loop no more than its beginning."""
    steps: list[ShownStep] = []
    inserted = 0  # running
    for operation, reference, hypothesis, *pier in row["alignment"]:
        inserted = inserted + 1 if operation == "I" else 0
        if inserted > INSERTIONS:
            more = f"... {inserted - INSERTIONS + 1} more"
            steps[-1] = ShownStep("I", "", more, False)
            continue
        mark = operation.strip("=")
        steps.append(ShownStep(mark, printable(reference), printable(hypothesis), bool(pier)))
    return steps


class AlignedText:
    """A row's alignment, in blocks of lines that fit the terminal's width."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        """Take a row of `utterance_rows`."""
        self.words: list[AlignedWord] = [
            (one.reference, one.hypothesis, one.mark + "*" * (one.mark != "" and one.is_point))
            for one in shown_steps(row)
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Yield lines of reference, hypothesis and kinds of errors."""
        width = options.max_width - len(LABELS[0]) - len(GAP)
        for block in _blocks(self.words, width):
            for index, label in enumerate(LABELS):
                line = Text(f"{label:3}", style="dim", no_wrap=True)
                for word in block:
                    style = "bold red" if word[2] else "default not dim"
                    pad = " " * (_width(word) - cell_len(word[index]))
                    line.append(GAP).append(word[index], style).append(pad)
                line.rstrip()
                if line.plain.strip():
                    yield line


def error_view(rows: Sequence[dict[str, Any]], top: int) -> list[RenderableType]:
    """Return the `top` utterances with the most errors, word above word.

    `rows` are those of `utterance_rows`; the most frequent errors are counted in all of them.
    """
    shown = worst(rows, top)
    if not shown:
        return [f"no errors in {len(rows)} utterances"]
    wrong = sum(row["edits"] > 0 for row in rows)
    parts: list[RenderableType] = [
        f"{rows[0]['state']}: errors in {wrong} of {len(rows)} utterances; the worst {len(shown)}:"
    ]
    for row in shown:
        parts += [Text(), *_utterance_title(row), AlignedText(row)]
    edits = Counter(
        (step[1] or "(nothing)", step[2] or "(nothing)")
        for row in rows
        for step in row["alignment"]
        if step[0] != "="
    )
    frequent = ", ".join(
        f"{printable(reference)} → {printable(hypothesis)} ({count})"
        for (reference, hypothesis), count in edits.most_common(FREQUENT)
    )
    notes = "S substitution, D deletion, I insertion"
    if any(len(step) > 3 for row in shown for step in row["alignment"]):
        notes += ", * counts in PIER"
    return [*parts, Text(f"\nmost frequent: {frequent}"), Text(notes, style="dim")]


def change_view(
    found: Mapping[str, Sequence[dict[str, Any]]], how: str, top: int
) -> list[RenderableType]:
    """Return what adaptation changed by set, and the utterances and words of one kind.

    Args:
        found: See `utterances.changed`.
        how: `broken` or `fixed`.
        top: Utterances shown.
    """
    columns = [*text_columns("set", wrap=False), *figure_columns("broken", "fixed")]
    table = Table(columns, "utterances that adaptation changed, and their words")
    for name in dict.fromkeys(row["set"] for some in found.values() for row in some):
        own = [[row for row in some if row["set"] == name] for some in found.values()]
        sizes = [f"{len(some)} ({sum(abs(row['change']) for row in some)})" for some in own]
        table.add_row(name, *sizes)
    rows = found[how]
    if not rows:
        return [*([table] if table.rows else []), f"nothing was {how}"]
    parts: list[RenderableType] = [table, f"{how}, the {min(top, len(rows))} most changed:"]
    for row in rows[:top]:
        parts += [Text(), *_utterance_title(row)]
        for state, one in (("base", row["base"]), ("adapted", row)):
            parts += [Text(state, style="dim"), AlignedText(one)]
    words = Counter(word for row in rows for word in row["words"]).most_common(FREQUENT)
    frequent = ", ".join(f"{printable(word)} ({count})" for word, count in words)
    return [*parts, Text(f"\nmost often {how}: {frequent or 'no word, only insertions'}")]


def _utterance_title(row: Mapping[str, Any]) -> list[Text]:
    """Return a line with the error rates, and one with the recording and its segment."""
    rate = f"{row['metric'].upper()} {row['edits']}/{row['length']}"
    if pier := row.get("pier"):
        rate += f", PIER {pier['edits']}/{pier['length']}"
    recording = printable(row["audio"] or row["origin"])
    start, end = row.get("start"), row.get("end")
    if start is not None or end is not None:
        recording += f", {start or 0:g} s to " + ("its end" if end is None else f"{end:g} s")
    return [Text(f"{rate}  {printable(row['set'])}"), Text(recording, "dim", overflow="fold")]


def _width(word: AlignedWord) -> int:
    return max(map(cell_len, word))


def _blocks(words: Sequence[AlignedWord], width: int) -> Iterator[list[AlignedWord]]:
    """Yield the words in blocks, each no wider than `width` unless it is one word."""
    block: list[AlignedWord] = []
    used = 0
    for word in words:
        needed = _width(word) + len(GAP)
        if block and used + needed > width:
            yield block
            block, used = [], 0
        block.append(word)
        used += needed
    if block:
        yield block
