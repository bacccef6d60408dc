import json

import pytest

from blora_pyro.comparison import files
from blora_pyro.comparison.methods import METHODS
from blora_pyro.errors import UserError


@pytest.fixture
def comparison(made_up):
    return made_up(["scaled-lora", "blora"], ("allx400",))


def test_a_report_is_three_files(comparison):
    lines, content = files.report(comparison)
    output = comparison.study.output
    assert json.loads((output / files.JSON).read_text()) == json.loads(json.dumps(content))
    assert content["rows"]["missing"] == 0
    assert content["settings"]["allx400"]["chosen"].keys() == {
        *("base", "lora", "scaled-lora", "blora")
    }
    assert content["machines"] == [{"threads": 1}]
    assert (output / files.PICTURE).read_bytes().startswith(b"\x89PNG")
    text = (output / files.MARKDOWN).read_text()
    chosen = content["settings"]["allx400"]["chosen"]["scaled-lora"]
    assert f"blora-pyro compare --row {chosen} --settings allx400 --domains de-en" in text
    assert "| BLoRA |" in text
    assert len(lines) == 8


def test_what_is_missing_is_told(made_up):
    comparison = made_up(["blora"], ("allx400",))
    spec = comparison.plan.rows()[-1]
    key = comparison.study.key_of(spec)
    (comparison.study.store.rows / f"{key}.json").unlink()
    comparison.study.store._known.clear()
    lines, content = files.report(comparison)
    assert content["rows"]["missing"] == 1
    assert "1 rows are not made yet: these figures will change" in lines


def test_without_rows_nothing_is_written(made_up):
    comparison = made_up(["blora"], ("allx400",), fill=False)
    lines, content = files.report(comparison)
    assert "no row is in" in lines[0] and content == {}
    assert not comparison.study.output.exists()


def test_the_plan_is_told_in_lines(made_up):
    comparison = made_up(["scaled-lora", "blora"], ("allx400",), fill=False)
    lines = files.plan_lines(comparison)
    assert lines[0].startswith("4 methods, settings allx400, domains de-en, es-en, seeds 0, 1")
    fits = len(METHODS["lora"].values) + len(METHODS["blora"].values)
    assert lines[1] == f"rows known: 0 done, {fits + 1} to do, with {fits} fits to make"
    assert lines[2].endswith("scaled-lora")
    assert lines[3] == "the second stage comes to 38 rows or so"
    assert lines[4:6] == [
        "to do: base, allx400, de-en, seed 0, dev",
        f"to do: lora:{METHODS['lora'].values[0]:g}, allx400, de-en, seed 0, dev",
    ]


def test_an_output_that_cant_be_written_is_told(comparison):
    (comparison.study.output / files.MARKDOWN).mkdir()
    with pytest.raises(UserError, match="can't be written"):
        files.report(comparison)


def test_a_comparison_of_which_every_fit_failed_has_no_picture(made_up):
    comparison = made_up(["blora"], ("allx400",), fill=False, only_choose=True)
    for spec in comparison.unmade():
        comparison.study.store.put(
            comparison.study.key_of(spec), {"failed": "nan", "sets": {}, "machine": {}}
        )
    lines, content = files.report(comparison)
    assert "failed, and in no figure: base, allx400, de-en, seed 0, dev" in lines
    assert content["settings"]["allx400"]["chosen"] == {}
    assert not (comparison.study.output / files.PICTURE).exists()
    assert "failed" in (comparison.study.output / files.MARKDOWN).read_text()
