"""Progress of a run on the terminal."""

import time
from collections.abc import Sequence
from datetime import timedelta

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from blora_pyro.fitting.history import DevError, Step
from blora_pyro.options import FitConfig
from blora_pyro.runs.listeners import Heard, Listener
from blora_pyro.tables import Terminal

SMOOTHING = 0.9  # of the figures next to the bar
EVERY = 30.0  # seconds between two lines on what goes on, where there is no terminal for a bar


class TerminalProgress(Listener):
    """Shows stages and steps on stderr, as a context manager: bars, or off a terminal lines."""

    def __init__(self) -> None:
        """Show nothing before the first stage."""
        self.console = Terminal(stderr=True, highlight=False)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task: TaskID | None = None
        self.counting: Progress | None = None
        self.beta = 0.0
        self.smooth: dict[str, float] = {}
        self.pace = Pace()

    def __enter__(self) -> "TerminalProgress":
        """Show no bar before `ready`."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop all bars; what they show stays."""
        self.fitted()
        if self.counting:
            self.counting.stop()

    def stage(self, name: str) -> None:
        """Print a line for each stage."""
        self.console.print(f"{name} ...", style="dim", markup=False)

    def features(self, name: str, done: int, total: int) -> None:
        """Show a bar for each set that is featurised."""
        self._count(f"features of {name}", done, total)

    def audio(self, name: str, done: int, total: int) -> None:
        """Show a bar for each set whose audio is read."""
        self._count(f"audio of {name}", done, total)

    def transcripts(self, name: str, done: int, total: int) -> None:
        """Show a bar for each set that is transcribed."""
        self._count(name, done, total)

    def _count(self, what: str, done: int, total: int) -> None:
        """Show a bar until all is done."""
        if not self.console.is_terminal:
            return self._tell(what, done, total)
        if self.counting is None:
            count = TextColumn("{task.completed}/{task.total}")
            bar, left = BarColumn(bar_width=20), TimeRemainingColumn()
            columns = (TextColumn("{task.description}"), bar, count, left)
            self.counting = Progress(*columns, console=self.console, transient=True)
            self.counting.add_task(escape(what), total=total)
            self.counting.start()
        self.counting.update(TaskID(0), completed=done)
        if done == total:
            self.counting.stop()
            self.counting = None

    def _tell(self, what: str, done: int, total: int, figures: str = "") -> None:
        """Print a line on what takes long, now and then."""
        if left := self.pace.left(what, done, total):
            line = f"{what}: {done:,} of {total:,}, {left} left{figures and f'; {figures}'}"
            self.console.print(line, style="dim", markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a line in another colour."""
        self.console.print(text, style="yellow", markup=False, soft_wrap=True)

    def ready(self, config: FitConfig, num_tokens: int | None, num_weights: int) -> None:
        """Print what is fitted, and at which temperature."""
        self.beta = float(config.beta)
        size = temperature = ""
        if num_tokens is not None:
            size = f"N = {num_tokens:,} target tokens, "
            product = self.beta * num_tokens
            temperature = f", effective temperature T = beta · N = {product:.3g}"
        line = f"fit: {num_weights:,} adapter weights, {size}beta {self.beta:.3g}{temperature}"
        line += f", on {config.device}" + ", in bf16" * (config.precision == "bf16")
        self.console.print(line)
        if self.task is None:
            self.task = self.bar.add_task("fit", total=config.steps, figures="")
        else:  # one fit after another
            self.bar.reset(self.task, total=config.steps, figures="")
            self.smooth.clear()
        self.bar.start()

    def fitted(self) -> None:
        """Stop the bar."""
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
        self.bar.update(self.task, completed=step.step, figures=f"{figures}  {pace}")
        if not self.console.is_terminal:
            self._tell("fit", step.step, int(self.bar.tasks[self.task].total or 0), figures)

    def heard(self, some: Sequence[Heard]) -> None:
        """Print what was said, what the base heard, and what is heard now."""
        for one in some:
            for name, text in one._asdict().items():
                self.console.print(f"{name:9}  {text.strip()}", style="dim", markup=False)

    def evaluated(self, error: DevError, best: DevError) -> None:
        """Print a line for each dev error."""
        text = "the best so far" if error == best else f"{best.error:.1%} at step {best.step}"
        line = f"step {error.step}: dev error {error.error:.1%} ({text})"
        if error.forgetting is not None:
            line += f", backward average {100 * error.forgetting:+.1f} points"
        self.console.print(line)


class Pace:
    """Says when it is time for another line, and how long what goes on will still take."""

    def __init__(self) -> None:
        """Nothing goes on yet."""
        self.what, self.first = "", 0
        self.began = self.told = 0.0

    def left(self, what: str, done: int, total: int) -> str:
        """Return the time left, such as 0:01:30; "" if it is not yet time to tell, or all done."""
        now = time.monotonic()
        if what != self.what or done < self.first:
            self.what, self.first, self.began, self.told = what, done, now, now
        if now - self.told < EVERY or not self.first < done < total:
            return ""
        self.told = now
        seconds = (now - self.began) * (total - done) / (done - self.first)
        return str(timedelta(seconds=round(seconds)))
