import json
import os
import shutil
from dataclasses import replace

import pytest

from blora_pyro.data import Examples, read_manifest
from blora_pyro.errors import UserError
from blora_pyro.evaluation import score
from blora_pyro.languages import read_language
from blora_pyro.runs.utterances import (
    changed,
    choose,
    counts_of_utterances,
    read_utterances,
    unlike,
    utterance_rows,
    worst,
    write_utterances,
)


def examples_of(texts, languages, word_languages=None) -> Examples:
    """`Examples` without features."""
    examples = object.__new__(Examples)
    examples.texts, examples.languages = texts, languages
    examples.written = [read_language(language) for language in languages]
    examples.word_languages = word_languages or [[] for _ in texts]
    examples.origins = [f"test.jsonl, line {index + 1}" for index in range(len(texts))]
    examples.audio_paths = [f"{index}.wav" for index in range(len(texts))]
    examples.segments = [(None, 1.5)] * len(texts)
    examples.fingerprint = "5e7"
    return examples


def rows_of(examples, hypotheses):
    result = score(examples, hypotheses)
    return list(utterance_rows({"x": examples}, {"base": {"x": result}}))


@pytest.fixture
def rows():
    tags = [["de", "en", "de"], ["de", "de"]]
    examples = examples_of(["Das Red, Rad!", "ein\u2028Rad"], ["de-en", "de"], tags)
    base, adapted = (
        score(examples, texts) for texts in (["das oh rat", "ein rad"], ["das red rad", "ein"])
    )
    states = {"base": {"new_domain": base}, "adapted": {"new_domain": adapted}}
    return list(utterance_rows({"new_domain": examples}, states))


def test_a_row_by_hand(rows):
    assert rows[0] == {
        "set": "new_domain",
        "set_fingerprint": "5e7",
        "state": "base",
        "adapter": None,
        "utterance": 0,
        "origin": "test.jsonl, line 1",
        "audio": "0.wav",
        "start": None,
        "end": 1.5,
        "language": "de-en",
        "metric": "wer",
        "reference": "das red rad",
        "hypothesis": "das oh rat",
        "edits": 2,
        "length": 3,
        "rate": 2 / 3,
        "pier": {"edits": 1, "length": 1},
        "alignment": [
            ["=", "das", "das"],
            ["S", "red", "oh", "pier"],
            ["S", "rad", "rat"],
        ],
        "raw": {
            "reference": "Das Red, Rad!",
            "hypothesis": "das oh rat",
            "edits": 3,
            "length": 3,
            "rate": 1.0,
        },
    }


def test_rows_are_in_the_order_of_states_and_utterances(rows):
    assert [(row["state"], row["utterance"]) for row in rows] == [
        ("base", 0),
        ("base", 1),
        ("adapted", 0),
        ("adapted", 1),
    ]


def test_pier_is_only_where_it_counts(rows):
    assert ["pier" in row for row in rows] == [True, False, True, False]
    assert all(len(step) == 3 for row in rows if "pier" not in row for step in row["alignment"])


def test_an_insertion_before_a_point_of_interest_is_marked():
    examples = examples_of(["das red rad"], ["de-en"], [["de", "en", "de"]])
    (row,) = rows_of(examples, ["das oh red rad"])
    assert row["alignment"] == [
        ["=", "das", "das"],
        ["I", "", "oh", "pier"],
        ["=", "red", "red", "pier"],
        ["=", "rad", "rad"],
    ]
    assert row["pier"] == {"edits": 1, "length": 1}


@pytest.mark.parametrize(
    ("language", "metric", "hypothesis", "steps"),
    [
        ("zh", "cer", "我 黄", [["=", "我", "我"], ["S", "红", "黄"]]),
        ("zh-en", "mer", "我红了", [["=", "我", "我"], ["=", "红", "红"], ["I", "", "了"]]),
    ],
)
def test_chinese_is_aligned_by_characters(language, metric, hypothesis, steps):
    (row,) = rows_of(examples_of(["我红"], [language]), [hypothesis])
    assert (row["metric"], row["alignment"]) == (metric, steps)


def pooled(figures) -> float:
    return sum(one["edits"] for one in figures) / sum(one["length"] for one in figures)


def test_rows_pool_to_the_rates_of_metrics_json(finished_run):
    rows = read_utterances(finished_run.output)
    domain = finished_run.metrics["new_domain"]
    for name, both in {"new_domain": domain, **finished_run.metrics["backward"]}.items():
        for state in ("base", "adapted"):
            mine, rates = choose(rows, name, state), both[state]
            assert len(mine) == rates["utterances"]
            assert pooled(mine) == rates["wer"]["rate"]
            assert sum(row["length"] for row in mine) == rates["length"]
            assert pooled([row["raw"] for row in mine]) == rates["wer"]["raw"]["rate"]
            if both is domain:
                assert pooled([row["pier"] for row in mine]) == rates["pier"]["rate"]
            for row in mine:
                operations = [step[0] for step in row["alignment"]]
                assert len(operations) - operations.count("=") == row["edits"]
                assert len(operations) - operations.count("I") == row["length"]


def test_counts_of_rows_are_those_that_were_scored(finished_run):
    rows = read_utterances(finished_run.output)
    for state in ("base", "adapted"):
        metrics, counts = counts_of_utterances(rows, state)
        measured = {"new_domain": finished_run.metrics["new_domain"]}
        measured |= finished_run.metrics["backward"]
        assert metrics == dict.fromkeys(measured, "wer")
        for name, both in measured.items():
            assert counts[name]["wer"].rate == both[state]["wer"]["rate"]
        pier = measured["new_domain"][state]["pier"]["rate"]
        assert counts["new_domain"]["pier"].rate == pier


def test_rows_can_be_paired_if_they_are_of_the_same_utterances(rows):
    base, adapted = rows[:2], rows[2:]
    assert unlike(base, adapted) == ""
    assert unlike(base, adapted[:1]) == "2 and 1 utterances"
    for change, words in (
        ({"metric": "mer"}, "measure"),
        ({"reference": "x"}, "reference"),
        ({"length": 9}, "reference"),
        ({"audio": "b/9.wav"}, "recording"),
        ({"audio": None}, "recording"),  # then it is where the row was
        ({"end": 1.0}, "segment"),
    ):
        assert unlike(base, [adapted[0], adapted[1] | change]) == f"utterance 1 has another {words}"
    moved = [row | {"audio": f"elsewhere/{row['audio']}"} for row in adapted]
    assert unlike(base, moved) == ""
    old = [{name: one for name, one in row.items() if name != "reference"} for row in base]
    assert unlike(old, old) == "an old version kept no references"


def test_rows_say_where_to_listen(finished_run, tones_folder):
    row = choose(read_utterances(finished_run.output), "new_domain")[1]
    assert row["origin"] == f"{tones_folder / 'test.jsonl'}, line 2"
    assert row["audio"] == str(tones_folder / "test5.wav")


def test_origins_and_audio_paths_are_in_the_order_of_the_utterances(fluent_base, tones_folder):
    dataset = read_manifest(tones_folder / "de.jsonl").select([1, 0])
    examples = Examples(dataset, fluent_base.feature_extractor, fluent_base.tokenizer)
    assert examples.audio_paths == [str(tones_folder / name) for name in ("de3.wav", "de2.wav")]
    assert [origin[-6:] for origin in examples.origins] == ["line 2", "line 1"]


def test_written_rows_are_read_again(rows, tmp_path):
    path = tmp_path / "u.jsonl"
    write_utterances(path, iter(rows))
    assert read_utterances(path) == rows
    assert list(tmp_path.iterdir()) == [path]
    write_utterances(path, [])
    assert read_utterances(path) == []


def test_of_a_run_that_was_not_scored_it_is_told_what_to_give(rows, tmp_path):
    write_utterances(tmp_path / "utterances.jsonl", [])
    with pytest.raises(UserError, match="was not scored; write one with 'blora-pyro evaluate"):
        read_utterances(tmp_path)
    write_utterances(tmp_path / "utterances-test-strength-0.5.jsonl", iter(rows))
    with pytest.raises(UserError, match=r"give .*/utterances-test-strength-0\.5\.jsonl, or"):
        read_utterances(tmp_path)


def test_an_empty_reference_has_no_rate(tmp_path):
    write_utterances(tmp_path / "u.jsonl", rows_of(examples_of([""], ["de"]), ["da"]))
    (row,) = read_utterances(tmp_path / "u.jsonl")
    assert (row["rate"], row["raw"]["rate"], row["edits"]) == (None, None, 1)
    assert row["alignment"] == [["I", "", "da"]]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"set": "x"}', "\xff"])
def test_a_damaged_file_is_refused(rows, tmp_path, content):
    path = tmp_path / "u.jsonl"
    path.write_text(json.dumps(rows[0]) + "\n" + content, encoding="latin-1")
    with pytest.raises(UserError, match="is damaged") as caught:
        read_utterances(path)
    assert "\n" not in str(caught.value)


def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "u.jsonl")
    with pytest.raises(UserError, match="a pipe or a device"):
        read_utterances(tmp_path / "u.jsonl")


@pytest.mark.parametrize(
    "wrong",
    [
        {"alignment": [["S", "a"]]},
        {"alignment": [["S", "a", None]]},
        {"alignment": None},
        {"edits": "2"},
        {"audio": 3},
        {"pier": 1},
        {"pier": {}},
        {"adapter": ["x"]},
        {"utterance": [1]},
        {"start": 10**400},
        {"end": float("nan")},
    ],
)
def test_a_damaged_row_is_refused(rows, tmp_path, wrong):
    (tmp_path / "u.jsonl").write_text(json.dumps(rows[0] | wrong))
    with pytest.raises(UserError, match="line 1 is no result"):
        read_utterances(tmp_path / "u.jsonl")


def test_what_is_not_there_is_refused(rows, tmp_path):
    with pytest.raises(UserError, match=r"utterances\.jsonl can't be read"):
        read_utterances(tmp_path)
    with pytest.raises(UserError, match=r"no set 'de'; there are: new_domain"):
        choose(rows, "de")
    with pytest.raises(UserError, match=r"no state 'pruned'; there are: adapted, base"):
        choose(rows, None, "pruned")


def test_the_worst_have_the_most_edits_then_the_highest_rate():
    made = [{"edits": e, "length": n} for e, n in ((1, 9), (0, 1), (3, 9), (1, 2), (3, 4))]
    assert [made.index(row) for row in worst(made, 9)] == [4, 2, 3, 0]
    assert worst(made, 1) == [made[4]]
    with pytest.raises(UserError, match="top is 0"):
        worst(made, 0)


def test_what_adaptation_changed_is_by_words_that_only_one_of_the_two_has_right(rows):
    found = changed(rows)
    (fixed,), (broken,) = found["fixed"], found["broken"]
    assert (fixed["utterance"], fixed["change"], fixed["words"]) == (0, -2, ["red", "rad"])
    assert (broken["utterance"], broken["change"], broken["words"]) == (1, 1, ["rad"])
    assert broken["base"]["hypothesis"] == "ein rad" and broken["hypothesis"] == "ein"
    with pytest.raises(UserError, match="no set 'de'"):
        changed(rows, "de")
    with pytest.raises(UserError, match="no state 'base'"):
        changed([row for row in rows if row["state"] == "adapted"])


def test_a_loop_is_no_worse_than_all_words_wrong():
    examples = examples_of(["ein rad", "das rad fuhr"], ["de", "de"])
    heard = {"base": ["ein rad", "das rad fuhr"], "adapted": ["ein rad" + " oh" * 50, "nichts"]}
    states = {state: {"x": score(examples, texts)} for state, texts in heard.items()}
    found = changed(utterance_rows({"x": examples}, states))["broken"]
    assert [(row["utterance"], row["change"]) for row in found] == [(1, 3), (0, 2)]


def test_rows_of_a_run_are_those_of_its_adapter(finished_run, tmp_path):
    adapters = {row["adapter"] for row in read_utterances(finished_run.output)}
    assert adapters == {None, finished_run.posterior.fingerprint}
    shutil.copytree(finished_run.output, tmp_path / "run")
    posterior = finished_run.posterior
    replace(posterior, mean={n: 2 * v for n, v in posterior.mean.items()}).save(tmp_path / "run")
    with pytest.raises(UserError, match="was not measured with the adapter beside it"):
        read_utterances(tmp_path / "run")
    assert read_utterances(tmp_path / "run" / "utterances.jsonl")  # a file has no adapter beside it
