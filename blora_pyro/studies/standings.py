"""How the methods stand in one setting: what was chosen on dev, and what that gives on test."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from blora_pyro.studies.definition import ScoreSpec, Setting
from blora_pyro.studies.estimates import Against, Matched, Result, Scores, match
from blora_pyro.studies.methods import BAYESIAN, LORA, Candidate
from blora_pyro.studies.plan import Plan
from blora_pyro.studies.results import BASE, DEV, TEST, ScoredFit


@dataclass(frozen=True)
class Choice:
    """A candidate in the first stage, on dev.

    Attributes:
        candidate: A method at a value of its knob.
        new_domain: Error on the new domain; None where the fit failed, as the next.
        backward: Error on the held-out sets.
        balanced: Mean of the two, by which it is chosen.
        is_chosen: Whether it is.
    """

    candidate: Candidate
    new_domain: float | None
    backward: float | None
    balanced: float | None
    is_chosen: bool


@dataclass(frozen=True)
class Standing:
    """One setting.

    Attributes:
        setting: Utterances and steps.
        split: What the results are of: `test`, or `dev` where the comparison went no further.
        choices: Of the first stage, method by method.
        chosen: Method -> its chosen candidate.
        results: Of all candidates that were scored, method by method, values rising.
        against_lora: Method -> its chosen candidate against the chosen LoRA.
        same_rate: Bayesian method -> its chosen candidate against LoRA at the same learning rate,
            where that was fitted: the comparison of the paper.
        matched: For every Bayesian method its chosen candidate against the curve of each other.
        failed: Titles of rows whose fits failed.
    """

    setting: Setting
    split: str
    choices: list[Choice]
    chosen: Mapping[str, Candidate]
    results: list[Result]
    against_lora: Mapping[str, Against]
    same_rate: Mapping[str, Against]
    matched: list[Matched]
    failed: list[str]

    @property
    def chosen_results(self) -> list[Result]:
        """The results of chosen candidates."""
        return [one for one in self.results if self.is_chosen(one)]

    def is_chosen(self, result: Result) -> bool:
        """Whether a result is that of a chosen candidate."""
        name = result.candidate.method.name
        return name in self.chosen and self.chosen[name].text == result.candidate.text

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "split": self.split,
            "choices": [{**vars(one), "candidate": one.candidate.text} for one in self.choices],
            "chosen": {name: one.text for name, one in self.chosen.items()},
            "results": [_to_json(one) for one in self.results],
            "against_lora": {name: _to_json(one) for name, one in self.against_lora.items()},
            "same_rate": {name: _to_json(one) for name, one in self.same_rate.items()},
            "matched": [_to_json(one) for one in self.matched],
            "failed": self.failed,
        }


def standings(plan: Plan) -> list[Standing]:
    """Return where the methods stand in every setting that has a score."""
    found = [_standing(plan, setting) for setting in plan.study.settings]
    return [one for one in found if one.results or one.choices]


def _standing(plan: Plan, setting: Setting) -> Standing:
    names = plan.names
    chosen = {name: one for name in names if (one := plan.chosen(name, setting)) is not None}
    candidates = {name: plan.candidates(name, setting) for name in names}
    every = [one for name in names for one in candidates[name]]
    choosing = every if plan.study.row is None else []
    first = _scored(plan, [plan.dev_score(one, setting) for one in choosing])
    second = _scored(plan, [spec for one in every for spec in plan.test_scores(one, setting)])
    rows = second or first
    scores = Scores((spec.candidate, (spec.data, spec.seed), score) for spec, score in rows)
    base = chosen.get(BASE, Candidate(plan.study.methods[BASE]))
    seen = {spec.candidate.text for spec, _ in rows}
    order = [one for one in every if one.text in seen]
    results = [found for one in order if (found := scores.result(one, base)) is not None]
    return Standing(
        setting,
        TEST if second else DEV,
        _choices(first, chosen),
        chosen,
        results,
        _against(scores, chosen, base, dict.fromkeys(chosen, chosen.get(LORA))),
        _against(scores, chosen, base, _same_rate(plan, chosen)),
        [*_matched(scores, chosen, order, base)],
        [spec.title for spec, score in [*first, *second] if score.failed],
    )


def _scored(plan: Plan, specs: Sequence[ScoreSpec]) -> list[tuple[ScoreSpec, ScoredFit]]:
    """Return the scores that are there."""
    return [(spec, score) for spec in specs if (score := plan.score_of(spec)) is not None]


def _choices(
    rows: Sequence[tuple[ScoreSpec, ScoredFit]], chosen: Mapping[str, Candidate]
) -> list[Choice]:
    found = []
    for spec, row in rows:
        one = spec.candidate
        is_chosen = one.method.name in chosen and chosen[one.method.name].text == one.text
        if row.failed:
            found.append(Choice(one, None, None, None, is_chosen))
            continue
        errors = row.new_domain_error, row.backward_error, row.balanced_error
        assert not any(map(math.isnan, errors))
        found.append(Choice(one, *errors, is_chosen))
    return found


def _against(
    scores: Scores,
    chosen: Mapping[str, Candidate],
    base: Candidate,
    others: Mapping[str, Candidate | None],
) -> dict[str, Against]:
    """Chosen candidates against others, LoRA itself and the base left out."""
    found: dict[str, Against] = {}
    for name, other in others.items():
        if name not in (BASE, LORA) and other is not None:
            one = scores.against(chosen[name], other, base)
            found |= {name: one} if one else {}
    return found


def _same_rate(plan: Plan, chosen: Mapping[str, Candidate]) -> dict[str, Candidate | None]:
    """LoRA at the learning rate of each chosen Bayesian candidate, where that was tried."""
    lora = plan.study.methods.get(LORA)
    if lora is None or lora.knob != "lr":
        return {}
    bayesian = {name: one for name, one in chosen.items() if one.method.family in BAYESIAN}
    rates = {name: one.options.get("lr") for name, one in bayesian.items()}
    return {name: Candidate(lora, rate) for name, rate in rates.items() if rate in lora.values}


def _matched(
    scores: Scores, chosen: Mapping[str, Candidate], order: Sequence[Candidate], base: Candidate
) -> Iterator[Matched]:
    """Chosen Bayesian candidates against the curves of methods that are not."""
    for one in chosen.values():
        for name, best in chosen.items():
            if one.method.family not in BAYESIAN or best.method.family in (*BAYESIAN, BASE):
                continue
            rest = [
                other
                for other in order
                if other == best.parent or (other.method.name == name and other != best)
            ]
            if found := match(scores, one, [best, *rest], base):
                yield found


def _to_json(one: Result | Against | Matched) -> dict[str, Any]:
    """Return figures as JSON has them: candidates by their texts."""
    names = {name: getattr(one, name).text for name in ("candidate", "other") if hasattr(one, name)}
    return {**asdict(one), **names}
