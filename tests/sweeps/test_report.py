from dataclasses import replace

from rich.console import Console

from blora_pyro.sweeps.report import sweep_tables
from blora_pyro.sweeps.sweeping import Sweep
from blora_pyro.sweeps.trials import Trial


def trial(number, new_domain, backward):
    new, old = (
        {"rate": error, "interval": [error - 0.01, error + 0.01]}
        for error in (new_domain, backward)
    )
    change = {"difference": backward - 0.05, "interval": [-0.01, 0.03]}
    values = {"beta": 1e-5 * (number + 1), "prior_scale": 0.0123456}
    return Trial(number, f"trial-{number}", values, new, old, change, {}, 1.0)


def shown(found):
    console = Console(width=110)
    with console.capture() as capture:
        for line in sweep_tables(found):
            console.print(line, soft_wrap=isinstance(line, str), markup=False)
    return capture.get().splitlines()


def cells(lines, start):
    (row,) = [line for line in lines if line.strip("│ ").startswith(start)]
    return [cell.strip() for cell in row.strip("│ ").split("│")]


BASE = {
    name: {"rate": error, "interval": [error, error]}
    for name, error in {"new_domain": 0.5, "backward": 0.05}.items()
}


def test_the_front_its_knee_and_the_base_are_shown(tmp_path):
    trials = trial(0, 0.3, 0.055), trial(1, 0.2, 0.06), trial(2, 0.19, 0.08), trial(3, 0.4, 0.08)
    options = {"data": "zh-en", "steps": 200}
    ranges = {"beta": (1e-6, 1e-3), "prior_scale": (0.01, 0.3)}
    found = Sweep(tmp_path / "[my] sweep", "study", options, ranges, BASE, trials, running=1)
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
    command = "blora-pyro fit --data zh-en --beta 2e-05 --prior-scale 0.0123456 --steps 200"
    assert lines[-1] == f"to fit it again: {command}"
    (found.output / "study.log").touch()
    assert f"optuna-dashboard '{found.output}/study.log'" in shown(found)[-1]


def test_without_a_finished_trial_there_is_a_line(tmp_path):
    found = Sweep(tmp_path, "study", {}, {}, None, (), ({"number": 0},))
    assert shown(found) == ["0 trials finished; 1 diverged"]
    assert shown(replace(found, diverged=(), running=2)) == [
        "0 trials finished; 2 running in other processes"
    ]
