import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from blora_pyro.reports.errors import error_view


def row(alignment, **more):
    figures = {
        "edits": sum(step[0] != "=" for step in alignment),
        "length": sum(step[0] != "I" for step in alignment),
    }
    about = {"set": "new_domain", "state": "adapted", "metric": "wer", "origin": "test.csv, line 3"}
    return {**about, "audio": "clips/3.wav", **figures, "alignment": alignment, **more}


SWITCHED = row(
    [["=", "das", "das"], ["S", "haus", "house"], ["D", "cool", "", "pier"], ["I", "", "oh"]],
    pier={"edits": 1, "length": 1},
)


def shown(rows, top=10, width=100) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    for line in error_view(rows, top):
        console.print(line, soft_wrap=isinstance(line, str))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_an_utterance_by_hand():
    assert shown([SWITCHED, row([["=", "a", "a"]])]) == [
        "adapted: errors in 1 of 2 utterances; the worst 1:",
        "",
        "WER 3 of 3, PIER 1 of 1  new_domain",
        "clips/3.wav",
        "REF  das  haus   cool",
        "HYP  das  house        oh",
        "          S      D*    I",
        "",
        "most frequent: haus → house (1), cool → (nothing) (1), (nothing) → oh (1)",
        "S substitution, D deletion, I insertion, * counts in PIER",
    ]


def test_without_errors_there_is_nothing_to_see():
    assert shown([row([["=", "a", "a"]])]) == ["no errors in 1 utterances"]
    assert shown([]) == ["no errors in 0 utterances"]


def test_only_the_worst_are_shown_but_all_are_counted():
    twice = row([["S", "ab", "cd"], ["S", "ab", "cd"]])
    lines = shown([row([["S", "x", "y"], ["=", "z", "z"]]), twice], top=1)
    assert [line for line in lines if line.startswith("REF")] == ["REF  ab  ab"]
    assert "most frequent: ab → cd (2), x → y (1)" in lines


@pytest.mark.parametrize("width", [30, 47, 80])
def test_long_utterances_are_wrapped_and_stay_aligned(width):
    long = row([["S", f"reference{i}", f"hyp{i}"] for i in range(20)])
    lines = [line for line in shown([long], width=width) if line.startswith(("REF", "HYP"))]
    assert all(len(line) <= width for line in lines)
    wanted = " ".join(line[5:] for line in lines[::2]).split()
    assert wanted == [f"reference{i}" for i in range(20)]
    for above, below in zip(lines[::2], lines[1::2], strict=True):
        starts = [
            [i for i in range(5, len(line)) if line[i] != " " and line[i - 1] == " "]
            for line in (above, below)
        ]
        assert starts[0] == starts[1]


def test_wide_characters_stay_aligned():
    han = row([["=", "我", "我"], ["S", "red", "喜欢"], ["S", "车", "x"]], metric="mer")
    above, below = (line for line in shown([han]) if line.startswith(("REF", "HYP")))
    assert cell_len(above[: above.index("车")]) == cell_len(below[: below.index("x")])


@pytest.mark.parametrize(
    ("segment", "place"),
    [
        ({}, "clips/3.wav"),
        ({"start": None, "end": None}, "clips/3.wav"),
        ({"start": 12.5, "end": 14.25}, "clips/3.wav, 12.5 s to 14.25 s"),
        ({"start": None, "end": 2}, "clips/3.wav, 0 s to 2 s"),
        ({"start": 3.0, "end": None}, "clips/3.wav, 3 s to its end"),
    ],
)
def test_it_says_where_to_listen(segment, place):
    assert shown([row([["S", "a", "b"]], **segment)])[3] == place


def test_a_text_is_no_markup_and_no_control_sequence():
    lines = shown([row([["S", "[red]", "\x1b[31m"]], audio=None, origin="[bold] line 1")])
    assert "[bold] line 1" in lines
    assert "REF  [red]" in lines
    assert not any("\x1b" in line for line in lines)
