"""What a fit reports as it goes: listeners, among them bars and Accelerate's own trackers."""

import json
import re
import secrets
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blora_pyro.diagnostics.summaries import NEAR_ZERO
from blora_pyro.errors import UserError
from blora_pyro.fitting.checkpoints import RandomState
from blora_pyro.fitting.history import DevError, Step
from blora_pyro.guides import Guide
from blora_pyro.guides.contracts import independent_of
from blora_pyro.models import BLoRA, FactorPrior
from blora_pyro.options import FitConfig
from blora_pyro.posterior.draws import point_scales, prior_variances
from blora_pyro.runs.folders import TRACKING
from blora_pyro.terminal import escaped

PROJECT = "blora-pyro"
EVERY = 20  # steps between two logs of the posterior's figures


class Heard(NamedTuple):
    """What was said in an utterance of the dev set, and what the net hears before the fit and now.

    Attributes:
        reference: Its text.
        before: The base's transcript.
        now: That of the net as it is.
    """

    reference: str
    before: str
    now: str


class Listener:
    """What `fit` calls as it goes; this one does nothing."""

    def stage(self, name: str) -> None:
        """A stage begins."""

    def features(self, name: str, done: int, total: int) -> None:
        """`done` utterances of a set are featurised, or were found in the cache."""

    def transcripts(self, name: str, done: int, total: int) -> None:
        """`done` utterances of a set are transcribed."""

    def note(self, text: str) -> None:
        """A note of one line."""

    def built(self, model: BLoRA, guide: Guide) -> None:
        """Program and guide are built."""

    def ready(self, config: FitConfig, num_tokens: int | None, num_weights: int) -> None:
        """SVI begins.

        Args:
            config: The resolved configuration.
            num_tokens: N, the number of target tokens; None of a stream.
            num_weights: Number of adapter weights.
        """

    def step(self, step: Step) -> None:
        """A step of SVI is done."""

    def evaluated(self, error: DevError, best: DevError) -> None:
        """The dev error has been measured; `best` is the lowest so far."""

    def heard(self, some: Sequence[Heard]) -> None:
        """A few utterances of the dev set have been transcribed."""

    def fitted(self) -> None:
        """The last step is done."""

    def measured(self, metrics: Mapping[str, Any], step: int) -> None:
        """All is measured: the content of `metrics.json`, and the last step of SVI."""


class Listeners(Listener):
    """Several listeners, called in turn."""

    def __init__(self, *listeners: Listener) -> None:
        """Call these, in their order."""
        for name in (one for one in vars(Listener) if not one.startswith("_")):
            setattr(self, name, partial(_call, [getattr(one, name) for one in listeners]))


def _call(methods: Iterable[Callable[..., None]], *arguments: object) -> None:
    for method in methods:
        method(*arguments)


# ---- notebooks


def heard_by(progress: Listener | None) -> Listener:
    """Return a listener; where none is given, bars in a notebook, and elsewhere nothing."""
    return progress or (Bars() if in_notebook() else Listener())


def in_notebook() -> bool:
    """Return whether this is a kernel of Jupyter, not a terminal, be it IPython's."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


class Bars(Listener):
    """Shows how far steps and sets are and the time left, by tqdm, which knows notebooks."""

    def __init__(self) -> None:
        """Show nothing yet."""
        self.bar: Any = None
        self.what, self.steps = "", 0

    def features(self, name: str, done: int, total: int) -> None:
        """Count a set that is featurised."""
        self._count(f"features of {name}", done, total)

    def transcripts(self, name: str, done: int, total: int) -> None:
        """Count a set that is transcribed."""
        self._count(name, done, total)

    def note(self, text: str) -> None:
        """Print it, above the bar."""
        from tqdm import tqdm

        tqdm.write(escaped(text), file=sys.stderr)

    def ready(self, config: FitConfig, num_tokens: int | None, num_weights: int) -> None:
        """Keep the number of steps."""
        self.steps = config.steps

    def step(self, step: Step) -> None:
        """Count a step."""
        self._count("fit", step.step, self.steps, f"NLL {step.nll:.3f}")

    def fitted(self) -> None:
        """End the bar, also of a fit that has ended early."""
        self._end()

    def _count(self, what: str, done: int, total: int, figures: str = "") -> None:
        """Show a bar from the first of several counts to the last."""
        if what != self.what:
            self._end()
        if self.bar is None and done < total:
            from tqdm import TqdmWarning

            with warnings.catch_warnings():  # without ipywidgets a bar is text
                warnings.simplefilter("ignore", TqdmWarning)
                from tqdm.auto import tqdm
            self.what, self.bar = what, tqdm(desc=what, total=total, initial=done, leave=False)
        if self.bar is not None:
            self.bar.set_postfix_str(figures, refresh=False)
            self.bar.update(done - self.bar.n)
            if done == total:
                self._end()

    def _end(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


# ---- experiment trackers


def check_trackers(names: Sequence[str] | None, folder: Path | None) -> None:
    """Refuse trackers that can't be used.

    Args:
        names: Trackers of Accelerate, or registered with it.
        folder: Folder of the run, if it has one.

    Raises:
        UserError: If there is no such tracker, its package is not installed, or it needs a folder.
    """
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    installed = {str(one) for one in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(LOGGER_TYPE_TO_CLASS)
            raise UserError(f"track is '{name}'; give some of: {known}")
        if name in LoggerType.list() and name not in installed:
            raise UserError(
                f"track is '{name}', whose package is not installed; pip install {name}, or leave "
                "track out"
            )
        if LOGGER_TYPE_TO_CLASS[name].requires_logging_directory and folder is None:
            raise UserError(f"track is '{name}', which writes into the output; give one")


@contextmanager
def tracked(
    progress: Listener, names: Sequence[str] | None, folder: Path | None
) -> Iterator[Listener]:
    """Give a listener that calls `progress` and the trackers, which end with the context."""
    if not names:
        yield progress
        return
    tracking = Tracking(names, folder, progress.note)
    try:
        yield Listeners(tracking, progress)
    finally:
        tracking.finish()


class Tracking(Listener):
    """Logs figures of every step, of the posterior now and then, and error rates to trackers.

    The trackers start with the first figure, when an earlier run is gone from the folder. One that
    fails later gets no more figures, and the fit goes on without it.
    """

    def __init__(
        self, names: Sequence[str], folder: Path | None, note: Callable[[str], None]
    ) -> None:
        """Nothing is started yet."""
        self.names, self.folder, self.on_note = names, folder, note
        self.trackers: list[Any] | None = None
        self.figures: Callable[[], dict[str, float]] = dict
        self.steps = self.last = 0

    def built(self, model: BLoRA, guide: Guide) -> None:
        """Keep what the posterior's figures are computed from."""
        self.figures = PosteriorFigures(model, guide)

    def ready(self, config: FitConfig, num_tokens: int | None, num_weights: int) -> None:
        """Start the trackers, with the configuration as hyperparameters."""
        self.steps = config.steps
        counts = {"training_tokens": num_tokens, "adapter_weights": num_weights}
        content = {**config.to_json(), **counts}
        plain = {name: _plain(value) for name, value in content.items()}
        self._call(lambda tracker: tracker.store_init_configuration(plain))

    def step(self, step: Step) -> None:
        """Log a step, every `EVERY` steps with the posterior's figures."""
        self.last = step.step
        names = ("loss", "nll", "kl", "lr", "regularizer", "tokens", "grad_norm")
        values = {name: getattr(step, name) for name in names}
        if step.step % EVERY == 0 and step.step < self.steps:  # the last is logged by `fitted`
            values |= self.figures()
        self._log(values, step.step)

    def evaluated(self, error: DevError, best: DevError) -> None:
        """Log the dev error and what is forgotten on dev, fractions."""
        lost = {} if error.forgetting is None else {"dev_forgetting": error.forgetting}
        self._log({"dev_error": error.error, **lost}, error.step)

    def fitted(self) -> None:
        """Log figures of the posterior that is kept."""
        self._log(self.figures(), self.last)

    def measured(self, metrics: Mapping[str, Any], step: int) -> None:
        """Log error rates, fractions, by their path in `metrics.json`, and the sparsity of ΔW."""
        sparsity = {"sparsity/delta_w": metrics["sparsity"]["delta_w"]}
        self._log({**dict(_rates(metrics)), **sparsity}, step)

    def finish(self) -> None:
        """Close the trackers that were started."""
        if self.trackers is not None:
            self._call(lambda tracker: tracker.finish())

    def _log(self, values: Mapping[str, float | None], step: int) -> None:
        known = {name: value for name, value in values.items() if value is not None}
        self._call(lambda tracker: tracker.log(known, step=step))

    def _call(self, call: Callable[[Any], object]) -> None:
        with redirect_stdout(sys.stderr):  # stdout is the command's own, for --json
            if self.trackers is None:
                self.trackers = start_trackers(self.names, self.folder)
            for tracker in tuple(self.trackers):
                try:
                    call(tracker)
                except Exception as error:  # of any package; hours of a fit are worth more
                    self.trackers.remove(tracker)
                    self.on_note(f"{tracker.name} gets no more of this fit ({_in_words(error)})")


def start_trackers(names: Sequence[str], folder: Path | None) -> list[Any]:
    """Start trackers of Accelerate: one run each, in the project `PROJECT`.

    A resumed fit goes on in the run of its folder.

    Raises:
        UserError: If one does not start.
    """
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # trackers ask it whether this is the main process
    options: dict[str, dict[str, Any]] = {}
    if folder is not None:
        logs = folder / TRACKING
        logs.mkdir(exist_ok=True)
        kept, name = logs / "id", folder.resolve().name
        if not kept.exists():
            kept.write_text(secrets.token_hex(4), encoding="utf-8")
        own = kept.read_text(encoding="utf-8")
        options = {
            "wandb": {"name": name, "id": own, "resume": "allow", "dir": str(logs)},
            "trackio": {"name": f"{name}-{own}", "resume": "allow"},
            "mlflow": {"run_name": name},
        }
    started = []
    for name in names:
        kind = LOGGER_TYPE_TO_CLASS[name]
        directory = (str(folder / TRACKING),) if folder and kind.requires_logging_directory else ()
        try:
            tracker = kind(PROJECT, *directory, **options.get(name, {}))
            tracker.start()
        except Exception as error:
            raise UserError(
                f"{name} does not start ({_in_words(error)}); put that right, or leave track out"
            ) from error
        started.append(tracker)
    return started


class PosteriorFigures:
    """Contraction and sparsity of A and B as the guide has them now, with no draw of the fit's.

    They cost a pass over means and deviations. The prior's variances are computed once, unless the
    guide has scales of a hierarchical prior as points, which move: then it is a draw each time.
    """

    def __init__(self, model: BLoRA, guide: Guide) -> None:
        """Compute nothing yet: Pyro's own guides have no parameters before their first call."""
        self.prior = FactorPrior(model.groups, model.prior, model.device)
        self.guide = guide
        self.variances: dict[str, Tensor] | None = None

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Return `contraction`, the mean of 1 - Var_q / Var_p, and shares of |mean| < 1e-3."""
        own = independent_of(self.guide)
        means = self.guide.mean()
        stddevs = self.guide.stddev() | {name: one.stddev for name, one in own.items()}
        variances = self._prior_variances(tuple(means), own)
        ratio, small, count = 0.0, {"A": 0, "B": 0}, {"A": 0, "B": 0}
        for name, mean in means.items():
            ratio += float((stddevs[name] ** 2 / variances[name]).mean()) * mean.numel()
            small[name[0]] += int((mean.abs() < NEAR_ZERO).sum())
            count[name[0]] += mean.numel()
        sparsity = {f"sparsity/{factor}": small[factor] / count[factor] for factor in count}
        return {"contraction": 1 - ratio / sum(count.values()), **sparsity}

    def _prior_variances(
        self, names: Sequence[str], independent: Collection[str]
    ) -> dict[str, Tensor]:
        if self.variances is not None:
            return self.variances
        with RandomState.kept(self.prior.device):
            points = point_scales(self.guide, names)
            found = prior_variances(self.prior, points, names, independent)
        if not points:
            self.variances = found
        return found


def _plain(value: Any) -> Any:
    """Return a hyperparameter as a type that every tracker takes."""
    is_plain = value is None or isinstance(value, bool | int | float | str)
    return value if is_plain else json.dumps(value, ensure_ascii=False)


def _rates(content: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float | None]]:
    """Yield rates and changes by slashed keys, with the characters that all trackers take."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            name = above + re.sub(r"[^\w. -]+", "_", key).strip("_.")
            if "rate" in value or "difference" in value:
                yield name, value.get("rate", value.get("difference"))
            else:
                yield from _rates(value, f"{name}/")


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
