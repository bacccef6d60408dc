import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blora_pyro.errors import UserError
from blora_pyro.runs.finished import evaluate_run
from blora_pyro.runs.folders import RUN, save_posterior
from blora_pyro.runs.strength_curves import strength_curve


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of the finished run, to write into."""
    return shutil.copytree(finished_run.output, tmp_path / "run")


@pytest.fixture
def set_option(run):
    """Change an option in the run's configuration."""

    def change(**options):
        about = json.loads((run / RUN).read_text(encoding="utf-8"))
        about["config"].update(options)
        (run / RUN).write_text(json.dumps(about), encoding="utf-8")

    return change


@pytest.fixture(scope="module")
def curve(finished_run, tmp_path_factory):
    """The curve of a copy of the finished run, which has a picture already."""
    run = shutil.copytree(finished_run.output, tmp_path_factory.mktemp("curves") / "run")
    (run / "strength.png").write_bytes(b"of before")
    return strength_curve(run, (0.5,))


def test_every_point_has_the_figures_of_an_evaluation_at_its_strength(curve, finished_run):
    assert [point["strength"] for point in curve["points"]] == [0, 0.5, 1]
    assert (curve["split"], curve["metric"], curve["strength_by"]) == ("test", "wer", "scale")
    assert curve["new_domain"] == finished_run.metrics["new_domain"]["name"]
    point, metrics = curve["points"][1], evaluate_run(finished_run.output, strength=0.5)
    assert point["new_domain"] == metrics["new_domain"]["adapted"]["wer"]
    assert point["backward_error"] == metrics["backward_error"]["adapted"]
    assert point["forgetting"] == metrics["backward_error"]["change"]
    for name, both in metrics["backward"].items():
        assert point["backward"][name] == both["adapted"]["wer"]
    assert curve["points"][0]["new_domain"] == finished_run.metrics["new_domain"]["base"]["wer"]
    assert curve["points"][2]["new_domain"] == finished_run.metrics["new_domain"]["adapted"]["wer"]
    rates = [point["new_domain"]["rate"] for point in curve["points"]]
    assert rates[0] > rates[-1]  # else this tests little


def test_what_is_removed_is_told_against_the_fit(curve):
    points = curve["points"]
    errors = [point["backward_error"]["rate"] for point in points]
    assert errors[-1] > errors[0]  # the fit has forgotten something
    assert points[0]["forgetting_removed"] == 1
    assert points[-1]["forgetting_removed"] == 0
    expected = 1 - (errors[1] - errors[0]) / (errors[-1] - errors[0])
    assert points[1]["forgetting_removed"] == pytest.approx(expected)


def test_where_nothing_is_forgotten_there_is_nothing_to_remove(run, finished_run):
    posterior = finished_run.posterior
    nothing = {name: torch.zeros_like(value) for name, value in posterior.mean.items()}
    save_posterior(run, replace(posterior, mean=nothing))
    points = strength_curve(run, (0.5,))["points"]
    assert [point["forgetting_removed"] for point in points] == [None] * 3


def test_the_picture_is_written_into_the_run_and_over_that_of_before(curve):
    file = Path(curve["plot"])
    assert file.read_bytes().startswith(b"\x89PNG")
    assert file.name == "strength.png"
    assert (file.parent / RUN).is_file()
    assert not list(file.parent.glob("*.new"))


def test_a_curve_on_dev_sees_no_test_set(run, set_option, tones_folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name, source in {"dev": "test", "de/dev": "de", "en/validation": "en"}.items():
        (data / name).parent.mkdir(exist_ok=True)
        shutil.copy(tones_folder / f"{source}.jsonl", data / f"{name}.jsonl")
        for wav in tones_folder.glob(f"{source}*.wav"):
            shutil.copy(wav, (data / name).parent)
    backward = {name: str(data / name) for name in ("de", "en")}
    set_option(data=[str(data)], backward=backward)
    curve = strength_curve(run, (0,), split="dev")
    assert curve["split"] == "dev"
    assert list(curve["points"][0]["backward"]) == ["de", "en"]
    with pytest.raises(UserError, match="test"):
        strength_curve(run, (0,), split="test")


def test_there_is_no_curve_without_both_errors(run, set_option, tones_folder):
    set_option(backward={})
    with pytest.raises(UserError, match=r"has new_domain to score; a curve needs .* backward sets"):
        strength_curve(run, (0.5,))


def test_bad_strengths_are_refused_before_anything_is_read(run, set_option):
    set_option(base="no/base")
    with pytest.raises(UserError, match="strength is 7"):
        strength_curve(run, (0.5, 7))
