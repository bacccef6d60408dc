"""A contract on forgetting: what the backward sets may lose, and the strength that keeps it.

Forgetting grows with the strength of an update, and so does, up to a point, what is learned. So the
largest strength that keeps the contract on the dev sets is looked for by halving, and from there on
a lower one as long as the new domain's dev error falls: three to eight of 21 are scored.
"""

import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from blora_pyro.data import split_names
from blora_pyro.errors import UserError
from blora_pyro.evaluation import Evaluation
from blora_pyro.metrics.bootstrap import macro_rate, paired_macro_quantile
from blora_pyro.options import AVERAGE, EACH, FitConfig, read_contract
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.strength import SCALE, Directions, at_strength
from blora_pyro.runs.measurements import Contract
from blora_pyro.runs.record import Kept
from blora_pyro.runs.scoring import DEV_SPLITS, NEW_DOMAIN, Scoring
from blora_pyro.runs.strength_curves import curve_of
from blora_pyro.sources import Source, describe_source

# How sure one is on dev that other utterances, as many, lose no more than the limit. Their loss as
# it will be measured lies as far from the mean as that of dev, so the difference of both deviates
# by sqrt(2) times what the bootstrap of one tells. By 0.9 contracts hold in about nine fits of ten,
# without this factor in four of five, by 0.5 in six; see experiments/contracts.py.
CONFIDENCE = 0.9
SPREAD = math.sqrt(2)
STRENGTHS = tuple(round(0.05 * place, 2) for place in range(21))
LOWER = 2  # places down, in search of a lower error
MOST_SCORED = 8  # of them, as a rule, 0 and 1 included
ROUNDING = 1e-9  # of a loss that is exactly its limit

Results = dict[str, Evaluation]


def check_dev_sets(config: FitConfig) -> None:
    """Refuse sets that a contract can't be kept on, before anything is computed.

    Raises:
        UserError: If a backward set has no dev and test split, or the new domain has no dev set.
    """
    for name, source in config.backward_sets.items():
        splits = split_names(source)
        if "test" not in splits or not {*DEV_SPLITS} & {*splits}:
            what = f"has only {', '.join(splits)}" if splits else "is one set without splits"
            raise UserError(
                f"keep needs the dev and the test split of a backward set, and {name} {what}; "
                "give a folder or a Hub data set with both, or leave keep out"
            )
    source = config.sources[0]
    if config.dev is None and not _has_dev(source):
        raise UserError(
            f"keep needs a dev set of the new domain, and {describe_source(source)} has no dev "
            "split; give one as dev, or leave keep out"
        )


def _has_dev(source: Source) -> bool:
    return bool({*DEV_SPLITS} & {*split_names(source)})


def limits_of(config: FitConfig) -> dict[str, float]:
    """Return the limits of a configuration's contract by name, as fractions."""
    return {name: points / 100 for name, points in read_contract(config.keep).items()}


def losses(before: Results, after: Results, confidence: float | None = None) -> dict[str, float]:
    """Return what the backward sets lost: error after minus before, by set and in `average`.

    Args:
        before: Of every set, by name, as `Scoring.score` returns it.
        after: Likewise.
        confidence: The loss that other utterances, as many, stay below with this probability, by
            the paired bootstrap; None is the losses as they were measured.

    Returns:
        Fractions; a gain is negative.

    Raises:
        UserError: If a set has no words.
    """
    backward = [name for name in before if name != NEW_DOMAIN]
    found = {}
    for label, names in {AVERAGE: backward, **{name: [name] for name in backward}}.items():
        old, new = ([side[name].main for name in names] for side in (before, after))
        measured = found[label] = macro_rate(new) - macro_rate(old)
        if confidence is not None:
            beyond = paired_macro_quantile(old, new, confidence) - measured
            found[label] = measured + SPREAD * beyond
        if math.isnan(found[label]):
            raise UserError(f"backward set {label} has no words to score; give another")
    return found


def holds(limits: Mapping[str, float], lost: Mapping[str, float]) -> bool:
    """Return whether losses, see `losses`, are within the limits of a contract."""
    worst = max(loss for name, loss in lost.items() if name != AVERAGE)
    return all(
        (worst if name == EACH else lost[name]) <= limit + ROUNDING
        for name, limit in limits.items()
    )


def strength_within(limits: Mapping[str, float], lost: Mapping[str, float]) -> float:
    """Return the strength up to which losses are within a contract, if they are linear in it.

    Args:
        limits: See `limits_of`.
        lost: At strength 1, see `losses`.
    """
    worst = max(loss for name, loss in lost.items() if name != AVERAGE)
    shares = (
        limit / loss
        for name, limit in limits.items()
        if (loss := worst if name == EACH else lost[name]) > limit
    )
    return min(shares, default=1.0)


def keep_contract(
    scoring: Scoring,
    posterior: Posterior,
    config: FitConfig,
    transcripts: Callable[[str], Path | None] = lambda state: None,
    confidence: float | None = None,
    directions: Mapping[str, Directions] | None = None,
) -> Kept:
    """Return the strength of the lowest new-domain error among those that keep a contract.

    Args:
        scoring: The dev sets of the new domain and the backward sets.
        posterior: The fit, at any strength.
        config: Has the contract, and what the strength is `strength_by`.
        transcripts: Gives the file that transcripts of a state, such as `dev-0.5`, are kept in.
        confidence: See `losses`; None is `CONFIDENCE`.
        directions: See `at_strength`.

    Returns:
        What `run.json` keeps: `strength` is 0, the base, if no other keeps the contract; `losses`
        are those at it, `curve` is that of `strength_curve` over the strengths that were scored.

    Raises:
        UserError: See `losses`.
    """
    limits, results = limits_of(config), dict[float, Results]()
    confidence, by = confidence or CONFIDENCE, config.strength_by or SCALE

    def score(strength: float) -> Results:
        if strength not in results:
            adapted = at_strength(posterior, strength, by, directions) if strength else None
            what = f"dev, strength {strength:g}" if strength else "dev, the base"
            kept = transcripts(f"dev-{strength:g}")
            results[strength] = scoring.score(adapted, what, kept)
        return results[strength]

    @cache
    def is_kept(strength: float) -> bool:
        return holds(limits, losses(score(0.0), score(strength), confidence))

    def error(strength: float) -> float:
        return score(strength)[NEW_DOMAIN].main.rate

    if math.isnan(error(0.0)):
        raise UserError("the dev set of the new domain has no words to score; give another as dev")
    place = largest(lambda place: is_kept(STRENGTHS[place]), len(STRENGTHS))
    while place and error(STRENGTHS[max(0, place - LOWER)]) < error(STRENGTHS[place]):
        place = max(0, place - LOWER)
    score(1.0)  # the curve shows it in any case
    chosen = min(filter(is_kept, sorted(results)), key=error)
    return {
        "limits": limits,
        "confidence": confidence,
        "strength": chosen,
        "losses": losses(results[0.0], results[chosen]),
        "curve": curve_of(results, posterior, config, "dev", by) | {"chosen": chosen},
    }


def largest(is_true: Callable[[int], bool], count: int) -> int:
    """Return the last of `count` places where something is true, by halving.

    It is true at 0, which is not asked for, and of the last place it is asked first. Where it is
    not true up to a place and false from there on, some place where it is true is returned.
    """
    low, high, probe = 0, count, count - 1
    while high - low > 1:
        low, high = (probe, high) if is_true(probe) else (low, probe)
        probe = (low + high) // 2
    return low


def verdict(kept: Kept, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return `contract` of `metrics.json`: limits, strength, losses, and whether they are held.

    Args:
        kept: The contract and the strength that was chosen.
        metrics: See `scoring.compare`. Without backward sets, or words in one, there is none.
    """
    lost = {
        name: both["change"][both["base"]["metric"]]["difference"]
        for name, both in metrics["backward"].items()
    }
    if not lost or None in lost.values():
        return {}
    lost[AVERAGE] = metrics["backward_error"]["change"]["difference"]
    contract: Contract = {
        "limits": kept["limits"],
        "strength": kept["strength"],
        "losses": lost,
        "holds": holds(kept["limits"], lost),
    }
    return {"contract": contract}
