import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from blora_pyro.errors import UserError
from blora_pyro.studies.report import tables_of, write_report
from blora_pyro.studies.results import read_results
from blora_pyro.studies.running import run_study
from blora_pyro.studies.standings import standings
from blora_pyro.tables import Table


@pytest.fixture
def run(made_up_run):
    return made_up_run(["scaled-lora", "blora"], ("allx400",))


@pytest.fixture
def found(run):
    (standing,) = standings(run.plan)
    return standing, tables_of(standing)


def rows(table):
    return [[str(cell) for cell in cells] for cells, _ in table.filled_rows]


# ---- files


def test_a_report_is_three_files(run):
    lines, content = write_report(run, "compare")
    text = json.dumps(content, allow_nan=False)
    assert json.loads((run.output / "compare.json").read_text()) == json.loads(text)
    assert content["rows"]["missing"] == 0
    chosen = content["settings"]["allx400"]["chosen"]
    assert chosen.keys() == {"base", "lora", "scaled-lora", "blora"}
    assert (run.output / "compare.png").read_bytes().startswith(b"\x89PNG")
    text = (run.output / "compare.md").read_text()
    command = f"blora-pyro compare --row {chosen['scaled-lora']} --settings allx400 --domains de-en"
    assert command in text
    assert "| BLoRA |" in text
    assert len([line for line in lines if isinstance(line, Table)]) == 7
    assert lines[-1].endswith("compare.md, compare.json, compare.png")


def test_a_report_is_made_from_the_table_alone_and_is_the_same(run, tmp_path):
    _, content = write_report(run)
    again = run_study(run.study, tmp_path / "elsewhere", results=run.results, work=False)
    assert write_report(again)[1] == content
    assert not (tmp_path / "elsewhere").exists()


def test_what_is_missing_is_told(run):
    del run.scores[run.plan.wanted()[-1].key]
    lines, content = write_report(run)
    assert content["rows"]["missing"] == 1
    assert "1 rows are not made yet: these figures will change" in lines


def test_without_rows_nothing_is_written(made_up_run):
    run = made_up_run(["blora"], ("allx400",), fill=False)
    lines, content = write_report(run)
    assert "no row is in" in lines[0] and content == {}
    assert not run.output.exists()


def test_an_output_that_cant_be_written_is_told(run):
    (run.output / "results.md").mkdir()
    with pytest.raises(UserError, match="can't be written"):
        write_report(run)


def test_a_study_of_which_every_fit_failed_has_no_picture(made_up_run):
    run = made_up_run(["blora"], ("allx400",), fill=False, only_choose=True)
    for spec in run.plan.missing():
        run.scores[spec.key] = replace(spec.scored, failed="nan")
    lines, content = write_report(run)
    assert "failed, and in no figure: base, allx400, de-en, seed 0, dev" in lines
    assert content["settings"]["allx400"]["chosen"] == {}
    assert content["settings"]["allx400"]["results"][0]["dev"] == {}
    assert not (run.output / "results.png").exists()
    assert "failed" in (run.output / "results.md").read_text()


# ---- tables


def test_there_is_a_table_of_everything(found):
    _, tables = found
    titles = [table.title.removeprefix("all utterances, 400 steps: ") for table in tables]
    assert titles == [
        "de-en, es-en, 2 seeds",
        "sparsity, size, time",
        "against LoRA at its best learning rate",
        "against LoRA at the same learning rate, as in the paper",
        "at equal error",
        "error by set, in %",
        "the choice, on dev",
    ]


def test_loops_and_rates_above_100_percent_are_told_below_the_errors(found):
    standing, (errors, *_) = found
    assert len(errors.captions) == 1
    for row in standing.rows:
        if row["name"] == "lora" and row["is_chosen"]:
            row["loops"], row["sets"]["de"] = 3, 1.4
    errors, *_ = tables_of(standing)
    assert errors.captions[1:] == (
        "transcripts that repeat themselves: LoRA 3",
        "above 100%: LoRA on de, which makes up more than was said",
    )


def test_the_table_of_errors_has_a_row_for_each_method_with_figures_counted_by_hand(run, found):
    _, (errors, *_) = found
    table = rows(errors)
    assert [row[0] for row in table] == ["base model", "LoRA", "LoRA, ΔW scaled", "BLoRA"]
    lora = run.plan.chosen("lora", run.study.settings[0])
    assert table[1][1] == lora.label
    scores = [one for one in read_results(run.results)
              if one.candidate == lora.text and one.split == "test"]  # fmt: skip
    assert len(scores) == 4
    by_data = {
        data: [
            sum(one.main("new_domain").edits) / sum(one.main("new_domain").lengths)
            for one in scores
            if one.data == data
        ]
        for data in ("de-en", "es-en")
    }
    error = sum(sum(rates) / 2 for rates in by_data.values()) / 2
    by_seed = [sum(rates[seed] for rates in by_data.values()) / 2 for seed in (0, 1)]
    mean = sum(by_seed) / 2
    deviation = sum((one - mean) ** 2 for one in by_seed) ** 0.5  # of two, over n - 1
    assert table[1][2].startswith(f"{100 * error:.1f} ±{100 * deviation:.1f} [")
    assert table[0][5] == "None"  # the base forgets nothing


def test_the_chosen_values_are_marked(found):
    standing, (*_, choice) = found
    marked = {cells[1] for cells, emphasis in choice.filled_rows if emphasis}
    assert marked == {one.label for one in standing.chosen.values()}
    assert [row[-1] for row in rows(choice)].count("chosen") == 4


def test_tables_fit_a_terminal(found):
    for table in found[1]:
        console = Console(width=110, record=True, file=io.StringIO())
        console.print(table)
        assert "…" not in console.export_text()
