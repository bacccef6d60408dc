import csv
import io
import itertools
import json
import os
from pathlib import Path

import pytest
from datasets import Audio
from hypothesis import given, settings
from hypothesis import strategies as st

from blora_pyro.data.audio import read_audio
from blora_pyro.data.manifest import manifest_splits, read_manifest
from blora_pyro.data.rows import BadRow, Unreadable, stop
from blora_pyro.data.splits import split_names
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


@pytest.mark.parametrize("suffix", [".csv", ".CSV"])
def test_csv_is_read_as_it_is_quoted(speak, table, suffix):
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
    path = table(text, name="train" + suffix)
    first, second, third = read_manifest(path)
    assert first == {
        "audio": {"bytes": None, "path": str(path.parent / "sub/a.wav")},
        "text": 'say "no", then\r\nyes',
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
    lines = ["audio,text,split", "a.wav,x,train", "b.wav,y,test", "a.wav,z, train "]
    path = table("\n".join(lines))
    assert manifest_splits(path) == ["test", "train"]
    assert read_manifest(path, "train")["text"][:] == ["x", "z"]
    with pytest.raises(UserError, match=r"line 3: .*b\.wav' does not exist"):
        read_manifest(path, "test")
    with pytest.raises(UserError, match=r"no rows of split 'dev', but of test, train"):
        read_manifest(path, "dev")


@pytest.mark.parametrize("blank", ["", " ", None, ...])
def test_a_row_without_a_split_is_refused_where_others_have_one(speak, manifest, table, blank):
    speak("a.wav")
    row = {"audio": "a.wav", "text": "split"}
    rows = [row if blank is ... else {**row, "split": blank}, {**row, "split": "train"}]
    paths = [manifest(*rows)]
    if isinstance(blank, str):
        paths.append(table(f"audio,text,split\na.wav,split,{blank}\na.wav,split,train\n"))
    for path in paths:
        for split in ("train", "test"):
            bad: list[BadRow] = []
            with pytest.raises(UserError, match="split is blank, and in other rows it is train"):
                read_manifest(path, split)
            assert len(read_manifest(path, split, bad.append)) == (split == "train")
            assert len(bad) == 1 and bad[0].reason.endswith("name it")
    path = manifest(rows[0], rows[0])  # no row has one, so that all are for every split
    assert manifest_splits(path) == [] and len(read_manifest(path, "test")) == 2


# ---- the conventions of others


def test_common_voice_and_nemo_call_the_language_otherwise(speak, manifest):
    speak("a.wav")
    row = {"audio": "a.wav", "text": "a"}
    rows = [{"locale": "sv-SE"}, {"lang": "de"}, {"language": "", "locale": "fr"}, {"locale": None}]
    rows += [{"language": "de", "locale": "fr"}, {"lang": 3}]
    data = read_manifest(manifest(*[row | one for one in rows]))
    assert data["language"][:] == ["sv-SE", "de", "fr", "", "de", ""]
    chosen = read_manifest(manifest(row | {"x": "es", "lang": "de"}), columns={"language": ["x"]})
    assert chosen["language"][:] == ["es"]
    with pytest.raises(UserError, match="language must be text, got 3"):
        read_manifest(manifest(row | {"language": 3, "lang": "de"}))


def test_a_split_that_differs_by_its_capitals_alone_is_refused(speak, manifest):
    speak("a.wav")
    row = {"audio": "a.wav", "text": "a"}
    path = manifest(*[row | {"split": name} for name in ("train", "Test", "TRAIN")])
    with pytest.raises(UserError, match='line 3: split is "TRAIN", and not "train"; write one'):
        read_manifest(path, "train")


def test_a_duration_is_that_of_the_segment_wherever_one_begins(speak, manifest):
    speak("long.wav", seconds=3.0)
    rows = [{"start": 1, "duration": 0.5}, {"start": 1, "end": 1.5, "duration": 3}]
    rows += [{"start": 1}, {"end": 2.5, "duration": 2.52}]
    data = read_manifest(manifest(*[{"audio": "long.wav", "text": "a", **row} for row in rows]))
    assert [*zip(data["start"], data["end"], strict=True)] == [
        (1.0, 1.5),
        (1.0, 1.5),
        (1.0, None),
        (None, 2.5),
    ]
    with pytest.raises(UserError, match=r"end is 2.5 s and duration 1 s, and start is missing"):
        read_manifest(manifest({"audio": "long.wav", "text": "a", "end": 2.5, "duration": 1}))


def test_the_segments_of_nemo_are_its_offsets_and_durations(speak, manifest):
    speak("long.wav", seconds=3.0)
    rows = [
        {"audio_filepath": "long.wav", "duration": 1.0, "text": "a"},
        {"audio_filepath": "long.wav", "offset": 1.0, "duration": 0.5, "text": "b"},
        {"audio_filepath": "long.wav", "offset": 1.5, "duration": 1.52, "text": "c"},
        {"audio_filepath": "long.wav", "text": "whole"},
        {"audio": "long.wav", "duration": 3.0, "text": "whole"},
        {"audio": "long.wav", "offset": 2, "text": "to the end"},
        {"audio_filepath": "long.wav", "start": 1, "end": 2, "duration": 1, "text": "ours"},
    ]
    segments = [(None, 1.0), (1.0, 1.5), (1.5, 3.02), (None, None), (None, None), (2.0, None)]
    read = read_manifest(manifest(*rows))
    assert [(row["start"], row["end"]) for row in read] == [*segments, (1.0, 2.0)]
    lengths = [len(read_audio(row["audio"], start=row["start"], end=row["end"])) for row in read]
    assert lengths == [16_000, 8_000, 24_000, 48_000, 48_000, 16_000, 16_000]
    with pytest.raises(UserError, match="offset, and start or end, both say what the segment is"):
        read_manifest(manifest({**rows[1], "end": 2}))
    with pytest.raises(UserError, match='offset must be a number of seconds, got "1"'):
        read_manifest(manifest({**rows[1], "offset": "1"}))


COMMON_VOICE = [
    "client_id\tpath\tsentence\tup_votes\tlocale\tsegment",
    '1\ta.mp3\t"Nein", sagte sie.\t2\tde\t',
    '2\tb.mp3\t"Ich gehe.\t2\tde\t',
    '3\tc.mp3\tEnde" und aus\t2\tde\t',
    '4\td.mp3\t"Ganz in Zeichen."\t2\tde\t',
]


def test_the_tables_of_common_voice_are_read_row_by_row(speak, table, tmp_path):
    for name in "abcd":
        speak(f"clips/{name}.mp3")
    speak("d.mp3")
    rows = read_manifest(table("\n".join(COMMON_VOICE) + "\n", "train.tsv"))
    assert rows["text"][:] == [line.split("\t")[2] for line in COMMON_VOICE[1:]]
    names = [f"{tmp_path}/clips/{name}.mp3" for name in "abcd"]
    assert [row["audio"]["path"] for row in rows] == names
    for name in ("test.tsv", "reported.tsv", "validated.tsv"):
        table("sentence_id\tsentence\treason\n", name)
    assert split_names(tmp_path) == ["test", "train"]


def test_a_path_beside_audio_is_not_the_audio(speak, manifest):
    row = {"audio": speak("a.wav").name, "path": "gone.wav", "sentence": "x"}
    assert read_manifest(manifest(row))[0]["audio"]["path"].endswith("a.wav")
    assert read_manifest(manifest({"path": "a.wav", "text": "x"}))["text"][:] == ["x"]


@pytest.mark.parametrize(
    ("name", "text", "gist"),
    [
        ("a.tsv", 'audio\ttext\na.wav\t"say ""no"""\n', "text looks quoted, .*TSV is not: save it"),
        ("a.tsv", '"audio"\t"text"\n"a.wav"\t"x"\n', "TSV is not quoted: save it without quotes"),
        ("a.tsv", "audio,text\na.wav,x\n", "it looks separated by commas: save it with tabs"),
        ("a.csv", "audio;text\na.wav;x, y\n", "separated by semicolons: save it with commas"),
        ("a.csv", "audio\ttext\na.wav\tx\n", "it looks separated by tabs: save it with commas"),
        ("a.csv", 'audio,text\na.wav,"x\na.wav,y"\n', "text holds another row, .*not closed"),
        ("a.csv", 'text,audio\n"x,a.wav\ny",a.wav\n', "text holds another row"),
    ],
)
def test_what_would_be_misread_is_refused_with_a_hint(speak, table, name, text, gist):
    speak("a.wav")
    with pytest.raises(UserError, match=gist):
        read_manifest(table(text, name))


def test_columns_may_be_called_anything(speak, table, manifest):
    speak("a.wav")
    columns = {"audio": ["wav"], "text": ["transcript", "raw"]}
    one = {"wav": "a.wav", "transcript": "x", "text": "y", "split": "train", "audio": "gone.wav"}
    lines = ["wav,transcript,text,split,audio", "a.wav,x,y,train,gone.wav"]
    for path in (manifest(one), table("\n".join(lines))):
        assert manifest_splits(path) == ["train"]
        assert read_manifest(path, "train", columns=columns)["text"][:] == ["x"]
        text = {**columns, "text": ["raw", "text"]}
        assert read_manifest(path, "train", columns=text)["text"][:] == ["y"]
        with pytest.raises(UserError, match="no column typo for text; its columns are: wav, trans"):
            read_manifest(path, "train", columns={**columns, "text": ["typo"]})


def test_a_header_of_many_columns_is_read_once(speak, table):
    speak("a.wav")
    many = ",".join(f"c{number}" for number in range(100_000))
    path = table(f"audio,text,{many}\na.wav,x,{many}\n")
    assert read_manifest(path)["text"][:] == ["x"]  # would take minutes, were it quadratic


def test_a_row_that_names_no_file_is_refused_unopened(manifest, tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    for path in ("pipe.wav", "/dev/zero", "."):
        with pytest.raises(UserError, match="is no file, but a folder or a device"):
            read_manifest(manifest({"audio": path, "text": "x"}))


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
