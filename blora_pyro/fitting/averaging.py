"""Averaging: the mean of a guide's parameters over the last part of a fit."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Average:
    """Running mean of a guide's parameters over all steps after a certain one.

    Averages of the iterates of SGD lie in wider, flatter optima than its last one (Polyak and
    Juditsky 1992; Izmailov et al., arXiv 1803.05407). A and B are averaged element by element:
    along one trajectory they stay in one basis, unlike those of separate fits.

    Attributes:
        count: Steps in the mean.
    """

    def __init__(self, start: float) -> None:
        """Nothing is averaged yet.

        Args:
            start: Steps after this one count.
        """
        self.start, self.count = start, 0
        self._means: dict[str, Tensor] = {}

    def update(self, step: int, guide: nn.Module) -> None:
        """Take the guide's parameters after `step` in."""
        if step <= self.start:
            return
        self.count += 1
        parameters = {name: value.detach() for name, value in guide.named_parameters()}
        if not self._means:
            self._means = {name: value.clone() for name, value in parameters.items()}
        means = [self._means[name] for name in parameters]
        torch._foreach_lerp_(means, list(parameters.values()), 1 / self.count)

    def restore(self, guide: nn.Module) -> None:
        """Give the guide the mean, if there is one."""
        guide.load_state_dict(guide.state_dict() | self._means)

    def state(self) -> tuple[dict[str, Tensor], int]:
        """What a checkpoint keeps."""
        return self._means, self.count

    def load_state(self, means: Mapping[str, Tensor], count: int) -> None:
        """Go on from what `state` gave."""
        self._means = {name: value.clone() for name, value in means.items()}
        self.count = count
