import io

import pytest
from rich.console import Console

from blora_pyro.comparison.measures import Estimate
from blora_pyro.comparison.standing import standings
from blora_pyro.comparison.tables import Sheet, percent, sheets, spread


@pytest.fixture
def found(made_up):
    (standing,) = standings(made_up(["scaled-lora", "blora"], ("allx400",)))
    return standing, sheets(standing)


def shown(sheet, width=110):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(sheet.to_rich())
    return console.export_text()


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.123, (0.1, 0.15), 0.011), "12.3 ±1.1 [10.0, 15.0]"),
        (Estimate(0.123, (0.1, 0.15), None), "12.3 [10.0, 15.0]"),
        (Estimate(0.123, None, None), "12.3"),
        (Estimate(None, None, None), "–"),
        (None, "–"),
    ],
)
def test_a_figure_shows_what_there_is_of_it(estimate, text):
    assert spread(estimate) == text
    assert percent(None) == "–"


def test_there_is_a_table_of_everything(found):
    _, tables = found
    titles = [sheet.title.removeprefix("all utterances, 400 steps: ") for sheet in tables]
    assert titles == [
        "de-en, es-en, 2 seeds",
        "sparsity, size, time",
        "against LoRA at its best learning rate",
        "against LoRA at the same learning rate, as in the paper",
        "at equal error",
        "error by set, in %",
        "the choice, on dev",
    ]
    assert all(len(row) == len(sheet.columns) for sheet in tables for row in sheet.rows)


def test_the_table_of_errors_has_a_row_a_method(found):
    standing, (errors, *_) = found
    assert [row[0] for row in errors.rows] == ["base model", "LoRA", "LoRA, ΔW scaled", "BLoRA"]
    result = standing.chosen_results[1]
    assert errors.rows[1][1] == result.candidate.label
    assert errors.rows[1][2] == spread(result.new_domain)
    assert errors.rows[1][4].startswith(f"{100 * result.backward.value:.1f} ±")
    assert errors.rows[0][5] == "–"  # the base forgets nothing


def test_the_chosen_values_are_marked(found):
    standing, (*_, choice) = found
    marked = {choice.rows[place][1] for place in choice.marked}
    assert marked == {one.label for one in standing.chosen.values()}
    assert [row[-1] for row in choice.rows].count("chosen") == 4


def test_tables_fit_a_terminal(found):
    _, tables = found
    for sheet in tables:
        text = shown(sheet)
        assert "…" not in text
        assert all(line.split(" [")[0] in text for row in sheet.rows for line in row[1:])


def test_markdown_has_a_line_a_row():
    sheet = Sheet("title", ("a", "b"), [("x", "1"), ("y", "")], "note", frozenset({0}))
    assert sheet.to_markdown().splitlines() == [
        "### title",
        "",
        "| a | b |",
        "|---|---:|",
        "| **x** | **1** |",
        "| y |  |",
        "",
        "note",
    ]
