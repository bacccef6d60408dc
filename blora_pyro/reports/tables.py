"""What the terminal shows: a progress bar, the table of a fit, a diagnosis, the priors."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from blora_pyro.diagnostics.layers import Place
from blora_pyro.guides import Argument
from blora_pyro.runs.outcomes import NEW_DOMAIN

if TYPE_CHECKING:  # `fit` needs no plots
    from blora_pyro.runs.diagnosis import Diagnosis, KindSummary

TOP = 5  # layers shown one by one
SHOWN_VALUES = 4  # their singular values


def fit_tables(metrics: dict[str, Any]) -> list[Table | str]:
    """Table and lines of `metrics.json`: rates in percent with 95% bootstrap intervals."""
    lines = _rate_tables(metrics, ("base", "adapted"))
    if not lines:
        return ["no test set and no backward sets: nothing was measured"]
    if "strength" in metrics:
        lines.append(f"adapted: at strength {metrics['strength']:g} by {metrics['strength_by']}")
    if average := metrics.get("backward_error"):
        change = average["change"]
        lines.append(
            f"forgetting: {_signed(change['difference'])} points {_interval(change)} "
            "on the backward average"
        )
    shares = metrics["sparsity"]
    lines.append(
        "sparsity (share of |w| < 1e-3 at the posterior mean): "
        f"A {shares['A']:.1%}, B {shares['B']:.1%}, ΔW {shares['delta_w']:.1%}"
    )
    return lines


def dev_line(dev: dict[str, Any]) -> str:
    """Which posterior a fit with a dev set ended with, and how far the fit went."""
    errors = {one["step"]: one["error"] for one in dev["errors"]}
    best, last = dev["best_step"], max(errors)
    end = "stopped early, after" if dev["ended_by"] == "patience" else "of"
    return f"dev error {errors[best]:.1%} after step {best}, the best; {end} {last} steps"


def prune_tables(metrics: dict[str, Any]) -> list[Table | str]:
    """What `prune_run` found: the sizes, and the rates of the full and of the pruned adapter."""
    full, pruned = metrics["size"]["full"], metrics["size"]["pruned"]
    share = 1 - pruned["nonzero_weights"] / full["adapter_weights"]
    size = (
        f"{pruned['nonzero_weights']:,} of {full['adapter_weights']:,} adapter weights are left "
        f"({share:.1%} pruned): {pruned['directions']:,} of {full['directions']:,} directions, in "
        f"{pruned['layers']} of {full['layers']} layers"
    )
    rates = _rate_tables(metrics, ("full", "pruned")) if "backward" in metrics else []
    return [*rates, size]


def combine_line(found: dict[str, Any]) -> str:
    """What `combine_runs` found."""
    how = found["method"]
    if found["weights"] is not None:
        how += " by " + ", ".join(f"{one:g}" for one in found["weights"])
    return (
        f"{how} of {len(found['from'])} runs at rank {found['rank']}, "
        f"{found['adapter_weights']:,} adapter weights: {found['kept_norm']:.2%} of the Frobenius "
        "norm of ΔW is kept"
    )


def strength_tables(curve: dict[str, Any]) -> list[Table | str]:
    """What `strength_curve` found: a row a strength."""
    table = Table(
        title=f"error in % [95% interval] on the {curve['split']} sets, by {curve['strength_by']}",
        title_justify="left",
    )
    domain = escape(f"new domain {curve['new_domain']}\n{curve['metric'].upper()}")
    for name in ("strength", domain, "backward average", "forgetting", "forgetting\nremoved"):
        table.add_column(name, justify="right")
    names = {0.0: "base 0", 1.0: "fit 1"}
    for point in curve["points"]:
        rates = (point["new_domain"], point["backward_error"])
        removed, forgotten = point["forgetting_removed"], point["forgetting"]
        table.add_row(
            names.get(point["strength"], f"{point['strength']:g}"),
            *(f"{_percent(rate['rate'])} {_interval(rate)}" for rate in rates),
            f"{_signed(forgotten['difference'])} {_interval(forgotten)}",
            _form(removed, ".0%"),
        )
    fit = next(one["forgetting"] for one in curve["points"] if one["strength"] == 1)
    low = fit["interval"][0]
    doubt = "" if low is None or low > 0 else "; the fit's own forgetting may be chance"
    return [table, f"forgetting removed: of that at strength 1{doubt}", f"plot: {curve['plot']}"]


def _rate_tables(metrics: dict[str, Any], states: tuple[str, str]) -> list[Table | str]:
    """Rates of two states of the model, and their change; nothing if nothing was measured."""
    domains = {f"domain {name}": one for name, one in metrics.get("domains", {}).items()}
    if domain := metrics.get(NEW_DOMAIN):
        domains[f"new domain {domain['name']}"] = domain
    if not domains and not metrics["backward"]:
        return []
    sets = " on the dev sets" if metrics.get("split") == "dev" else ""
    table = Table(title=f"error in % [95% interval]{sets}, before and after", title_justify="left")
    for name in ("set", "measure", *states, "change"):
        table.add_column(name, justify="left" if name in ("set", "measure") else "right")
    for name, domain in domains.items():
        for index, measure in enumerate(domain["change"]):
            _add_row(table, name if index == 0 else "", measure, _only(domain, measure))
        table.add_section()
    for name, both in metrics["backward"].items():
        measure = both["base"]["metric"]
        _add_row(table, f"backward {name}", measure, _only(both, measure))
    if average := metrics.get("backward_error"):
        _add_row(table, "backward average", "", average)
    if not (normalizer := metrics.get("normalizer")):  # of a run from before there was a choice
        return [table]
    return [table, f"normalizer: {normalizer}; raw is without it, shown where that differs"]


def print_tables(lines: Sequence[RenderableType], *more: str) -> None:
    """Print to stdout, wide enough for the table also where no terminal is."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    for line in lines:
        console.print(line, soft_wrap=isinstance(line, str))
    for line in more:
        console.print(line, soft_wrap=True, markup=False)


def _only(both: dict[str, Any], measure: str) -> dict[str, Any]:
    """One measure's base, adapted and change."""
    return {state: both[state][measure] for state in ("base", "adapted", "change")}


def _add_row(table: Table, name: str, measure: str, rates: dict[str, Any]) -> None:
    """A row of normalised rates, and below it one of the raw ones, if they are others."""
    table.add_row(escape(name), measure.upper(), *_cells(rates))
    raw = {state: rate["raw"] for state, rate in rates.items() if "raw" in rate}
    if raw and _cells(raw) != _cells(rates):
        table.add_row("", f"raw {measure.upper()}".strip(), *_cells(raw), style="dim")


def _cells(rates: dict[str, Any]) -> list[str]:
    base, adapted, change = (rates[state] for state in ("base", "adapted", "change"))
    states = [f"{_percent(rate['rate'])} {_interval(rate)}" for rate in (base, adapted)]
    return [*states, f"{_signed(change['difference'])} {_interval(change)}"]


def _percent(share: float | None, form: str = ".1f") -> str:
    return _form(None if share is None else 100 * share, form)


def _signed(share: float | None) -> str:
    return _percent(share, "+.1f")


def _interval(rate: dict[str, Any]) -> str:
    low, high = map(_percent, rate["interval"])
    return f"\\[{low}, {high}]"


def prior_tables(families: Mapping[str, tuple[str, tuple[Argument, ...]]]) -> list[RenderableType]:
    """Every family of priors, what it is, its arguments and their defaults."""
    table = Table(title="prior families", title_justify="left")
    for name in ("prior", "argument", "default"):
        table.add_column(name, justify="right" if name == "default" else "left", no_wrap=True)
    table.add_column("what")
    for name, (summary, arguments) in families.items():
        table.add_row(name, "", "", escape(summary), style="bold")
        for one in arguments:
            table.add_row("", one.name, f"{one.default}", escape(one.description))
        table.add_section()
    return [
        table,
        "fit with one: blora-pyro fit --prior student-t --prior-arg df=3 --prior-arg scale=0.05",
        "your own: --prior PATH.py, a file with classes Prior and Guide; see "
        "docs/your_own_prior.md",
    ]


def diagnosis_tables(found: "Diagnosis") -> list[RenderableType]:
    """Header, tables, explanations and plots of `blora-pyro diagnose`."""
    lines: list[RenderableType] = [*_header(found), "", _kinds_table(found), _layers_table(found)]
    lines.append(Text(f"How this prior shrinks. {found.explanation}\n"))
    khat = found.khat
    text = khat.meaning
    if khat.value is not None:
        value = f"{khat.value:.2f}" if math.isfinite(khat.value) else "infinite"
        text = (
            f"{value} ({khat.draws} draws, {khat.utterances} of {khat.of_utterances} "
            f"training utterances). {text}"
        )
    lines.append(Text(f"k-hat of the fit: {text}"))
    names = [path.name for path in found.plots if path.suffix == ".png"]
    if names:
        folder = escape(str(found.plots[0].parent))
        lines.append(f"\nplots (and as .pdf) in {folder}: {', '.join(names)}")
    return lines


def _header(found: "Diagnosis") -> list[str]:
    summary = found.summary
    arguments = ", ".join(f"{name} {value}" for name, value in summary.prior_args.items())
    lines = [
        escape(
            f"{found.run}: prior {summary.prior} ({arguments}), guide {summary.guide}, rank "
            f"{summary.rank}, beta {found.beta:.3g}, {found.num_weights:,} adapter weights"
        )
    ]
    if all(row.kl is None for row in summary.factors):
        return [*lines, "KL(q || p): infinite, as of every point estimate"]
    weights = sum(row.weights for row in summary.factors if row.kl is not None)
    text = f"KL(q || p): {summary.kl:,.0f} nats, {summary.kl / weights:.3f} a weight"
    if summary.scales_kl:
        text += f"; {sum(summary.scales_kl.values()) / summary.kl:.1%} of it is the prior's scales"
    if any(row.kl is None for row in summary.factors):
        text += "; without the factors that are points"
    return [*lines, text]


def _kinds_table(found: "Diagnosis") -> Table:
    """A row a kind of layer; two figures in a cell are those of A and of B."""
    table = _plain_table("by kind of layer (two figures: A and B)")
    active = any(row.active_ranks["A"] is not None for row in found.kinds)
    names = ["contrac-\ntion", "|mean|\n/ sd", "near 0", "KL\nnats", "a\nweight", "share"]
    names += ["eff.\nrank", "dirs\n> sd", "‖ΔW‖\n%"]
    for name in [*names, *(["active\nranks"] if active else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in found.kinds:
        table.add_row(*_kind_cells(row), *([_pair(row.active_ranks, ".1f")] if active else []))
    table.caption = (
        "sd: posterior standard deviation; near 0: share with |mean| < 0.001; dirs > sd: "
        "directions of ΔW above their sd; ‖ΔW‖: in % of the frozen weight's norm\n"
    )
    return table


def _kind_cells(row: "KindSummary") -> list[str]:
    return [
        row.kind.removesuffix("_proj"),
        _pair(row.contraction, ".2f"),
        _pair(row.signal_to_noise, ".2f"),
        f"{row.near_zero:.0%}",
        " ".join(map(_nats, row.kl.values())),
        _form(row.kl_per_weight, ".3f"),
        _form(row.kl_share, ".1%"),
        f"{row.effective_rank:.1f}",
        _form(row.directions, ".1f"),
        _form(None if row.relative_norm is None else 100 * row.relative_norm, ".1f"),
    ]


def _layers_table(found: "Diagnosis") -> Table:
    """The layers with the largest ΔW."""
    table = _plain_table("the layers with the largest ΔW")
    for name in ("‖ΔW‖", "dirs > sd", "largest singular values of ΔW ± sd"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in sorted(found.summary.updates, key=lambda row: -row.norm)[:TOP]:
        spread = any(row.singular_stddevs)
        values = [*zip(row.singular_values, row.singular_stddevs, strict=True)][:SHOWN_VALUES]
        table.add_row(
            Place.of(row.module).label,
            f"{row.norm:.2f}",
            f"{row.directions} of {len(row.singular_values)}" if spread else "–",
            ", ".join([f"{v:.3f} ± {s:.3f}" if spread else f"{v:.3f}" for v, s in values]),
        )
    return table


def _plain_table(title: str) -> Table:
    look: dict[str, Any] = {"title_justify": "left", "caption_justify": "left"}
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, **look)
    table.add_column("", no_wrap=True)
    return table


def _nats(kl: float | None) -> str:
    if kl is None:
        return "–"
    if kl < 1e4:
        return f"{kl:,.0f}"
    return f"{kl / 1e3:.1f}k" if kl < 1e6 else f"{kl / 1e6:.2f}M"


def _form(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _pair(values: Mapping[str, float | None], form: str) -> str:
    """The figures of A and of B."""
    return " ".join(_form(value, form) for value in values.values())
