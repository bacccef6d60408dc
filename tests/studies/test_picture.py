import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blora_pyro.studies.picture import HUES, draw, spaced
from blora_pyro.studies.standings import standings
from blora_pyro.tables import Percent


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_labels_are_apart_in_their_order_and_inside(heights):
    found = spaced(sorted(heights))
    gap = min(0.045, 1 / len(heights))
    assert all(b - a > gap - 1e-9 for a, b in itertools.pairwise(found))
    assert found[0] > 0 and found[-1] < 1


def test_labels_that_are_apart_stay_where_they_are():
    assert spaced([0.1, 0.5, 0.9]) == [0.1, 0.5, 0.9]


def point(row):
    """New-domain and backward error in percent."""
    return 100 * row["new_domain"].share, 100 * row["backward"].share


@pytest.fixture
def found(made_up_run):
    return standings(made_up_run(["scaled-lora", "blora"], ("allx600", "allx400")).plan)


def test_a_panel_a_setting_with_every_point(found):
    figure = draw(found)
    assert len(figure.axes) == 2
    for panel, standing in zip(figure.axes, found, strict=True):
        assert standing.setting.title in panel.get_title("left")
        lines = [line for line in panel.lines if line.get_markerfacecolor() == "white"]
        assert len(lines) == 4  # base, LoRA, scaled LoRA, BLoRA
        assert sum(len(line.get_xdata()) for line in lines) == len(standing.results)
        result = standing.results[0]
        assert tuple(lines[0].get_xydata()[0]) == pytest.approx(point(result))


def test_chosen_points_are_filled_and_named_in_their_familys_hue(found):
    figure = draw(found)
    for panel, standing in zip(figure.axes, found, strict=True):
        filled = [line for line in panel.lines if line.get_markerfacecolor() != "white"]
        chosen = {point(one) for one in standing.chosen_results}
        drawn = {tuple(line.get_xydata()[0]) for line in filled if len(line.get_xdata()) == 1}
        assert drawn == chosen
        hues = {text.get_text().split(", at ")[0]: text.get_color() for text in panel.texts}
        assert hues == {
            one.method.title: HUES[one.method.family] for one in standing.chosen.values()
        }


def test_the_view_is_of_what_is_adapted_and_the_base_is_named_with_its_place(found):
    for panel, standing in zip(draw(found).axes, found, strict=True):
        base, *adapted = (point(one)[0] for one in standing.chosen_results)
        low, high = panel.get_xlim()
        assert low < min(adapted) and max(adapted) < high < base
        assert f"base model, at {base:.1f}" in {text.get_text() for text in panel.texts}


def test_the_base_alone_is_in_view(found):
    for standing in found:
        alone = replace(standing, rows=standing.results[:1])
        (panel,) = draw([alone]).axes
        low, high = panel.get_xlim()
        assert low < point(alone.results[0])[0] < high
        assert [text.get_text() for text in panel.texts] == ["base model"]


def test_a_method_without_its_chosen_value_is_named_at_another(found):
    (standing, _) = found
    others = [
        one for one in standing.results if one["name"] != "scaled-lora" or not one["is_chosen"]
    ]
    (panel,) = draw([replace(standing, rows=others)]).axes
    first = next(one for one in others if one["name"] == "scaled-lora")
    (named,) = (text for text in panel.texts if text.get_text().startswith("LoRA, ΔW scaled"))
    assert named.xy == pytest.approx(point(first))


def test_a_value_that_lacks_a_seed_of_the_chosen_one_is_not_drawn(found):
    (standing, _) = found
    partial = next(one for one in standing.results if not one["is_chosen"])
    results = [
        {**one, "repeats": one["repeats"][1:]} if one == partial else one
        for one in standing.results
    ]
    (panel,) = draw([replace(standing, rows=results)]).axes
    lines = [line for line in panel.lines if line.get_markerfacecolor() == "white"]
    points = {tuple(point) for line in lines for point in line.get_xydata()}
    assert len(points) == len(standing.results) - 1
    assert point(partial) not in points


def test_a_perfect_method_has_a_place_too(made_up_run):
    run = made_up_run(["blora"], ("allx400",))
    (standing,) = standings(run.plan)
    zero = standing.chosen_results[-1]
    assert zero["name"] == "blora"
    zero["new_domain"] = Percent(0.0)
    (panel,) = draw([standing]).axes
    assert (panel.get_xscale(), panel.get_yscale()) == ("linear", "log")


def test_before_the_test_rows_the_picture_is_of_dev(made_up_run):
    (panel,) = draw(standings(made_up_run(["blora"], ("allx400",), only_choose=True).plan)).axes
    assert "(dev: the choice alone)" in panel.get_title("left")
