"""Traces of Pyro programs, and the moments and densities that are computed from them."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import WhisperForConditionalGeneration

from blora_pyro.data import IGNORED, Examples
from blora_pyro.guides import latent_sites
from blora_pyro.models.encoder import encode

Program = Callable[[], Any]
PRIOR_DRAWS = 64
BATCH_SIZE = 32


def traces(program: Program, count: int, seed: int = 0) -> Iterator[poutine.Trace]:
    """Yield `count` traces of a Pyro program, the same ones for the same seed.

    The caller's random state and parameter store are left alone.
    """
    state = torch.Generator().manual_seed(seed).get_state()
    for _ in range(count):
        with torch.no_grad(), pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            trace = poutine.trace(program).get_trace()
            state = torch.get_rng_state()
        yield trace


def log_density(prior: Program, trace: poutine.Trace) -> float:
    """Log p of a guide's draw in nats; NaN if the guide lacks scales of a hierarchical prior."""
    (scored,) = traces(poutine.replay(prior, trace=trace), 1)
    if latent_sites(scored).keys() != latent_sites(trace).keys():
        return math.nan
    return scored.log_prob_sum().item()


def is_point(trace: poutine.Trace, name: str) -> bool:
    """Whether q of a site is a point mass; Pyro's own guides wrap their draws in Deltas, too."""
    is_wrapped = {f"{name}_unconstrained", "_Guide_latent"} & trace.nodes.keys()
    return isinstance(trace.nodes[name]["fn"], dist.Delta) and not is_wrapped


def point_scales(guide: Program, factors: Collection[str]) -> dict[str, Tensor]:
    """Scales of a hierarchical prior that the guide fits as points, by site name.

    `factors` are the site names of A and B.
    """
    (trace,) = traces(guide, 1)
    return {
        name: node["value"]
        for name, node in latent_sites(trace).items()
        if name not in factors and is_point(trace, name)
    }


def prior_variances(
    prior: Program,
    points: Mapping[str, Tensor],
    factors: Collection[str],
    independent: Collection[str] = (),
) -> dict[str, Tensor]:
    """Prior variance of every weight by site, of the site's shape.

    The scales of a hierarchical prior are averaged over, and with them the weights of a layer: then
    the shape is (modules, 1, 1). Scales among `points`, see `point_scales`, are held fixed. Sites
    in `independent` have that of their coordinates, see `guides.contracts.NonCentredPrior`.
    """

    def variance(name: str, q: Any) -> Tensor:
        found: Tensor = (q.base_dist if name in independent else q).variance
        return found

    found = []
    for trace in traces(poutine.condition(prior, data=points), PRIOR_DRAWS):
        latent = latent_sites(trace)
        variances = {name: variance(name, latent[name]["fn"]) for name in factors}
        if latent.keys() == set(factors):
            return variances
        # E[w | scales] = 0, so the law of total variance has one term.
        found.append({name: one.mean((1, 2), keepdim=True) for name, one in variances.items()})
    none = torch.tensor(0.0)
    return {name: sum((one[name] for one in found), none) / PRIOR_DRAWS for name in factors}


@torch.no_grad()
def token_logits(
    net: WhisperForConditionalGeneration, examples: Examples
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of all utterances in order: logits, and the tokens that they are to predict.

    Logits are (batch, tokens, vocabulary), float32, after the true tokens before; labels (batch,
    tokens) as in a `Batch`. Both are on the CPU.
    """
    for indices in torch.arange(len(examples)).split(BATCH_SIZE):
        batch = examples.batch(indices.tolist()).to(net.device)
        assert batch.labels is not None
        states, tokens = encode(net, batch.input_features), batch.decoder_input_ids
        logits = net(encoder_outputs=(states,), decoder_input_ids=tokens, use_cache=False).logits
        yield logits.float().cpu(), batch.labels.cpu()


def log_likelihoods(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log p(tokens | audio) of every utterance of a batch, (batch,), float64, nats."""
    flat = logits.flatten(0, 1), labels.flatten()
    nll = cross_entropy(*flat, ignore_index=IGNORED, reduction="none")
    return -nll.double().view(labels.shape).sum(1)
