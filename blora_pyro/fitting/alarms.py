"""Alarms: a fit that goes wrong says so, ends early, and keeps its last good parameters.

- tokens are half as likely as at the start, on the very same batches: where a step's NLL says so
  against the first step's, which may be chance, its batch's NLL at the start is computed, too;
- the norm of the gradient is far above its running median;
- the dev error (with `eval_every`) runs away from its best, or that of the backward sets, where
  they are watched, from the base's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import Tensor, nn

from blora_pyro.fitting.history import DevError, Ended, Step

WINDOW = 3  # steps in a median
NLL_RISE = math.log(2)  # nats over the start's on a batch
NLL_TIMES = 2  # steps running with such a rise
NLL_REST = 5  # steps without a further look, after one that was no higher
NORM_RISE, NORM_STEPS = 10.0, 50  # factor on the median norm, and of how many steps that is
DEV_RISE, DEV_POINTS = 1.5, 0.1  # factor on the best dev error, and fractions on top
FORGOTTEN = 0.3  # of the backward sets' dev errors, fractions above the base's
EVERY = 10  # steps between two looks at whether the parameters are the best so far

_RATE = "try a smaller --lr, a longer --warmup-steps, or --max-grad-norm 1"


def norm_alarm(history: Sequence[Step]) -> str | None:
    """Return what is wrong with the last steps' gradient norms; None if nothing is."""
    norms = [one.grad_norm for one in history[-NORM_STEPS - WINDOW :] if one.grad_norm is not None]
    if len(norms) < 3 * WINDOW:
        return None
    usual, now = median(norms[:-WINDOW]), median(norms[-WINDOW:])
    if now <= NORM_RISE * usual:
        return None
    return (
        f"the gradient's norm is {now:.3g} in the last {WINDOW} steps, and was {usual:.3g} in the "
        f"median before; {_RATE}"
    )


def dev_alarm(errors: Sequence[DevError]) -> str | None:
    """Return what is wrong with the last two dev errors, fractions; None if nothing is."""
    lost = [one.forgetting for one in errors[-2:] if one.forgetting is not None]
    if len(lost) == 2 and min(lost) > FORGOTTEN:
        return (
            f"the backward sets' dev error is {100 * min(lost):.1f} points above the base's at the "
            "last two measurements; try a smaller --lr or fewer --steps"
        )
    if len(errors) < 3:
        return None
    best, now = min(one.error for one in errors), min(one.error for one in errors[-2:])
    if now <= DEV_RISE * best + DEV_POINTS:
        return None
    return (
        f"the dev error is {now:.1%} at its last two measurements, and {best:.1%} at its best; try "
        "fewer --steps, a smaller --lr or a larger --beta"
    )


@dataclass(frozen=True)
class _Kept:
    step: int
    nll: float
    parameters: Mapping[str, Tensor]


class Alarms:
    """Watches a fit, and keeps the parameters of its best steps so far.

    The best are those after which the median NLL of the last three steps was lowest, of every tenth
    step; before the first of them it is the start. A fit that goes on from a checkpoint raises the
    same alarms as one that was never interrupted.

    Attributes:
        ended: What ended the fit; None as long as nothing has.
    """

    def __init__(self) -> None:
        """Nothing is watched yet."""
        self.ended: Ended | None = None
        self._kept: _Kept | None = None
        self._high: list[tuple[float, float]] = []  # NLLs and the start's, of the last steps
        self._rests_until = 0

    def start(self, guide: nn.Module) -> None:
        """Keep the parameters that the fit starts with."""
        self._kept = _Kept(0, math.inf, _copy(guide.state_dict()))

    def check(
        self,
        history: Sequence[Step],
        errors: Sequence[DevError],
        guide: nn.Module,
        nll_at_start: Callable[[], float],
    ) -> None:
        """Look at the fit after a step.

        Args:
            history: All steps so far.
            errors: All dev errors so far.
            guide: What is fitted.
            nll_at_start: Returns the NLL that the last step's batch had at the start, nats.
        """
        assert self._kept is not None
        step = history[-1].step
        reason = self._nll_alarm(history, nll_at_start) or norm_alarm(history) or dev_alarm(errors)
        if reason:
            self.ended = {"step": step, "kept_step": self._kept.step, "reason": reason}
        elif step % EVERY == 0:
            nll = median(one.nll for one in history[-WINDOW:])
            if nll < self._kept.nll:
                self._kept = _Kept(step, nll, _copy(guide.state_dict()))

    def _nll_alarm(self, history: Sequence[Step], nll_at_start: Callable[[], float]) -> str | None:
        """Return what is wrong with the NLL of the last steps; None if nothing is."""
        last = history[-1]
        is_high = last.nll > history[0].nll + NLL_RISE
        if last.step < self._rests_until or not is_high:
            self._high = []
            return None
        before = nll_at_start()
        if last.nll <= before + NLL_RISE:
            self._high, self._rests_until = [], last.step + NLL_REST
            return None
        self._high.append((last.nll, before))
        if len(self._high) < NLL_TIMES:
            return None
        shown = " and ".join(f"{now:.3g} in place of {before:.3g}" for now, before in self._high)
        return f"tokens are less than half as likely as at the start (NLL {shown}); {_RATE}"

    def restore(self, guide: nn.Module) -> None:
        """Give the guide the parameters that were kept."""
        assert self._kept is not None
        guide.load_state_dict(dict(self._kept.parameters))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a checkpoint keeps: parameters, and everything else as JSON."""
        assert self._kept is not None
        nll = self._kept.nll if math.isfinite(self._kept.nll) else None
        about = {"step": self._kept.step, "nll": nll, "high": self._high}
        return dict(self._kept.parameters), {**about, "rests_until": self._rests_until}

    def load_state(self, parameters: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        nll = math.inf if about["nll"] is None else float(about["nll"])
        self._kept = _Kept(int(about["step"]), nll, _copy(parameters))
        self._high = [(float(now), float(before)) for now, before in about["high"]]
        self._rests_until = int(about["rests_until"])


def _copy(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in parameters.items()}
