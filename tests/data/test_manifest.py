import json
import math
from pathlib import Path

import pytest
from datasets import Audio
from hypothesis import given, settings
from hypothesis import strategies as st

from blora_pyro.data.manifest import read_manifest
from blora_pyro.errors import UserError

COLUMNS = ["audio", "text", "language", "word_languages", "duration"]


def test_round_trip(speak, manifest, tmp_path):
    audio = speak("train/0000.wav")
    full = {
        "audio": "train/0000.wav",
        "text": "das house",
        "language": "de-en",
        "word_languages": ["de", "en"],
        "duration": 0.5,
    }
    bare = {"audio": str(audio), "text": "", "voice": {"pitch": 3}}
    dataset = read_manifest(manifest(full, "", bare, "  "))
    assert dataset.column_names == COLUMNS
    assert dataset.features["audio"] == Audio(decode=False)
    source = {"bytes": None, "path": str(tmp_path / "train" / "0000.wav")}
    assert dataset[0] == {**full, "audio": source}
    assert dataset[1] == {
        "audio": source,
        "text": "",
        "language": "",
        "word_languages": [],
        "duration": None,
    }


def test_absent_may_be_null(speak, manifest):
    nulls = {"language": None, "word_languages": None, "duration": None}
    rows = [{"audio": speak("a.wav").name, "text": "x", **nulls}]
    rows.append({**rows[0], "duration": math.nan})
    for row in read_manifest(manifest(*rows)):
        assert (row["language"], row["word_languages"], row["duration"]) == ("", [], None)


def test_line_separators_inside_text_and_byte_order_mark(speak, manifest):
    line = json.dumps({"audio": speak("a.wav").name, "text": "a\u2028b\x85c"}, ensure_ascii=False)
    assert read_manifest(manifest("\ufeff" + line))["text"][:] == ["a\u2028b\x85c"]


@pytest.mark.parametrize(
    ("change", "gist"),
    [
        ({"audio": ...}, "no audio; a row needs audio and text"),
        ({"text": ...}, "no text; a row needs"),
        ({"audio": ..., "text": ...}, "no audio and no text"),
        ({"audio": 3}, "audio must be text, got 3"),
        ({"audio": "b.wav"}, "b.wav' does not exist"),
        ({"audio": "."}, "does not exist"),
        ({"audio": "a\0.wav"}, "does not exist"),
        ({"audio": "a" * 5000}, "does not exist"),
        ({"text": None}, "text must be text, got null"),
        ({"text": "\ud800"}, "text is not valid Unicode"),
        ({"language": ["de"]}, "language must be text"),
        ({"word_languages": "de"}, 'word_languages must be a list of texts, got "de"'),
        ({"word_languages": ["de", 1]}, "word_languages must be text, got 1"),
        ({"duration": "1"}, 'duration must be a number of seconds, got "1"'),
        ({"duration": -1}, "duration must be"),
        ({"duration": True}, "duration must be"),
        ({"duration": math.inf}, "duration must be"),
        ({"duration": 10**400}, "duration must be"),
    ],
)
def test_bad_row(speak, manifest, change, gist):
    good = {"audio": speak("a.wav").name, "text": "x"}
    bad = {name: value for name, value in {**good, **change}.items() if value is not ...}
    with pytest.raises(UserError) as caught:
        read_manifest(manifest(good, bad))
    message = str(caught.value)
    assert gist in message and "\n" not in message
    assert "train.jsonl, line 2: " in message


@pytest.mark.parametrize(
    ("line", "gist"),
    [
        ("not so", "not JSON: 'not so'"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "not JSON"),
        ("1" * 5000, "not JSON"),
    ],
)
def test_bad_line(manifest, line, gist):
    with pytest.raises(UserError, match=f"line 1: {gist}"):
        read_manifest(manifest(line))


def test_unreadable_manifest(manifest, tmp_path):
    with pytest.raises(UserError, match=r"cannot read the manifest .*gone.jsonl': No such file"):
        read_manifest(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match="cannot read"):
        read_manifest(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        read_manifest(tmp_path / "latin.jsonl")
    with pytest.raises(UserError, match="has no rows"):
        read_manifest(manifest("", " "))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)
rows = st.fixed_dictionaries(
    {},
    optional={name: st.just("a.wav") | json_values for name in COLUMNS},
)


@settings(deadline=None, max_examples=60)
@given(lines=st.lists(st.text() | rows.map(json.dumps), max_size=3))
def test_any_lines_give_a_dataset_or_a_user_error(tmp_path_factory, lines):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    (folder / "a.wav").touch()
    path = Path(folder / "m.jsonl")
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    try:
        assert read_manifest(path).column_names == COLUMNS
    except UserError as error:
        assert "\n" not in str(error)
