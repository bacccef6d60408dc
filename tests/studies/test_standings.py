import json
from dataclasses import replace

import pytest

from blora_pyro.studies.methods import built_in_methods
from blora_pyro.studies.results import TEST
from blora_pyro.studies.standings import standings

METHODS = built_in_methods()

COMPARED = ["scaled-lora", "blora"]


@pytest.fixture
def standing(made_up_run):
    run = made_up_run(COMPARED, ("allx400",))
    (found,) = standings(run.plan)
    return found


def test_a_setting_has_its_choices_and_its_results(standing):
    assert standing.split == TEST
    chosen = {name: one.text for name, one in standing.chosen.items()}
    assert chosen.keys() == {"base", "lora", "scaled-lora", "blora"}
    assert {one.candidate.text for one in standing.choices if one.is_chosen} == {*chosen.values()}
    for name, text in chosen.items():
        tried = [one for one in standing.choices if one.candidate.method.name == name]
        best = min(tried, key=lambda one: one.balanced)
        assert best.candidate.text == text
        assert best.balanced == pytest.approx((best.new_domain + best.backward) / 2)
    assert [one.candidate.text for one in standing.chosen_results] == [*chosen.values()]


def test_results_are_in_the_order_of_the_knob(standing):
    values = [one.candidate.value for one in standing.results if "blora" in one.candidate.text]
    assert len(values) == 3 and values == sorted(values)


def test_values_that_are_not_asked_for_any_more_count_where_their_rows_are_there(made_up_run):
    (wide,) = standings(made_up_run(COMPARED, ("allx400",)).plan)
    run = made_up_run(COMPARED, ("allx400",), neighbours=False)
    (found,) = standings(run.plan)
    assert len(run.plan.scored("blora", found.setting)) == 1
    assert found.results == wide.results and found.matched == wide.matched


def test_methods_are_held_against_the_best_lora_and_against_the_one_of_the_same_rate(standing):
    assert standing.against_lora.keys() == {"scaled-lora", "blora"}
    best = standing.chosen["lora"].text
    assert {one.other.text for one in standing.against_lora.values()} == {best}
    assert {name: one.other.text for name, one in standing.same_rate.items()} == {
        "blora": f"lora:{METHODS['blora'].options['lr']:g}"
    }


def test_bayesian_methods_are_held_against_the_curves_of_the_others(standing):
    assert [(one.candidate.method.name, one.method) for one in standing.matched] == [
        ("blora", "lora"),
        ("blora", "scaled-lora"),
    ]


def test_after_the_choice_alone_the_results_are_of_dev(made_up_run):
    (found,) = standings(made_up_run(COMPARED, ("allx400",), only_choose=True).plan)
    assert found.split == "dev"
    tried = sum(len(METHODS[name].choices) for name in ("base", "lora", "scaled-lora", "blora"))
    assert len(found.results) == len(found.choices) == tried
    assert all(one.repeats == (("de-en", 0),) for one in found.results)


def test_without_a_row_there_is_no_standing(made_up_run):
    assert standings(made_up_run(COMPARED, ("allx400",), fill=False).plan) == []


def test_failed_rows_are_named(made_up_run):
    run = made_up_run(COMPARED, ("allx400",))
    setting = run.study.settings[0]
    chosen = run.plan.chosen("blora", setting)
    spec = run.plan.test_scores(chosen, setting)[0]
    run.scores[spec.key] = replace(spec.scored, failed="nan")
    (found,) = standings(run.plan)
    assert found.failed == [spec.title]
    result = next(one for one in found.results if one.candidate.text == chosen.text)
    assert result.failed == ((spec.data, spec.seed),)


def test_json_has_no_nan(standing):
    content = json.loads(json.dumps(standing.to_json(), allow_nan=False))
    assert content["chosen"]["base"] == "base"
    assert content["choices"][0]["candidate"] == "base"
