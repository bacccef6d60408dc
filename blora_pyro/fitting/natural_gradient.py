"""Natural-gradient steps for the deviations of a mean-field Normal guide."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.functional import softplus

from blora_pyro.errors import UserError

FASTEST = 0.1  # of the rates: faster, deviations outgrow what the means can follow
MEMORY = 4.0  # after t steps a precision is an average over about the last t / 4
LARGEST = 3.0  # of one draw's relative change of a precision, which then grows 2.5 to 8.5 times


def deviation_parameters(guide: object, beta: float) -> list[nn.Parameter]:
    """Return the parameters rho of a guide whose deviations are softplus(rho), of Normal sites.

    Raises:
        UserError: If the guide has no such `rhos` (see `guides.normal.Guide`), or beta is 0.
    """
    if beta == 0:
        raise UserError(
            "optimizer natural-gradient needs a beta above 0, by which it weighs the prior; give "
            "one, or optimizer adam"
        )
    rhos = getattr(guide, "rhos", None)
    if not isinstance(rhos, nn.ParameterDict) or not len(rhos):
        raise UserError(
            "optimizer natural-gradient needs a mean-field Normal guide, with deviations "
            "softplus(rho) and its parameters rho in `rhos`; give guide normal, or optimizer adam"
        )
    return list(rhos.values())


def rate(step: int) -> float:
    """Return the rate of a step, counted from 0: 0.1, then falling as 4 / (step + 5).

    Precisions that are moved by such rates are averages with weights that grow as step³ (Robbins
    and Monro 1951; polynomial-decay averaging, Shamir and Zhang, arXiv 1212.1824): a start is
    forgotten at once, and no end need be known.
    """
    return min(FASTEST, MEMORY / (step + 1 + MEMORY))


@torch.no_grad()
def natural_step(rhos: Iterable[nn.Parameter], beta: float, step: int) -> None:
    """Move deviations sigma = softplus(rho) along the natural gradient of the loss.

    With L = E_q[NLL] + beta · KL(q || p) and q(w) = N(mean, sigma²), by element,

        1 / sigma² <- (1 + x + x² / 2) / sigma²,    x = rate · (sigma / beta) dL/dsigma.

    To first order this is the natural gradient of L / beta (Amari 1998): the Fisher information of
    log sigma is 2. For the reparameterised draw w = mean + sigma · eps and the prior N(., s²)

        (sigma / beta) dL/dsigma = sigma² (h / beta + 1 / s²) - 1,    h = dNLL/dw · eps / sigma,

    and E h is the curvature of the NLL under q (Stein's identity): IVON's estimate of the Hessian
    (Shen et al., arXiv 2402.17641), which costs no further pass. E x is 0 where
    1 / sigma² = 1 / s² + E h / beta, whatever start, learning rate and scale of the loss.

    The x² / 2 is IVON's, too (Lin et al., arXiv 2002.10060): a precision stays above 0. In the
    mean of log(1 + x + x² / 2) = x - x³ / 6 + x⁴ / 8 - ... noise of x counts only where it is near
    1 or above. There precisions grow, until the noise is averaged: a weight of gradients that are
    large against beta / sigma is held narrower than at the optimum.

    Nothing but the gradient is used: any prior, estimator, regulariser or number of processes is
    in it. A gradient that was clipped makes a smaller step. There is no state but rho.

    Args:
        rhos: Any shapes, each with its gradient; changed in place.
        beta: Weight of the KL, above 0.
        step: Counted from 0.
    """
    for rho in rhos:
        if rho.grad is None:
            continue
        sigma = softplus(rho)
        slope = rho.grad * sigma / rho.sigmoid() / beta
        x = (rate(step) * slope).clamp_(-LARGEST, LARGEST)
        sigma = sigma * (1 + x + x.square() / 2).rsqrt()
        rho.copy_(sigma + (-(-sigma).expm1()).log())  # the inverse of softplus
