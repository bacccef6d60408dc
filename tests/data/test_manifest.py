import csv
import io
import itertools
import json
from pathlib import Path

import pytest
from datasets import Audio
from hypothesis import given, settings
from hypothesis import strategies as st

from blora_pyro.data.audio import read_audio
from blora_pyro.data.manifest import manifest_splits, read_manifest
from blora_pyro.data.rows import BadRow, Unreadable, stop
from blora_pyro.errors import UserError

GIVEN = ["audio", "text", "language", "word_languages", "duration", "start", "end"]
COLUMNS = [*GIVEN, "origin"]


def test_a_row_is_read_with_its_file_and_line(speak, manifest, tmp_path):
    audio = speak("train/0000.wav")
    full = {
        "audio": "train/0000.wav",
        "text": "das house",
        "language": "de-en",
        "word_languages": ["de", "en"],
        "duration": 0.5,
        "start": 0.1,
        "end": 0.4,
    }
    bare = {"audio": str(audio), "text": "", "voice": {"pitch": 3}}
    path = manifest(full, "", bare, "  ")
    dataset = read_manifest(path)
    assert dataset.column_names == COLUMNS
    assert dataset.features["audio"] == Audio(decode=False)
    source = {"bytes": None, "path": str(tmp_path / "train" / "0000.wav")}
    assert dataset[0] == {**full, "audio": source, "origin": f"{path}, line 1"}
    assert dataset[1] == {
        "audio": source,
        "text": "",
        "language": "",
        "word_languages": [],
        "duration": None,
        "start": None,
        "end": None,
        "origin": f"{path}, line 3",
    }


def test_json_may_hold_line_separators_and_a_byte_order_mark(speak, manifest):
    line = json.dumps({"audio": speak("a.wav").name, "text": "a\u2028b\x85c"}, ensure_ascii=False)
    assert read_manifest(manifest("\ufeff" + line))["text"][:] == ["a\u2028b\x85c"]


@pytest.mark.parametrize(
    ("line", "gist"),
    [
        ("not so", "not JSON: 'not so'"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "not JSON"),
        ("1" * 5000, "not JSON"),
    ],
)
def test_a_line_that_is_no_json_object_is_refused(manifest, line, gist):
    with pytest.raises(UserError, match=f"line 1: {gist}"):
        read_manifest(manifest(line))


def test_a_manifest_that_cannot_be_read_is_refused(manifest, tmp_path):
    with pytest.raises(UserError, match=r"cannot read the manifest .*gone.jsonl': No such file"):
        read_manifest(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match="cannot read"):
        read_manifest(tmp_path)
    with pytest.raises(UserError, match="has no rows"):
        read_manifest(manifest("", " "))


def test_a_line_that_is_no_utf_8_is_named(speak, tmp_path):
    speak("a.wav")
    row = '{"audio": "a.wav", "text": "TEXT"}'
    files = {"latin.jsonl": row.replace("TEXT", "x") + "\n" + row.replace("TEXT", "ä")}
    files["latin.csv"] = "audio,text\na.wav,x\na.wav,ä\na.wav,y"
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
        line = 2 + name.endswith(".csv")
        with pytest.raises(UserError, match=rf"{name}, line {line}: not UTF-8 text; save the mani"):
            read_manifest(tmp_path / name)
    assert read_manifest(tmp_path / "latin.csv", on_bad=[].append)["text"][:] == ["x", "y"]
    (tmp_path / "latin.tsv").write_bytes("ä\taudio\ttext".encode("latin-1"))
    with pytest.raises(Unreadable, match=r"line 1: not UTF-8 text"):
        read_manifest(tmp_path / "latin.tsv", on_bad=[].append)


# ---- other names, other formats


@pytest.fixture
def table(tmp_path):
    """Write a CSV or TSV file as it is."""

    def write(text: str, name: str = "train.csv") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
        return path

    return write


@pytest.mark.parametrize(("suffix", "gap"), [(".csv", ","), (".tsv", "\t"), (".TSV", "\t")])
def test_csv_and_tsv_are_read_as_they_are_quoted(speak, table, suffix, gap):
    speak("sub/a.wav")
    lines = [
        " audio,text,language,word_languages,duration,start,end,other",
        'sub/a.wav,"say ""no"", then\r\nyes",de-en,de  en,0.5,0.1,0.4,!',
        ",,,,,,,",
        "",
        "sub/a.wav,,,,,,,",
        "sub/a.wav,x,,,nan,,0.2,",
    ]
    text = "\ufeff" + "\r\n".join(lines) + "\r\n"
    path = table(text.replace(",", gap), name="train" + suffix)
    first, second, third = read_manifest(path)
    assert first == {
        "audio": {"bytes": None, "path": str(path.parent / "sub/a.wav")},
        "text": f'say "no"{gap} then\r\nyes',
        "language": "de-en",
        "word_languages": ["de", "en"],
        "duration": 0.5,
        "start": 0.1,
        "end": 0.4,
        "origin": f"{path}, line 2",
    }
    assert second == {
        **dict.fromkeys(COLUMNS),
        "audio": first["audio"],
        "text": "",
        "language": "",
        "word_languages": [],
        "origin": f"{path}, line 6",
    }
    assert (third["duration"], third["end"], third["origin"]) == (None, 0.2, f"{path}, line 7")


@pytest.mark.parametrize(
    ("text", "gist"),
    [
        (
            "audio;text\na.wav;x",
            'line 1: the header "audio;text": no audio and no text; a row needs',
        ),
        ("a.wav,x", 'line 1: the header "a.wav | x": no audio'),
        ("text,audio,text\n", 'line 1: two columns are called "text"'),
        ("\naudio,file_name,text\n", "line 2: the header"),
        ("audio,file_name,text\n", "audio and file_name both say what the audio is"),
        ("audio,text\na.wav,x\na.wav\n", "line 3: 1 cells, but the header has 2"),
        ("audio,text\na.wav,x,y\n", "line 2: 3 cells, but the header has 2"),
        ("audio,text\na.wav,x\n,x\n", "line 3: audio is empty; give a path"),
        ("audio,text\nb.wav,x\n", "line 2: the audio file"),
        ('audio,text\na.wav,"x\ny"\na.wav,"x\n\n\n', "line 4: unexpected end of data; write cells"),
        ('audio,text\na.wav,"x" y\n', "line 2: "),
        (
            "audio,text,start\na.wav,x,soon\n",
            'line 2: start must be a number of seconds, got "soon"',
        ),
        ("audio,text,duration\na.wav,x,-1\n", "line 2: duration must be a number of seconds"),
        ("audio,text\na.wav," + "x" * 200_000, "line 2: field larger than field limit"),
        ("audio,text\n", "has no rows; a row needs audio and text"),
        ("", "has no rows"),
    ],
)
def test_a_bad_line_of_csv_is_named(speak, table, text, gist):
    speak("a.wav")
    with pytest.raises(UserError) as caught:
        read_manifest(table(text))
    message = str(caught.value)
    assert gist in message and "train.csv" in message and "\n" not in message


def test_an_unknown_ending_is_refused(table):
    with pytest.raises(UserError, match=r"must end in .jsonl, .json, .csv, .tsv"):
        read_manifest(table("", name="train.txt"))


def test_a_column_split_picks_the_rows(speak, table):
    speak("a.wav")
    lines = ["audio,text,split", "a.wav,x,train", "b.wav,y,test", "a.wav,z,"]
    path = table("\n".join(lines))
    assert manifest_splits(path) == ["test", "train"]
    assert read_manifest(path, "train")["text"][:] == ["x", "z"]
    assert read_manifest(path, "dev")["text"][:] == ["z"]
    with pytest.raises(UserError, match=r"line 3: .*b\.wav' does not exist"):
        read_manifest(path, "test")
    path = table("\n".join(lines[:-1]))
    with pytest.raises(UserError, match=r"no rows of split 'dev', but of test, train"):
        read_manifest(path, "dev")


def test_bad_rows_are_left_out_and_reported_in_order(speak, manifest):
    good = {"audio": speak("a.wav").name, "text": "x"}
    path = manifest(good, "?", {"text": "y"}, {**good, "text": "z"})
    bad: list[BadRow] = []
    assert read_manifest(path, on_bad=bad.append)["text"][:] == ["x", "z"]
    assert [error.origin for error in bad] == [f"{path}, line 2", f"{path}, line 3"]
    assert bad[0].reason == "not JSON: '?'" and str(bad[0]) == f"{path}, line 2: not JSON: '?'"
    assert len(read_manifest(manifest("?", "!"), on_bad=bad.append)) == 0
    with pytest.raises(BadRow, match=r"line 1: not JSON: '\?'"):
        read_manifest(manifest("?", "!"))


def test_a_row_after_which_all_is_lost_is_never_skipped(speak, table):
    speak("a.wav")
    bad: list[BadRow] = []
    path = table('audio,text\na.wav\na.wav,"x" y\na.wav,x\n')
    with pytest.raises(Unreadable, match=r"line 3: "):
        read_manifest(path, on_bad=bad.append)
    assert [error.origin for error in bad] == [f"{path}, line 2"]


def test_nothing_is_unpickled_and_nothing_written(speak, manifest, table, watch, tmp_path):
    speak("a.wav")
    paths = [manifest({"audio": "a.wav", "text": "x"}), table("audio,text\na.wav,x\n")]
    before = {path: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    with watch() as seen:
        for path in paths:
            read_audio(read_manifest(path)[0]["audio"])
    assert seen == []
    assert {path: path.read_bytes() for path in sorted(tmp_path.iterdir())} == before


# ---- anything at all

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)
json_rows = st.fixed_dictionaries(
    {},
    optional={name: st.just("a.wav") | json_values for name in [*GIVEN, "file_name", "split"]},
)
cells = st.sampled_from(["a.wav", "", "1", "0.5", "nan", "de en", '"', "\r"]) | st.text(max_size=5)
headers = st.lists(st.sampled_from([*GIVEN, "sentence", "split"]) | st.text(max_size=3), max_size=6)
csv_rows = st.lists(cells, max_size=6)
anything = settings(deadline=None, max_examples=25, derandomize=True)


@pytest.fixture(scope="session")
def fuzz(tmp_path_factory):
    """Read bytes as a manifest: there must be a data set or a `UserError` of one line."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "a.wav").touch()

    def read(data: bytes, suffix: str) -> None:
        path = folder / f"m{suffix}"
        path.write_bytes(data)
        for split, skip in itertools.product((None, "train"), (False, True)):
            bad: list[BadRow] = []
            try:
                dataset = read_manifest(path, split, bad.append if skip else stop)
                assert dataset.column_names == COLUMNS and len(dataset) + len(bad) > 0
            except UserError as error:
                assert str(error).isprintable()
                assert not (skip and isinstance(error, BadRow))
            assert all(str(error).isprintable() for error in bad)

    return read


@anything
@given(data=st.binary(max_size=200), suffix=st.sampled_from([".jsonl", ".csv", ".tsv"]))
def test_any_bytes_are_rows_or_an_error_of_one_line(fuzz, data, suffix):
    fuzz(data, suffix)


@anything
@given(lines=st.lists(st.text() | json_rows.map(json.dumps), max_size=3))
def test_any_lines_are_rows_or_an_error_of_one_line(fuzz, lines):
    fuzz("\n".join(lines).encode(errors="surrogatepass"), ".jsonl")


@anything
@given(header=headers, rows=st.lists(csv_rows, max_size=3), quoted=st.booleans())
def test_any_cells_are_rows_or_an_error_of_one_line(fuzz, header, rows, quoted):
    header = ["audio", "text", *header]
    rows = [["a.wav", "x", *row][: len(header)] for row in rows]
    out = io.StringIO(newline="")
    csv.writer(out, quoting=csv.QUOTE_ALL).writerows([header, *rows])
    plain = "\n".join(",".join(row) for row in [header, *rows])
    fuzz((out.getvalue() if quoted else plain).encode(errors="surrogatepass"), ".csv")
