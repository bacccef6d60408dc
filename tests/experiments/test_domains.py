import tomllib
from pathlib import Path

import pytest
from domain_results import Figures, read_rows, results_table, write_rows
from domains import FOLDER

STUDY = tomllib.loads((FOLDER / "study.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rows():
    return read_rows(FOLDER / "results.csv", STUDY["domains"])


def test_the_table_of_the_docs_is_that_of_the_results(rows):
    docs = (Path(__file__).parents[2] / "docs" / "domains.md").read_text(encoding="utf-8")
    assert results_table(rows, STUDY["methods"]).to_markdown().strip() in docs


def test_the_table_of_results_is_written_as_it_was_read(rows, tmp_path):
    write_rows(tmp_path / "results.csv", rows[::-1])
    assert (tmp_path / "results.csv").read_bytes() == (FOLDER / "results.csv").read_bytes()


def test_a_method_is_not_worse_than_itself(rows):
    found = Figures(rows, STUDY["methods"]).difference("chain", "chain", "backward")
    assert (found.share, found.interval) == (0, (0, 0))
