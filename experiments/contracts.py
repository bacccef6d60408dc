"""How sure must one be on dev that a contract on forgetting holds on test?

    python experiments/contracts.py
    python experiments/contracts.py --real

From the table of the pocket study (`experiments/pocket/results.csv`), without a fit: for LoRA,
BLoRA and the horseshoe, scaled after the fit (3 settings, 3 domains, 3 seeds), with the errors of
every utterance on straight lines between the strengths that were scored, the test utterances are
split into halves at random. On one, as if it were dev, the strength with the lowest new-domain
error is chosen among those whose loss is within the limit at a quantile of the paired bootstrap,
whose distance from the loss as measured is multiplied by 1 or by the factor of `fit --keep`; on the
other it is seen whether the contract holds, and what it cost: new-domain error above that of the
best strength which holds there. Results: `experiments/pocket/contracts.json`. With `--real` the
same of the fits of whisper-base in `experiments/real/strengths.json`, whose dev and test utterances
are put together before they are split; results: `experiments/real/contracts.json`.
"""

import argparse
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from records import ROOT, origin

from blora_pyro.files import read_json, write_json
from blora_pyro.metrics import Counts
from blora_pyro.metrics.bootstrap import paired_rates
from blora_pyro.runs.contracts import SPREAD, STRENGTHS
from blora_pyro.runs.scoring import NEW_DOMAIN
from blora_pyro.studies.results import TEST, ScoredFit, read_results

METHODS = ("lora", "blora", "horseshoe")
LIMITS = (0.005, 0.01, 0.02)
QUANTILES = (0.5, 0.7, 0.8, 0.9, 0.95)
FACTORS = (1.0, SPREAD)
HALVES = 20
DRAWS = 400

Curve = dict[float, dict[str, Counts]]  # of every set, by strength; 0 is the base


def curves(scores: Sequence[ScoredFit]) -> list[Curve]:
    """Return the strengths of every fit that was scaled."""
    tested = [one for one in scores if one.split == TEST and one.counts]
    bases = {one.data: one for one in tested if one.method == "base"}
    found = []
    for method in METHODS:
        scaled = [one for one in tested if one.method == f"scaled-{method}"]
        for name in sorted({(one.setting, one.data, one.seed, parent(one)) for one in scaled}):
            own = {
                float(one.candidate.split(":")[1]): one
                for one in scaled
                if (one.setting, one.data, one.seed, parent(one)) == name
            }
            full = [
                one
                for one in tested
                if (one.setting, one.data, one.seed, one.candidate) == (*name[:3], name[3])
            ]
            fits = {0.0: bases[name[1]], **own, 1.0: full[0]}
            found.append(
                {
                    strength: {key: one.main(key) for key in one.counts}
                    for strength, one in fits.items()
                }
            )
    return found


def real_curves(fits: dict[str, Any]) -> list[Curve]:
    """Return the strengths of every real fit that has three on dev and test, both as one set."""

    def counts(sides: Sequence[dict[str, Any]]) -> dict[str, Counts]:
        def joined(name: str, key: str) -> Any:
            return np.concatenate([np.array(side[name][key]) for side in sides])

        return {name: Counts(joined(name, "edits"), joined(name, "lengths")) for name in sides[0]}

    found = []
    for own in (one["scores"] for one in fits.values()):
        names = {name.partition("-")[2] for name in own}
        pairs = {name: [own.get(f"{split}-{name}") for split in ("dev", "test")] for name in names}
        whole = {float(name): counts(pair) for name, pair in pairs.items() if all(pair)}
        if len(whole) > 3:  # with the base
            found.append({strength: whole[strength] for strength in sorted(whole)})
    return found


def parent(scored: ScoredFit) -> str:
    """Return the candidate that was scaled."""
    return f"{scored.method.removeprefix('scaled-')}:{scored.candidate.split(':')[2]}"


def half(counts: Counts, rows: Any) -> Counts:
    """Return the counts of some utterances."""
    return Counts(counts.edits[rows], counts.lengths[rows])


def finer(curve: Curve) -> Curve:
    """Return a curve at the strengths that `fit --keep` has.

    Between two strengths that were scored the errors of every utterance lie on a straight line.
    """
    known = sorted(curve)

    def between(name: str, strength: float) -> Counts:
        own = [one for one in known if name in curve[one]]
        edits = np.stack([curve[one][name].edits for one in own]).astype(float)
        columns = [np.interp(strength, own, column) for column in edits.T]
        return Counts(np.array(columns), curve[own[0]][name].lengths)

    names = {name for sets in curve.values() for name in sets}
    return {strength: {name: between(name, strength) for name in names} for strength in STRENGTHS}


def outcomes(curve: Curve, seed: int) -> list[dict[str, Any]]:
    """Return what each surety chooses for each limit, for one split into halves."""
    rng = np.random.default_rng(seed)
    orders = {name: rng.permutation(len(one.edits)) for name, one in curve[max(curve)].items()}
    sides = [{name: rows[side::2] for name, rows in orders.items()} for side in (0, 1)]
    backward = [name for name in orders if name != NEW_DOMAIN]

    def rates(side: int, draws: int) -> Any:
        """Return the backward errors, (strengths, 1 + draws), the first column as measured."""
        return np.mean(
            [
                paired_rates([half(curve[one][name], sides[side][name]) for one in curve], draws, k)
                for k, name in enumerate(backward)
            ],
            axis=0,
        )

    def new(strength: float, side: int) -> float:
        return half(curve[strength][NEW_DOMAIN], sides[side][NEW_DOMAIN]).rate

    drawn = rates(0, DRAWS)
    drawn, after = drawn - drawn[0], rates(1, 1)[:, 0]
    lost = dict(zip(curve, after - after[0], strict=True))
    found = []
    for factor, quantile in product(FACTORS, QUANTILES):
        beyond = np.quantile(drawn[:, 1:], quantile, axis=1) - drawn[:, 0]
        sure = dict(zip(curve, drawn[:, 0] + factor * beyond, strict=True))
        for limit in LIMITS:
            kept = [one for one in curve if sure[one] <= limit]
            chosen = min(kept, key=lambda one: (new(one, 0), -one))
            best = min(new(one, 1) for one in curve if lost[one] <= limit)
            found.append(
                {
                    "factor": round(factor, 2),
                    "quantile": quantile,
                    "limit": limit,
                    "holds": bool(lost[chosen] <= limit),
                    "strength": chosen,
                    "cost": new(chosen, 1) - best,
                }
            )
    return found


def main() -> None:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--real", action="store_true", help="of the fits of whisper-base")
    folder = ROOT / "experiments" / ("real" if parser.parse_args().real else "pocket")
    if folder.name == "real":
        every = real_curves(read_json(folder / "strengths.json")["fits"])
    else:
        every = curves(read_results(folder / "results.csv"))
    every = [finer(curve) for curve in every]
    rows = [one for curve in every for seed in range(HALVES) for one in outcomes(curve, seed)]
    summary = []
    for limit, factor, quantile in product(
        LIMITS, sorted({one["factor"] for one in rows}), QUANTILES
    ):
        own = [
            one
            for one in rows
            if (one["limit"], one["factor"], one["quantile"]) == (limit, factor, quantile)
        ]
        about = {
            key: float(np.mean([one[key] for one in own])) for key in ("holds", "cost", "strength")
        }
        summary.append({"limit": limit, "factor": factor, "quantile": quantile, **about})
        print(
            f"limit {limit:.1%}, factor {factor}, quantile {quantile}: holds {about['holds']:.1%}, "
            f"costs {100 * about['cost']:.2f} points, mean strength {about['strength']:.2f}"
        )
    result: dict[str, Any] = {**origin(), "curves": len(every), "halves": HALVES, "rows": summary}
    write_json(folder / "contracts.json", result)


if __name__ == "__main__":
    main()
