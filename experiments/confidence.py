"""Do confidences of words tell right from wrong? Posterior draws against the mean's softmax.

    python experiments/confidence.py          # a fit for each domain: draws.json, draws.png
    python experiments/confidence.py RUN...   # fits of a study, side by side: fits.json

Without RUN, the kinds of confidence are scored on dev and test; what `transcribe` writes was chosen
on dev, and logistic maps are fitted on dev. With folders of fits, each to one pocket domain, test
figures are pooled over fits of one kind and compared with LoRA's softmax. Intervals are 95%
bootstrap intervals over utterances, differences paired. Results are in `experiments/confidence`.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from records import ROOT, origin
from sparsity import kind_of
from word_confidence import (
    AGREEMENT,
    CONFIDENCE,
    EXP,
    SOFTMAX,
    Bins,
    Floats,
    Words,
    reliability,
    resampled,
    score,
    with_interval,
)

from blora_pyro import fit, load_base
from blora_pyro.data import DOMAINS, load_split
from blora_pyro.files import write_json
from blora_pyro.models import Base
from blora_pyro.plotting import BLACK, BLUE, GREY, SMALL, TEXT, label_axes, new_figure
from blora_pyro.runs.folders import read_run

LORA = "LoRA"
EDGE = 1e-3  # confidences are kept this far from 0 and 1 before their logits are taken

Key = tuple[str, int]  # domain and seed


def main() -> None:
    """Score, print the figures, and write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("fits", type=Path, nargs="*", metavar="RUN", help="folders of fits")
    parser.add_argument("--runs", type=Path, default=Path("runs/confidence"), help="for new fits")
    parser.add_argument("--samples", type=int, default=16, help="posterior draws")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    folder = ROOT / "experiments" / "confidence"
    parser.add_argument("--output", type=Path, default=folder, help="folder for the results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base, about = load_base("pocket"), {**origin(), "samples": arguments.samples}
    if arguments.fits:
        kinds = by_kind(base, arguments.fits, arguments.samples)
        found = {kind: compare_fits(own, kinds.get(LORA, {})) for kind, own in kinds.items()}
        write_json(arguments.output / "fits.json", {**about, "kinds": found})
    else:
        found, tests = {}, dict[str, Words]()
        for domain in DOMAINS:
            run = arguments.runs / domain
            if not (run / "posterior.safetensors").is_file():
                fit(output=run, data=domain, evaluate=False, overwrite=True)
            dev, test = (
                score(base, run, domain, one, arguments.samples) for one in ("dev", "test")
            )
            add_maps(dev, test)
            found[domain] = {"dev": compare_kinds(dev), "test": compare_kinds(test)}
            tests[domain] = test
        write_json(arguments.output / "draws.json", {**about, "domains": found})
        plot(tests, arguments.samples).savefig(arguments.output / "draws.png", dpi=100)
    for name, row in found.items():
        print(f"{name}: {'; '.join(f'{key} {value}' for key, value in row.items())}")


# ---- one fit: its kinds of confidence


def compare_kinds(words: Words) -> dict[str, Any]:
    """Return every measure of every kind, and its difference to the mean's softmax."""
    sizes = {"": ("", int(words.utterances.max()) + 1)}
    right = words.right
    found: dict[str, Any] = {"words": len(right), "accuracy": round(float(right.mean()), 4)}
    plain = resampled({"": words}, SOFTMAX, sizes)
    for kind, values in words.kinds.items():
        found[kind] = {"mean": round(float(values.mean()), 4)}
        found[kind] |= measures_of(resampled({"": words}, kind, sizes), plain, kind != SOFTMAX)
    return found


def measures_of(own: dict[str, Floats], other: dict[str, Floats], differ: bool) -> dict[str, Any]:
    """Return measures with intervals, and if wanted their paired differences to another's."""
    found = {name: with_interval(values) for name, values in own.items()}
    if differ:
        for name, values in own.items():
            found[f"{name}_difference"] = with_interval(values - other[name])
    return found


def add_maps(dev: Words, test: Words) -> None:
    """Add logistic maps of kinds of confidence to the chance of being right, fitted on dev."""
    for name, parts in {
        f"map of {SOFTMAX}": (SOFTMAX,),
        f"map of {CONFIDENCE}": (CONFIDENCE,),
        "map of agreement and exp(log_prob)": (AGREEMENT, EXP),
    }.items():
        weights = fit_logistic(logits(dev, parts), dev.right)
        for one in (dev, test):
            one.kinds[name] = 1 / (1 + np.exp(-logits(one, parts) @ weights))


def logits(words: Words, parts: tuple[str, ...]) -> Floats:
    """Return logits of some kinds of confidence and a one, (n, kinds + 1)."""
    shares = [np.clip(words.kinds[part], EDGE, 1 - EDGE) for part in parts]
    return np.stack([*(np.log(one / (1 - one)) for one in shares), np.ones_like(shares[0])], 1)


def fit_logistic(inputs: Floats, right: np.ndarray, steps: int = 50) -> Floats:
    """Return the weights of a logistic regression, by Newton's method."""
    weights = np.zeros(inputs.shape[1])
    for _ in range(steps):
        chance = 1 / (1 + np.exp(-inputs @ weights))
        slope = inputs.T @ (chance - right) + EDGE * weights
        curve = (inputs * (chance * (1 - chance))[:, None]).T @ inputs + EDGE * np.eye(len(weights))
        weights -= np.linalg.solve(curve, slope)
    return weights


# ---- several fits, by kind


def by_kind(base: Base, folders: list[Path], samples: int) -> dict[str, dict[Key, Words]]:
    """Return the words of the test set of every fit."""
    kinds: dict[str, dict[Key, Words]] = {}
    for folder in folders:
        config = read_run(folder, "cpu")[1].resolved
        (domain,) = config.domains
        found = score(base, folder, domain, "test", samples)
        kinds.setdefault(kind_of(config), {})[domain, config.seed] = found
        print(f"{folder}: {kind_of(config)}, {domain}", flush=True)
    return kinds


def compare_fits(fits: dict[Key, Words], others: dict[Key, Words]) -> dict[str, Any]:
    """Return every measure of a kind of fits, and its difference to LoRA's softmax."""
    sizes = {key: (key[0], len(load_split(key[0], "test"))) for key in fits}
    right = np.concatenate([one.right for one in fits.values()])
    found: dict[str, Any] = {
        "fits": [f"{domain}, seed {seed}" for domain, seed in fits],
        "words": len(right),
        "accuracy": round(float(right.mean()), 4),
    }
    common = {key: others[key] for key in fits if key in others}
    is_whole = common.keys() == fits.keys()
    lora = resampled(common, SOFTMAX, sizes) if is_whole else {}
    has_draws = any((one.kinds[AGREEMENT] < 1).any() for one in fits.values())
    for kind in (SOFTMAX, CONFIDENCE) if has_draws else (SOFTMAX,):
        found[kind] = measures_of(resampled(fits, kind, sizes), lora, is_whole)
    return found


# ---- the figure


def plot(tests: dict[str, Words], samples: int) -> Figure:
    """Return reliability diagrams of the test sets, a panel a domain."""
    title = "Are words as often right as their confidence says? Pocket test sets"
    figure, axes = new_figure(title, 3.4, 1, len(tests), sharey=True)
    looks = {
        SOFTMAX: (GREY, "s", "softmax of the posterior mean"),
        CONFIDENCE: (BLUE, "o", f"confidence from {samples} draws"),
    }
    for panel, (domain, words) in zip(axes[0], tests.items(), strict=True):
        panel.plot([0, 1], [0, 1], color=BLACK, linewidth=0.8, linestyle=":")
        for kind, (color, marker, label) in looks.items():
            bins = reliability(words.kinds[kind], words.right, bins=6)
            look = {"color": color, "marker": marker, "markersize": 4, "label": label}
            lines = {"linewidth": 1.3, "elinewidth": 0.8}
            panel.errorbar(bins.confidence, bins.accuracy, yerr=wilson(bins), **look, **lines)
        label_axes(panel, domain, "confidence" if panel is axes[0][len(tests) // 2] else "")
        panel.set(xlim=(0, 1.02), ylim=(0, 1.02), box_aspect=1)
    axes[0][0].set_ylabel("share of words that are right", fontsize=TEXT)
    handles, labels = axes[0][0].get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncols": 2, "fontsize": SMALL, "frameon": False}
    figure.legend(handles, labels, **place)
    return figure


def wilson(bins: Bins, z: float = 1.96) -> tuple[Floats, Floats]:
    """Return the lengths of Wilson's 95% intervals below and above the accuracies."""
    share, count = bins.accuracy, bins.counts
    center = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return np.maximum(share - center + half, 0), np.maximum(center + half - share, 0)


if __name__ == "__main__":
    main()
