import copy
import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from blora_pyro.runs.report import (
    change_view,
    dev_line,
    error_view,
    fit_tables,
    prune_tables,
    strength_tables,
)
from blora_pyro.runs.utterances import changed

SIZE = {"adapter_weights": 9, "nonzero_weights": 9, "directions": 2, "layers": 1}


def rate(value, low, high):
    return {"rate": value, "interval": [low, high]}


def change(value, low, high):
    return {"difference": value, "interval": [low, high]}


def backward(base, adapted):
    return {
        "base": {"metric": "wer", "utterances": 9, "wer": base, "cer": rate(0.111, 0.1, 0.12)},
        "adapted": {"metric": "wer", "utterances": 9, "wer": adapted, "cer": rate(0.2, 0.1, 0.3)},
        "change": {"wer": change(0.0123, -0.004, 0.0289), "cer": change(0, 0, 0)},
    }


METRICS = {
    "new_domain": {
        "name": "de-en",
        "base": {
            "metric": "wer",
            "utterances": 40,
            "wer": rate(0.6543, 0.6012, 0.7089),
            "cer": rate(0.301, 0.25, 0.35),
            "pier": rate(1.0567, 0.9, 1.2),
        },
        "adapted": {
            "metric": "wer",
            "utterances": 40,
            "wer": rate(0.2708, 0.22, 0.33),
            "cer": rate(0.1, 0.05, 0.15),
            "pier": rate(0.4, 0.3, 0.5),
        },
        "change": {
            "wer": change(-0.3838, -0.45, -0.3211),
            "cer": change(-0.201, -0.25, -0.15),
            "pier": change(-0.6567, -0.8, -0.5),
        },
    },
    "backward": {
        "de": backward(rate(0.0612, 0.04, 0.08), rate(0.0735, 0.05, 0.1)),
        "fr": backward(rate(0.15, 0.1, 0.2), rate(0.1623, 0.11, 0.21)),
    },
    "backward_error": {
        "base": rate(0.1056, 0.08, 0.13),
        "adapted": rate(0.1179, 0.09, 0.14),
        "change": change(0.0123, -0.001, 0.025),
    },
    "sparsity": {"A": 0.1234, "B": 0.5, "delta_w": 0.9971},
}


def shown(parts, width=110) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str), markup=False)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def rendered(metrics) -> list[str]:
    return shown(fit_tables(metrics))


def row(lines, *starts) -> str:
    """The one line with all these words, spaces squeezed and rules dropped."""
    (line,) = [line for line in lines if all(start in line for start in starts)]
    return " ".join(line.replace("│", " ").split())


def test_the_new_domain_has_a_row_a_measure_in_percent_with_intervals():
    lines = rendered(METRICS)
    assert row(lines, "new domain de-en") == (
        "new domain de-en WER 65.4 [60.1, 70.9] 27.1 [22.0, 33.0] -38.4 [-45.0, -32.1]"
    )
    assert row(lines, "CER") == "CER 30.1 [25.0, 35.0] 10.0 [5.0, 15.0] -20.1 [-25.0, -15.0]"
    assert row(lines, "PIER") == "PIER 105.7 [90.0, 120.0] 40.0 [30.0, 50.0] -65.7 [-80.0, -50.0]"


def test_every_backward_set_has_a_row_of_its_main_measure():
    lines = rendered(METRICS)
    assert row(lines, "backward de") == (
        "backward de WER 6.1 [4.0, 8.0] 7.3 [5.0, 10.0] +1.2 [-0.4, 2.9]"
    )
    assert row(lines, "backward fr") == (
        "backward fr WER 15.0 [10.0, 20.0] 16.2 [11.0, 21.0] +1.2 [-0.4, 2.9]"
    )


def test_raw_rates_have_a_row_where_they_differ():
    metrics = copy.deepcopy(METRICS)
    metrics["normalizer"] = "basic"
    for name, value in (("de", 0.2), ("fr", 0.15)):
        raw = {"base": rate(value, 0.1, 0.2), "adapted": rate(0.1623, 0.11, 0.21)}
        raw["change"] = change(0.0123, -0.004, 0.0289)
        for state, one in raw.items():
            metrics["backward"][name][state]["wer"]["raw"] = one
    lines = rendered(metrics)
    raws = [line for line in lines if "│ raw" in line]
    assert [" ".join(line.replace("│", " ").split()) for line in raws] == [
        "raw WER 20.0 [10.0, 20.0] 16.2 [11.0, 21.0] +1.2 [-0.4, 2.9]"
    ]
    assert "normalizer: basic; raw is without it, shown where that differs" in lines


def test_loops_are_counted_in_the_table_and_a_rate_above_100_percent_is_told():
    metrics = copy.deepcopy(METRICS) | {"heard": "in full windows"}
    metrics["backward"]["de"]["base"] |= {"loops": 2, "wer": rate(1.553, 1.2, 2.1)}
    metrics["backward"]["de"]["adapted"]["loops"] = 1
    lines = rendered(metrics)
    assert row(lines, "loop") == "2 loops 1 loop -1"
    assert row(lines, "above") == (
        "above 100%: base on backward de, which makes up more than was said"
    )
    assert "heard: in full windows" in lines


def test_a_rate_of_nothing_is_a_dash():
    metrics = copy.deepcopy(METRICS)
    metrics["backward_error"]["base"] = rate(None, None, None)
    metrics["backward_error"]["change"] = change(None, None, None)
    assert row(rendered(metrics), "│ backward average") == ("backward average – 11.8 [9.0, 14.0] –")


def test_the_backward_average_and_the_forgetting_are_shown():
    lines = rendered(METRICS)
    assert row(lines, "│ backward average") == (
        "backward average 10.6 [8.0, 13.0] 11.8 [9.0, 14.0] +1.2 [-0.1, 2.5]"
    )
    assert row(lines, "forgetting:") == (
        "forgetting: +1.2 points [-0.1, 2.5] on the backward average"
    )


def test_sparsity_is_shown():
    assert row(rendered(METRICS), "sparsity").endswith("A 12.3%, B 50.0%, ΔW 99.7%")


def without(*names):
    return {name: value for name, value in METRICS.items() if name not in names}


def test_without_sets_it_says_that_nothing_was_measured():
    metrics = {"backward": {}, "sparsity": METRICS["sparsity"]}
    assert "nothing was measured" in " ".join(rendered(metrics))


def test_without_backward_sets_there_is_no_forgetting():
    lines = rendered({**without("backward_error"), "backward": {}})
    assert row(lines, "new domain")
    assert not any("backward" in line or "forgetting" in line for line in lines)


def test_without_a_new_domain_there_are_backward_rows_only():
    lines = rendered(without("new_domain"))
    assert row(lines, "backward de")
    assert not any("new domain" in line for line in lines)


def test_brackets_in_a_name_are_shown_as_they_are():
    name = "[/] of [bold]"
    metrics = {**METRICS, "new_domain": {**METRICS["new_domain"], "name": name}}
    metrics["backward"] = {name: METRICS["backward"]["de"]}
    lines = rendered(metrics)
    assert row(lines, f"new domain {name}")
    assert row(lines, f"backward {name}")


def test_a_long_name_costs_no_digit():
    name = "/home/somebody/corpora/of/a/very/long/name/that/goes/on/and/on/test.jsonl"
    metrics = {**METRICS, "backward": {name: METRICS["backward"]["de"]}}
    cells = " ".join(" ".join(rendered(metrics)).split())
    for figures in ("6.1 [4.0, 8.0]", "7.3 [5.0, 10.0]", "+1.2 [-0.4, 2.9]", "65.4 [60.1, 70.9]"):
        assert figures in cells


def test_the_dev_line_names_the_best_step_and_the_end():
    errors = [{"step": 50, "error": 0.1234}, {"step": 100, "error": 0.2}]
    dev = {"errors": errors, "best_step": 50, "ended_by": "steps"}
    assert dev_line(dev) == "dev error 12.3% after step 50, the best; of 100 steps"
    early = dev_line({**dev, "ended_by": "patience"})
    assert early == "dev error 12.3% after step 50, the best; stopped early, after 100 steps"


def curve(fit_forgetting):
    def point(strength, new, backward, forgotten, removed):
        figures = {"new_domain": new, "backward_error": backward, "forgetting": forgotten}
        return {"strength": strength, **figures, "forgetting_removed": removed}

    points = [
        point(0, rate(0.5, 0.4, 0.6), rate(0.05, 0.04, 0.06), change(0, 0, 0), 1.0),
        point(0.5, rate(0.25, 0.2, 0.3), rate(0.06, 0.05, 0.07), change(0.01, 0, 0.02), None),
        point(1, rate(0.1, 0.05, 0.2), rate(0.0712, 0.06, 0.08), fit_forgetting, 0.0),
    ]
    head = {"split": "dev", "strength_by": "scale", "new_domain": "[de]", "metric": "wer"}
    return {**head, "points": points, "plot": "runs/a/strength.png"}


def test_a_curve_is_a_row_a_strength():
    lines = strength_tables(curve(change(0.0212, 0.01, 0.03)))
    out = "\n".join(shown(lines))
    rows = [[cell.strip() for cell in r.split("│")[1:-1]] for r in out.splitlines() if "│" in r]
    assert rows == [
        ["base 0", "50.0 [40.0, 60.0]", "5.0 [4.0, 6.0]", "+0.0 [0.0, 0.0]", "100%"],
        ["0.5", "25.0 [20.0, 30.0]", "6.0 [5.0, 7.0]", "+1.0 [0.0, 2.0]", "–"],
        ["fit 1", "10.0 [5.0, 20.0]", "7.1 [6.0, 8.0]", "+2.1 [1.0, 3.0]", "0%"],
    ]
    for words in ("on the dev sets, by scale", "new domain [de]", "WER", "runs/a/strength.png"):
        assert words in out
    assert "chance" not in out


def test_a_curve_shows_loops_and_rates_above_100_percent():
    found = curve(change(0.0212, 0.01, 0.03))
    found["points"][1]["loops"] = {"new_domain": 2, "de": 1}
    found["points"][1]["backward"] = {"de": rate(1.3, 1.2, 1.4), "en": rate(1.0, 0.9, 1.1)}
    table, above, *_ = strength_tables(found)
    assert [cells[-1] for cells, _ in table.filled_rows] == [0, 3, 0]
    assert above == "above 100%: strength 0.5 on de, which makes up more than was said"


def test_a_pruned_run_shows_loops_and_rates_above_100_percent():
    metrics = copy.deepcopy(METRICS) | {"size": {"full": SIZE, "pruned": SIZE}}
    metrics["backward"]["de"]["adapted"] |= {"loops": 2, "wer": rate(1.553, 1.2, 2.1)}
    lines = shown(prune_tables(metrics))
    assert row(lines, "loop") == "0 loops 2 loops +2"
    assert any(line.startswith("above 100%: pruned on backward de, which") for line in lines)


def test_a_curve_says_where_its_forgetting_may_be_chance():
    assert "chance" in strength_tables(curve(change(0.0212, -0.01, 0.03)))[1]


def test_the_table_says_the_strength_and_the_dev_sets():
    out = "\n".join(rendered({**METRICS, "split": "dev", "strength": 0.5, "strength_by": "scale"}))
    assert "on the dev sets, before and after" in out
    assert "adapted: at strength 0.5 by scale" in out
    assert "dev" not in "\n".join(rendered({**METRICS, "split": "test"}))


# ---- errors, word by word


def utterance(alignment, **more):
    figures = {
        "edits": sum(step[0] != "=" for step in alignment),
        "length": sum(step[0] != "I" for step in alignment),
    }
    about = {"set": "new_domain", "state": "adapted", "metric": "wer", "origin": "test.csv, line 3"}
    return {**about, "audio": "clips/3.wav", **figures, "alignment": alignment, **more}


SWITCHED = utterance(
    [["=", "das", "das"], ["S", "haus", "house"], ["D", "cool", "", "pier"], ["I", "", "oh"]],
    pier={"edits": 1, "length": 1},
)


def shown_errors(rows, top=10, width=100) -> list[str]:
    return shown(error_view(rows, top), width)


def test_an_utterance_by_hand():
    assert shown_errors([SWITCHED, utterance([["=", "a", "a"]])]) == [
        "adapted: errors in 1 of 2 utterances; the worst 1:",
        "",
        "WER 3/3, PIER 1/1  new_domain",
        "clips/3.wav",
        "REF  das  haus   cool",
        "HYP  das  house        oh",
        "          S      D*    I",
        "",
        "most frequent: haus → house (1), cool → (nothing) (1), (nothing) → oh (1)",
        "S substitution, D deletion, I insertion, * counts in PIER",
    ]


def test_a_loop_is_cut():
    looping = utterance([["=", "das", "das"], *[["I", "", "oh"]] * 40, ["=", "haus", "haus"]])
    line = shown_errors([looping])[5]
    assert line.split() == ["HYP", "das", *["oh"] * 11, "...", "29", "more", "haus"]


def test_what_adaptation_broke_by_hand():
    before = utterance([["=", "das", "das"], ["=", "haus", "haus"]], state="base")
    after = utterance([["=", "das", "das"], ["S", "haus", "house"]])
    found = changed([before, after])
    assert shown(change_view(found, "fixed", 5))[-1] == "nothing was fixed"
    lines = shown(change_view(found, "broken", 5))
    assert (
        lines[-12:]
        == [
            "broken, the 1 most changed:",
            "",
            "WER 1/2  new_domain",
            "clips/3.wav",
            "base",
            "REF  das  haus",
            "HYP  das  haus",
            "adapted",
            "REF  das  haus",
            "HYP  das  house",
            "          S",
            "",
            "most often broken: haus (1)",
        ][-12:]
    )
    (row,) = [line for line in lines if line.strip().startswith("new_domain")]
    assert row.split() == ["new_domain", "1", "(1)", "0", "(0)"]


def test_without_errors_there_is_nothing_to_see():
    assert shown_errors([utterance([["=", "a", "a"]])]) == ["no errors in 1 utterances"]
    assert shown_errors([]) == ["no errors in 0 utterances"]


def test_only_the_worst_are_shown_but_all_are_counted():
    twice = utterance([["S", "ab", "cd"], ["S", "ab", "cd"]])
    lines = shown_errors([utterance([["S", "x", "y"], ["=", "z", "z"]]), twice], top=1)
    assert [line for line in lines if line.startswith("REF")] == ["REF  ab  ab"]
    assert "most frequent: ab → cd (2), x → y (1)" in lines


@pytest.mark.parametrize("width", [30, 80])
def test_long_utterances_are_wrapped_and_stay_aligned(width):
    long = utterance([["S", f"reference{i}", f"hyp{i}"] for i in range(20)])
    lines = [line for line in shown_errors([long], width=width) if line.startswith(("REF", "HYP"))]
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
    han = utterance([["=", "我", "我"], ["S", "red", "喜欢"], ["S", "车", "x"]], metric="mer")
    above, below = (line for line in shown_errors([han]) if line.startswith(("REF", "HYP")))
    assert cell_len(above[: above.index("车")]) == cell_len(below[: below.index("x")])


@pytest.mark.parametrize(
    ("segment", "place"),
    [
        ({}, "clips/3.wav"),
        ({"start": 12.5, "end": 14.25}, "clips/3.wav, 12.5 s to 14.25 s"),
        ({"start": None, "end": 2}, "clips/3.wav, 0 s to 2 s"),
        ({"start": 3.0, "end": None}, "clips/3.wav, 3 s to its end"),
    ],
)
def test_it_says_where_to_listen(segment, place):
    assert shown_errors([utterance([["S", "a", "b"]], **segment)])[3] == place


def test_a_text_is_no_markup_and_no_control_sequence():
    lines = shown_errors(
        [utterance([["S", "[red]", "\x1b[31m"]], audio=None, origin="[bold] line 1")]
    )
    assert "[bold] line 1" in lines
    assert "REF  [red]" in lines
    assert not any("\x1b" in line for line in lines)
