import json
from dataclasses import replace

import pytest
from rich.console import Console

from blora_pyro.errors import UserError
from blora_pyro.studies.search import Search
from blora_pyro.studies.search_report import search_plot, search_tables, write_search

ERRORS = [(0.10, 0.10), (0.12, 0.08), (0.14, 0.06), (0.30, 0.055), (0.30, 0.09)]


BASE = {
    name: {"rate": error, "interval": [error, error]}
    for name, error in {"new_domain": 0.5, "backward": 0.05}.items()
}


def rate(value):
    return {"rate": value, "interval": [value - 0.01, value + 0.01]}


def fit(number, new_domain, backward, values):
    errors = {"new_domain": rate(new_domain), "backward": rate(backward)}
    change = {"difference": backward - 0.05, "interval": [-0.01, 0.03]}
    about = {"number": number, "folder": f"trial-{number}", "values": values}
    return {**about, **errors, "forgetting": change, "sparsity": {}, "seconds": 1.0}


def made_up(output, ranges):
    trials = [
        fit(number, *errors, {name: low * 2**number for name, (low, _) in ranges.items()})
        for number, errors in enumerate(ERRORS)
    ]
    return Search(output, "study", {}, ranges, BASE, trials)


@pytest.mark.parametrize(
    ("names", "panels"),
    [(["beta"], 1), (["beta", "prior_scale"], 2), (["beta", "prior_scale", "lr"], 3)],
)
def test_there_is_a_panel_for_everything_that_was_searched(tmp_path, names, panels):
    figure = search_plot(made_up(tmp_path, {name: (1e-3, 1.0) for name in names}))
    seen = [axes for axes in figure.axes if axes.get_title("left")]
    titles = [axes.get_title("left") for axes in seen]
    assert titles == [f"colour: {name.replace('_', ' ')}" for name in names]
    assert len(seen) == panels


def test_all_trials_the_front_the_knee_and_the_base_are_drawn(tmp_path):
    found = made_up(tmp_path, {"beta": (1e-3, 1.0)})
    figure = search_plot(found)
    panel = figure.axes[0]
    drawn = {one.get_label(): one.get_offsets().tolist() for one in panel.collections}
    assert drawn["trial"] == [[100 * x, 100 * y] for x, y in ERRORS]
    assert drawn["knee"] == [pytest.approx([14, 6])]
    assert drawn["base"] == [pytest.approx([50, 5])]
    (front,) = [line for line in panel.lines if line.get_label() == "Pareto front"]
    assert front.get_xdata() == pytest.approx([10, 12, 14, 30])
    dots = next(one for one in panel.collections if one.get_label() == "trial")
    assert dots.get_array().tolist() == [0.001, 0.002, 0.004, 0.008, 0.016]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(names) == ["Pareto front", "base", "knee", "trial"]


# ---- for the terminal


def shown(found):
    console = Console(width=110)
    with console.capture() as capture:
        for line in search_tables(found):
            console.print(line, soft_wrap=isinstance(line, str), markup=False)
    return capture.get().splitlines()


def cells(lines, start):
    (row,) = [line for line in lines if line.strip("│ ").startswith(start)]
    return [cell.strip() for cell in row.strip("│ ").split("│")]


def test_the_front_its_knee_and_the_base_are_shown(tmp_path):
    errors = (0.3, 0.055), (0.2, 0.06), (0.19, 0.08), (0.4, 0.08)
    trials = [
        fit(number, *both, {"beta": 1e-5 * (number + 1), "prior_scale": 0.0123456})
        for number, both in enumerate(errors)
    ]
    options = {"data": "zh-en", "steps": 200}
    ranges = {"beta": (1e-6, 1e-3), "prior_scale": (0.01, 0.3)}
    found = Search(tmp_path / "[my] sweep", "study", options, ranges, BASE, trials, running=1)
    found.output.mkdir()
    lines = shown(found)
    assert cells(lines, "*1") == [
        *("*1", "2e-05", "0.0123"),
        *("20.0 [19.0, 21.0]", "6.0 [5.0, 7.0]", "+1.0 [-1.0, 3.0]"),
    ]
    assert cells(lines, "0 ")[3] == "30.0 [29.0, 31.0]"
    assert cells(lines, "base")[3:5] == ["50.0 [50.0, 50.0]", "5.0 [5.0, 5.0]"]
    assert not any(line.strip("│ ").startswith("3 ") for line in lines)  # dominated
    text = "\n".join(lines)
    assert "4 trials finished; 1 running in other processes; picture: " in text
    assert f"blora-pyro evaluate '{found.output}/trial-1'" in text
    command = "blora-pyro fit --data zh-en --prior-scale 0.0123456 --beta 2e-05 --steps 200"
    assert lines[-1] == f"to fit it again: {command}"
    (found.output / "study.db").touch()
    assert f"optuna-dashboard sqlite:///'{found.output}/study.db'" in shown(found)[-1]


def test_without_a_finished_trial_there_is_a_line(tmp_path):
    found = Search(tmp_path, "study", {}, {}, None, (), ({"number": 0},))
    assert shown(found) == ["0 trials finished; 1 diverged"]
    assert shown(replace(found, diverged=(), running=2)) == [
        "0 trials finished; 2 running in other processes"
    ]


def test_what_came_of_a_search_is_written_and_told(tmp_path):
    found = made_up(tmp_path, {"beta": (1e-6, 1e-3)})
    assert write_search(found)[1:] == search_tables(found)[1:]
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert content == json.loads(json.dumps(found.to_json()))
    assert content["front"] == [one["number"] for one in found.front] == [0, 1, 2, 3]
    assert content["knee"]["number"] == found.knee["number"]
    assert f"--beta {found.knee['values']['beta']!r}" in content["knee"]["command"]
    assert content["options"]["search"] == {"beta": [1e-6, 1e-3]}
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    (tmp_path / "sweep.png").unlink()
    (tmp_path / "sweep.png").mkdir()
    with pytest.raises(UserError, match=r"can't be written .*: no trial is lost"):
        write_search(found)
