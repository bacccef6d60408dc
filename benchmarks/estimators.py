"""Gradient variance and step time of every gradient estimator, on the pocket Whisper and de-en.

    python benchmarks/estimators.py --output benchmarks/results/estimators.json

Default configuration, after a short fit with `shared`. Then every estimator draws the gradient of
one and the same batch again and again, in turn, so that whatever else the machine does falls on all
of them alike. Variance is summed over the parameters, step time is that of forward and backward.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import torch
from common import about
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor

from blora_pyro import FitConfig, Temper, load_base
from blora_pyro.data import batch_indices
from blora_pyro.fitting import fit_guide
from blora_pyro.guides import with_prior_arguments
from blora_pyro.models import ESTIMATORS, build_estimator
from blora_pyro.options import FittingOptions
from blora_pyro.runs.loading import load_examples
from blora_pyro.runs.parts import build

PARTS = {  # what is summed over: prefixes of the names of the guide's parameters
    "mean_A": "means.A",
    "mean_B": "means.B",
    "rho_A": "rhos.A",
    "rho_B": "rhos.B",
}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=50, help="steps of the fit before")
    parser.add_argument("--draws", type=int, default=60, help="gradients of each estimator")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    results = {
        prior: measure(FitConfig(prior=prior, steps=arguments.steps), arguments.draws)
        for prior in ("normal", "a-only")
    }
    report = {
        **about(arguments.threads),
        "draws": arguments.draws,
        "fit_steps": arguments.steps,
        "priors": results,
    }
    for prior, result in results.items():
        print_table(prior, result)
    if arguments.output:
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        arguments.output.write_text(text, encoding="utf-8")


def measure(config: FitConfig, draws: int) -> dict[str, Any]:
    """Fit, then draw gradients: what the JSON holds for one prior."""
    config = with_prior_arguments(config)
    pyro.set_rng_seed(config.seed)
    base = load_base(config.base)
    examples = load_examples(base, config.data, "train")
    config = config.resolved(examples.num_tokens, len(examples))
    model, guide = build(base, config)
    beta = float(config.beta)
    fit_guide(
        model,
        guide,
        examples,
        FittingOptions(beta=beta, lr=config.lr, steps=config.steps, batch_size=config.batch_size),
    )
    batch = examples.batch(next(batch_indices(examples.sources, config.batch_size, seed=1)))
    temper, elbo = Temper(beta), TraceMeanField_ELBO()
    tempered = temper(model), temper(guide)

    gradients: dict[str, list[dict[str, Tensor]]] = {name: [] for name in ESTIMATORS}
    seconds: dict[str, list[float]] = {name: [] for name in ESTIMATORS}
    for number in range(-3, draws):  # three rounds to warm up
        for name in ESTIMATORS:
            guide.zero_grad()
            started = time.perf_counter()
            with build_estimator(name):
                loss = elbo.differentiable_loss(*tempered, batch)
            loss.backward()
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
                gradients[name].append(dict(parts(guide)))
    return {
        "batch": {"utterances": len(batch.decoder_input_ids), "target_tokens": batch.num_tokens},
        "estimators": {
            name: {**summary(gradients[name], gradients["shared"]), **pace(seconds, name)}
            for name in ESTIMATORS
        },
    }


def parts(guide: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(part, all gradients of its parameters in one vector), for the parts that the guide has."""
    for part, prefix in PARTS.items():
        found = [
            parameter.grad.flatten()
            for name, parameter in guide.named_parameters()
            if name.startswith(prefix) and parameter.grad is not None
        ]
        if found:
            yield part, torch.cat(found)


def summary(own: list[dict[str, Tensor]], shared: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Of every part: variance, its ratio to shared with a standard error, and |E gradient|²."""
    figures = {}
    for part in own[0]:
        variance, error, squared_norm = moments([draw[part] for draw in own])
        reference, reference_error, _ = moments([draw[part] for draw in shared])
        ratio = variance / reference
        spread = ((error / variance) ** 2 + (reference_error / reference) ** 2) ** 0.5
        figures[part] = {
            "variance": variance,
            "ratio": ratio,
            "ratio_standard_error": ratio * spread if own is not shared else 0.0,
            "squared_norm_of_mean": squared_norm,
        }
    return {"gradient": figures}


def moments(draws: list[Tensor]) -> tuple[float, float, float]:
    """Summed variance, its standard error, and the squared norm of the mean, without its bias."""
    stacked = torch.stack(draws).double()
    mean = stacked.mean(0)
    deviations = (stacked - mean).square().sum(1)
    count = len(draws)
    variance = (deviations.sum() / (count - 1)).item()
    error = (deviations.std() / count**0.5).item()
    return variance, error, mean.square().sum().item() - variance / count


def pace(seconds: dict[str, list[float]], name: str) -> dict[str, float]:
    """Median step time, and the median over rounds of its ratio to shared in the same round."""
    ratios = [own / shared for own, shared in zip(seconds[name], seconds["shared"], strict=True)]
    return {
        "median_seconds": statistics.median(seconds[name]),
        "time_ratio": statistics.median(ratios),
    }


def print_table(prior: str, result: dict[str, Any]) -> None:
    """Markdown: a row an estimator, relative to shared."""
    names = list(result["estimators"]["shared"]["gradient"])
    print(f"\n| prior {prior} | {' | '.join(names)} | step time |")
    print("|---" * (len(names) + 2) + "|")
    for name, row in result["estimators"].items():
        cells = [
            f"{part['ratio']:.2f} ± {part['ratio_standard_error']:.2f}"
            for part in row["gradient"].values()
        ]
        print(f"| `{name}` | {' | '.join(cells)} | {row['time_ratio']:.2f} |")
    scale = result["estimators"]["shared"]["gradient"].values()
    cells = [f"{part['variance'] / part['squared_norm_of_mean']:.2g}" for part in scale]
    seconds = result["estimators"]["shared"]["median_seconds"]
    print(f"| `shared`: variance / squared mean | {' | '.join(cells)} | {seconds:.2f} s |")


if __name__ == "__main__":
    main()
