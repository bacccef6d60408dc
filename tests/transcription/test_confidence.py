import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blora_pyro.metrics import words
from blora_pyro.models import load_base
from blora_pyro.transcription.confidence import Speller, Spelling, Tally, word_key

quick = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def tokenizer():
    return load_base("pocket").tokenizer


def spelled(text):
    return [Spelling(word, [place]) for place, word in enumerate(text.split())]


def agreement(mean, *draws):
    tally = Tally(spelled(mean))
    for draw in draws:
        tally.add(torch.zeros(len(mean.split())), spelled(draw))
    return [word.agreement for word in tally.words()]


# ---- spelling


def test_words_and_their_tokens(tokenizer):
    ids = tokenizer.encode(" das red我们", add_special_tokens=False)
    names = tokenizer.convert_ids_to_tokens(ids)
    found = Speller(tokenizer).spell(ids, offset=10)
    assert [one.text for one in found] == ["das", "red", "我", "们"]
    assert [one.tokens for one in found][:1] == [[10]] and names[0] == "Ġdas"
    places = [place for one in found for place in one.tokens]
    assert sorted(places) == list(range(10, 10 + len(ids)))


def test_a_token_of_two_characters_counts_for_both(timed_tokenizer):
    tokenizer = copy.deepcopy(timed_tokenizer)
    tokenizer.add_tokens(["我们"])
    ids = tokenizer.convert_tokens_to_ids(["我们", "Ġ", "r"])
    found = Speller(tokenizer).spell(ids)
    assert found == [Spelling("我", [0]), Spelling("们", [0]), Spelling("r", [1, 2])]


def test_special_tokens_and_timestamps_spell_nothing(timed_tokenizer):
    names = ["<|0.00|>", "Ġ", "r", "<|de|>", "e", "<|0.50|>", "<|endoftext|>"]
    ids = timed_tokenizer.convert_tokens_to_ids(names)
    assert Speller(timed_tokenizer).spell(ids) == [Spelling("re", [1, 2, 4])]
    assert Speller(timed_tokenizer).spell([]) == []


def test_half_a_character_is_a_word_all_the_same(tokenizer):
    ids = tokenizer.encode(" red 喜", add_special_tokens=False)
    found = Speller(tokenizer).spell(ids[:-1])
    assert found[-1].text == "\ufffd"
    assert found[-1].tokens[-1] == len(ids) - 2


@quick
@given(st.text(alphabet="aé ß我们.,'-😀\u0301", max_size=12))
def test_every_text_is_spelled_as_its_words_with_all_its_tokens(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = Speller(tokenizer).spell(ids)
    assert [one.text for one in found] == words(tokenizer.decode(ids))
    assert all(one.tokens for one in found)
    used = {place for one in found for place in one.tokens}
    left = [token for place, token in enumerate(ids) if place not in used]
    assert tokenizer.decode(left).strip() == ""


# ---- agreement


@pytest.mark.parametrize(
    ("mean", "draws", "expected"),
    [
        ("das red rad", ["das red rad"], [1, 1, 1]),
        ("das red rad", ["das rad", "das red rad", "red", "ein bad"], [0.5, 0.5, 0.5]),
        ("das red rad", ["und das rote red rad"], [1, 1, 1]),
        ("das rad das", ["das rad"], [1, 1, 0]),
        ("das rad", [""], [0, 0]),
        ("Das Rad!", ["das rad"], [1, 1]),
        ("e-mail – ja", ["email - ja"], [1, 0, 1]),
        ("", ["das"], []),
    ],
)
def test_agreement_is_the_share_of_draws_with_the_word_at_its_place(mean, draws, expected):
    assert agreement(mean, *draws) == expected


@pytest.mark.parametrize(
    ("word", "key"), [("Rad,", "rad"), ("E-Mail", "email"), ("–", "–"), ("don't", "dont")]
)
def test_words_are_compared_without_case_and_punctuation(word, key):
    assert word_key(word) == key


# ---- figures


def test_figures_are_means_over_the_draws():
    tally = Tally([Spelling("das", [0, 1]), Spelling("rad", [3])])
    tally.add(torch.tensor([-0.1, -0.2, -9.0, -0.5]), spelled("das rad"))
    tally.add(torch.tensor([-0.3, -0.4, -9.0, -1.5]), spelled("das rat"))
    das, rad = tally.words()
    assert (das.agreement, rad.agreement) == (1, 0.5)
    assert (das.log_prob, rad.log_prob) == pytest.approx((-0.5, -1.0), abs=1e-6)
    assert rad.confidence == pytest.approx((0.5 + math.exp(-1)) / 2)
    assert das.to_json() == {
        "text": "das",
        "agreement": 1.0,
        "log_prob": -0.5,
        "confidence": round((1 + math.exp(-0.5)) / 2, 4),
    }
