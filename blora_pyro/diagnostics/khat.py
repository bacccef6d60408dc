"""How well a guide fits: k-hat of Pareto-smoothed importance sampling (PSIS) of its draws."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from blora_pyro.data import IGNORED, Examples
from blora_pyro.guides import latent_sites
from blora_pyro.models import Base
from blora_pyro.models.encoder import encode
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.draws import log_density, traces
from blora_pyro.posterior.inference_data import pareto_khat

BATCH_SIZE = 32


@dataclass(frozen=True)
class Khat:
    """PSIS k-hat of a fit, or why there is none.

    Attributes:
        value: None if it was not computed; may be infinite.
        meaning: What it says, or why it was not computed.
        draws: Number of draws.
        utterances: Training utterances that it was computed on.
        of_utterances: All training utterances.
    """

    value: float | None
    meaning: str
    draws: int = 0
    utterances: int = 0
    of_utterances: int = 0


def fit_khat(
    posterior: Posterior, base: Base, examples: Examples, beta: float, draws: int = 50
) -> float:
    """Return PSIS k-hat of the fit (Yao et al., Yes, but Did It Work?, arXiv 1802.02538).

    Below 0.7 the guide could stand in for the posterior in every expectation. With one mean-field
    guide over hundreds of thousands of weights it will be far above: log-ratios differ by tens of
    nats from draw to draw. It is a figure to report and to compare between fits, not a gate.
    """
    return pareto_khat(log_ratios(posterior, base, examples, beta, draws))


def log_ratios(
    posterior: Posterior, base: Base, examples: Examples, beta: float, draws: int
) -> np.ndarray:
    """Return log p - log q at draws from q, up to a constant, (draws,).

    p is what a fit with weight `beta` > 0 of the KL approximates, p(w | data) ∝ exp(-NLL(w) / beta)
    p(w), with the mean token NLL of `examples`; a part of the training set stands for all of it.
    """
    ratios = []
    for trace in traces(posterior.guide, draws):
        latent = latent_sites(trace)
        factors = {name: latent[name]["value"].detach() for name in posterior.mean}
        with posterior.applied(base.net, factors), torch.no_grad():
            nll = _mean_nll(base, examples)
            log_q = trace.log_prob_sum().item()
        ratios.append(-nll / beta + log_density(posterior.prior, trace) - log_q)
    return np.array(ratios)


def _mean_nll(base: Base, examples: Examples) -> float:
    total, tokens = 0.0, 0
    for indices in torch.arange(len(examples)).split(BATCH_SIZE):
        batch = examples.batch(indices.tolist()).to(base.net.device)
        assert batch.labels is not None
        logits = base.net(
            encoder_outputs=(encode(base.net, batch.input_features),),
            decoder_input_ids=batch.decoder_input_ids,
            use_cache=False,
        ).logits.float()
        labels = batch.labels.flatten()
        nll = cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum")
        total += nll.item()
        tokens += batch.num_tokens
    return total / tokens


def khat_meaning(khat: float, num_weights: int) -> str:
    """Return what a k-hat says of the fit, in two or three sentences."""
    if khat < 0.7:
        return (
            "Below 0.7 importance weighting of these draws gives the exact posterior's "
            "expectations: the guide is close to it, as few are."
        )
    here = "here a few draws outweigh all others"
    if math.isinf(khat):
        here = "here it has no finite value, because draws differ by hundreds of nats"
    return (
        "Below 0.7 the guide could stand in for the exact posterior after importance weighting; "
        f"{here}, as a mean-field guide over {num_weights:,} weights must expect. Report it and "
        "compare it between fits of one model and data; it is no test to pass."
    )
