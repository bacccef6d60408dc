"""The shipped corpora and model keep what the README says of them."""

from hashlib import sha256

import pyarrow.parquet
import pytest

from blora_pyro.data import DOMAINS, LANGUAGES, MODEL_DIR, load_split, read_audio
from blora_pyro.data.splits import corpus_dir
from blora_pyro.metrics import words

SIZES = {"train": 200, "dev": 100, "test": 100}
DOMAIN_SIZES = {"train": 400, "dev": 100, "test": 200}
SHIPPED = [
    (corpus, split, size)
    for corpora, sizes in ((LANGUAGES, SIZES), (DOMAINS, DOMAIN_SIZES))
    for corpus in corpora
    for split, size in sizes.items()
]
# The audio and texts with which every published figure was made, see `digest`
DIGESTS = {
    ("en", "train"): "9c199b84f23d7aff",
    ("en", "dev"): "270fc670dda0024b",
    ("en", "test"): "077e02fd3ea6ed09",
    ("de", "train"): "c2e611c2285b6505",
    ("de", "dev"): "77acbac4cbb66abf",
    ("de", "test"): "9b8560f451fd705f",
    ("es", "train"): "6e99d48e354a1d9d",
    ("es", "dev"): "c0e87a39b2ee6d7a",
    ("es", "test"): "f04ddfe61c4f2839",
    ("fr", "train"): "e936a33f12e7a2e9",
    ("fr", "dev"): "f05c32c11a331b8f",
    ("fr", "test"): "f8a354ec65efa832",
    ("tr", "train"): "14f5dccf9a05189f",
    ("tr", "dev"): "74e659b4f0dc843f",
    ("tr", "test"): "fe700162cef25f10",
    ("zh", "train"): "56e9005fb7e95e0a",
    ("zh", "dev"): "cdbc91e5d710ca34",
    ("zh", "test"): "dc004a1d246f270e",
    ("de-en", "train"): "57f415f2b47ad20c",
    ("de-en", "dev"): "c8dbfbe5729221ab",
    ("de-en", "test"): "a59dff2b79c86b5e",
    ("es-en", "train"): "664c991d41d2b0c2",
    ("es-en", "dev"): "f5e39010a448cdac",
    ("es-en", "test"): "0d03489509e003c6",
    ("zh-en", "train"): "8b37dddbbdcf09f1",
    ("zh-en", "dev"): "6a52704d8d3d5b55",
    ("zh-en", "test"): "c2b6ac5839e2f614",
}


def rows(corpus, split):
    return pyarrow.parquet.read_table(corpus_dir(corpus) / f"{split}.parquet").to_pylist()


def digest(dataset):
    total = sha256()
    for row in dataset:
        total.update(sha256(row["audio"]["bytes"]).digest() + row["text"].encode() + b"\n")
    return total.hexdigest()[:16]


@pytest.mark.parametrize(("corpus", "split", "size"), SHIPPED)
def test_every_split_has_its_size_languages_and_audio(corpus, split, size):
    dataset = load_split(corpus, split)
    assert len(dataset) == size
    assert digest(dataset) == DIGESTS[corpus, split]
    for row in dataset:
        assert row["language"] == corpus
        assert len(row["word_languages"]) == len(words(row["text"]))
        assert set(row["word_languages"]) == set(corpus.split("-"))
    for row in dataset.select(range(3)):
        seconds = len(read_audio(row["audio"])) / 16_000
        assert seconds == pytest.approx(row["duration"], abs=0.02)
        assert seconds < 3


@pytest.mark.parametrize("corpus", (*LANGUAGES, *DOMAINS))
def test_no_test_sentence_is_in_a_train_set_and_half_of_the_test_voices_are_new(corpus):
    train, test = rows(corpus, "train"), rows(corpus, "test")
    assert not {row["text"] for row in test} & {row["text"] for row in train}
    known = {row["voice"]["variant"] for row in train}
    heard = {row["voice"]["variant"] for row in test}
    assert 2 * len(heard - known) == len(heard)


def test_the_model_is_stored_in_half_precision_without_pickles():
    assert {path.suffix for path in MODEL_DIR.iterdir()} == {".json", ".safetensors"}
    assert (MODEL_DIR / "model.safetensors").stat().st_size < 8e6
