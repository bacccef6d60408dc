"""The grammars of the pocket corpora."""

import importlib
import json
import random
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from blora_pyro.data import load_split
from blora_pyro.metrics import words

RECIPE = Path(__file__).parents[2] / "recipes" / "pocket"
LANGUAGES = ("en", "de", "es", "fr", "tr", "zh")
DOMAINS = (("de", "en"), ("es", "en"), ("zh", "en"))


@pytest.fixture(scope="module")
def sentences():
    sys.path.insert(0, str(RECIPE))
    yield importlib.import_module("sentences")
    sys.path.remove(str(RECIPE))


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_grammar_has_250_words_and_no_dangling_symbol(sentences, language):
    grammar = sentences.Grammar.load(language)
    rng = random.Random(0)
    drawn = [grammar.sentence(rng) for _ in range(5000)]
    assert len({word for sentence in drawn for word, _ in sentence}) >= 250
    assert all(3 <= len(sentence) <= 8 for sentence in drawn)
    assert not any("{" in sentences.render(sentence) for sentence in drawn)


@pytest.mark.parametrize(("matrix", "embedded"), DOMAINS)
def test_code_switched_sentences_hold_both_languages_and_name_each_words(
    sentences, matrix, embedded
):
    grammars = sentences.Grammar.load(matrix), sentences.Grammar.load(embedded)
    rng = random.Random(0)
    for _ in range(300):
        sentence = grammars[0].code_switched(grammars[1], rng)
        tags = sentences.word_languages(sentence)
        assert set(tags) == {matrix, embedded}
        assert len(tags) == len(words(sentences.render(sentence)))
        spoken = sentences.runs(sentence)
        assert "".join(text for text, _ in spoken).replace(" ", "") == (
            sentences.render(sentence).replace(" ", "")
        )
        languages = [language for _, language in spoken]
        assert all(a != b for a, b in pairwise(languages))


# ---- ship


@pytest.fixture(scope="module")
def ship():
    sys.path.insert(0, str(RECIPE))
    yield importlib.import_module("ship")
    sys.path.remove(str(RECIPE))


def test_a_packed_split_has_the_bytes_and_rows_of_its_manifest(ship, tmp_path):
    corpus = tmp_path / "de-en"
    (corpus / "test").mkdir(parents=True)
    rows = [{"audio": f"test/{n}.ogg", "text": f"x {n}", "voice": {"pitch": n}} for n in range(3)]
    for row in rows:
        (corpus / row["audio"]).write_bytes(row["text"].encode())
    lines = [json.dumps(row) for row in rows]
    (corpus / "test.jsonl").write_text("\n".join(lines), encoding="utf-8")
    packed = [ship.pack(corpus / "test.jsonl", 2) for _ in range(2)]
    for number, one in enumerate(packed):
        one.to_parquet(tmp_path / f"{number}.parquet")
    assert (tmp_path / "0.parquet").read_bytes() == (tmp_path / "1.parquet").read_bytes()
    dataset = load_split(tmp_path / "0.parquet", "test")
    assert dataset["text"][:] == ["x 0", "x 1"]
    assert dataset[1]["audio"] == {"bytes": b"x 1", "path": "de-en/test/1.ogg"}
