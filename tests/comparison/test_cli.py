import json
import shlex

import pytest
import torch
from typer.testing import CliRunner

from blora_pyro.cli import app
from blora_pyro.comparison.methods import METHODS

LORA, BLORA = METHODS["lora"], METHODS["blora"]
FITS = len(LORA.values) + len(BLORA.values)  # of the first stage


@pytest.fixture
def run(small, tmp_path):
    def invoke(*more):
        backward = [
            part for name in ("de", "en") for part in ("--backward", small["backward"][name])
        ]
        given = ["compare", "--base", small["base"], "--domains", f"mix={small['domains']['mix']}"]
        given += ["--settings", "allx2", "--seeds", "0", "--output", tmp_path / "out", *backward]
        return CliRunner().invoke(app, [str(one) for one in (*given, *more)])

    return invoke


def test_compare_prints_tables_and_writes_files(run, fake_rows, tmp_path):
    result = run("--methods", "scaled-lora,blora", "--threads", 1)
    assert result.exit_code == 0, result.output
    for words in ("against LoRA at its best learning rate", "BLoRA", "ΔW scaled", "the choice"):
        assert words in result.stdout
    assert result.stdout.splitlines()[-1].endswith("compare.md, compare.json, compare.png")
    assert torch.get_num_threads() == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("compare.json", "compare.md", "compare.png", "rows", "locks")
    }
    made = len(fake_rows)
    again = run("--methods", "scaled-lora,blora", "--report", "--json")
    assert json.loads(again.stdout)["rows"] == {"made": made, "missing": 0}
    assert len(fake_rows) == made


def test_a_dry_run_makes_nothing(run, fake_rows, tmp_path):
    result = run("--methods", "blora", "--dry-run")
    assert result.exit_code == 0, result.output
    assert (
        result.stdout.splitlines()[1]
        == f"rows known: 0 done, {FITS + 1} to do, with {FITS} fits to make"
    )
    assert not fake_rows and not (tmp_path / "out").exists()


def test_only_choose_and_chosen_only(run, fake_rows):
    assert run("--methods", "blora", "--only-choose").exit_code == 0
    assert len(fake_rows) == 1 + FITS
    assert run("--methods", "blora", "--chosen-only").exit_code == 0
    rates = {LORA.values[0], BLORA.options["lr"]}  # of equals the first is chosen
    assert len(fake_rows) == 1 + FITS + 1 + len(rates) + 1


def test_a_row_of_its_own_and_the_command_that_makes_it_again(run, fake_rows, tmp_path):
    result = run("--row", "scaled-lora:0.6:0.002")  # at values that are not in the list
    assert result.exit_code == 0, result.output
    assert [title.split(",")[0] for title in fake_rows] == ["base", "scaled-lora:0.6:0.002"]
    assert "factor 0.6 (lr 0.002)" in result.stdout
    assert "against LoRA" not in result.stdout
    (command,) = [
        line
        for line in (tmp_path / "out" / "compare.md").read_text().splitlines()
        if line.startswith("blora-pyro compare")
    ]
    again = shlex.split(command)[1:]
    again[again.index("again")] = str(tmp_path / "again")
    before = [*fake_rows]
    assert CliRunner().invoke(app, again).exit_code == 0
    assert fake_rows == 2 * before
    keys = [
        {path.name for path in (tmp_path / name / "rows").iterdir()} for name in ("out", "again")
    ]
    assert keys[0] == keys[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "dora"), "method is 'dora'; give one of base, full"),
        (("--seeds", "one"), "seeds is 'one'; give whole numbers, such as 0,1,2"),
        (("--settings", "short"), "setting is 'short'; give UTTERANCESxSTEPS"),
        (("--threads", 0), "threads is 0"),
        (("--row", "lora"), "row is 'lora'; give lora:LR"),
        (("--domains", "nowhere", "--row", "lora:0.1"), "no data at 'nowhere'"),
        (("--base", "nowhere", "--row", "lora:0.1"), "nowhere"),
    ],
)
def test_bad_input_is_one_line(run, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1 and lines[0].startswith("blora-pyro: ")
    assert message in lines[0]
    assert "Traceback" not in result.output
