"""How the methods stand in one setting: what was chosen on dev, and what that gives on test."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blora_pyro.metrics import forgetting
from blora_pyro.runs.scoring import NEW_DOMAIN
from blora_pyro.studies.definition import Setting
from blora_pyro.studies.estimates import BACKWARD, Resampled
from blora_pyro.studies.methods import BASE, BAYESIAN, LORA, Candidate, Method
from blora_pyro.studies.plan import Plan
from blora_pyro.studies.results import DEV, PARTS, PIER, TEST, ScoredFit

FORGETTING = "forgetting"

Row = dict[str, Any]


@dataclass(frozen=True)
class Standing:
    """How the methods stand in one setting.

    Rows are of candidates, method by method, values rising. A row has the candidate's names
    (`candidate`, `name`, `title`, `knob`, `family`), whether it `is_chosen`, and
    - `dev`: the errors that it is chosen by, `new_domain`, `backward` and their mean `balanced`: {}
      where the fit failed, None where it was not tried on dev;
    - `repeats`, data sets and seeds of the figures, without which it has none; `failed`, those that
      are in no figure;
    - `new_domain`, `pier`, `backward` and `forgetting`, the backward error less that of the base;
      `sets`, the error by data set and backward set; None where there is nothing to err in;
    - `loops`, the number of transcripts that repeat themselves, of all sets and repeats;
    - `A`, `B`, `delta_w`, shares of elements below 1e-3; `weights` and `bytes` of the adapter;
      `seconds` of the fit, the median;
    - `against_lora`, if it is chosen: see `Resampled.against`, of the chosen LoRA, `other`;
      `same_rate`, if it is Bayesian: of LoRA at the same learning rate, as in the paper.

    Attributes:
        setting: Base and options.
        split: What the figures are of: `test`, or `dev` where the study went no further.
        chosen: Method -> its chosen candidate.
        rows: Of all candidates with a score.
        matched: A row for every chosen Bayesian candidate and other method: `Resampled.match`.
        failed: Titles of scores whose fits failed.
    """

    setting: Setting
    split: str
    chosen: Mapping[str, Candidate]
    rows: Sequence[Row]
    matched: Sequence[Row]
    failed: Sequence[str]

    @property
    def results(self) -> list[Row]:
        """Those of candidates that have figures."""
        return [one for one in self.rows if one["repeats"]]

    @property
    def chosen_results(self) -> list[Row]:
        """Those of the chosen candidates."""
        return [one for one in self.results if one["is_chosen"]]


def standings(plan: Plan) -> list[Standing]:
    """Return how the methods stand in every setting that has a score."""
    found = [_standing(plan, setting) for setting in plan.study.settings]
    return [one for one in found if one.rows]


def _standing(plan: Plan, setting: Setting) -> Standing:
    names, methods = plan.names, plan.study.methods
    chosen = {name: one for name in names if (one := plan.chosen(name, setting)) is not None}
    every = [one for name in names for one in plan.candidates(name, setting)]
    on_dev = [] if plan.study.row else [plan.dev_score(one, setting) for one in every]
    on_test = [spec for one in every for spec in plan.test_scores(one, setting)]
    first, second = (
        [(spec, score) for spec in specs if (score := plan.score_of(spec)) is not None]
        for specs in (on_dev, on_test)
    )
    resampled = Resampled(score for _, score in second or first)
    base = chosen.get(BASE, Candidate(methods[BASE]))
    rows = []
    for one in every:
        own = [score for spec, score in second or first if spec.candidate == one]
        dev = next((score for spec, score in first if spec.candidate == one), None)
        if own or dev:
            is_chosen = one == chosen.get(one.method.name)
            row = {**_names(one), "is_chosen": is_chosen, "dev": dev and _dev_errors(dev)}
            row |= {"failed": [(score.data, score.seed) for score in own if score.failed]}
            row |= {**_figures(resampled, one, base), "against_lora": {}, "same_rate": {}}
            if is_chosen and one.method.name not in (BASE, LORA):
                row |= _against_lora(resampled, one, base, chosen.get(LORA), methods.get(LORA))
            rows.append(row)
    tried = [one for one in every if any(row["candidate"] == one.text for row in rows)]
    return Standing(
        setting,
        TEST if second else DEV,
        chosen,
        rows,
        [*_matched(resampled, chosen, tried, base)],
        [spec.title for spec, score in [*first, *second] if score.failed],
    )


def _names(one: Candidate) -> Row:
    method = one.method
    about = {"name": method.name, "title": method.title, "family": method.family}
    return {"candidate": one.text, "knob": one.label, **about}


def _dev_errors(score: ScoredFit) -> dict[str, float]:
    if score.failed:
        return {}
    errors = {NEW_DOMAIN: score.new_domain_error, BACKWARD: score.backward_error}
    return {**errors, "balanced": score.balanced_error}


def _figures(resampled: Resampled, one: Candidate, base: Candidate) -> Row:
    """Return what a row holds of the candidate's own scores."""
    repeats, scores = resampled.repeats(one), [*resampled.scores.get(one.text, {}).values()]
    row: dict[str, Any] = {
        name: resampled.estimate([(one, name)], repeats) for name in (NEW_DOMAIN, PIER, BACKWARD)
    }
    is_base = one.method.name == BASE
    both = [(one, BACKWARD), (base, BACKWARD)]
    row[FORGETTING] = None if is_base else resampled.estimate(both, repeats, forgetting)
    places = {data: [repeat for repeat in repeats if repeat[0] == data] for data, _ in repeats}
    sets = {data: resampled.estimate([(one, NEW_DOMAIN)], own) for data, own in places.items()}
    for name in scores[0].backward_sets if scores else ():
        sets[name] = resampled.estimate([(one, name)], repeats)
    for part in PARTS:
        shares = [share for score in scores if (share := score.sparsity.get(part)) is not None]
        row[part] = sum(shares) / len(shares) if shares else None
    return {
        **row,
        "repeats": repeats,
        "sets": {name: error and error.share for name, error in sets.items()},
        "loops": sum(score.loops for score in scores),
        "weights": scores[0].weights if scores else 0,
        "bytes": scores[0].bytes if scores else 0,
        "seconds": float(np.median([score.seconds for score in scores])) if scores else 0.0,
    }


def _against_lora(
    resampled: Resampled,
    one: Candidate,
    base: Candidate,
    chosen: Candidate | None,
    lora: Method | None,
) -> Row:
    """Return a chosen candidate against the chosen LoRA, and against that of its learning rate."""
    rate, others = one.options.get("lr"), {} if chosen is None else {"against_lora": chosen}
    if lora and lora.knob == "lr" and one.method.family in BAYESIAN and rate in lora.values:
        others["same_rate"] = Candidate(lora, rate)
    found = {what: resampled.against(one, other, base) for what, other in others.items()}
    return {what: {"other": others[what].label, **one} for what, one in found.items() if one}


def _matched(
    resampled: Resampled,
    chosen: Mapping[str, Candidate],
    tried: Sequence[Candidate],
    base: Candidate,
) -> Iterator[Row]:
    """Yield chosen Bayesian candidates against the curves of methods that are not."""
    for one in chosen.values():
        for name, best in chosen.items():
            if one.method.family not in BAYESIAN or best.method.family in (*BAYESIAN, BASE):
                continue
            rest = [
                other
                for other in tried
                if other == best.parent or (other.method.name == name and other != best)
            ]
            if found := resampled.match(one, [best, *rest], base):
                yield {**_names(one), "method": name, **found}
