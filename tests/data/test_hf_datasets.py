import io
import json
import pickle
import re
import shutil

import datasets
import huggingface_hub
import numpy as np
import pytest
import soundfile
from datasets import Audio, Dataset, DatasetDict, Features, IterableDataset, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blora_pyro.data import Examples, hf_datasets, read_audio
from blora_pyro.data import rows as rows_module
from blora_pyro.data.rows import BadRow, Unreadable
from blora_pyro.data.splits import load_split, split_names, stream_split
from blora_pyro.errors import UserError
from blora_pyro.options import FitConfig

COLUMNS = [
    *("audio", "text", "language", "word_languages", "duration", "start", "end", "origin"),
]
EXTRAS = {"language": "de", "word_languages": ["de", "de"], "start": 0.1, "end": 0.4}
WAVE = (0.5 * np.sin(np.arange(8_000) / 5)).astype(np.float32)


@pytest.fixture
def forms(speak):
    """One recording in all forms that audio may have."""
    path = speak("a.wav")
    data = path.read_bytes()
    array = {"array": WAVE, "sampling_rate": 16_000}
    return {
        "path": str(path),
        "bytes": data,
        "path and bytes": {"path": "a.wav", "bytes": data},
        "path of two": {"path": str(path), "bytes": None},
        "array": array,
        "array and path": {**array, "path": "b.wav"},
        "list": {**array, "array": WAVE.tolist()},
    }


@pytest.fixture
def saved(forms):
    """A data set with its audio in bytes, as the Hub has them, and a column to be dropped."""
    rows = [
        {"audio": forms["path and bytes"], "sentence": text, "id": 7, **EXTRAS} for text in "xy"
    ]
    return Dataset.from_list(rows).cast_column("audio", Audio())


def as_table(rows, stream):
    return IterableDataset.from_generator(lambda: iter(rows)) if stream else Dataset.from_list(rows)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def check(dataset, texts=("x", "y")):
    assert dataset.column_names == COLUMNS
    assert dataset.features["audio"] == Audio(decode=False)
    assert dataset["text"][:] == list(texts)
    for row in dataset:
        assert {name: row[name] for name in EXTRAS} == EXTRAS
        assert len(read_audio(row["audio"])) == 8_000


FORMS = ["path", "bytes", "path and bytes", "path of two", "array", "array and path", "list"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stream", [False, True])
def test_every_form_of_audio_is_read(forms, form, stream):
    rows = [{"audio": forms[form], "text": text, **EXTRAS} for text in "xy"]
    table = as_table(rows, stream)
    dataset = load_split(table, "train")
    check(dataset)
    assert dataset["origin"][:] == ["the data set, row 0", "the data set, row 1"]
    if "array" in form:
        np.testing.assert_array_equal(read_audio(dataset[1]["audio"]), WAVE)


def test_a_stream_may_have_paths_and_bytearrays(forms, speak):
    audio = [speak("a.wav"), bytearray(forms["bytes"])]
    rows = [{"audio": one, "text": "x", **EXTRAS} for one in audio]
    check(load_split(IterableDataset.from_generator(lambda: iter(rows)), "train"), "xx")


def test_a_dictionary_has_its_splits_stored_or_streamed(saved):
    both = DatasetDict(train=saved, test=saved.select([1]))
    check(load_split(both, "train"))
    check(load_split(both, "test"), "y")
    check(load_split(both.with_format("numpy"), "test"), "y")
    assert load_split(both, "test")["origin"][:] == ["the data set, test, row 0"]
    streams = datasets.IterableDatasetDict({k: v.to_iterable_dataset() for k, v in both.items()})
    check(load_split(streams, "train"))
    assert split_names(both) == split_names(streams) == ["train", "test"]
    assert split_names(saved) == split_names(saved.to_iterable_dataset()) == []
    for table in (both, streams):
        with pytest.raises(UserError, match="has no split 'dev'; its splits are: train, test"):
            load_split(table, "dev")


def test_audio_of_a_data_set_is_not_copied_and_chunks_of_a_stream_are_joined(saved, monkeypatch):
    monkeypatch.setattr("blora_pyro.data.rows.parse_audio", None)
    check(load_split(saved.select([1, 0]).select([1, 0]), "train"))
    monkeypatch.undo()
    monkeypatch.setattr(rows_module, "CHUNK", 2)
    many = datasets.concatenate_datasets([saved, saved, saved.select([0])])
    check(load_split(many.to_iterable_dataset(), "train"), "xyxyx")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("rows", "gist"),
    [
        ([{"audio": "a.wav"}], "no text; a row needs audio"),
        ([{"audio": b"", "file_name": "", "text": ""}], "audio and file_name both say"),
        ([{"audio": b"", "text": 3}], "the data set, row 0: text must be text, got 3"),
        (
            [{"audio": b"", "text": "", "language": x} for x in ("de", None, "\x00")]
            + [{"audio": b"", "text": None, "language": ""}],
            "the data set, row 3: text must be text, got null",
        ),
        (
            [{"audio": b"", "text": "", "start": 1.0, "end": 0.5}],
            "row 0: the segment starts at 1 s",
        ),
        ([{"audio": {"array": [1, 2], "sampling_rate": 8}, "text": ""}], "is an array of int64"),
        (
            [{"audio": {"array": [0.5], "sampling_rate": 0}, "text": ""}],
            "row 0: audio without a path",
        ),
        ([{"audio": 3, "text": ""}], "audio"),
    ],
)
def test_a_bad_row_is_named_by_its_number(rows, gist, stream):
    table = as_table(rows, stream)
    with pytest.raises(UserError) as caught:
        load_split(table, "train")
    assert gist in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("stream", [False, True])
def test_bad_rows_are_left_out(forms, stream):
    texts = ["x", None, "y", None]
    rows = [{"audio": forms["bytes"], "text": text, **EXTRAS} for text in texts]
    table = as_table(rows, stream)
    bad: list[BadRow] = []
    check(load_split(table, "train", bad.append))
    assert [error.origin for error in bad] == ["the data set, row 1", "the data set, row 3"]
    table = table.filter(lambda row: row["text"] is None)
    assert len(load_split(table, "train", bad.append)) == 0


@pytest.mark.parametrize("audio", [None, {"path": None, "bytes": None}, {"path": "gone.wav"}])
def test_missing_audio_is_an_error_when_it_is_read(audio, extractor, tokenizer):
    rows = [{"audio": audio, "text": "x", "language": "de"}]
    features = Features(audio=Audio(decode=False), text=Value("string"), language=Value("string"))
    table = Dataset.from_list(rows).cast(features)
    for given_table in (table, table.to_iterable_dataset()):
        with pytest.raises(
            UserError, match=r"the data set, row 0: .*(cannot read|audio must be|does not exist)"
        ):
            Examples(load_split(given_table, "train"), extractor, tokenizer)


def test_no_rows_and_a_generator_that_fails_are_refused(saved):
    for table in (saved.select([]), IterableDataset.from_generator(lambda: iter([]))):
        with pytest.raises(UserError, match="the data set has no rows"):
            load_split(table, "train")

    def rows():
        yield {"audio": b"", "text": "x"}
        raise OSError("the disk\nis gone")

    with pytest.raises(Unreadable, match="row 1: cannot be read: the disk is gone"):
        load_split(IterableDataset.from_generator(rows), "train", [].append)


def test_a_stream_that_asks_for_torchcodec_is_read_without_or_refused_with_advice(forms):
    table = IterableDataset.from_generator(
        lambda: iter([{"audio": forms["path"], "text": "x"}]),
        features=Features(audio=Audio(), text=Value("string")),
    )
    try:
        path = load_split(table, "train")[0]["audio"]["path"]
    except UserError as error:  # of newer `datasets`, where it is not installed
        assert re.search("row 0: .* torchcodec; yield the same without that type", str(error))
    else:
        assert path == forms["path"]


# ---- saved


def test_a_saved_data_set_is_loaded_without_unpickling(saved, watch, tmp_path):
    saved.save_to_disk(tmp_path / "one")
    DatasetDict(train=saved, test=saved.select([1])).save_to_disk(tmp_path / "two")
    with watch() as seen:
        check(load_split(tmp_path / "one", "train"))
        check(load_split(str(tmp_path / "two"), "train"))
        check(load_split(tmp_path / "two", "test"), "y")
    assert not [event for event in seen if "unpickle" in event or str(tmp_path) in event]
    assert split_names(tmp_path / "one") == [] and split_names(tmp_path / "two") == [
        "train",
        "test",
    ]
    assert load_split(tmp_path / "one", "dev")["origin"][0] == f"{tmp_path / 'one'}, row 0"
    with watch() as seen:
        pickle.loads(pickle.dumps(tmp_path))
    assert "unpickles" in seen[0]
    with pytest.raises(UserError, match="two has no split 'dev'; its splits are: train, test"):
        load_split(tmp_path / "two", "dev")


def test_damaged_saved_data_are_refused(saved, tmp_path):
    for number, (name, content) in enumerate(
        [
            ("state.json", b"{"),
            ("state.json", b"{}"),
            ("state.json", json.dumps({"_data_files": [{"filename": "gone"}]}).encode()),
            ("dataset_info.json", b"[]"),
            ("data-00000-of-00001.arrow", b"cos\nsystem\n"),
        ]
    ):
        folder = tmp_path / f"{number}"
        saved.save_to_disk(folder)
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=r"cannot load the saved data set .*; save it anew"):
            load_split(folder, "train")
    DatasetDict(train=saved).save_to_disk(tmp_path / "splits")
    (tmp_path / "splits" / "dataset_dict.json").write_bytes(b"[1")
    with pytest.raises(
        UserError, match=r"cannot load the saved data set .*splits: .*; save it anew"
    ):
        load_split(tmp_path / "splits", "train")


@pytest.mark.parametrize("limit", [0, hf_datasets.IN_MEMORY])
def test_parquet_files_have_the_names_of_the_hub(saved, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(hf_datasets, "IN_MEMORY", limit)
    folder = tmp_path / "odd [name]*"
    (folder / "data").mkdir(parents=True)
    saved.select([0]).to_parquet(folder / "data" / "train-00000-of-00002.parquet")
    saved.select([1]).to_parquet(folder / "data" / "train-00001-of-00002.parquet")
    saved.select([1]).to_parquet(folder / "test.parquet")
    check(load_split(folder, "train"))
    check(load_split(folder, "test"), "y")
    assert split_names(folder) == ["test", "train"]
    with pytest.raises(UserError, match=r"no dev.jsonl .*; its splits are: test, train"):
        load_split(folder, "dev")
    (folder / "dev.parquet").write_bytes(b"PAR1" * 4)
    with pytest.raises(UserError, match=r"cannot load .*dev\.parquet: .*; save it anew"):
        load_split(folder, "dev")


def test_a_parquet_file_serves_every_split(saved, tmp_path):
    path = tmp_path / "two.parquet"
    saved.to_parquet(path)
    dataset = load_split(path, "train")
    check(dataset)
    assert dataset["origin"][1] == f"{path}, row 1"
    check(load_split(str(path), "dev"))
    assert split_names(path) == []
    assert len(list(stream_split(path, "train").records)) == 2


# ---- the Hub


@pytest.fixture
def hub(monkeypatch, saved, tmp_path):
    """Stands in for the Hub: owner/name is a local folder with the configuration "small"."""
    folder = tmp_path / "hub"
    (folder / "small").mkdir(parents=True)
    saved.to_parquet(folder / "small" / "train-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_dir: small\n---\n", encoding="utf-8"
    )
    asked = []

    def local(real):
        def call(name, *args, **options):
            asked.append((name, *args, options))
            assert "trust_remote_code" not in options
            return real(str(folder) if name == "owner/name" else name, *args, **options)

        return call

    for name in ("load_dataset", "get_dataset_split_names"):
        monkeypatch.setattr(hf_datasets, name, local(getattr(datasets, name)))
    return asked


def test_a_hub_id_is_loaded_and_a_path_comes_first(hub, monkeypatch, tmp_path):
    check(load_split("owner/name:small", "train"))
    assert hub == [("owner/name", "small", {"split": "train", "streaming": False})]
    dataset = load_split("owner/name", "train")
    check(dataset)
    assert dataset["origin"][0] == "owner/name, train, row 0"
    assert split_names("owner/name") == ["train"]
    with pytest.raises(UserError, match=r"no data at 'owner/name': .*\"test\".*'train'"):
        load_split("owner/name", "test")
    with pytest.raises(UserError, match=r"no data at 'owner/name:big': .*small"):
        load_split("owner/name:big", "train")
    # A path that exists comes first.
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tmp_path / "hub" / "small", tmp_path / "owner" / "name")
    hub.clear()
    check(load_split("owner/name", "train"))
    assert not hub


def test_a_repository_that_is_a_script_is_read_as_the_hub_has_converted_it(
    monkeypatch, saved, tmp_path
):
    """google/fleurs: a folder a language, with one for each split, and these columns."""
    rows = [
        {"id": 7, "num_samples": 8000, "path": "a.wav", "audio": row["audio"], "gender": 1}
        | {"transcription": "das rote", "raw_transcription": "Das Rote.", "lang_id": 19}
        | {"language": "German"}
        for row in saved.cast_column("audio", Audio(decode=False))
    ]
    table = Dataset.from_list(rows).cast_column("audio", Audio())
    for split in ("train", "validation", "test"):
        (tmp_path / "de_de" / split).mkdir(parents=True)
        table.to_parquet(tmp_path / "de_de" / split / "0000.parquet")

    def converted(real):
        def call(name, config=None, *, revision=None, **options):
            assert name == "google/fleurs"
            if revision is None:
                raise RuntimeError("Dataset scripts are no longer supported, but found fleurs.py")
            assert (revision, config) == ("refs/convert/parquet", None)
            return real(str(tmp_path), **options)

        return call

    for name in ("load_dataset", "get_dataset_split_names"):
        monkeypatch.setattr(hf_datasets, name, converted(getattr(datasets, name)))
    ((name, source),) = FitConfig(backward=["fleurs:German"]).backward.items()
    assert (name, source) == ("de", "google/fleurs:de_de")
    assert sorted(split_names(source)) == ["test", "train", "validation"]
    dataset = load_split(source, "test")
    assert dataset["text"][:] == ["das rote", "das rote"]
    assert dataset["language"][:] == ["German", "German"]
    assert len(read_audio(dataset[0]["audio"])) == 8000


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for action in (lambda: load_split("owner/name", "train"), lambda: split_names("owner/name")):
        with pytest.raises(UserError) as caught:
            action()
        message = str(caught.value)
        assert message.startswith(
            "no data at 'owner/name': there is no such path, and from the Hub"
        )
        assert message.endswith("give a path, or load it where there is a network")
        assert message.isprintable()


def test_audio_files_on_the_hub_are_refused_with_advice(monkeypatch):
    def fail(*args, **options):
        try:
            raise ImportError("please install 'torchcodec'")
        except ImportError as error:
            raise RuntimeError("while generating") from error

    monkeypatch.setattr(hf_datasets, "load_dataset", fail)
    with pytest.raises(UserError, match="download the repository and give its folder"):
        load_split("owner/name", "train")


# ---- anything at all

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)
sounds = st.fixed_dictionaries(
    {},
    optional={
        "array": st.lists(st.floats(width=32), max_size=9) | values,
        "sampling_rate": st.just(16_000) | values,
        "path": values,
        "bytes": values,
    },
)
names = ["text", "language", "word_languages", "duration", "start", "end", "file_name"]
rows = st.fixed_dictionaries({"audio": sounds | values}, optional={name: values for name in names})


@settings(
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],  # the machine may be busy
)
@given(rows=st.lists(rows, max_size=3))
def test_any_stream_is_a_data_set_or_an_error_of_one_line(rows):
    try:
        dataset = load_split(IterableDataset.from_generator(lambda: iter(rows)), "train")
        assert dataset.column_names == COLUMNS
        for row in dataset:
            read_audio(row["audio"])
    except UserError as error:
        assert str(error).isprintable()


def test_encoded_arrays_are_wav_files():
    row = {"audio": {"array": WAVE, "sampling_rate": 8_000}, "text": "x"}
    dataset = load_split(IterableDataset.from_generator(lambda: iter([row])), "train")
    info = soundfile.info(io.BytesIO(dataset[0]["audio"]["bytes"]))
    assert (info.samplerate, info.subtype) == (8_000, "FLOAT")
