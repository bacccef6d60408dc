"""The shipped corpora and model keep what the README says of them."""

import json

import pytest

from blora_pyro.data import DOMAINS, LANGUAGES, MODEL_DIR, load_split, read_audio
from blora_pyro.data.pocket import corpus_dir
from blora_pyro.metrics import words

SIZES = {"train": 200, "dev": 100, "test": 100}
DOMAIN_SIZES = {"train": 400, "dev": 100, "test": 200}
SHIPPED = [
    (corpus, split, size)
    for corpora, sizes in ((LANGUAGES, SIZES), (DOMAINS, DOMAIN_SIZES))
    for corpus in corpora
    for split, size in sizes.items()
]


def rows(corpus, split):
    lines = (corpus_dir(corpus) / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(("corpus", "split", "size"), SHIPPED)
def test_every_split_has_its_size_languages_and_audio(corpus, split, size):
    dataset = load_split(corpus, split)
    assert len(dataset) == size
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
