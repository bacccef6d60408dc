"""Progress of a run on the terminal."""

from collections.abc import Sequence

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from blora_pyro.cli.common import Telling
from blora_pyro.fitting.history import DevError, Step
from blora_pyro.options import FitConfig
from blora_pyro.runs.listeners import Heard, Listener

SMOOTHING = 0.9  # of the figures next to the bar


class TerminalProgress(Listener):
    """Shows stages and steps on stderr, as a context manager: bars, or off a terminal lines."""

    def __init__(self) -> None:
        """Show nothing before the first stage."""
        self.telling = Telling()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.telling.console,
        )
        self.task: TaskID | None = None
        self.fitting = False
        self.some: Sequence[Heard] = ()
        self.beta = 0.0
        self.smooth: dict[str, float] = {}

    def __enter__(self) -> "TerminalProgress":
        """Show no bar before `ready`."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop all bars; what they show stays."""
        self.fitted()
        self.telling.stop()

    def stage(self, name: str) -> None:
        """Print a line for each stage."""
        self.telling.say(f"{name} ...", "dim")

    def features(self, name: str, done: int, total: int) -> None:
        """Count each set that is featurised."""
        self.telling.count(f"features of {name}", done, total)

    def audio(self, name: str, done: int, total: int) -> None:
        """Count each set whose audio is read."""
        self.telling.count(f"audio of {name}", done, total)

    def transcripts(self, name: str, done: int, total: int) -> None:
        """Count each set that is transcribed."""
        self.telling.count(name, done, total)

    def note(self, text: str) -> None:
        """Print a line in another colour."""
        self.telling.say(text, "yellow", anyway=True)

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
        self.telling.say(line)
        if self.task is None:
            self.task = self.bar.add_task("fit", total=config.steps, figures="")
        else:  # one fit after another
            self.bar.reset(self.task, total=config.steps, figures="")
            self.smooth.clear()
        self.fitting = True
        if self.telling.has_bars and not self.telling.verbosity.quiet:
            self.bar.start()

    def fitted(self) -> None:
        """Stop the bar."""
        if self.bar.live.is_started:  # else rich would end it with an empty line
            self.bar.stop()
        elif self.fitting and self.task is not None and not self.telling.verbosity.verbose:
            task = self.bar.tasks[self.task]
            self.telling.say(f"fit: {task.completed:,.0f} steps; {task.fields['figures']}", "dim")
        self.fitting = False

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
        if not self.telling.has_bars:
            if self.telling.verbosity.verbose:
                norm = "" if step.grad_norm is None else f"  gradient {step.grad_norm:.3g}"
                figures = f"NLL {step.nll:.3f}  loss {step.loss:.3f}  lr {step.lr:.2e}{norm}"
            total = int(self.bar.tasks[self.task].total or 0)
            self.telling.count("fit", step.step, total, figures)

    def heard(self, some: Sequence[Heard]) -> None:
        """Keep what was said, what the base heard, and what is heard now, for `evaluated`."""
        self.some = some

    def evaluated(self, error: DevError, best: DevError) -> None:
        """Print a line for each dev error, and below it some of the utterances."""
        text = "the best so far" if error == best else f"{best.error:.1%} at step {best.step}"
        line = f"step {error.step}: dev error {error.error:.1%} ({text})"
        if error.forgetting is not None:
            line += f", backward average {100 * error.forgetting:+.1f} points"
        if error.within_contract is not None:
            line += f", {error.within_contract:.1%} to be expected within the contract"
        self.telling.say(line)
        for one in self.some:
            for name, text in one._asdict().items():
                self.telling.say(f"  {name:9}  {text.strip()}", "dim")
        self.some = ()
