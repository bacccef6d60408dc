"""What the terminal shows of a diagnosis, of the prior families, and of checked data."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from blora_pyro.diagnostics.data_check import REFUSED, DataCheck, SetCheck
from blora_pyro.diagnostics.explanations import Shrinkage
from blora_pyro.diagnostics.khat import Khat, loo_meaning
from blora_pyro.diagnostics.layers import KindSummary, LayerPosition
from blora_pyro.diagnostics.row_notes import NOTES
from blora_pyro.diagnostics.summaries import Summary
from blora_pyro.families import AUTO_LOWRANK
from blora_pyro.guides import Argument, FamilyReport
from blora_pyro.tables import NONE, Part, Table, figure_columns, number, percent, text_columns

TOP = 5  # layers shown one by one
SHOWN_VALUES = 4  # singular values shown of each
EXAMPLES = 3  # findings shown of a kind and a set
CHARACTERS = 8  # the same of characters


@dataclass(frozen=True)
class Diagnosis:
    """What `blora-pyro diagnose` shows of the fit in the folder `run`; `plots` are its files."""

    run: Path
    beta: float
    num_weights: int
    summary: Summary
    kinds: tuple[KindSummary, ...]
    shrinkage: Shrinkage
    explanation: str
    khat: Khat
    plots: tuple[Path, ...]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON has it: infinite values and NaN are None."""
        content = asdict(self)
        content["summary"]["kl"] = self.summary.kl
        return _as_json(content)


def _as_json(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _as_json(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_as_json(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return str(content) if isinstance(content, Path) else content


def figure_tables(found: Diagnosis) -> list[Part]:
    """Return header, tables and explanations, which `blora-pyro diagnose` shows first."""
    parts: list[Part] = [*_header(found), "", kinds_table(found.kinds), _layers_table(found)]
    return [*parts, Text(f"How this prior shrinks. {found.explanation}\n")]


def closing_lines(found: Diagnosis) -> list[Part]:
    """Return lines on k-hat, LOO and plots, which take longer than the figures."""
    khat = found.khat
    text = khat.meaning
    if khat.value is not None:
        value = f"{khat.value:.2f}" if math.isfinite(khat.value) else "infinite"
        text = (
            f"{value} ({khat.draws} draws, {khat.utterances} of {khat.of_utterances} "
            f"training utterances). {text}"
        )
    parts: list[Part] = [Text(f"k-hat of the fit: {text}")]
    if khat.loo is not None:
        parts.append(Text(f"leave one out (PSIS-LOO of these utterances): {loo_meaning(khat.loo)}"))
    if found.plots:
        names = ", ".join(path.name for path in found.plots if path.suffix == ".png")
        parts.append(f"\nplots (and as .pdf) in {found.plots[0].parent}: {names}")
    return parts


def _header(found: Diagnosis) -> list[str]:
    summary = found.summary
    arguments = ", ".join(f"{name} {value}" for name, value in summary.prior_args.items())
    lines = [
        f"{found.run}: prior {summary.prior} ({arguments}), guide {summary.guide}, rank "
        f"{summary.rank}, beta {found.beta:.3g}, {found.num_weights:,} adapter weights"
    ]
    if all(row.kl is None for row in summary.factors):
        return [*lines, "KL(q || p): infinite, as of every point estimate"]
    weights = sum(row.weights for row in summary.factors if row.kl is not None)
    text = f"KL(q || p): {summary.kl:,.0f} nats, {summary.kl / weights:.3f} a weight"
    if summary.scales_kl:
        text += f"; {sum(summary.scales_kl.values()) / summary.kl:.1%} of it is the prior's scales"
    if summary.guide == AUTO_LOWRANK:
        text += "; of each weight alone, to which their correlations add"
    if any(row.kl is None for row in summary.factors):
        text += "; without the factors that are points"
    return [*lines, text]


def kinds_table(kinds: Sequence[KindSummary]) -> Table:
    """Return the figures of every kind of layer."""
    has_ranks = any(row.active_ranks["A"] is not None for row in kinds)
    heads = ["contrac-\ntion", "|mean|\n/ sd", "near 0", "KL\nnats", "a\nweight", "share"]
    heads += ["eff.\nrank", "dirs\n> sd", "‖ΔW‖\n%", *(["active\nranks"] if has_ranks else [])]
    table = Table(
        [*text_columns("", wrap=False), *figure_columns(*heads)],
        "by kind of layer (two figures: A and B)",
        captions=[
            "sd: posterior standard deviation; near 0: share with |mean| < 0.001; dirs > sd: "
            "directions of ΔW above their sd; ‖ΔW‖: in % of the frozen weight's norm"
        ],
    )
    for row in kinds:
        active_ranks = [_pair(row.active_ranks, ".1f")] if has_ranks else []
        table.add_row(
            row.kind.removesuffix("_proj"),
            _pair(row.contraction, ".2f"),
            _pair(row.signal_to_noise, ".2f"),
            f"{row.near_zero:.0%}",
            " ".join(map(_nats, row.kl.values())),
            number(row.kl_per_weight, ".3f"),
            number(row.kl_share, ".1%"),
            f"{row.effective_rank:.1f}",
            number(row.directions, ".1f"),
            percent(row.relative_norm),
            *active_ranks,
        )
    return table


def _layers_table(found: Diagnosis) -> Table:
    heads = ("‖ΔW‖", "dirs > sd", "largest singular values of ΔW ± sd")
    columns = [*text_columns("", wrap=False), *figure_columns(*heads)]
    table = Table(columns, "the layers with the largest ΔW")
    for row in sorted(found.summary.updates, key=lambda row: -row.norm)[:TOP]:
        is_point = not any(row.singular_stddevs)
        values = [*zip(row.singular_values, row.singular_stddevs, strict=True)][:SHOWN_VALUES]
        table.add_row(
            LayerPosition.of(row.module).label,
            f"{row.norm:.2f}",
            None if is_point else f"{row.directions} of {len(row.singular_values)}",
            ", ".join(f"{v:.3f}" if is_point else f"{v:.3f} ± {s:.3f}" for v, s in values),
        )
    return table


def _nats(kl: float | None) -> str:
    if kl is None:
        return NONE
    if kl < 1e4:
        return f"{kl:,.0f}"
    return f"{kl / 1e3:.1f}k" if kl < 1e6 else f"{kl / 1e6:.2f}M"


def _pair(values: Mapping[str, float | None], form: str) -> str:
    """Return the figures of A and of B."""
    return " ".join(number(value, form) for value in values.values())


def prior_tables(families: Mapping[str, tuple[str, tuple[Argument, ...]]]) -> list[Part]:
    """Return every prior family by name, what it is, its arguments and their defaults."""
    columns = [*text_columns("prior", "argument", wrap=False), *figure_columns("default")]
    table = Table([*columns, *text_columns("what")], "prior families", grid=True)
    for name, (summary, arguments) in families.items():
        table.add_row(name, "", "", summary, emphasis="bold")
        for one in arguments:
            table.add_row("", one.name, f"{one.default}", one.description)
        table.add_section()
    return [
        table,
        "fit with one: blora-pyro fit --prior student-t --prior-arg df=3 --prior-arg scale=0.05",
        "your own: --prior PATH.py, a file with classes Prior and Guide; see "
        "docs/your_own_prior.md",
    ]


def family_tables(report: FamilyReport) -> list[Part]:
    """Return the checks of a prior family, and what is wrong with it."""
    table = Table(text_columns("check", "", "found"), f"checks of {report.family}")
    for one in report.checks:
        table.add_row(one.name, "passed" if one.passed else "failed", one.message)
    return [table, "it keeps the contract" if report.passed else "see docs/your_own_prior.md"]


def data_check_tables(found: DataCheck) -> list[Part]:
    """Return the sets, what a fit would refuse in them, and what is worth knowing."""
    refused = _findings_table(found, REFUSED, "a fit would refuse")
    notes = _findings_table(found, NOTES, "worth knowing; a fit takes it")
    bad = sum(one.refused_rows for one in found.sets)
    end = "a fit would take every row"
    if found.base is None:
        end += ", if its base takes their languages, lengths and characters: --base tells"
    if found.fast:
        end += ", if it can use the audio, which was not opened (--fast)"
    if bad:
        end = f"a fit would stop at {bad:,} bad rows; --on-bad-row skip leaves them out"
    return [_sets_table(found), *(table for table in (refused, notes) if table.rows), end]


def _sets_table(found: DataCheck) -> Table:
    heads = ("rows", "hours", "seconds\nmin", "\nmedian", "\nmax")
    text = text_columns("Hz", "channels", "languages")
    title = "data, checked without a base"
    if found.window is not None:
        title = f"data for the base {found.base}, which takes {found.window:g} s at a time"
    table = Table([*text_columns("set"), *figure_columns(*heads), *text], title)
    for one in found.sets:
        lengths = [f"{value:.2f}" for value in (one.seconds or {}).values()] or [NONE] * 3
        counts = [_listed(counts) for counts in (one.sampling_rates, one.channels, one.languages)]
        table.add_row(one.name, f"{one.rows:,}", f"{one.hours:.2f}", *lengths, *counts)
    return table


def _listed(counts: Mapping[Any, int]) -> str:
    """Return values and how often they come; a single value needs no number."""
    if len(counts) == 1:
        return f"{next(iter(counts)) or 'none'}"
    return ", ".join(f"{value or 'none'}: {count:,}" for value, count in counts.items())


def _findings_table(found: DataCheck, kinds: Mapping[str, str], title: str) -> Table:
    text = text_columns("what was found, with examples")
    table = Table([*text_columns("set"), *figure_columns("number"), *text], title)
    for one in found.sets:
        for index, (kind, count) in enumerate(one.count(kinds).items()):
            table.add_row("" if index else one.name, f"{count:,}", kinds[kind], emphasis="bold")
            for example in _examples(one, kind):
                table.add_row("", "", example)
    return table


def _examples(one: SetCheck, kind: str) -> list[str]:
    rows = [row for row in one.findings if row.kind == kind]
    if kind in ("characters", "bytes"):
        return ["; ".join(row.message for row in rows[:CHARACTERS])]
    origins: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        origins[row.message].append(row.origin)
    return [
        f"{places[0]}{f' and {len(places) - 1:,} more' if places[1:] else ''}: {message}"
        for message, places in [*origins.items()][:EXAMPLES]
    ]
