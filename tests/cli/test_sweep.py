import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blora_pyro.cli import app
from blora_pyro.sweeps import sweeping

from .conftest import complaint


def run(*arguments):
    return CliRunner().invoke(app, ["sweep", *(str(argument) for argument in arguments)])


@pytest.fixture
def handed_on(monkeypatch):
    """What `sweep` is called with, in place of a sweep."""
    seen = {}

    def sweep(output, *, progress, **options):
        seen.update(options, output=output)
        return sweeping.Sweep(output, "study", {}, {}, None, ())

    monkeypatch.setattr(sweeping, "sweep", sweep)
    return seen


@pytest.fixture
def short(fluent_folder, tones_folder, tmp_path):
    """Arguments of a sweep with fits of two steps."""
    data = shutil.copytree(tones_folder, tmp_path / "tones")
    (data / "test.jsonl").rename(data / "dev.jsonl")
    return [
        *("--base", fluent_folder, "--data", data, "--backward", data / "de.jsonl"),
        *("--rank", 2, "--steps", 2, "--batch-size", 2, "--output", tmp_path / "sweep"),
    ]


OWN = {"trials": 20, "search": None, "storage": None, "study_name": None, "timeout": None}


def test_options_of_the_sweep_and_of_its_fits_are_handed_on(handed_on, tmp_path):
    result = run(
        *("--trials", 5, "--search", "beta=1e-6:1e-2", "--search", "prior-scale = 0.1:1"),
        *("--storage", "sqlite:///a.db", "--study-name", "mine", "--timeout", 60),
        *("--output", tmp_path, "--data", "de-en", "--backward", "de, en", "--steps", 200),
        *("--prior", "student-t", "--prior-arg", "df=3", "--dev", "zh-en", "--spec-augment"),
    )
    assert result.exit_code == 0, result.output
    assert handed_on == {
        "output": tmp_path,
        "trials": 5,
        "search": {"beta": (1e-6, 1e-2), "prior_scale": (0.1, 1.0)},
        "storage": "sqlite:///a.db",
        "study_name": "mine",
        "timeout": 60.0,
        "data": ("de-en",),
        "backward": ("de", "en"),
        "steps": 200,
        "prior": "student-t",
        "prior_args": {"df": "3"},
        "dev": "zh-en",
        "spec_augment": True,
    }


def test_what_is_not_given_is_not_handed_on(handed_on):
    assert run().exit_code == 0
    assert handed_on == {**OWN, "output": Path("runs/sweep")}


@pytest.mark.parametrize("option", ["--resume", "--overwrite", "--checkpoint-every", "--dance"])
def test_options_that_make_no_sense_for_a_sweep_are_refused(handed_on, option):
    result = run(option)
    assert result.exit_code == 2 and f"No such option: {option}" in result.stderr
    assert handed_on == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--search", "beta"], "search is 'beta'; give name=low:high, such as beta=1e-6:1e-3"),
        (["--search", "beta=1:2:3"], "search is 'beta=1:2:3'"),
        (["--search", "beta=1:2", "--search", "beta=3:4"], "search gives 'beta' twice"),
        (["--search", "beta=2:1"], "search of beta is from 2.0 to 1.0; give 0 < low < high"),
        (["--search", "df=2:3"], "prior normal has no 'df' to be searched"),
        (["--beta", "1e-4"], "beta is searched and given, too"),
        (["--prior-scale", "0.1"], "prior_scale is searched and given, too"),
        (["--backward", "none"], "there are no backward sets to forget"),
        (["--steps", "0"], "steps is 0"),
        (["--trials", "0"], "trials is 0"),
        (["--storage", "nowhere"], "storage 'nowhere' can't be opened"),
        (["--dev", "nowhere"], "'nowhere'"),
    ],
)
def test_bad_input_is_told_in_one_line(short, arguments, words):
    if arguments[:2] == ["--backward", "none"]:
        short = [*short[:4], *short[6:]]
    assert words in complaint(run(*short, *arguments))


def test_a_sweep_shows_its_front_and_goes_on(short, tmp_path):
    result = run(*short, "--trials", 1)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "1 trial finished" in result.stdout
    assert lines[-1].startswith("to look at all trials: optuna-dashboard ")
    assert lines[-2].startswith("to fit it again: blora-pyro fit --base ")
    assert "trial 0: beta " in " ".join(result.stderr.split())
    result = run(*short, "--trials", 2, "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content == json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [one["number"] for one in content["trials"]] == [0, 1]
    assert "has rank = 2, not 3" in complaint(run(*short, "--rank", 3))
