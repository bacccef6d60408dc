import pytest
import torch

from blora_pyro.models.logits import EndLoops, Limit, Sample, Sampling, Spell, repeats

PROMPT, BEGIN, END = 2, 10, 9


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_most_probable_token_is_a_draw_at_the_temperature(temperature):
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    sample = Sample(Sampling(temperature, range(2000)))
    drawn = sample(torch.zeros(2000, 1), logits.expand(2000, -1)).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / 2000
    assert (shares - (logits / temperature).softmax(-1)).abs().max() < 0.05


def test_a_row_draws_by_its_own_seed():
    logits, ids = torch.zeros(3, 50), torch.zeros(3, 1)
    first = Sample(Sampling(1.0, [5, 6, 7]))(ids, logits)
    assert torch.equal(Sample(Sampling(1.0, [7]))(ids[:1], logits[:1]), first[2:])


def test_a_row_that_has_all_its_tokens_ends():
    limit = Limit(PROMPT, [1, 3], END)
    found = limit(torch.zeros(2, PROMPT + 1), torch.ones(2, 12))
    assert found[0].isfinite().nonzero().flatten().tolist() == [END]
    assert torch.equal(found[1], torch.ones(12))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3] + [7] * 24, True),
        ([7] * 23, False),  # short as it is
        ([1] + [4, 5, 6] * 8, True),
        ([4, 5, 6] * 8 + [4, 5], True),  # in the middle of a turn
        ([4, 5, 6] * 8 + [1], False),  # it has ended by itself
        ([*range(10)] * 3, False),  # three turns
        ([*range(10)] * 4, True),
        ([], False),
    ],
)
def test_four_turns_of_the_same_tokens_are_a_loop(tokens, expected):
    assert repeats(tokens) is expected


@pytest.mark.parametrize("is_loop", [True, False])
def test_a_row_that_repeats_itself_ends_if_its_text_is_a_loop(is_loop):
    rows = [[7] * 24, [*range(8)] * 2 + [END] * 8, [*range(8)] * 3]
    asked = []
    end = EndLoops(PROMPT, lambda tokens: asked.append(tokens) or is_loop, END)
    scores = torch.ones(3, 12)
    found = end(torch.tensor([[0] * PROMPT + row for row in rows]), scores)
    assert asked == rows[:1]
    assert torch.equal(found[1:], scores[1:]) and torch.equal(scores, torch.ones(3, 12))
    ends = found[0].isfinite().nonzero().flatten().tolist()
    assert ends == ([END] if is_loop else [*range(12)])


@pytest.mark.parametrize(
    ("said", "allowed"),
    [
        ([], [3, 10, 11, 12]),  # the first token, or a timestamp up to the last
        ([3], [4]),  # here there may be no break
        ([11, 3, 4], [5, 10, 11, 12]),
        ([11, 3, 4, 12, 5], [END, 10, 11, 12]),
    ],
)
def test_the_next_token_is_the_given_one_or_a_timestamp_where_there_may_be_a_break(said, allowed):
    spell = Spell(PROMPT, [[3, 4, 5]], [[2]], BEGIN, [12], END)
    ids = torch.tensor([[0] * PROMPT + said])
    found = spell(ids, torch.ones(1, 15))
    assert sorted(found[0].isfinite().nonzero().flatten().tolist()) == sorted(allowed)


def test_a_given_token_that_is_suppressed_comes_after_every_timestamp():
    spell = Spell(PROMPT, [[3]], [[]], BEGIN, [12], END)
    scores = torch.full((1, 15), -float("inf"))
    assert spell(torch.zeros(1, PROMPT, dtype=torch.long), scores).argmax() == 3
    scores[0, 11] = -50.0
    assert spell(torch.zeros(1, PROMPT, dtype=torch.long), scores).argmax() == 11
