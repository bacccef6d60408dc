import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blora_pyro.metrics import words
from blora_pyro.models import load_base
from blora_pyro.transcription.words import (
    Speller,
    Spelling,
    Tally,
    _path,
    _sharpened,
    time_words,
    word_key,
)

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


# ---- times


def cheapest(gain):
    """The greatest sum of a path from corner to corner, by the definition."""
    best = torch.full(gain.shape, -math.inf, dtype=torch.float64)
    for token, frame in itertools.product(*map(range, gain.shape)):
        steps = [(token - 1, frame - 1), (token - 1, frame), (token, frame - 1)]
        before = [float(best[one]) for one in steps if min(one) >= 0]
        best[token, frame] = float(gain[token, frame]) + max(before, default=0.0)
    return float(best[-1, -1])


def sum_of(gain, begins):
    """The greatest sum of a path that enters the rows at these frames."""
    total = float(gain[-1, begins[-1] :].double().sum())
    for row, first, then in zip(gain.double(), begins, begins[1:], strict=False):
        # It leaves the row at the next one's first frame, or at the one before that.
        lasts = [last for last in (then - 1, then) if last >= first]
        total += max(float(row[first : last + 1].sum()) for last in lasts)
    return total


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 1), (3, 7), (6, 4)])
def test_the_path_is_the_one_of_the_greatest_sum(shape):
    for seed in range(20):
        gain = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        begins = _path(gain)
        assert begins[0] == 0 and begins == sorted(begins)
        assert len(begins) == shape[0] and begins[-1] < shape[1]
        assert sum_of(gain, begins) == pytest.approx(cheapest(gain), abs=1e-5)


def test_the_path_follows_what_stands_out():
    weights = torch.full((2, 4, 20), 0.01)  # heads, tokens, frames
    for token, (first, end) in enumerate([(0, 3), (3, 9), (9, 16), (16, 20)]):
        weights[:, token, first:end] = 1.0
    assert _path(_sharpened(weights)) == [0, 3, 9, 16]
    assert _path(_sharpened(weights[..., :2])) == [0, 1, 1, 1]  # too short to be smoothed


def test_words_begin_and_end_with_what_is_no_punctuation_in_them():
    found = time_words(
        [Spelling("«So,", [0, 1, 2]), Spelling("we", [3, 4])],
        marks=[True, False, True, False, False],
        begins=[0.0, 0.2, 0.5, 0.9, 1.0, 1.3],
        probabilities=[0.1, 0.3, 0.9, 0.8, 0.6],
    )
    assert [(one.text, one.start, one.end) for one in found] == [
        ("«So,", 0.2, 0.5),
        ("we", 0.9, 1.3),
    ]
    assert [one.probability for one in found] == pytest.approx([0.3, 0.7])


def test_a_word_after_a_pause_lasts_twice_a_typical_one_at_most():
    texts = ["First", "words", "end.", "Then", "more"]
    begins = [0.0, 3.0, 3.2, 3.4, 6.0, 6.3]  # of each, and the end of the last
    found = time_words(
        [Spelling(text, [place]) for place, text in enumerate(texts)],
        [False] * 5,
        begins,
        [1.0] * 5,
    )
    spans = [(one.start, one.end) for one in found]  # a typical one lasts 0.3
    assert spans[0] == pytest.approx((2.4, 3.0)) and spans[3] == pytest.approx((5.4, 6.0))
    assert [spans[place] for place in (1, 2, 4)] == [(3.0, 3.2), (3.2, 3.4), (6.0, 6.3)]
    one = time_words([Spelling("«", [0])], [True], [0.0, 0.0], [])
    assert (one[0].start, one[0].end, one[0].probability) == (0.0, 0.0, 0.0)


def test_marks_are_tokens_of_punctuation_alone(timed_tokenizer):
    tokenizer = copy.deepcopy(timed_tokenizer)
    tokenizer.add_tokens([".", "»,", "a."])
    ids = tokenizer.convert_tokens_to_ids([".", "»,", "a.", "r", "Ġ", "<|de|>"])
    marks = [Speller(tokenizer).is_mark(token) for token in ids]
    assert marks == [True, True, False, False, False, False]
