"""`auto-lowrank`: Pyro's own `AutoLowRankMultivariateNormal`, started where ours starts."""

import pyro.distributions as dist
from pyro.infer.autoguide import AutoLowRankMultivariateNormal
from torch import Tensor

from blora_pyro.guides.auto_normal import start
from blora_pyro.models import FactorPrior

RANK = 8  # Pyro's own, the root of the number of weights, is 600 vectors as long as all of them


class Guide(AutoLowRankMultivariateNormal):
    """q(w) = N(w; loc, D (I + F Fᵀ) D) over all weights together, D diagonal and F of rank 8.

    So weights may depend on one another, such as A and B along `A → A / c, B → c B`. Its KL is a
    one-draw estimate. Every deviation starts at about 0.007, a hierarchical prior's own sites at
    the median. The parameters, 10 a weight, exist after the first call.

    `stddev` is that of each weight alone: what works with it (pruning, `--prior-from`, products,
    the spread of singular values) takes the weights as independent. Draws are not.
    """

    def __init__(self, model: FactorPrior) -> None:
        """Pyro's guide for `model`."""
        super().__init__(model, init_loc_fn=start(model), init_scale=0.007, rank=RANK)
        self._names = tuple(site.name for site in model.sites)

    def marginal(self, name: str) -> dist.Distribution:
        """Q of a site's elements, each alone, before the transform to the site's support."""
        moments = (self._unpack_latent(one.detach()) for one in self._loc_scale())
        loc, scale = ({site["name"]: value for site, value in one}[name] for one in moments)
        event_dim = self.prototype_trace.nodes[name]["fn"].event_dim
        return dist.Normal(loc, scale).to_event(event_dim)

    def mean(self) -> dict[str, Tensor]:
        """Posterior mean of every site."""
        return {name: self.marginal(name).mean for name in self._names}

    def stddev(self) -> dict[str, Tensor]:
        """Posterior standard deviation of every site."""
        return {name: self.marginal(name).stddev for name in self._names}
