"""`auto-normal`: Pyro's own `AutoNormal`, started where ours starts."""

from collections.abc import Callable
from typing import Any

from pyro.infer.autoguide import AutoNormal, init_to_median, init_to_value
from torch import Tensor

from blora_pyro.guides.normal import initial_mean
from blora_pyro.models import FactorPrior


def start(model: FactorPrior) -> Callable[..., Any]:
    """Return where Pyro's own guides start: at `initial_mean`, and other sites at the median."""
    values = {site.name: initial_mean(site).detach().to(model.device) for site in model.sites}
    found: Callable[..., Any] = init_to_value(values=values, fallback=init_to_median())
    return found


class Guide(AutoNormal):
    """q(w) = N(w; loc, scale²) for every element, by way of auxiliary sites.

    Its KL is a one-draw estimate, not the closed form: Pyro samples an auxiliary Normal and a
    Delta for each site. Every scale starts at 0.007, a hierarchical prior's own sites at the
    median. The parameters exist after the first call.
    """

    def __init__(self, model: FactorPrior) -> None:
        """Pyro's guide for `model`."""
        super().__init__(model, init_loc_fn=start(model), init_scale=0.007)
        self._names = tuple(site.name for site in model.sites)

    def mean(self) -> dict[str, Tensor]:
        """Posterior mean of every site."""
        return {name: self._get_loc_and_scale(name)[0].detach() for name in self._names}

    def stddev(self) -> dict[str, Tensor]:
        """Posterior standard deviation of every site."""
        scales: dict[str, Any] = {name: self._get_loc_and_scale(name)[1] for name in self._names}
        return {name: scale.detach() for name, scale in scales.items()}
