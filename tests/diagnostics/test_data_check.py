import json
import os
from itertools import chain

import numpy as np
import pytest
import soundfile

from blora_pyro.data import DOMAINS, load_split
from blora_pyro.diagnostics import data_check
from blora_pyro.diagnostics.data_check import REFUSED, check_data, load_processor
from blora_pyro.diagnostics.row_notes import NOTES, Characters
from blora_pyro.errors import UserError
from blora_pyro.models import load_base
from blora_pyro.options import FitConfig
from blora_pyro.runs.loading import Loader

GOOD = {"audio": "a.wav", "text": "das red", "language": "de-en", "word_languages": ["de", "en"]}


@pytest.fixture
def folder(tmp_path):
    """Recordings of many kinds, and a function that writes a split of rows of them."""
    rng = np.random.default_rng(0)
    for name, seconds, rate, channels in [
        ("a.wav", 0.5, 16_000, 1),
        ("b.flac", 0.75, 44_100, 2),
        ("c.ogg", 1.0, 48_000, 1),
        ("long.wav", 10.0, 8_000, 1),
        ("empty.wav", 0.0, 16_000, 1),
    ]:
        wave = 0.1 * rng.standard_normal((int(seconds * rate), channels))
        soundfile.write(tmp_path / name, wave, rate)
    soundfile.write(tmp_path / "nan.wav", np.full(800, np.nan), 16_000, subtype="FLOAT")
    loud = 30_000 * np.sin(np.arange(8_000))
    soundfile.write(tmp_path / "integers.wav", loud, 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "huge.wav", loud * 1e34, 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "clipped.wav", loud.clip(-1, 1), 16_000)
    soundfile.write(tmp_path / "silent.wav", loud * 1e-9, 16_000)
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "noise.wav").write_bytes(b"noise")
    flac = (tmp_path / "b.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(flac[: len(flac) // 2])
    for name in ("a.wav", "c.ogg"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / f"cut.{name}").write_bytes(data[: len(data) // 2])

    def write(split, *changes):
        rows = [json.dumps(GOOD | one) if isinstance(one, dict) else one for one in changes]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")
        return str(tmp_path)

    return write


def kinds(found, split=0):
    """Kind and line of every finding, but of characters."""
    findings = found.sets[split].findings
    return [
        (one.kind, int(one.origin.rpartition(" ")[2])) for one in findings if one.kind != "bytes"
    ]


# ---- a fit would refuse


BAD = [
    ("row", "?"),
    ("row", {"audio": "gone.wav"}),
    ("row", {"text": None}),
    ("row", {"audio": "pipe.wav"}),
    ("row", {"audio": "/dev/zero"}),
    ("row", {"offset": "1"}),
    ("audio", {"audio": "noise.wav"}),
    ("audio", {"audio": "empty.wav"}),
    ("audio", {"audio": "nan.wav"}),
    ("audio", {"audio": "cut.flac"}),
    ("audio", {"audio": "cut.a.wav"}),
    ("audio", {"audio": "cut.c.ogg"}),
    ("audio", {"audio": "integers.wav"}),
    ("audio", {"audio": "huge.wav"}),
    ("audio", {"audio": "long.wav"}),
    ("audio", {"audio": "long.wav", "start": 9.5, "end": 11.0}),
    ("transcript", {"text": "wort " * 30, "word_languages": None}),
    ("transcript", {"text": "x" * 90_000, "word_languages": None}),
    ("transcript", {"language": "fr"}),
    ("transcript", {"language": ""}),
    ("transcript", {"text": "<|de|> das", "word_languages": None}),
    ("transcript", {"language": "fr", "text": "", "word_languages": None}),
    ("transcript", {"language": "ca-es"}),
    ("word_languages", {"word_languages": ["de"]}),
]


@pytest.mark.parametrize("split", ["train", "test"])
def test_it_refuses_what_a_fit_refuses(folder, fluent_folder, fluent_base, split):
    """The rows that a fit would leave out, and with the same words."""
    good = ({}, {"audio": "b.flac"}, {"audio": "long.wav", "start": 1.0, "end": 1.5})
    source = folder(split, *good, *(row for _, row in BAD), {"text": "", "word_languages": None})
    checked = check_data(source, str(fluent_folder))
    found = checked.sets[0].findings
    assert checked.refused and checked.sets[0].rows == 28
    assert checked.sets[0].refused_rows == (23 if split == "train" else 24)
    if split == "test":
        bad = [one for one in kinds(checked) if one[0] in REFUSED]
        assert sorted(bad) == sorted((kind, line) for line, (kind, _) in enumerate(BAD, 4))
    loader = Loader(fluent_base, FitConfig(on_bad_row="skip"))
    loader.load(source, split)
    skipped = sorted((row.origin, row.reason) for row in loader.skipped)
    assert sorted((one.origin, one.message) for one in found if one.refused) == skipped
    assert len(skipped) == checked.sets[0].refused_rows


def test_a_language_may_be_given(folder, fluent_folder):
    source = folder("train", {"language": ""})
    assert check_data(source, str(fluent_folder)).refused
    found = check_data(source, str(fluent_folder), language="German-English")
    assert not found.refused and found.sets[0].languages == {"de-en": 1}


def test_a_language_that_a_fit_chooses_a_token_for_is_a_note_and_unmapped_refused(
    folder, fluent_folder
):
    source, base = folder("train", {"language": "qu-de"}, {"language": "qu"}), str(fluent_folder)
    (one,) = check_data(source, base).sets
    assert one.languages == {"qu-de": 1, "qu": 1} and one.counts["no token"] == 2
    assert not one.count(REFUSED) and "--language-map qu=TOKEN" in one.findings[0].message
    (one,) = check_data(source, base, language_map={}).sets
    assert one.count(REFUSED) == {"transcript": 2}
    (one,) = check_data(source, base, language_map={"qu": "en"}).sets
    assert not one.refused_rows and "no token" not in one.counts


def test_without_a_base_what_only_a_base_can_say_is_left_out(folder):
    rows = [{"audio": "long.wav"}, {"language": "fr"}, {"language": ""}, {"text": "ж" * 900}]
    told = [{"audio": "gone.wav"}, {"language": "ca-es"}, {"text": "<|0.00|> a"}]
    found = check_data(folder("train", *rows, *({**row, "word_languages": None} for row in told)))
    assert (found.base, found.window) == (None, None)
    assert [one for one in kinds(found) if one[0] in REFUSED] == [
        ("row", 5),
        ("transcript", 6),
        ("transcript", 7),
    ]
    assert found.to_json()["window"] is None


# ---- worth knowing


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("empty text", {"text": " ", "word_languages": None}),
        ("duration", {"duration": 0.7}),
        ("tags", {"word_languages": ["de"]}),
        ("repeated", {"text": "ein rad"}),
    ],
)
def test_what_a_fit_takes_is_a_note(folder, fluent_folder, kind, row):
    first = {"audio": "c.ogg"} if kind != "repeated" else {}
    found = check_data(folder("train", first, row), str(fluent_folder))
    assert kinds(found) == [(kind, 2)]
    assert not found.refused and found.sets[0].count(NOTES)[kind] == 1


def test_tokens_that_the_base_suppresses_are_told(folder, fluent_base, tmp_path):
    settings, vocabulary = fluent_base.net.generation_config, fluent_base.tokenizer.get_vocab()
    settings.suppress_tokens = [vocabulary["0"], vocabulary[":"]]
    fluent_base.save_pretrained(tmp_path / "base")
    row = {"text": "um 10:30", "word_languages": None}
    found = check_data(folder("train", {}, row), str(tmp_path / "base"))
    (note,) = [one for one in found.sets[0].findings if one.kind == "suppressed"]
    assert (note.origin[-6:], note.message) == ("line 2", "'0', ':'") and not found.refused


ODD = {
    "clipped": {"audio": "clipped.wav"},
    "silent": {"audio": "silent.wav"},
    "duration": {"audio": "b.flac", "duration": 3},
    "empty text": {"audio": "c.ogg", "text": "", "word_languages": None},
    "tags": {"audio": "long.wav", "end": 0.5, "word_languages": ["de"]},
    "shared audio": {},
    "shared text": {"audio": "b.flac", "start": 0.1, "text": "ein haus"},
}


def test_what_it_notes_a_fit_tells_also_of_features_that_are_cached(
    folder, fluent_folder, fluent_base
):
    folder("test", {"text": "ein haus"})
    source = folder("train", *ODD.values())
    found = check_data(source, str(fluent_folder))
    assert [kind for kind, _ in kinds(found, 1)] == [*ODD] and not found.refused
    for _ in range(2):
        notes = []
        loader = Loader(fluent_base, FitConfig(), on_note=notes.append)
        for split in ("test", "train"):
            loader.load(source, split)
        loader.report_skipped()
        (line,) = notes
        assert all(f"{NOTES[kind]}: 1 of {source} train; " in line for kind in ODD)
        assert f"the first: {source}/train.jsonl, line 4: the fit will learn" in line


def test_what_an_english_only_base_cannot_do_is_refused_as_a_fit_does(
    folder, fluent_folder, monkeypatch
):
    source = folder("train", {"language": "", "word_languages": None})
    monkeypatch.setattr("blora_pyro.data.prompts.language_codes", lambda tokenizer: [])
    for given in ({}, {"task": "translate"}):
        found = check_data(source, str(fluent_folder), **given)
        loader = Loader(load_base(str(fluent_folder)), FitConfig(on_bad_row="skip", **given))
        if not given:
            assert not found.refused and len(loader.load(source, "train")) == 1
            continue
        (finding,) = found.sets[0].findings
        assert finding.message == "the base is English-only, and the task is 'translate'"
        with pytest.raises(UserError, match=finding.message):
            loader.load(source, "train")
    with pytest.raises(UserError, match="task is 'translat'; give transcribe or translate"):
        check_data(source, task="translat")


def test_without_opening_audio_rows_texts_and_paths_are_checked(folder, fluent_folder):
    rows = [{"audio": "gone.wav"}, {"audio": "noise.wav"}, {"language": "fr"}, "?"]
    found = check_data(folder("train", *rows), str(fluent_folder), fast=True)
    assert sorted(kinds(found)) == [("row", 1), ("row", 4), ("transcript", 3)]
    assert found.sets[0].rows == 4 and found.sets[0].hours == 0 and found.fast


def test_findings_are_counted_and_the_first_are_kept(folder, fluent_folder, monkeypatch):
    monkeypatch.setattr(data_check, "KEPT", 2)
    monkeypatch.setattr(data_check, "CHUNK", 3)
    found = check_data(folder("train", *["?"] * 5, *[{}] * 4), str(fluent_folder))
    (one,) = found.sets
    assert (one.rows, one.refused_rows, one.count(REFUSED)) == (9, 5, {"row": 5})
    assert one.count(NOTES) == {"repeated": 3} and len(one.findings) == 4


def test_columns_may_have_other_names_in_all_data_but_the_built_in(folder, fluent_base):
    row = {"audio": "a.wav", "text": "", "transcript": "das red", "word_languages": None}
    source = folder("train", row)
    config = FitConfig(column={"text": "transcript"})
    assert Loader(fluent_base, config).load(source, "train").texts == ["das red"]
    assert Loader(fluent_base, config).stream(source, print).sample.texts == ["das red"]
    with pytest.raises(UserError, match="no column typo or raw for text; its columns are: audio"):
        Loader(fluent_base, FitConfig(column=["text=typo,raw"])).load(source, "train")
    assert len(load_split("de-en", "test", columns={"text": ["transcript"]}))


def test_a_duration_may_be_rounded_or_that_of_a_segment(folder, fluent_folder):
    rows = [{"duration": 0.55}, {"duration": 0.25, "start": 0.1, "end": 0.35}]
    assert kinds(check_data(folder("train", *rows), str(fluent_folder))) == []


def test_audio_and_texts_in_two_sets(folder, fluent_folder, tmp_path):
    source = folder("test", {}, {"audio": "b.flac", "text": "ein rad"})
    (tmp_path / "copy.wav").write_bytes((tmp_path / "a.wav").read_bytes())
    one, two = {"audio": "copy.wav", "text": "ein haus"}, {"audio": "c.ogg", "text": "ein rad"}
    folder("train", one, two, two, {"audio": "a.wav", "start": 0.1, "text": "das"})
    found = check_data(source, str(fluent_folder))
    assert kinds(found) == []
    assert kinds(found, 1) == [
        ("shared audio", 1),
        ("shared text", 2),
        ("repeated", 3),
        ("shared text", 3),
        ("tags", 4),
    ]
    assert found.sets[1].findings[0].message == f"the same audio as {source}/test.jsonl, line 1"
    assert kinds(check_data([source, source], str(fluent_folder), split="test"), 1) == [
        ("repeated", 1),
        ("repeated", 2),
    ]


class Poor:
    """A tokenizer without some characters: it drops ä, and spells ö by its bytes."""

    def encode(self, text, **options):
        return [*chain(*(char.encode() if char == "ö" else [char] for char in text if char != "ä"))]

    def decode(self, tokens):
        return "".join("ö" if token == 0xB6 else token for token in tokens if token != 0xC3)


def test_characters_that_cannot_be_spelled():
    characters = Characters()
    for number, text in enumerate(["ab äö", "ö"]):
        characters.add(text, f"line {number}")
    assert list(characters.notes(Poor())) == [
        ("characters", "line 0", "'ä' (U+00E4), rows: 1"),
        ("bytes", "line 0", "'ö' (U+00F6), rows: 2"),
    ]


# ---- what the data hold


def test_lengths_rates_channels_and_languages(folder, fluent_folder):
    source = folder(
        "train",
        {},
        {"audio": "b.flac", "language": "German"},
        {"audio": "long.wav", "end": 0.25, "language": "xx"},
        {"audio": "noise.wav"},
    )
    counted = []
    found = check_data(source, str(fluent_folder), on_progress=lambda *now: counted.append(now))
    (one,) = found.sets
    assert (one.source, one.split, one.rows, found.window) == (source, "train", 4, 1)
    assert one.seconds == {"min": 0.25, "median": 0.5, "max": 0.75}
    assert one.hours == pytest.approx(1.5 / 3600)
    assert one.sampling_rates == {16_000: 1, 44_100: 1, 8_000: 1}
    assert one.channels == {1: 2, 2: 1}
    assert one.languages == {"de-en": 2, "de": 1, "xx": 1}
    assert {*counted} == {(f"{source} train", 4, 4)}


def test_one_set_for_all_splits_and_one_split_of_many(folder, fluent_folder, tmp_path):
    folder("train", {"word_languages": ["de"]})
    source = folder("test", {})
    assert [one.split for one in check_data(source, str(fluent_folder)).sets] == ["test", "train"]
    assert [one.split for one in check_data(source, str(fluent_folder), "test").sets] == ["test"]
    (one,) = check_data(tmp_path / "train.jsonl", str(fluent_folder)).sets
    assert one.split == "" and one.count(REFUSED) == {"word_languages": 1}


@pytest.mark.parametrize("corpus", DOMAINS)
def test_the_built_in_corpora_are_taken(corpus):
    found = check_data(corpus, split="dev")
    assert not found.refused
    assert {one.kind for one in found.sets[0].findings} <= {"bytes"}
    assert found.sets[0].rows == 100 and found.sets[0].languages == {corpus: 100}


def test_what_cannot_be_read_at_all(folder, fluent_folder, tmp_path):
    source = folder("train", {})
    for sources, base, message in [
        ("nowhere", str(fluent_folder), "no data at 'nowhere'"),
        (source, str(tmp_path), "base model '.*' has no preprocessor_config.json"),
    ]:
        with pytest.raises(UserError, match=message):
            check_data(sources, base)
    with pytest.raises(UserError, match=r"no dev.jsonl"):
        check_data(source, str(fluent_folder), split="dev")
    assert load_processor("pocket")[2] == 64


# ---- as JSON


def test_json_holds_it_all(folder, fluent_folder):
    found = check_data(folder("test", {}, "?"), str(fluent_folder))
    content = json.loads(json.dumps(found.to_json()))
    assert content["refused"] is True
    (one,) = content["sets"]
    assert one["refused"] == {"row": 1} and one["sampling_rates"] == {"16000": 1}
    assert one["findings"][0]["message"] == "not JSON: '?'"
