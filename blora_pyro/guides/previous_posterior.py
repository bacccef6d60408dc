"""`previous-posterior`: an earlier run's posterior as the prior, element by element."""

from collections.abc import Mapping

import pyro.distributions as dist
import torch
from torch import Tensor

from blora_pyro.adapters import Group, Site
from blora_pyro.errors import UserError
from blora_pyro.guides import normal

EXPLANATION = (
    "The prior is an earlier run's posterior, its deviations times {inflation:g}: every weight is "
    "pulled to where that run left it, the harder the surer it was (the widths of layers are "
    "{narrowest:.2g} to {widest:.2g}). Contraction is what the new data added, and KL how far they "
    "led away."
)


class Prior:
    """p(w) = N(w; m, (inflation · s)²), m and s the mean and deviation of w after an earlier fit.

    Variational continual learning (Nguyen et al., arXiv 1710.10628, eq. 2-4): what is known after
    one domain is what is believed before the next. A weight that the earlier data fixed is held
    there; one that they left open is as free as it was. Inflation forgets on purpose: it takes the
    earlier data for inflation² times fewer. KL(q || p) of two Normals is in closed form.

    What is carried on is the independent Normal of those moments. Guides that are mean-field
    Normal (those of all families but `horseshoe`, whatever the prior) are just that. Of the
    horseshoe it is the closest independent Normal in KL(q || ·): that a rank switches off as a
    whole is lost.

    Attributes:
        tensors: `{site}.mean` and `{site}.stddev` -> tensor of the site's shape, without inflation.
    """

    def __init__(
        self, groups: tuple[Group, ...], tensors: Mapping[str, Tensor], inflation: float = 1.0
    ) -> None:
        """The posterior of `groups`, the earlier run's; every deviation above 0.

        Raises:
            UserError: If the inflation is below 1 or not finite.
        """
        if not 1 <= inflation < float("inf"):
            raise UserError(f"prior_inflation is {inflation}; give a number from 1, to forget more")
        self.tensors, self.inflation = tensors, inflation
        self._modules = {site.name: site.modules for group in groups for site in group.sites}
        self._placed: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}

    def __call__(self, site: Site) -> dist.Distribution:
        """Batch shape (modules,), event shape (rows, columns); `site` may have some of the layers.

        Raises:
            UserError: If the earlier run had no such factors.
        """
        known = self._modules.get(site.name, ())
        if not set(site.modules) <= set(known):
            raise UserError(f"the earlier run has no {site.name} of these layers; fit its layers")
        mean, stddev = self._moments(site.name)
        if site.modules != known:
            chosen = [known.index(name) for name in site.modules]
            mean, stddev = mean[chosen], stddev[chosen]
        return dist.Normal(mean, stddev, validate_args=False).to_event(2)

    def _moments(self, name: str) -> tuple[Tensor, Tensor]:
        """Mean and deviation under the prior, where tensors are made now."""
        device = torch.empty(0).device
        if (name, device) not in self._placed:
            mean, stddev = (
                self.tensors[f"{name}.{moment}"].to(device) for moment in ("mean", "stddev")
            )
            self._placed[name, device] = mean, self.inflation * stddev
        return self._placed[name, device]


@torch.no_grad()
def start_at(guide: normal.Guide, mean: Mapping[str, Tensor], stddev: Mapping[str, Tensor]) -> None:
    """Set the moments that a guide starts from: site name -> tensor of the site's shape.

    rho = log(exp(sigma) - 1), the inverse of softplus; -inf for a deviation of 0.
    """
    for name, value in mean.items():
        guide.means[name].copy_(value)
        guide.rhos[name].copy_(stddev[name].expm1().log())
