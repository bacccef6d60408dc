"""The parameters that a fit ends with: of the lowest dev error, or the mean of the last steps."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blora_pyro.errors import UserError
from blora_pyro.fitting.history import DevError, DevErrors


class EarlyStopping:
    """Keeps the guide's parameters of the lowest dev error, and ends a fit that stops improving.

    Of equal errors the first counts. With a contract it is the error that is expected within it.

    Attributes:
        errors: Measured so far, in order.
    """

    def __init__(
        self,
        measure: Callable[[], float],
        every: int,
        patience: int | None = None,
        on_error: Callable[[DevError, DevError], None] = lambda error, best: None,
        forgetting: Callable[[float], Sequence[float]] | None = None,
    ) -> None:
        """Start without measurements.

        Args:
            measure: Returns the dev error, a fraction, of the net as it is.
            every: Steps between two measurements; there is one after the last step, too.
            patience: End after so many in a row without a new lowest error; None never does.
            on_error: Called after every measurement, with it and the best so far.
            forgetting: Given the dev error, returns `forgetting` and `within_contract` of
                `DevError`.
        """
        self.every, self.patience = every, patience
        self.errors: list[DevError] = []
        self._measure, self._on_error, self._forgetting = measure, on_error, forgetting
        self._best: dict[str, Tensor] = {}

    @property
    def best(self) -> DevError:
        """The first of the lowest errors, of those within the contract if there is one."""

        def compared(one: DevError) -> float:
            return one.error if one.within_contract is None else one.within_contract

        return min(self.errors, key=compared)

    @property
    def stops(self) -> bool:
        """Whether patience is at its end."""
        if self.patience is None or not self.errors:
            return False
        return len(self.errors) - 1 - self.errors.index(self.best) >= self.patience

    def due(self, step: int, steps: int) -> bool:
        """Whether to measure after `step` of `steps` steps."""
        measured = self.errors[-1].step if self.errors else 0
        return step > measured and (step % self.every == 0 or step == steps)

    def check(self, step: int, guide: nn.Module) -> None:
        """Measure the net, in which the posterior mean is in place; keep the guide if it is best.

        Raises:
            UserError: If the dev set has nothing to score.
        """
        measured = self._measure()
        watched = self._forgetting(measured) if self._forgetting else ()
        error = DevError(step, measured, *watched)
        if not math.isfinite(error.error):
            raise UserError("the dev set has no words to score; give another with --dev")
        self.errors.append(error)
        if self.best is error:
            state = guide.state_dict()
            self._best = {name: value.detach().cpu().clone() for name, value in state.items()}
        self._on_error(error, self.best)

    def restore(self, guide: nn.Module) -> None:
        """Give the guide its best parameters back, if anything was measured."""
        if self._best:
            guide.load_state_dict(self._best)

    def state(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Return what a checkpoint keeps: the best parameters, and the errors as JSON."""
        return self._best, [one.to_json() for one in self.errors]

    def load_state(self, best: Mapping[str, Tensor], errors: Sequence[Mapping[str, Any]]) -> None:
        """Continue from what `state` returned."""
        self._best = {name: value.clone() for name, value in best.items()}
        self.errors = [DevError(**one) for one in errors]

    def to_json(self, by_alarm: bool = False) -> DevErrors:
        """Return what `run.json` stores once the fit is done, or an alarm has ended it."""
        ended = "alarm" if by_alarm else "patience" if self.stops else "steps"
        errors: list[Any] = [one.to_json() for one in self.errors]
        return {"errors": errors, "best_step": self.best.step, "ended_by": ended}


class Average:
    """Running mean of a guide's parameters over all steps after a certain one.

    Averages of the iterates of SGD lie in wider, flatter optima than its last one (Polyak and
    Juditsky 1992; Izmailov et al., arXiv 1803.05407). A and B are averaged element by element:
    along one trajectory they stay in one basis, unlike those of separate fits.

    Attributes:
        count: Steps in the mean.
    """

    def __init__(self, start: float) -> None:
        """Average the steps after `start`."""
        self.start, self.count = start, 0
        self._means: dict[str, Tensor] = {}

    def update(self, step: int, guide: nn.Module) -> None:
        """Include the guide's parameters after `step`."""
        if step <= self.start:
            return
        self.count += 1
        values = {name: value.detach() for name, value in guide.named_parameters()}
        if not self._means:
            self._means = {name: value.clone() for name, value in values.items()}
        means = [self._means[name] for name in values]
        torch._foreach_lerp_(means, list(values.values()), 1 / self.count)

    def restore(self, guide: nn.Module) -> None:
        """Give the guide the mean, if there is one."""
        guide.load_state_dict(guide.state_dict() | self._means)

    def state(self) -> tuple[dict[str, Tensor], int]:
        """Return what a checkpoint keeps."""
        return self._means, self.count

    def load_state(self, means: Mapping[str, Tensor], count: int) -> None:
        """Continue from what `state` returned."""
        self._means = {name: value.clone() for name, value in means.items()}
        self.count = count
