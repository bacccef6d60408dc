"""How well a guide fits, and predicts what was left out: PSIS k-hat of its draws, and PSIS-LOO.

Both by Pareto-smoothed importance sampling, from the same draws and forward passes.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from blora_pyro.data import IGNORED, Examples
from blora_pyro.guides import latent_sites
from blora_pyro.models import Base
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.draws import log_density, log_likelihoods, token_logits, traces
from blora_pyro.posterior.inference_data import pareto_khat, pareto_smoothed


@dataclass(frozen=True)
class Loo:
    """PSIS-LOO of training utterances, see `leave_one_out`.

    Attributes:
        elpd: Expected log predictive density of an utterance left out, summed over them, nats.
        se: Its standard error.
        bad: Share of the utterances whose own k-hat is above `limit`.
        limit: The largest k-hat at which this number of draws is enough.
        temperature: T of the posterior.
        tokens: Target tokens of the utterances.
    """

    elpd: float
    se: float
    bad: float
    limit: float
    temperature: float
    tokens: int


@dataclass(frozen=True)
class Khat:
    """PSIS k-hat of a fit, or why there is none.

    Attributes:
        value: None if it was not computed; may be infinite.
        meaning: What it says, or why it was not computed.
        draws: Number of draws.
        utterances: Training utterances that it was computed on.
        of_utterances: All training utterances.
        loo: PSIS-LOO of the former, if k-hat was computed.
    """

    value: float | None
    meaning: str
    draws: int = 0
    utterances: int = 0
    of_utterances: int = 0
    loo: Loo | None = None


def fit_khat(
    posterior: Posterior,
    base: Base,
    examples: Examples,
    beta: float,
    draws: int = 50,
    of_utterances: int | None = None,
) -> Khat:
    """Return PSIS k-hat of the fit (Yao et al., Yes, but Did It Work?, arXiv 1802.02538), and LOO.

    Below 0.7 the guide could stand in for the posterior in every expectation. With one mean-field
    guide over hundreds of thousands of weights it will be far above: log-ratios differ by tens of
    nats from draw to draw. It is a figure to report and to compare between fits, not a gate.

    `examples` stand for a training set of `of_utterances`; None has them be all of it.
    """
    densities, scores, tokens = at_draws(posterior, base, examples, draws)
    value = pareto_khat(densities + scores.sum(1) / tokens / beta)
    count = len(examples)
    temperature = beta * tokens * (of_utterances or count) / count
    loo = leave_one_out(scores, temperature, tokens)
    meaning = khat_meaning(value, posterior.num_weights)
    return Khat(value, meaning, draws, count, of_utterances or count, loo)


def log_ratios(
    posterior: Posterior, base: Base, examples: Examples, beta: float, draws: int
) -> np.ndarray:
    """Return log p - log q at draws from q, up to a constant, (draws,).

    p is what a fit with weight `beta` > 0 of the KL approximates, p(w | data) ∝ exp(-NLL(w) / beta)
    p(w), with the mean token NLL of `examples`; a part of the training set stands for all of it.
    """
    densities, scores, tokens = at_draws(posterior, base, examples, draws)
    return densities + scores.sum(1) / tokens / beta


def at_draws(
    posterior: Posterior, base: Base, examples: Examples, draws: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the densities and likelihoods of draws from q.

    Returns:
        Log p(w) - log q(w), (draws,); log p(utterance | w), (draws, utterances), nats; and the
        number of target tokens.
    """
    densities, scores, tokens = [], [], 0
    for trace in traces(posterior.guide, draws):
        latent = latent_sites(trace)
        factors = {name: latent[name]["value"].detach() for name in posterior.mean}
        found, tokens = [], 0
        with posterior.applied(base.net, factors), torch.no_grad():
            log_q = trace.log_prob_sum().item()
            for logits, labels in token_logits(base.net, examples):
                found.append(log_likelihoods(logits, labels))
                tokens += int((labels != IGNORED).sum())
        scores.append(torch.cat(found).numpy())
        densities.append(log_density(posterior.prior, trace) - log_q)
    return np.array(densities), np.array(scores), tokens


def leave_one_out(scores: np.ndarray, temperature: float, tokens: int) -> Loo:
    """Return PSIS-LOO (Vehtari, Gelman, Gabry, arXiv 1507.04544), with q taken for the posterior.

    A posterior of temperature T counts an utterance's likelihood 1 / T times, so leaving it out
    weighs draws by p(utterance | w)^(-1 / T). With T = 1 this is `arviz.loo`.

    Args:
        scores: Log p(utterance | w), (draws, utterances), nats.
        temperature: T, above 0.
        tokens: Target tokens of the utterances.
    """
    count, elpds, khats = scores.shape[1], [], []
    for score in scores.T:
        weights, khat = pareto_smoothed(-score / temperature)
        elpds.append(np.logaddexp.reduce(weights + score))
        khats.append(khat)
    limit = min(1 - 1 / math.log10(len(scores)), 0.7)  # arXiv 1507.02646, as in ArviZ
    bad = float(np.mean(np.array(khats) > limit))
    se = math.sqrt(count * np.var(elpds))
    return Loo(float(np.sum(elpds)), se, bad, limit, temperature, tokens)


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


def loo_meaning(loo: Loo) -> str:
    """Return LOO and what its k-hats say of it, in a sentence or two."""
    text = (
        f"elpd {loo.elpd:,.1f} ± {loo.se:,.1f} nats ({loo.elpd / loo.tokens:.3f} a token) at "
        f"temperature T = {loo.temperature:.3g}; k-hat is above {loo.limit:.2f} for {loo.bad:.0%} "
        "of the utterances"
    )
    if not loo.bad:
        return f"{text}: no few draws decide it."
    return (
        f"{text}, where a few draws decide what the fit would be without them: there elpd is too "
        "high, nearly that of utterances which were learned. More draws (--draws) may help; else "
        "compare on a dev set."
    )
