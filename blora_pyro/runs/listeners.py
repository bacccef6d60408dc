"""A fit in experiment trackers (TensorBoard, Weights & Biases, ...), by those of Accelerate."""

import json
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blora_pyro.diagnostics import NEAR_ZERO
from blora_pyro.errors import UserError
from blora_pyro.fitting.checkpoints import RandomState
from blora_pyro.fitting.stopping import DevError
from blora_pyro.fitting.svi import Step
from blora_pyro.guides import Guide
from blora_pyro.models import BLoRA, FactorPrior
from blora_pyro.options import FitConfig
from blora_pyro.posterior.draws import point_scales, prior_variances
from blora_pyro.runs.folders import TRACKING

PROJECT = "blora-pyro"
EVERY = 20  # steps between two looks at the posterior


class Listener:
    """What `fit` tells its caller as it goes; this one keeps silent."""

    def stage(self, name: str) -> None:
        """A stage begins."""

    def features(self, name: str, done: int, total: int) -> None:
        """So many utterances of a set are featurised, or were found in the cache."""

    def note(self, text: str) -> None:
        """Something worth knowing, in one line."""

    def built(self, model: BLoRA, guide: Guide) -> None:
        """Program and guide are made."""

    def ready(self, config: FitConfig, num_tokens: int | None, num_weights: int) -> None:
        """SVI begins: the resolved configuration, N target tokens, number of adapter weights.

        N is not known of a stream, and None.
        """

    def step(self, step: Step) -> None:
        """A step of SVI is done."""

    def evaluated(self, error: DevError, best: DevError) -> None:
        """The dev error has been measured; `best` is the lowest so far."""

    def fitted(self) -> None:
        """The last step is done."""

    def measured(self, metrics: Mapping[str, Any], step: int) -> None:
        """All is measured: the content of `metrics.json`, and the last step of SVI."""


class Listeners(Listener):
    """Several, each told in turn of whatever there is to tell."""

    def __init__(self, *listeners: Listener) -> None:
        """In the order that they are told."""
        for name in (one for one in vars(Listener) if not one.startswith("_")):
            setattr(self, name, partial(_tell, [getattr(one, name) for one in listeners]))


def _tell(methods: Iterable[Callable[..., None]], *what: object) -> None:
    for method in methods:
        method(*what)


# ---- experiment trackers


def check_trackers(names: Sequence[str] | None, folder: Path | None) -> None:
    """Refuse trackers that could not be told of a fit.

    Args:
        names: Of trackers of Accelerate, those registered with it among them.
        folder: Of the run, if it has one.

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
    """A listener that tells `progress` and the trackers, which are finished with the `with`.

    Args:
        progress: Whoever else is told.
        names: See `check_trackers`; None or none leave it at `progress`.
        folder: Of the run, if it has one.
    """
    if not names:
        yield progress
        return
    tracking = Tracking(names, folder, progress.note)
    try:
        yield Listeners(tracking, progress)
    finally:
        tracking.finish()


class Tracking(Listener):
    """Tells trackers of every step's figures, of the posterior now and then, and of error rates.

    They are started when there is first something to tell, which is when an earlier run is gone
    from the folder. One that fails later is told no more, and the fit goes on without it.
    """

    def __init__(
        self, names: Sequence[str], folder: Path | None, note: Callable[[str], None]
    ) -> None:
        """Nothing is started.

        Args:
            names: See `check_trackers`.
            folder: Of the run, if it has one.
            note: Told of a tracker that fails.
        """
        self.names, self.folder, self.note_on = names, folder, note
        self.trackers: list[Any] | None = None
        self.figures: Callable[[], dict[str, float]] = dict
        self.steps = self.last = 0

    # ---- what a fit tells

    def built(self, model: BLoRA, guide: Guide) -> None:
        """Keep what is looked at."""
        self.figures = PosteriorFigures(model, guide)

    def ready(self, config: FitConfig, num_tokens: int | None, num_weights: int) -> None:
        """Start the trackers, with the configuration as hyperparameters."""
        self.steps = config.steps
        counts = {"training_tokens": num_tokens, "adapter_weights": num_weights}
        content = {**config.to_json(), **counts}
        plain = {name: _plain(value) for name, value in content.items()}
        self._tell(lambda tracker: tracker.store_init_configuration(plain))

    def step(self, step: Step) -> None:
        """Figures of a step, every `EVERY` steps with those of the posterior."""
        self.last = step.step
        names = ("loss", "nll", "kl", "lr", "regularizer", "tokens")
        values = {name: getattr(step, name) for name in names}
        if step.step % EVERY == 0 and step.step < self.steps:  # the last is `fitted`'s
            values |= self.figures()
        self._log(values, step.step)

    def evaluated(self, error: DevError, best: DevError) -> None:
        """The dev error, a fraction."""
        self._log({"dev_error": error.error}, error.step)

    def fitted(self) -> None:
        """Figures of the posterior that is kept."""
        self._log(self.figures(), self.last)

    def measured(self, metrics: Mapping[str, Any], step: int) -> None:
        """Error rates, fractions, by their place in `metrics.json`, and the sparsity of ΔW."""
        sparsity = {"sparsity/delta_w": metrics["sparsity"]["delta_w"]}
        self._log({**dict(_rates(metrics)), **sparsity}, step)

    # ---- what trackers are told

    def finish(self) -> None:
        """Close those that were started."""
        if self.trackers is not None:
            self._tell(lambda tracker: tracker.finish())

    def _log(self, values: Mapping[str, float | None], step: int) -> None:
        known = {name: value for name, value in values.items() if value is not None}
        self._tell(lambda tracker: tracker.log(known, step=step))

    def _tell(self, tell: Callable[[Any], object]) -> None:
        with redirect_stdout(sys.stderr):  # stdout is the command's own, for --json
            if self.trackers is None:
                self.trackers = start_trackers(self.names, self.folder)
            for tracker in tuple(self.trackers):
                try:
                    tell(tracker)
                except Exception as error:  # of whatever package; hours of a fit are worth more
                    self.trackers.remove(tracker)
                    self.note_on(f"{tracker.name} is told no more of this fit ({_in_words(error)})")


def start_trackers(names: Sequence[str], folder: Path | None) -> list[Any]:
    """Trackers of Accelerate, started: one run each, in the project `PROJECT`.

    Raises:
        UserError: If one does not start.
    """
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # trackers ask it whether this is the main process
    logs = None if folder is None else folder / TRACKING
    if logs is not None:
        logs.mkdir(exist_ok=True)
    options, started = _run_options(folder, logs), []
    for name in names:
        kind = LOGGER_TYPE_TO_CLASS[name]
        place = (str(logs),) if kind.requires_logging_directory else ()
        try:
            tracker = kind(PROJECT, *place, **options.get(name, {}))
            tracker.start()
        except Exception as error:
            raise UserError(
                f"{name} does not start ({_in_words(error)}); put that right, or leave track out"
            ) from error
        started.append(tracker)
    return started


def _run_options(folder: Path | None, logs: Path | None) -> dict[str, dict[str, Any]]:
    """What trackers call their run, and what has a resumed fit go on with it."""
    if folder is None or logs is None:
        return {}
    kept, name = logs / "id", folder.resolve().name
    if not kept.exists():
        kept.write_text(secrets.token_hex(4), encoding="utf-8")
    own = kept.read_text(encoding="utf-8")
    return {
        "wandb": {"name": name, "id": own, "resume": "allow", "dir": str(logs)},
        "trackio": {"name": f"{name}-{own}", "resume": "allow"},
        "mlflow": {"run_name": name},
    }


class PosteriorFigures:
    """Contraction and sparsity of A and B as the guide has them now, with no draw of the fit's.

    They cost a pass over means and deviations. The prior's variances are worked out once, unless
    the guide has scales of a hierarchical prior as points, which move: then it is a draw each time.
    """

    def __init__(self, model: BLoRA, guide: Guide) -> None:
        """Nothing is looked at yet: Pyro's own guides have no parameters before their first call.

        Args:
            model: The Pyro program.
            guide: That is being fitted to it.
        """
        self.prior = FactorPrior(model.groups, model.prior, model.device)
        self.guide = guide
        self.variances: dict[str, Tensor] | None = None

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """`contraction`, the mean of 1 - Var_q / Var_p, and shares of |mean| < 1e-3."""
        means, stddevs = self.guide.mean(), self.guide.stddev()
        variances = self._prior_variances(tuple(means))
        ratio, small, count = 0.0, {"A": 0, "B": 0}, {"A": 0, "B": 0}
        for name, mean in means.items():
            ratio += float((stddevs[name] ** 2 / variances[name]).mean()) * mean.numel()
            small[name[0]] += int((mean.abs() < NEAR_ZERO).sum())
            count[name[0]] += mean.numel()
        sparsity = {f"sparsity/{factor}": small[factor] / count[factor] for factor in count}
        return {"contraction": 1 - ratio / sum(count.values()), **sparsity}

    def _prior_variances(self, names: Sequence[str]) -> dict[str, Tensor]:
        if self.variances is not None:
            return self.variances
        with RandomState.kept(self.prior.device):
            points = point_scales(self.guide, names)
            found = prior_variances(self.prior, points, names)
        if not points:
            self.variances = found
        return found


def _plain(value: Any) -> Any:
    """What every tracker takes as a hyperparameter."""
    is_plain = value is None or isinstance(value, bool | int | float | str)
    return value if is_plain else json.dumps(value, ensure_ascii=False)


def _rates(content: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float | None]]:
    """Rates and their changes, by keys with slashes between; a key keeps what all trackers take."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            name = above + re.sub(r"[^\w. -]+", "_", key).strip("_.")
            if "rate" in value or "difference" in value:
                yield name, value.get("rate", value.get("difference"))
            else:
                yield from _rates(value, f"{name}/")


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
