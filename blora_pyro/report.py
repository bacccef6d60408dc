"""What the terminal shows of a fit: a progress bar and the table at the end."""

import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from blora_pyro.config import FitConfig
from blora_pyro.fitting import Step
from blora_pyro.runs import NEW_DOMAIN, Listener

SMOOTHING = 0.9  # of the figures beside the bar


class TerminalProgress(Listener):
    """Stages and steps on stderr, for the time of a `with`."""

    def __init__(self) -> None:
        """Nothing is shown before the first stage."""
        self.console = Console(stderr=True, highlight=False)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task: TaskID | None = None
        self.beta = 0.0
        self.smooth: dict[str, float] = {}

    def __enter__(self) -> "TerminalProgress":
        """Nothing is drawn before `ready`."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing; what was drawn stays."""
        self.fitted()

    def stage(self, name: str) -> None:
        """One line a stage."""
        self.console.print(f"{name} ...", style="dim", markup=False)

    def ready(self, config: FitConfig, num_tokens: int, num_weights: int) -> None:
        """Say what is fitted, and at which temperature."""
        self.beta = float(config.beta)
        self.console.print(
            f"fit: {num_weights:,} adapter weights, N = {num_tokens:,} target tokens, beta "
            f"{self.beta:.3g}, effective temperature T = beta · N = {self.beta * num_tokens:.3g}"
        )
        self.task = self.bar.add_task("fit", total=config.steps, figures="")
        self.bar.start()

    def fitted(self) -> None:
        """Leave the bar behind."""
        if self.task is not None:
            self.bar.stop()

    def step(self, step: Step) -> None:
        """Advance the bar; NLL and KL are running means."""
        assert self.task is not None
        kl = 0.0 if step.kl is None else step.kl
        for name, value in {"nll": step.nll, "kl": kl, "tokens": float(step.tokens)}.items():
            old = self.smooth.get(name, value)
            self.smooth[name] = SMOOTHING * old + (1 - SMOOTHING) * value
        speed = self.bar.tasks[self.task].speed
        pace = f"{self.smooth['tokens'] * speed:,.0f} tokens/s" if speed else ""
        weighted = f"{self.beta * self.smooth['kl']:.3f}"
        figures = f"NLL {self.smooth['nll']:.3f}  KL {self.smooth['kl']:,.0f}  beta·KL {weighted}"
        if self.beta == 0:
            figures = f"NLL {self.smooth['nll']:.3f}"
        self.bar.update(self.task, advance=1, figures=f"{figures}  {pace}")


def fit_tables(metrics: dict[str, Any]) -> list[Table | str]:
    """Table and lines of `metrics.json`: rates in percent with 95% bootstrap intervals."""
    if NEW_DOMAIN not in metrics and not metrics["backward"]:
        return ["no test set and no backward sets: nothing was measured"]
    table = Table(title="error in % [95% interval], before and after", title_justify="left")
    for name in ("set", "measure", "base", "adapted", "change"):
        table.add_column(name, justify="left" if name in ("set", "measure") else "right")
    if domain := metrics.get(NEW_DOMAIN):
        for index, measure in enumerate(domain["change"]):
            name = f"new domain {domain['name']}" if index == 0 else ""
            _add_row(table, name, measure, _only(domain, measure))
        table.add_section()
    for name, both in metrics["backward"].items():
        measure = both["base"]["metric"]
        _add_row(table, f"backward {name}", measure, _only(both, measure))
    lines: list[Table | str] = [table]
    if average := metrics.get("backward_error"):
        _add_row(table, "backward average", "", average)
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


def print_tables(lines: list[Table | str], *more: str) -> None:
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
    cells = [
        f"{100 * rates[state]['rate']:.1f} {_interval(rates[state])}"
        for state in ("base", "adapted")
    ]
    change = f"{_signed(rates['change']['difference'])} {_interval(rates['change'])}"
    table.add_row(escape(name), measure.upper(), *cells, change)


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def _interval(rate: dict[str, Any]) -> str:
    low, high = rate["interval"]
    return f"\\[{100 * low:.1f}, {100 * high:.1f}]"
