"""Word confidences from posterior draws on the pocket test sets, against the mean's own softmax.

    python benchmarks/confidence.py --output benchmarks/results/confidence.json

A fit a domain at the command line's defaults; run folders that are there already are used as they
are. The kinds of confidence are scored on dev and on test; what `transcribe` writes was chosen on
dev. Logistic maps are fitted on dev. Beside the JSON goes a figure, of the test sets.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import about
from matplotlib.figure import Figure
from torch import Tensor
from word_calibration import (
    Bins,
    auroc,
    brier_score,
    calibration_error,
    reliability,
    right_words,
)

from blora_pyro import Posterior, fit, load_base
from blora_pyro.data import DOMAINS, load_split, read_audio
from blora_pyro.models import Base
from blora_pyro.plotting import BLACK, BLUE, GREY, SMALL, TEXT, label_axes, new_figure
from blora_pyro.transcription import Transcriber
from blora_pyro.transcription.windows import Recording

SPLITS = ("dev", "test")
SOFTMAX, CONFIDENCE = "softmax of the mean", "confidence"
MEASURES: dict[str, Callable[..., float]] = {
    "ece": calibration_error,
    "brier": brier_score,
    "auroc": auroc,
}
RESAMPLES = 1000
DIGITS = 4
EDGE = 1e-3  # confidences are this far from 0 and 1 before their logits are taken


class Mean(Posterior):
    """A posterior whose draws are all its mean."""

    def draws(self, count: int, seed: int = 0) -> Iterator[dict[str, Tensor]]:
        """The mean, again and again."""
        yield from [dict(self.mean)] * count


@dataclass(frozen=True)
class Scored:
    """Words of a set: kinds of confidence, marks, and the utterances they are from, all (n,)."""

    kinds: dict[str, np.ndarray]
    right: np.ndarray
    utterances: np.ndarray


def main() -> None:
    """Fit what is missing, score, print a table, write JSON and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/confidence"))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base, domains, tests = load_base("pocket"), {}, {}
    for domain in DOMAINS:
        folder = arguments.runs / domain
        if not (folder / "posterior.safetensors").is_file():
            fit(output=folder, data=domain, evaluate=False, overwrite=True)
        dev, test = (score(base, folder, domain, split, arguments.samples) for split in SPLITS)
        add_maps(dev, test)
        domains[domain] = {"dev": rows(dev), "test": rows(test)}
        tests[domain] = test
        print_table(domain, domains[domain]["test"])
    if arguments.output:
        write(arguments, domains, tests)


def score(base: Base, folder: Path, domain: str, split: str, samples: int) -> Scored:
    """Transcribe a set with draws, and once more with the mean in place of the draws."""
    dataset = load_split(domain, split)
    recordings = [Recording(str(i), read_audio(one)) for i, one in enumerate(dataset["audio"])]
    columns: dict[str, list[float]] = {name: [] for name in (SOFTMAX, "agreement", "exp(log_prob)")}
    right: list[bool] = []
    utterances: list[int] = []
    posterior, mean = Posterior.load(folder), Mean.load(folder)
    if not any(spread.any() for spread in posterior.stddev.values()):
        # a point has no draws: its mean stands in for them, with a spread that is not looked at
        stddev = {name: torch.ones_like(value) for name, value in mean.stddev.items()}
        posterior = mean = replace(mean, stddev=stddev)
        samples = 1
    transcripts = [
        Transcriber(base, one, domain, samples=count, batch_size=64).transcribe(recordings)
        for one, count in ((mean, 1), (posterior, samples))
    ]
    for place, (text, mean, drawn) in enumerate(zip(dataset["text"], *transcripts, strict=True)):
        plain, sure = (
            [word for segment in one.segments for word in segment.words or ()]
            for one in (mean, drawn)
        )
        columns[SOFTMAX] += [np.exp(word.log_prob) for word in plain]
        columns["agreement"] += [word.agreement for word in sure]
        columns["exp(log_prob)"] += [np.exp(word.log_prob) for word in sure]
        right += right_words(text, [word.text for word in sure])
        utterances += [place] * len(sure)
    kinds = {name: np.array(values) for name, values in columns.items()}
    kinds[CONFIDENCE] = (kinds["agreement"] + kinds["exp(log_prob)"]) / 2
    return Scored(kinds, np.array(right), np.array(utterances))


def add_maps(dev: Scored, test: Scored) -> None:
    """Add logistic maps of kinds of confidence to the chance of being right, fitted on dev."""
    for name, parts in {
        f"map of {SOFTMAX}": (SOFTMAX,),
        f"map of {CONFIDENCE}": (CONFIDENCE,),
        "map of agreement and exp(log_prob)": ("agreement", "exp(log_prob)"),
    }.items():
        weights = fit_logistic(logits(dev, parts), dev.right)
        for one in (dev, test):
            one.kinds[name] = 1 / (1 + np.exp(-logits(one, parts) @ weights))


def logits(scored: Scored, parts: tuple[str, ...]) -> np.ndarray:
    """Logits of some kinds of confidence and a one, (n, kinds + 1)."""
    shares = [np.clip(scored.kinds[part], EDGE, 1 - EDGE) for part in parts]
    return np.stack(
        [*(np.log(share / (1 - share)) for share in shares), np.ones_like(shares[0])], 1
    )


def fit_logistic(inputs: np.ndarray, right: np.ndarray, steps: int = 50) -> np.ndarray:
    """Weights of a logistic regression, by Newton's method."""
    weights = np.zeros(inputs.shape[1])
    for _ in range(steps):
        chance = 1 / (1 + np.exp(-inputs @ weights))
        slope = inputs.T @ (chance - right) + EDGE * weights
        curve = (inputs * (chance * (1 - chance))[:, None]).T @ inputs + EDGE * np.eye(len(weights))
        weights -= np.linalg.solve(curve, slope)
    return weights


def rows(scored: Scored) -> dict[str, Any]:
    """Every measure of every kind with its 95% bootstrap interval over utterances.

    The differences are paired: a kind's minus that of the mean's softmax.
    """
    rng = np.random.default_rng(0)
    members = [np.flatnonzero(scored.utterances == i) for i in np.unique(scored.utterances)]
    samples = [
        np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        for _ in range(RESAMPLES)
    ]
    everything = np.arange(len(scored.right))

    def measured(name: str, kind: str) -> np.ndarray:
        values = scored.kinds[kind]
        return np.array(
            [MEASURES[name](values[one], scored.right[one]) for one in (everything, *samples)]
        )

    accuracy = round(float(scored.right.mean()), DIGITS)
    found: dict[str, Any] = {"words": len(scored.right), "accuracy": accuracy}
    for kind, values in scored.kinds.items():
        found[kind] = {"mean": round(float(values.mean()), DIGITS)}
        for name in MEASURES:
            mine, other = measured(name, kind), measured(name, SOFTMAX)
            found[kind][name] = with_interval(mine)
            if kind != SOFTMAX:
                found[kind][f"{name}_difference"] = with_interval(mine - other)
    return found


def with_interval(values: np.ndarray) -> dict[str, Any]:
    """The first value, and the interval of the others."""
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return {
        "value": round(float(values[0]), DIGITS),
        "interval": [round(float(one), DIGITS) for one in (low, high)],
    }


def print_table(domain: str, found: dict[str, Any]) -> None:
    """A line a kind."""
    print(f"{domain}: {found['words']} words, {found['accuracy']:.1%} right")
    for kind, row in found.items():
        if isinstance(row, dict):
            cells = [f"{name} {row[name]['value']:.3f}" for name in MEASURES]
            print(f"  {kind:36} mean {row['mean']:.3f}  {'  '.join(cells)}", flush=True)


def write(arguments: argparse.Namespace, domains: dict[str, Any], tests: dict[str, Scored]) -> None:
    """JSON, and the figure beside it."""
    report = {
        **about(arguments.threads),
        "samples": arguments.samples,
        "domains": domains,
    }
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    arguments.output.write_text(text, encoding="utf-8")
    plot(tests, arguments.samples).savefig(arguments.output.with_suffix(".png"), dpi=100)


def plot(tests: dict[str, Scored], samples: int) -> Figure:
    """Reliability diagrams of the test sets, a panel a domain."""
    title = "Are words as often right as their confidence says? Pocket test sets"
    figure, axes = new_figure(title, 3.4, 1, len(tests), sharey=True)
    looks = {
        SOFTMAX: (GREY, "s", "softmax of the posterior mean"),
        CONFIDENCE: (BLUE, "o", f"confidence from {samples} draws"),
    }
    for panel, (domain, scored) in zip(axes[0], tests.items(), strict=True):
        panel.plot([0, 1], [0, 1], color=BLACK, linewidth=0.8, linestyle=":")
        for kind, (color, marker, label) in looks.items():
            bins = reliability(scored.kinds[kind], scored.right, bins=6)
            low, high = wilson(bins)
            panel.errorbar(
                bins.confidence,
                bins.accuracy,
                yerr=(bins.accuracy - low, high - bins.accuracy),
                color=color,
                marker=marker,
                markersize=4,
                linewidth=1.3,
                elinewidth=0.8,
                label=label,
            )
        label_axes(panel, domain, "confidence" if panel is axes[0][len(tests) // 2] else "")
        panel.set_xlim(0, 1.02)
        panel.set_ylim(0, 1.02)
        panel.set_box_aspect(1)
    axes[0][0].set_ylabel("share of words that are right", fontsize=TEXT)
    handles, labels = axes[0][0].get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncols": 2, "fontsize": SMALL, "frameon": False}
    figure.legend(handles, labels, **place)
    return figure


def wilson(bins: Bins, z: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95% intervals of the accuracies."""
    share, count = bins.accuracy, bins.counts
    center = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return np.minimum(center - half, share), np.maximum(center + half, share)


if __name__ == "__main__":
    main()
