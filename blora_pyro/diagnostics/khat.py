"""How well a guide fits: Pareto-smoothed importance sampling of its draws, on data."""

import numpy as np
import torch

from blora_pyro.data import IGNORED, Examples
from blora_pyro.guides import latent_sites
from blora_pyro.models import Base
from blora_pyro.models.encoder import encode
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.draws import log_density, traces
from blora_pyro.posterior.inference_data import pareto_khat


def log_ratios(
    posterior: Posterior, base: Base, examples: Examples, beta: float, draws: int = 50
) -> np.ndarray:
    """Log p - log q at draws from q, up to a constant, (draws,).

    p is what a fit with weight `beta` approximates, p(w | data) ∝ exp(-NLL(w) / beta) p(w), with
    the mean token NLL of `examples`; a part of the training set stands for all of it.

    Args:
        posterior: What was fitted.
        base: Its base model.
        examples: Training data, all of it or a part.
        beta: Weight of the KL, above 0.
        draws: Number of draws.
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


def _mean_nll(base: Base, examples: Examples, batch_size: int = 32) -> float:
    total, tokens = 0.0, 0
    for indices in torch.arange(len(examples)).split(batch_size):
        batch = examples.batch(indices.tolist()).to(base.net.device)
        assert batch.labels is not None
        logits = base.net(
            encoder_outputs=(encode(base.net, batch.input_features),),
            decoder_input_ids=batch.decoder_input_ids,
            use_cache=False,
        ).logits.float()
        labels = batch.labels.flatten()
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum"
        ).item()
        tokens += batch.num_tokens
    return total / tokens


def fit_khat(
    posterior: Posterior, base: Base, examples: Examples, beta: float, draws: int = 50
) -> float:
    """PSIS k-hat of the fit (Yao et al., Yes, but Did It Work?, arXiv 1802.02538).

    Below 0.7 the guide could stand in for the posterior in every expectation. With one mean-field
    guide over hundreds of thousands of weights it will be far above: log-ratios differ by tens of
    nats from draw to draw. It is a figure to report and to compare between fits, not a gate.
    """
    return pareto_khat(log_ratios(posterior, base, examples, beta, draws))
