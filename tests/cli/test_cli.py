import subprocess
import sys

import pytest

import blora_pyro

from .conftest import complaint, run, well

COMMANDS = (
    "fit",
    "study",
    "sweep",
    "compare",
    "runs",
    "show",
    "evaluate",
    "errors",
    "diagnose",
    "keep",
    "prune",
    "combine",
    "priors",
    "transcribe",
    "merge",
    "push-to-hub",
    "data",
)


@pytest.mark.parametrize("place", ["", "nowhere/u.jsonl"])
def test_an_output_that_cannot_be_written_is_refused_before_anything(finished_run, tmp_path, place):
    result = run("evaluate", finished_run.output, "--output", tmp_path / place)
    assert "can't be written" in complaint(result)
    assert "..." not in result.stderr


def test_an_unknown_normalizer_is_refused(finished_run, short):
    for command in (["evaluate", finished_run.output], short):
        assert "normalizer is 'english'; give" in complaint(
            run(*command, "--normalizer", "english")
        )


def test_a_missing_run_is_refused_in_one_line(tones_folder, tmp_path):
    gone = tmp_path / "gone"
    assert str(gone) in complaint(run("evaluate", gone))
    assert str(gone) in complaint(run("merge", gone, tmp_path / "out"))
    audio = tones_folder / "en0.wav"
    assert str(gone) in complaint(run("transcribe", audio, "--adapter", gone))


@pytest.mark.parametrize("command", ["evaluate", "transcribe"])
def test_an_unknown_device_is_refused_in_one_line(
    fluent_folder, finished_run, tones_folder, command
):
    arguments = {
        "evaluate": [finished_run.output],
        "transcribe": [tones_folder / "en0.wav", "--base", fluent_folder],
    }
    result = run(command, *arguments[command], "--device", "toaster")
    assert "toaster" in complaint(result)


@pytest.mark.parametrize("command", [[], ["data", "check"], *([name] for name in COMMANDS)])
def test_every_command_has_help_that_is_whole_in_80_columns(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    out = well(*command, "-h")
    assert "Usage:" in out and "…" not in out
    assert max(map(len, out.splitlines())) <= 80
    if not command:
        assert all(name in out for name in COMMANDS)
        assert well("--help") == out


def test_the_help_of_a_run_shows_how_its_revision_is_given():
    assert "OWNER/NAME@REVISION" in "".join(well("evaluate", "--help").split())


def test_version():
    assert well("--version") == f"blora-pyro {blora_pyro.__version__}\n"


@pytest.mark.parametrize("arguments", [["evaluate"], ["fit", "--rank", "many"], ["dance"], []])
def test_usage_errors_exit_with_2_and_no_traceback(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_help_version_and_the_list_of_runs_load_no_heavy_library(finished_run):
    code = """
import sys
from typer.testing import CliRunner
from blora_pyro.cli import app
helps = (["--help"], ["fit", "--help"], ["sweep", "-h"], ["compare", "-h"], ["data", "check", "-h"])
lists = (["runs", sys.argv[1]], ["runs", sys.argv[1], "--json"])
for arguments in (*helps, ["--version"], *lists):
    assert CliRunner().invoke(app, arguments).exit_code == 0
heavy = {"torch", "transformers", "pyro", "peft", "datasets", "numpy", "jiwer"}
heavy |= {"arviz", "matplotlib", "optuna"}
print(sorted(heavy & set(sys.modules)))
"""
    command = [sys.executable, "-c", code, str(finished_run.output)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == "[]\n"
