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


def test_a_setting_has_a_row_for_each_candidate_with_what_it_is_chosen_by(standing):
    assert standing.split == TEST
    chosen = {name: one.text for name, one in standing.chosen.items()}
    assert chosen.keys() == {"base", "lora", "scaled-lora", "blora"}
    assert {one["candidate"] for one in standing.rows if one["is_chosen"]} == {*chosen.values()}
    for name, text in chosen.items():
        tried = [one for one in standing.rows if one["name"] == name]
        best = min(tried, key=lambda one: one["dev"]["balanced"])
        assert best["candidate"] == text
        errors = best["dev"]
        mean = (errors["new_domain"] + errors["backward"]) / 2
        assert errors["balanced"] == pytest.approx(mean)
    assert [one["candidate"] for one in standing.chosen_results] == [*chosen.values()]


def test_results_are_in_the_order_of_the_knob(standing):
    texts = [one["candidate"] for one in standing.results if one["name"] == "blora"]
    assert len(texts) == 3 and texts == sorted(texts, key=lambda text: float(text.split(":")[1]))


def test_values_that_are_not_asked_for_any_more_count_where_their_rows_are_there(made_up_run):
    (wide,) = standings(made_up_run(COMPARED, ("allx400",)).plan)
    run = made_up_run(COMPARED, ("allx400",), neighbours=False)
    (found,) = standings(run.plan)
    assert len(run.plan.scored("blora", found.setting)) == 1
    assert found.rows == wide.rows and found.matched == wide.matched


def test_a_row_has_the_figures_of_its_scores(made_up_run):
    run = made_up_run(COMPARED, ("allx400",))
    lora = run.plan.chosen("lora", run.study.settings[0]).text
    shares = iter((0.1, None, 0.2, 0.4))
    for key, one in run.scores.items():
        if one.candidate == lora and one.split == TEST:
            sparsity = {"A": next(shares), "B": None, "delta_w": 0.5}
            run.scores[key] = replace(one, sparsity=sparsity, seconds=10.0 + one.seed)
    (found,) = standings(run.plan)
    base, row = (one for one in found.chosen_results if one["name"] in ("base", "lora"))
    assert {name: row[name] for name in ("A", "B", "delta_w")} == pytest.approx(
        {"A": 0.7 / 3, "B": None, "delta_w": 0.5}
    )
    assert (row["weights"], row["bytes"], row["seconds"]) == (1000, 4096, 10.5)
    assert row["sets"].keys() == {"de-en", "es-en", "de", "en"}
    assert row["sets"]["de"] + row["sets"]["en"] == pytest.approx(2 * row["backward"].share)
    assert row["forgetting"].share == pytest.approx(row["backward"].share - base["backward"].share)
    assert base["forgetting"] is None


def test_methods_are_held_against_the_best_lora_and_against_the_one_of_the_same_rate(standing):
    against = {one["name"]: one["against_lora"] for one in standing.rows if one["against_lora"]}
    assert against.keys() == {"scaled-lora", "blora"}
    assert {one["other"] for one in against.values()} == {standing.chosen["lora"].label}
    same = {one["name"]: one["same_rate"]["other"] for one in standing.rows if one["same_rate"]}
    assert same == {"blora": f"lr {METHODS['blora'].options['lr']:g}"}


def test_bayesian_methods_are_held_against_the_curves_of_the_others(standing):
    assert [(one["name"], one["method"]) for one in standing.matched] == [
        ("blora", "lora"),
        ("blora", "scaled-lora"),
    ]


def test_after_the_choice_alone_the_results_are_of_dev(made_up_run):
    (found,) = standings(made_up_run(COMPARED, ("allx400",), only_choose=True).plan)
    assert found.split == "dev"
    tried = sum(len(METHODS[name].choices) for name in ("base", "lora", "scaled-lora", "blora"))
    assert len(found.results) == len(found.rows) == tried
    assert all(one["repeats"] == [("de-en", 0)] for one in found.results)


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
    row = next(one for one in found.rows if one["candidate"] == chosen.text)
    assert row["failed"] == [(spec.data, spec.seed)]
