import io
from html.parser import HTMLParser

import pytest
from rich.console import Console
from rich.text import Text

from blora_pyro.tables import (
    Column,
    Percent,
    Table,
    Terminal,
    described,
    described_html,
    figure_columns,
    number,
    percent,
    print_report,
    report_markdown,
    report_text,
    text_columns,
)


def errors_table(**options):
    columns = [*text_columns("set"), *figure_columns("base", "KL\nnats")]
    table = Table(columns, title="error in % [95% interval]", **options)
    table.add_row("[de]|a", Percent(0.4472, (0.398, 0.495)), 3)
    table.add_section()
    table.add_row("en", Percent.of({"difference": 0.0123, "interval": [-0.004, 0.0289]}), None)
    return table


def rendered(part, width=60) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(part)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (Percent(0.4472), "44.7"),
        (Percent(0.4472, (0.398, 0.495)), "44.7 [39.8, 49.5]"),
        (Percent(0.4472, (0.398, 0.495), 0.012), "44.7 ±1.2 [39.8, 49.5]"),
        (Percent(0.02, signed=True), "+2.0"),
        (Percent(-0.02, (None, None), signed=True), "-2.0 [–, –]"),
        (Percent(None, (None, None)), "–"),
        (Percent.of({"rate": 0.5, "interval": [0.4, 0.6]}), "50.0 [40.0, 60.0]"),
        (Percent.of({"difference": 0.5, "interval": [0.4, 0.6]}), "+50.0 [40.0, 60.0]"),
        (number(None, ".1f"), "–"),
        (percent(0.1234, ".0f"), "12"),
    ],
)
def test_rates_are_written_in_percent_with_spread_and_interval(cell, text):
    assert str(cell) == text


def test_a_grid_has_lines_between_its_sections():
    assert rendered(errors_table(grid=True)) == [
        "error in % [95% interval]",
        "┏━━━━━━━━┳━━━━━━━━━━━━━━━━━━━┳━━━━━━┓",
        "┃        ┃                   ┃   KL ┃",
        "┃ set    ┃              base ┃ nats ┃",
        "┡━━━━━━━━╇━━━━━━━━━━━━━━━━━━━╇━━━━━━┩",
        "│ [de]|a │ 44.7 [39.8, 49.5] │    3 │",
        "├────────┼───────────────────┼──────┤",
        "│ en     │  +1.2 [-0.4, 2.9] │    – │",
        "└────────┴───────────────────┴──────┘",
    ]


def test_a_plain_table_ends_with_an_empty_line_after_its_captions():
    lines = rendered(errors_table(captions=["in points [x]", "of 9"], stack_intervals=True))
    assert lines[0] == "error in % [95% interval]"
    assert lines[-4:] == ["", "in points [x]", "of 9", ""]
    row = next(i for i, line in enumerate(lines) if line.startswith(" [de]|a"))
    assert lines[row].split() == ["[de]|a", "44.7", "3"]
    assert lines[row + 1].split() == ["[39.8,", "49.5]"]


def test_markdown_is_aligned_and_escapes_bars():
    table = errors_table(captions=["in points"])
    table.add_row("fr", 1.5, "", emphasis="bold")
    assert table.to_markdown().splitlines() == [
        "### error in % [95% interval]",
        "",
        "| set | base | KL nats |",
        "| --- | ---: | ---: |",
        "| [de]\\|a | 44.7 [39.8, 49.5] | 3 |",
        "| en | +1.2 [-0.4, 2.9] | – |",
        "| **fr** | **1.5** |  |",
        "",
        "in points",
    ]
    parts = report_markdown([errors_table(), "a line\n"]).split("\n\n")
    assert parts[0] == "error in % [95% interval]:" and parts[-1] == "a line"
    assert Column("contrac-\ntion").name == "contraction"


def test_a_row_of_too_few_cells_is_refused():
    with pytest.raises(ValueError, match="2 cells for 3 columns"):
        errors_table().add_row("en", "1")


def test_a_report_goes_to_stdout_and_its_lines_are_not_broken(capsys):
    path = "run folder: runs/[a]/" + "x" * 150
    print_report([errors_table(grid=True), path])
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[-1] == path
    assert "44.7 [39.8, 49.5]" in out


def test_others_words_do_not_steer_the_terminal(capsys):
    steering = "\x1b]0;title\x07 \x1b[31m \u202e"
    table = Table([Column(f"head{steering}")], title=f"title{steering}", captions=[steering])
    table.add_row(f"cell{steering}")
    print_report([table, f"line{steering}", Text(f"text{steering}")])
    printed = capsys.readouterr().out
    assert printed.count(r"\x1b]0;title") == 6 and printed.count(r"\u202e") == 6
    assert not any(sign in printed for sign in "\x1b\x07\u202e")
    console = Terminal(force_terminal=True, width=80)
    with console.capture() as captured:
        console.print(Text(f"red{steering}", "red"))
    assert captured.get().startswith("\x1b[31mred\\x1b]0;title")  # rich's own colour is left


@pytest.mark.parametrize("name", ["FORCE_COLOR", "DATABRICKS_RUNTIME_VERSION"])  # a notebook
def test_a_text_is_plain_wherever_it_is_made(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    text = report_text([errors_table()])
    assert "\x1b" not in text and "44.7" in text


def test_a_long_name_is_folded_and_not_cut():
    table = Table(text_columns("folder", "prior"))
    table.add_row("x" * 30, "y" * 40)
    text = "".join("".join(rendered(table, width=40)).split())
    assert "x" * 30 not in text and text.count("x") == 30 and text.count("y") == 40


def test_an_object_tells_of_itself_in_a_few_lines():
    assert described("Run", {"base": "pocket", "steps": 40}) == (
        "<blora_pyro.Run>\n    base   pocket\n    steps  40"
    )


def test_html_is_whole_and_holds_others_words_as_text():
    evil = "<script>alert(1)</script> & \x1b[31m"
    table = Table(
        [*text_columns(f"set {evil}"), *figure_columns("rate")], title=evil, captions=[evil]
    )
    table.add_row(evil, Percent(0.5, (0.4, 0.6)), emphasis="bold")
    table.add_section()
    shown = described_html(
        "Run", {"base": evil}, {"Errors": [table, evil, Text(evil)], "None": [], evil: ["more"]}
    )
    open_tags, seen = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            open_tags.append(tag)
            seen.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Reader().feed(shown)
    assert open_tags == [] and "script" not in seen and "\x1b" not in shown
    assert seen.count("details") == 2 and shown.count("<details open>") == 1
    assert shown.count("&lt;script&gt;alert(1)&lt;/script&gt; &amp; \\x1b[31m") == 8
    assert '<td style="text-align:right">50.0 [40.0, 60.0]</td>' in shown
