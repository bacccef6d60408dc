import json

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from blora_pyro.data import splits
from blora_pyro.data.rows import BadRow
from blora_pyro.data.splits import load_mixture, load_split, split_names
from blora_pyro.errors import UserError
from blora_pyro.files import cache_dir
from blora_pyro.sources import describe_source


@pytest.fixture
def row(speak):
    return {"audio": str(speak("a.wav")), "text": "x"}


@pytest.fixture
def built_in(monkeypatch, tmp_path, manifest, row):
    monkeypatch.setattr(splits, "POCKET_DIR", tmp_path / "pocket")
    manifest({**row, "text": "built in"}, name="pocket/de-en/test.jsonl")


def test_a_manifest_serves_every_split(manifest, row):
    path = manifest(row)
    assert load_split(path, "train")["text"][:] == load_split(str(path), "dev")["text"][:] == ["x"]


def test_a_folder_has_a_manifest_a_split(manifest, row):
    folder = manifest(row, name="mine/train.jsonl").parent
    manifest({**row, "text": "y"}, name="mine/dev.jsonl")
    assert load_split(folder, "dev")["text"][:] == ["y"]
    with pytest.raises(UserError, match=r"no test.jsonl .*; its splits are: dev, train$"):
        load_split(folder, "test")


@pytest.fixture
def write(tmp_path, speak):
    """Write a manifest of one row, with these further columns, and the audio beside it."""

    def write(name, text, **columns):
        path = tmp_path / "mine" / name
        audio = speak(path.parent / "a.wav").name
        row = {"file_name": audio, "text": text, **columns}
        if path.suffix == ".jsonl":
            path.write_text(json.dumps(row), encoding="utf-8")
        else:
            gap = "\t" if path.suffix == ".tsv" else ","
            path.write_text("\n".join([gap.join(row), gap.join(row.values())]), encoding="utf-8")
        return tmp_path / "mine"

    return write


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_a_folder_may_have_a_folder_a_split(write, suffix):
    write(f"train{suffix}" if suffix != ".json" else "train.jsonl", "x")
    write(f"dev/metadata{suffix}" if suffix != ".json" else "dev/metadata.jsonl", "y")
    folder = write("notes/a.jsonl", "z")
    assert load_split(folder, "train")["text"][:] == ["x"]
    assert load_split(folder, "dev")["text"][:] == ["y"]
    assert split_names(folder) == ["dev", "train"]
    with pytest.raises(UserError, match=r"no test.jsonl .*; its splits are: dev, train$"):
        load_split(folder, "test")


def test_one_metadata_file_has_its_splits_in_a_column(write):
    folder = write("metadata.csv", "x")
    for split in ("train", "test"):
        assert load_split(folder, split)["text"][:] == ["x"]
    assert split_names(folder) == []
    folder = write("metadata.csv", "x", split="train")
    for source in (folder, folder / "metadata.csv"):
        assert load_split(source, "train")["text"][:] == ["x"]
        assert split_names(source) == ["train"]
        with pytest.raises(UserError, match="no rows of split 'test', but of train"):
            load_split(source, "test")


def test_a_column_split_in_a_split_s_own_manifest_is_no_matter(write):
    folder = write("train.csv", "x", split="training")
    assert load_split(folder, "train")["text"][:] == ["x"]


def test_two_manifests_of_one_split_are_refused(write):
    write("train.csv", "x")
    folder = write("train.jsonl", "y")
    with pytest.raises(UserError, match=r"has train.jsonl and train.csv; keep one of them"):
        load_split(folder, "train")


def test_an_empty_folder_is_refused(tmp_path):
    assert split_names(tmp_path) == []
    with pytest.raises(UserError, match="its splits are: none"):
        load_split(tmp_path, "train")


def test_a_built_in_corpus_has_split_names(built_in):
    assert split_names("de-en") == ["test"]


@pytest.mark.parametrize(
    "source",
    ["gone", "/gone/a", "./a", "../a", "a/b/c", "a/b.jsonl", "a/b:", "", "a\0b", "a" * 999],
)
def test_a_path_and_a_corpus_are_no_hub_ids(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for read in (lambda: load_split(source, "train"), lambda: split_names(source)):
        with pytest.raises(UserError, match=r"no data at '.*'; give a manifest") as caught:
            read()
        assert str(caught.value).isprintable()


def test_a_built_in_name_is_a_source(built_in):
    assert load_split("de-en", "test")["text"][:] == ["built in"]
    with pytest.raises(UserError, match=r"no train.jsonl .*; its splits are: test$"):
        load_split("de-en", "train")


def test_a_path_that_exists_wins_over_a_built_in_name(
    built_in, manifest, row, monkeypatch, tmp_path
):
    manifest(row, name="de-en/test.jsonl")
    monkeypatch.chdir(tmp_path)
    assert load_split("de-en", "test")["text"][:] == ["x"]


def test_an_unknown_source_is_refused_with_what_is_allowed(tmp_path):
    with pytest.raises(UserError) as caught:
        load_split(tmp_path / "gone", "dev")
    message = str(caught.value)
    assert all(
        part in message
        for part in ("gone", ".jsonl, .json, .csv, .tsv", "owner/name", "zh-en, en, de")
    )


@pytest.fixture
def folders(monkeypatch, tmp_path):
    monkeypatch.setattr(splits, "POCKET_DIR", tmp_path / "shipped")
    monkeypatch.setenv("BLORA_PYRO_CACHE", str(tmp_path / "cache"))


def test_a_shipped_corpus_comes_before_one_in_the_cache(folders, tmp_path):
    cached = tmp_path / "cache" / "pocket" / "tr"
    cached.mkdir(parents=True)
    assert splits.corpus_dir("tr") == cached
    shipped = tmp_path / "shipped" / "tr"
    shipped.mkdir(parents=True)
    assert splits.corpus_dir("tr") == shipped


def test_the_cache_is_in_the_home_folder(folders, monkeypatch, tmp_path):
    monkeypatch.delenv("BLORA_PYRO_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    cached = tmp_path / ".cache" / "blora-pyro" / "pocket" / "zh-en"
    cached.mkdir(parents=True)
    assert splits.corpus_dir("zh-en") == cached


def test_a_missing_corpus_is_an_error_that_says_how_to_make_it(folders):
    with pytest.raises(UserError, match=r"python recipes/pocket/build.py"):
        splits.corpus_dir("de")
    with pytest.raises(UserError, match=r"'\.\./de'; choose from de-en, es-en, zh-en, en, de"):
        splits.corpus_dir("../de")


def test_no_cache_where_it_is_switched_off_or_there_is_no_home(folders, monkeypatch):
    monkeypatch.setenv("BLORA_PYRO_CACHE", "")
    assert cache_dir() is None
    with pytest.raises(UserError, match=r"'de' is not in .*shipped; make it"):
        splits.corpus_dir("de")
    monkeypatch.setenv("BLORA_PYRO_CACHE", "~nobody-of-that-name/x")
    assert cache_dir() is None


def test_the_description_of_an_object_is_no_source():
    text = describe_source(DatasetDict(train=Dataset.from_dict({"audio": ["a"], "text": ["x"]})))
    for use in (split_names, lambda source: load_split(source, "train")):
        with pytest.raises(UserError, match=r"were an object from Python, <DatasetDict .*again"):
            use(text)


# ---- mixtures


def test_rows_know_their_source(manifest, speak):
    row = {"audio": str(speak("a.wav")), "text": "x"}
    one = manifest(row, {**row, "text": "y"}, name="one.jsonl")
    two = manifest({**row, "text": "z", "word_languages": ["de"]}, name="two.jsonl")
    mixed = load_mixture((one, str(two)), "train")
    assert mixed["text"][:] == ["x", "y", "z"]
    assert mixed["source"][:] == [0, 0, 1]
    assert mixed["word_languages"][:] == [[], [], ["de"]]


def test_manifests_and_tables_mix(manifest, speak):
    path = str(speak("a.wav"))
    lines = manifest({"audio": path, "text": "x"})
    table = Dataset.from_dict({"file_name": [path], "sentence": ["y"]})
    stream = IterableDataset.from_generator(lambda: iter([{"audio": path, "text": "z"}]))
    mixed = load_mixture((lines, table, stream), "train")
    assert mixed["text"][:] == ["x", "y", "z"]
    assert [row["audio"]["path"] for row in mixed] == [path] * 3


def test_bad_rows_know_their_source_and_all_bad_is_refused(manifest, speak):
    good = {"audio": str(speak("a.wav")), "text": "x"}
    one = manifest(good, "?", name="one.jsonl")
    two = manifest({"text": "y"}, good, good, name="two.jsonl")
    bad: list[BadRow] = []
    mixed = load_mixture((one, two), "train", bad.append)
    assert mixed["source"][:] == [0, 1, 1]
    assert [(error.source, error.origin[-6:]) for error in bad] == [(0, "line 2"), (1, "line 1")]
    worst = manifest("?", "!", name="worst.jsonl")
    with pytest.raises(UserError, match=r"worst.jsonl, train: all rows are bad \(2\).*line 1: not"):
        load_mixture((one, worst), "train", bad.append)


def test_a_limit_draws_rows_of_the_first_source_by_the_seed():
    one, two = (
        Dataset.from_dict(
            {
                "audio": [{"array": [0.0], "sampling_rate": 8000}] * 20,
                "text": [f"{name}{number:02}" for number in range(20)],
                "language": ["de"] * 20,
            }
        )
        for name in "ab"
    )
    draws = [load_mixture((one, two), "train", limit=5, seed=seed)["text"][:] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    for texts in draws:
        assert [text[0] for text in texts] == ["a"] * 5 + ["b"] * 20
        assert texts[:5] == sorted(set(texts[:5]))
    assert len(load_mixture(one, "train", limit=30)) == 20


def test_a_folder_of_audio_alone_has_empty_texts_and_a_dev_half(speak, tmp_path):
    for name in ("b.wav", "a.wav", "c.wav"):
        speak(name)
    folder = tmp_path / "old"
    folder.mkdir()
    for path in tmp_path.glob("*.wav"):
        path.rename(folder / path.name)
    assert split_names(folder) == ["dev", "test"]
    dev, test = (load_split(str(folder), split) for split in ("dev", "test"))
    assert [row["path"] for row in test["audio"]] == [f"{folder}/a.wav", f"{folder}/c.wav"]
    assert [row["path"] for row in dev["audio"]] == [f"{folder}/b.wav"]
    assert test["text"][:] == ["", ""]
    (folder / "dev").mkdir()
    (folder / "b.wav").rename(folder / "dev" / "b.wav")
    (folder / "a.wav").unlink()
    (folder / "c.wav").unlink()
    assert split_names(folder) == ["dev"]
    with pytest.raises(UserError, match=r"has no train\.jsonl"):
        load_split(str(folder), "train")
