import math

import pytest
from datasets import Audio

from blora_pyro.data.rows import (
    ALIASES,
    FEATURES,
    BadRow,
    BadRows,
    Unreadable,
    good_rows,
    parse_row,
    to_dataset,
)
from blora_pyro.errors import UserError


@pytest.fixture
def good(speak):
    return {"audio": speak("a.wav").name, "text": "x"}


def test_a_missing_value_may_be_null_or_nan(good, tmp_path):
    bare = parse_row(good, tmp_path)
    assert bare["audio"] == {"bytes": None, "path": str(tmp_path / "a.wav")}
    assert (bare["language"], bare["word_languages"]) == ("", [])
    assert bare["duration"] is bare["start"] is bare["end"] is None
    nulls = dict.fromkeys(("language", "word_languages", "duration", "start", "end"))
    for row in (nulls, {**nulls, "duration": math.nan, "start": math.nan, "end": math.nan}):
        assert parse_row({**good, **row}, tmp_path) == bare


@pytest.mark.parametrize("audio", ALIASES["audio"])
@pytest.mark.parametrize("text", ALIASES["text"])
def test_columns_may_have_other_names(good, tmp_path, audio, text):
    row = {audio: "a.wav", text: "x"}
    assert parse_row({**row, "id": 7}, tmp_path) == parse_row(good, tmp_path)
    assert parse_row({"audio": None, "text": None, **row}, tmp_path) == parse_row(good, tmp_path)


def test_word_languages_may_be_one_text(good, tmp_path):
    row = parse_row({**good, "word_languages": " de en "}, tmp_path)
    assert row["word_languages"] == ["de", "en"]


@pytest.mark.parametrize(
    ("change", "gist"),
    [
        ({"audio": ...}, "no audio; a row needs audio (or audio_filepath, file_name, path) and"),
        ({"text": ...}, "no text; a row needs"),
        ({"audio": 3}, "audio must be text, got 3"),
        ({"audio": "b.wav"}, "b.wav' does not exist"),
        ({"audio": "."}, "is no file, but a folder or a device"),
        ({"audio": " "}, "audio is empty; give a path"),
        ({"file_name": "a.wav"}, "audio and file_name both say what the audio is; keep one"),
        ({"audio": "a\0.wav"}, "cannot be read: that cannot be a path"),
        ({"audio": "a" * 5000}, "cannot be read: File name too long"),
        ({"text": None}, "text must be text, got null"),
        ({"text": "\ud800"}, "text is not valid Unicode"),
        ({"language": ["de"]}, "language must be text"),
        ({"word_languages": 3}, "word_languages must be a list of texts, got 3"),
        ({"word_languages": ["de", 1]}, "word_languages must be text, got 1"),
        ({"duration": "1"}, 'duration must be a number of seconds, got "1"'),
        ({"duration": -1}, "duration must be"),
        ({"duration": math.inf}, "duration must be"),
        ({"duration": 10**400}, "duration must be"),
        ({"start": 2, "end": 1.5}, "the segment starts at 2 s, but ends at 1.5 s"),
    ],
)
def test_a_bad_row_is_refused_in_one_line(good, tmp_path, change, gist):
    bad = {name: value for name, value in {**good, **change}.items() if value is not ...}
    with pytest.raises(UserError) as caught:
        parse_row(bad, tmp_path)
    assert gist in str(caught.value) and "\n" not in str(caught.value)


def test_without_a_folder_audio_is_not_looked_for():
    row = parse_row({"audio": "gone.wav", "text": "x"})
    assert row["audio"] == {"bytes": None, "path": "gone.wav"}


def test_an_error_has_the_origin_and_the_source_of_its_row():
    seen: list[BadRow] = []
    bad = BadRows(seen.append, source=2)
    lost = UserError("not JSON")
    records = [("a, row 0", {"audio": b"", "text": "x"}), ("a, row 1", {"audio": b"", "text": 3})]
    (row,) = good_rows([*records, ("a, row 2", lost)], on_bad=bad)
    assert row["origin"] == "a, row 0"
    assert bad == seen and [error.source for error in bad] == [2, 2]
    assert [str(error) for error in bad] == [
        "a, row 1: text must be text, got 3",
        "a, row 2: not JSON",
    ]
    with pytest.raises(BadRow, match="a, row 1"):
        list(good_rows(records))
    with pytest.raises(Unreadable, match=r"^a, row 2: gone$"):
        list(good_rows([("a, row 2", Unreadable("gone"))], on_bad=bad))


def test_rows_become_a_data_set_whose_audio_is_not_decoded():
    row = {**parse_row({"audio": b"RIFF", "text": "x"}), "origin": "a, row 0"}
    dataset = to_dataset([row])
    assert dataset.column_names == list(FEATURES)
    assert dataset.features["audio"] == Audio(decode=False)
    assert dataset[0] == row
    assert to_dataset([]).features == dataset.features
