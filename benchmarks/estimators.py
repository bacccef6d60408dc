"""Gradient variance and step time of every gradient estimator, on the pocket Whisper and de-en.

    python benchmarks/estimators.py

Default configuration, after a short fit with `shared`. Then every estimator draws the gradient of
the same batch again and again, in turn. Variance is summed over the parameters; step time is that
of forward and backward.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import torch
from common import Results, compared, interleaved, parse, parser, print_table
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor

from blora_pyro import FitConfig, Temper, load_base
from blora_pyro.data import batch_indices
from blora_pyro.fitting.svi import fit_guide
from blora_pyro.guides import with_prior_arguments
from blora_pyro.models import ESTIMATORS, build_estimator
from blora_pyro.runs.loading import load_examples
from blora_pyro.runs.parts import build

PARTS = ("means.A", "means.B", "rhos.A", "rhos.B")  # prefixes of the names of the parameters
PRIORS = ("normal", "a-only")
PEER = "shared"

Gradients = dict[str, list[dict[str, Tensor]]]  # estimator -> of every draw, part -> gradient


def main() -> None:
    """Measure, print a table for each prior, write JSON."""
    found = parser(__doc__)
    found.add_argument("--steps", type=int, default=50, help="steps of the fit before")
    found.add_argument("--draws", type=int, default=60, help="gradients of each estimator")
    arguments = parse(found)
    steps, draws = (2, 3) if arguments.quick else (arguments.steps, arguments.draws)
    results = Results(arguments, fit_steps=steps, draws=draws)
    for prior in PRIORS[: 1 if arguments.quick else None]:
        case = results.case(prior, partial(measure, FitConfig(prior=prior, steps=steps), draws))
        parts = [*case[PEER]["gradient"]]
        rows = [
            (
                f"`{name}`",
                *(f"{one['ratio']:.2f} ± {one['standard_error']:.2f}" for one in by_part.values()),
                f"{found['ratio']['median']:.2f}",
            )
            for name, found in case.items()
            for by_part in [found["gradient"]]
        ]
        shares = [f"{one['relative_variance']:.2g}" for one in case[PEER]["gradient"].values()]
        seconds = f"{case[PEER]['seconds']['median']:.2f} s"
        rows.append((f"`{PEER}`: variance / squared mean", *shares, seconds))
        print_table((f"prior {prior}", *parts, "step time"), rows)


def measure(config: FitConfig, draws: int) -> dict[str, Any]:
    """Fit, then draw gradients: variance and time of every estimator, relative to `shared`."""
    config = with_prior_arguments(config)
    pyro.set_rng_seed(config.seed)
    base = load_base(config.base)
    examples = load_examples(base, config.data, "train")
    config = config.resolved(examples.num_tokens, len(examples))
    model, guide = build(base, config)
    fit_guide(model, guide, examples, replace(config, estimator=PEER))
    batch = examples.batch(next(batch_indices(examples.sources, config.batch_size, seed=1)))
    temper, elbo = Temper(float(config.beta)), TraceMeanField_ELBO()
    tempered = temper(model), temper(guide)
    gradients: Gradients = {name: [] for name in ESTIMATORS}

    def draw(name: str) -> None:
        guide.zero_grad()
        with build_estimator(name):
            loss = elbo.differentiable_loss(*tempered, batch)
        loss.backward()
        gradients[name].append(parts_of(guide))

    calls: dict[str, Callable[[], object]] = {name: partial(draw, name) for name in ESTIMATORS}
    times = compared(interleaved(calls, draws, warm_up=3), PEER)
    own = {name: moments(found[3:]) for name, found in gradients.items()}
    return {name: {"gradient": ratios(own[name], own[PEER]), **times[name]} for name in ESTIMATORS}


def parts_of(guide: torch.nn.Module) -> dict[str, Tensor]:
    """Return part -> all gradients of its parameters in one vector, of the parts there are."""
    found = {
        part: [
            one.grad.flatten()
            for name, one in guide.named_parameters()
            if name.startswith(part) and one.grad is not None
        ]
        for part in PARTS
    }
    return {part: torch.cat(gradients) for part, gradients in found.items() if gradients}


def moments(draws: list[dict[str, Tensor]]) -> dict[str, tuple[float, float, float]]:
    """Return part -> summed variance, its standard error, and |E gradient|² without its bias."""
    found = {}
    for part in draws[0]:
        stacked = torch.stack([draw[part] for draw in draws]).double()
        mean, count = stacked.mean(0), len(draws)
        deviations = (stacked - mean).square().sum(1)
        variance = (deviations.sum() / (count - 1)).item()
        error = (deviations.std() / count**0.5).item()
        found[part] = variance, error, mean.square().sum().item() - variance / count
    return found


def ratios(
    own: dict[str, tuple[float, float, float]], peer: dict[str, tuple[float, float, float]]
) -> dict[str, dict[str, float]]:
    """Return part -> variance, its ratio to the peer's with a standard error, and scale."""
    found = {}
    for part, (variance, error, squared_mean) in own.items():
        reference, reference_error, _ = peer[part]
        spread = ((error / variance) ** 2 + (reference_error / reference) ** 2) ** 0.5
        found[part] = {
            "variance": variance,
            "ratio": variance / reference,
            "standard_error": 0.0 if own is peer else variance / reference * spread,
            "relative_variance": variance / squared_mean,
        }
    return found


if __name__ == "__main__":
    main()
