import base64
import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from datasets import Audio, Dataset

from blora_pyro.errors import UserError
from blora_pyro.metrics import align
from blora_pyro.options import FitConfig
from blora_pyro.runs import report_transcripts
from blora_pyro.runs.report_transcripts import (
    Line,
    Utterance,
    add_confidences,
    embed_audio,
    find_audio,
    most_changed,
)
from blora_pyro.runs.scoring import SetSource
from blora_pyro.runs.utterances import read_utterances


def row(state, reference, hypothesis, measure="wer", utterance=0, points=(), **more):
    steps = align(measure, reference, hypothesis)
    return {
        **{"set": "new_domain", "set_fingerprint": "5e7", "state": state, "utterance": utterance},
        **{"origin": f"corpus/test.jsonl, line {utterance}", "audio": None, "language": "de"},
        **{"metric": measure, "reference": reference, "hypothesis": hypothesis},
        "edits": sum(step.operation != "=" for step in steps),
        "length": len(reference.split()) if measure == "wer" else len(reference),
        "alignment": [
            [step.operation, step.reference, step.hypothesis]
            + ["pier"] * (step.position in points and step.operation != "I")
            for step in steps
        ],
        **more,
    }


def both(reference, before, after, **more):
    return [row("base", reference, before, **more), row("adapted", reference, after, **more)]


def text_of(words):
    return "".join(" " * word.spaced + word.text for word in words)


def marks_of(words):
    return [(word.text, word.mark) for word in words if word.mark]


# ---- words


def test_words_are_marked_by_their_errors_and_by_what_became_of_them():
    rows = both("das rote rad ist neu", "das rate rad neu", "ein rote oh rad ist", points=(1,))
    (one,), count = most_changed({"": rows})
    assert count == 1 and text_of(one.reference) == "das rote rad ist neu"
    fates = [("das", "broken"), ("rote", "fixed"), ("ist", "fixed"), ("neu", "broken")]
    assert marks_of(one.reference) == fates
    assert [word.text for word in one.reference if word.is_point] == ["rote"]
    (base,), (adapted,) = one.bases, one.adapted
    assert (base.label, base.edits, adapted.label, adapted.edits) == ("base", 2, "adapted", 3)
    assert marks_of(base.words) == [("rate", "S"), ("ist", "D")]
    assert marks_of(adapted.words) == [("ein", "S"), ("oh", "I"), ("neu", "D")]
    abouts = [word.about for word in adapted.words if word.mark]
    assert abouts == ["said: das", "not said", "left out"]
    assert (one.harm, one.help, one.wrong) == (1, 1, 3)


def test_what_neither_has_right_is_told_from_what_one_has():
    (one,), _ = most_changed({"": both("ein rad", "x y", "x rad")})
    assert marks_of(one.reference) == [("ein", "missed"), ("rad", "fixed")]


def test_characters_have_no_spaces_between_them_and_stand_together_where_they_are_alike():
    rows = both("我喜欢自行车", "我喜爱自车", "我他们自行车", measure="cer")
    (one,), _ = most_changed({"": rows})
    assert text_of(one.reference) == "我喜欢自行车"
    assert marks_of(one.bases[0].words) == [("爱", "S"), ("行", "D")]
    assert marks_of(one.adapted[0].words) == [("他们", "S")]
    assert one.adapted[0].words[1].about == "said: 喜欢"
    rows = both("我 red", "我 red", "我red", measure="mer")
    (one,), _ = most_changed({"": rows})
    assert text_of(one.reference) == "我 red"  # one side has spaces


def test_a_space_that_is_an_error_is_seen():
    (one,), _ = most_changed({"": both("ab", "ab", "a b", measure="cer")})
    assert ("␣", "I") in marks_of(one.adapted[0].words)


def test_long_words_loops_and_endless_transcripts_are_cut():
    rows = both("ein rad", "ein " + "x" * 10_000, "ein rad" + " rad" * 5_000)
    (one,), _ = most_changed({"": rows})
    assert max(len(word.text) for word in one.bases[0].words) <= 301
    assert one.adapted[0].words[-1].text == "... 4989 more" and len(one.adapted[0].words) == 14
    said = " ".join(f"w{n}" for n in range(5_000))
    (one,), _ = most_changed({"": both(said, said, said)})
    assert len(one.reference) == len(one.bases[0].words) == report_transcripts.STEPS + 1
    assert one.reference[-1].text == "…"


def test_what_turns_letters_round_is_shown_and_does_nothing():
    (one,), _ = most_changed({"": both("ein rad", "ein \u202edar", "\u05d0\u05d1 rad")})
    assert one.bases[0].words[1].text == "\\u202edar"
    assert one.adapted[0].words[0].text == "\u05d0\u05d1"


# ---- which


def rows_that_change(changes):
    said = "a b c d e f g h"
    wrong = {n: " ".join(["x"] * n + said.split()[n:]) for n in range(9)}
    rows = []
    for index, change in enumerate(changes):
        rows += both(said, wrong[max(0, -change)], wrong[max(0, change)], utterance=index)
    return rows


def shown(rows, limit):
    found, count = most_changed({"": rows}, limit)
    assert count == len(rows) // 2
    return [one.changes[0] for one in found]


def test_half_of_what_is_shown_was_harmed_and_half_helped_if_there_is_so_much():
    rows = rows_that_change([-1, 2, -3, 0, 1, -4, 3, -2, 0, 4])
    assert shown(rows, 4) == [4, 3, -3, -4]
    assert shown(rows, 100) == [4, 3, 2, 1, 0, 0, -1, -2, -3, -4]
    assert shown(rows_that_change([1, 2, 3, 4, -1, 0]), 4) == [4, 3, 2, -1]
    assert shown(rows_that_change([1, -2, -3, -4, 0]), 4) == [1, -2, -3, -4]
    assert shown(rows_that_change([0, 0, 1]), 2) == [1, 0]


def test_a_file_without_both_states_has_nothing_to_show():
    assert most_changed({"": []}) == ([], 0)
    assert most_changed({"": [row("base", "a", "b")]}) == ([], 0)


def test_runs_stand_beside_each_other_below_one_base():
    runs = {
        "A": both("ein rotes rad", "ein rad", "ein rotes rad"),
        "B": both("ein rotes rad", "ein rad", "oh oh oh"),
        "C": both("ein rotes rad", "rotes rad", "rotes rad"),
    }
    (one,), count = most_changed(runs)
    assert count == 1
    assert [line.label for line in one.bases] == ["base", "base of C"]
    assert [(line.label, line.edits) for line in one.adapted] == [("A", 0), ("B", 3), ("C", 1)]
    assert (one.harm, one.help, one.wrong) == (2, -1, 3)
    assert marks_of(one.reference) == []  # of several runs there is no one fate
    other = [{**one, "set_fingerprint": "c0"} for one in runs["B"]]
    assert most_changed({**runs, "B": other})[1] == 2  # a set of that name, but another


def test_the_place_of_an_utterance_names_no_folder():
    for origin in ("/secret/test.jsonl, line 3", "C:\\secret\\test.jsonl, line 3"):
        one = Utterance(row("adapted", "a", "b", origin=origin), 0, [])
        assert one.place == "test.jsonl, line 3"


# ---- audio


def heard(rows):
    return most_changed({"": rows})[0]


@pytest.fixture
def wav(tmp_path):
    path = tmp_path / "ein rad.wav"
    soundfile.write(path, np.zeros(1600, np.float32), 16_000)
    return path


def test_small_audio_is_in_the_page_and_large_is_a_link(wav, monkeypatch):
    utterances = heard(both("ein rad", "ein rad", "ein", audio=str(wav), start=0.5, end=1.25))
    find_audio(utterances, FitConfig(), "test")
    assert embed_audio(utterances) == 0
    kind, _, content = str(utterances[0].source).partition(";base64,")
    content, _, part = content.partition("#")
    assert kind == "data:audio/wav" and base64.b64decode(content) == wav.read_bytes()
    assert part == "t=0.5,1.25"
    monkeypatch.setattr(report_transcripts, "EMBEDDED", 100)
    assert embed_audio(utterances) == 1
    assert utterances[0].source == f"{wav.as_uri()}#t=0.5,1.25"


def test_what_is_no_audio_is_neither_embedded_nor_linked(tmp_path, monkeypatch):
    secret = tmp_path / "key.txt"
    secret.write_text("a secret that a run folder of others names as its audio")
    utterances = heard(both("ein rad", "ein rad", "ein", audio=str(secret)))
    for size in (report_transcripts.EMBEDDED, 10):
        monkeypatch.setattr(report_transcripts, "EMBEDDED", size)
        find_audio(utterances, FitConfig(), "test")
        assert embed_audio(utterances) == 0 and utterances[0].source is None


def test_audio_that_is_in_no_file_is_found_in_its_set(wav, tmp_path, monkeypatch):
    content = {"bytes": wav.read_bytes(), "path": "inside.wav"}
    rows = {"audio": [content] * 3, "text": ["ein rad"] * 3, "language": ["de"] * 3}
    path = tmp_path / "test.parquet"
    Dataset.from_dict(rows).cast_column("audio", Audio(decode=False)).to_parquet(path)
    config = FitConfig(base="x", data=str(tmp_path / "gone"), test=str(path), backward=())
    some = [
        one
        for index in range(3)
        for one in both(
            "ein rad",
            "ein rad",
            "ein",
            utterance=index,
            audio="inside.wav",
            origin=f"{path}, row {index}",
        )
    ]
    utterances = heard(some)
    find_audio(utterances, config, "test")
    assert embed_audio(utterances) == 0
    assert all(str(one.source).startswith("data:audio/wav;base64,") for one in utterances)
    for one in utterances:
        one.source = None
    monkeypatch.setattr(report_transcripts, "EMBEDDED", 2 * wav.stat().st_size)
    assert embed_audio(utterances) == 0  # there is nothing to link to
    assert [one.source is not None for one in utterances] == [True, True, False]


def test_data_that_are_gone_are_silent():
    utterances = heard(both("ein rad", "ein rad", "ein", audio="gone.wav"))
    find_audio(utterances, FitConfig(base="x", data="gone.parquet", backward=()), "test")
    assert embed_audio(utterances) == 0 and utterances[0].audio is None


def test_the_hub_is_asked_only_where_that_is_wanted(wav, monkeypatch):
    utterances = heard(both("ein rad", "ein rad", "ein", audio="x.wav", origin="owner/name, row 0"))
    config = FitConfig(base="x", data="owner/name", backward=())
    asked = []

    def load_split(source, split, on_bad, columns):
        asked.append(source)
        content = {"bytes": wav.read_bytes(), "path": "x.wav"}
        return Dataset.from_dict({"audio": [content], "origin": ["owner/name, row 0"]})

    monkeypatch.setattr(report_transcripts, "load_split", load_split)
    its = SetSource("owner/name", "test")
    monkeypatch.setattr(report_transcripts, "set_sources", lambda *_: {"new_domain": its})
    find_audio(utterances, config, "test")
    assert asked == [] and utterances[0].audio is None
    find_audio(utterances, config, "test", from_hub=True)
    assert asked == ["owner/name"] and embed_audio(utterances) == 0 and utterances[0].source


# ---- how sure


def test_each_word_has_the_confidence_of_the_draws(finished_run, fluent_base, tones_folder):
    utterances = heard(read_utterances(finished_run.output))
    find_audio(utterances, finished_run.config, "test")
    done = []
    posterior = finished_run.posterior
    add_confidences(utterances, fluent_base, posterior, 2, "", lambda *some: done.append(some))
    assert done[-1] == (6, 6)
    for one in utterances:
        line = one.adapted[-1]
        assert isinstance(line, Line) and line.label == "how sure" and line.edits is None
        said = [word.text.lower() for word in line.words]
        assert said == json.loads(json.dumps(one.row["hypothesis"])).split()
        assert all(0 <= word.confidence <= 1 for word in line.words)
        assert all(word.about.endswith("% sure") for word in line.words)


def test_a_point_has_no_draws(finished_run, fluent_base):
    utterances = heard(read_utterances(finished_run.output))
    find_audio(utterances, finished_run.config, "test")
    posterior = finished_run.posterior
    point = replace(posterior, stddev={n: 0 * v for n, v in posterior.stddev.items()})
    with pytest.raises(UserError, match="a point estimate"):
        add_confidences(utterances, fluent_base, point, 2, "")
