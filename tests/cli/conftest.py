import json

import pytest
from typer.testing import CliRunner

from blora_pyro.cli import app


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def well(*arguments):
    """The standard output of a command that must succeed."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def complaint(result, exit_code=2) -> str:
    """The one line that a command died with; stages that had begun ("loading ...") may precede."""
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("blora-pyro: ")
    return lines[0]


def parsed(text):
    """JSON as every parser reads it: without NaN and Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def short(fluent_folder, tones_folder) -> list[str]:
    """Arguments of a fit in two steps."""
    return [
        *("fit", "--base", fluent_folder, "--data", tones_folder, "--backward", "none"),
        *("--rank", 2, "--steps", 2, "--batch-size", 2),
    ]
