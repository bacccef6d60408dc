import json

import pytest

from blora_pyro.comparison.methods import METHODS, read_setting
from blora_pyro.comparison.rows import TEST
from blora_pyro.comparison.standing import standings

COMPARED = ["scaled-lora", "blora"]


@pytest.fixture
def standing(made_up):
    comparison = made_up(COMPARED, ("allx400",))
    (found,) = standings(comparison)
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


def test_values_that_are_not_asked_for_any_more_count_where_their_rows_are_there(made_up):
    (wide,) = standings(made_up(COMPARED, ("allx400",)))
    comparison = made_up(COMPARED, ("allx400",), neighbours=False)
    (found,) = standings(comparison)
    assert len(comparison.plan.scored("blora", found.setting)) == 1
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


def test_after_the_choice_alone_the_results_are_of_dev(made_up):
    (found,) = standings(made_up(COMPARED, ("allx400",), only_choose=True))
    assert found.split == "dev"
    tried = sum(len(METHODS[name].choices) for name in ("base", "lora", "scaled-lora", "blora"))
    assert len(found.results) == len(found.choices) == tried
    assert all(one.places == (("de-en", 0),) for one in found.results)


def test_without_a_row_there_is_no_standing(made_up):
    assert standings(made_up(COMPARED, ("allx400",), fill=False)) == []


def test_failed_rows_are_named(made_up):
    comparison = made_up(COMPARED, ("allx400",))
    study, plan = comparison.study, comparison.plan
    chosen = plan.chosen("blora", read_setting("allx400"))
    spec = plan.test_rows(chosen, plan.settings[0])[0]
    study.store.put(study.key_of(spec), {"failed": "nan", "sets": {}})
    study.store._known.clear()
    (found,) = standings(comparison)
    assert found.failed == [spec.title]
    result = next(one for one in found.results if one.candidate.text == chosen.text)
    assert result.failed == ((spec.domain, spec.seed),)


def test_json_has_no_nan(standing):
    content = json.loads(json.dumps(standing.to_json(), allow_nan=False))
    assert content["chosen"]["base"] == "base"
    assert content["choices"][0]["candidate"] == "base"
