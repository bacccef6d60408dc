"""`learned-scale`: empirical Bayes, a Normal prior whose width per layer is fitted, too."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from blora_pyro.adapters import Site
from blora_pyro.errors import check_positive
from blora_pyro.guides import normal
from blora_pyro.guides.contracts import prior_scale
from blora_pyro.models import FactorPrior

EXPLANATION = (
    "A learned scale shrinks layer by layer: each factor of a layer has a Normal prior whose "
    "width was fitted, here from {narrowest:.2g} to {widest:.2g} (it started at {scale:g}). A "
    "layer that the data do not need gets a narrow prior and shrinks as a whole; within it "
    "all ranks are treated alike."
)


class Prior:
    """p(w | s) = N(w; 0, s²) with one s a layer and factor, s ~ LogNormal(log scale, spread²).

    Site `{site}_scale` holds s, (modules,). At its optimum s² is the mean of mean² + sigma² over
    the layer's weights (but for the pull of the hyper-prior, one term against thousands), so a
    layer that the data do not need gets a narrow prior and shrinks further. MacKay, Bayesian
    Interpolation, Neural Computation 4 (1992), section 3 ff.; with a variational posterior: Graves,
    Practical Variational Inference for Neural Networks, NIPS 24 (2011), section 4.2.
    """

    def __init__(self, scale: float = 0.1, spread: float = 1.0) -> None:
        """A Normal prior with a learned width.

        Args:
            scale: Median of the standard deviation's hyper-prior, and where the fit starts.
            spread: Standard deviation of its logarithm: how freely it is learned.
        """
        check_positive(scale=scale, spread=spread)
        self.scale, self.spread = scale, spread

    def __call__(self, site: Site) -> dist.Distribution:
        """Batch shape (modules,), event shape (rows, columns); samples `{site}_scale`."""
        median = torch.full(site.shape[:1], math.log(self.scale))
        hyper = dist.LogNormal(median, self.spread).to_event(1)
        scales = pyro.sample(f"{site.name}_scale", hyper)
        return dist.Normal(0.0, scales[:, None, None]).expand(site.shape).to_event(2)


class Guide(normal.Guide):
    """The mean-field Normal guide of `normal`, and one point for every s (type-II MAP).

    KL(q || p) is closed-form given s; the points add -log p(s).
    """

    def __init__(self, model: FactorPrior) -> None:
        """Parameters of shape `site.shape`, and a log s of shape (modules,), for every site."""
        super().__init__(model)
        start = math.log(prior_scale(model.prior))
        self.log_scales = nn.ParameterDict(
            {site.name: nn.Parameter(torch.full(site.shape[:1], start)) for site in model.sites}
        )

    def distribution(self, site: Site) -> dist.Distribution:
        """Q of a site, after visiting its `{site}_scale`."""
        point = dist.Delta(self.log_scales[site.name].exp(), event_dim=1)
        pyro.sample(f"{site.name}_scale", point)
        return super().distribution(site)
