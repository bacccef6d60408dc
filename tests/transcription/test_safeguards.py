import pytest
import torch

from blora_pyro.data import prompt_ids
from blora_pyro.models.decoding import TokenScores, encode, text_of
from blora_pyro.transcription import safeguards, transcribe_features
from blora_pyro.transcription.safeguards import Hearing, decode_safely, hearings, is_loop


def noise(count: int) -> torch.Tensor:
    return torch.randn((count, 8, 100), generator=torch.Generator().manual_seed(3)).half()


def scripted(monkeypatch, texts, means, silence=0.0):
    """A decoder that says one text at each temperature, with one mean log-probability."""
    asked = []

    def decode(base, encoded, prompts, limits, sampling, is_loop):
        asked.append(sampling.temperature if sampling else 0.0)
        tokens = base.tokenizer.encode(texts[asked[-1]], add_special_tokens=False)
        assert is_loop(tokens) == (texts[asked[-1]] == LOOP)
        return [tokens for _ in prompts]

    def score_tokens(base, encoded, prompts, said):
        return [TokenScores(torch.zeros(len(row)), means[asked[-1]], silence) for row in said]

    monkeypatch.setattr(safeguards, "decode", decode)
    monkeypatch.setattr(safeguards, "score_tokens", score_tokens)
    return asked


def said_of_noise(base):
    (text,) = transcribe_features(base, noise(1), [prompt_ids(base.tokenizer, "de")])
    return text


LOOP = " rad" * 50


@pytest.mark.parametrize(
    ("texts", "means", "asked", "said"),
    [
        ({0.0: " red"}, {0.0: -0.5}, [0.0], "red"),
        ({0.0: ""}, {0.0: -0.5}, [0.0], ""),
        ({0.0: " red", 0.2: " rad"}, {0.0: -1.5, 0.2: -0.5}, [0.0, 0.2], "rad"),
        ({0.0: LOOP, 0.2: " rad"}, {0.0: -0.5, 0.2: -0.5}, [0.0, 0.2], "rad"),
    ],
)
def test_an_unlikely_or_repetitive_text_is_drawn_again(
    tiny_base, monkeypatch, texts, means, asked, said
):
    temperatures = scripted(monkeypatch, texts, means)
    assert said_of_noise(tiny_base) == said
    assert temperatures == asked


@pytest.mark.parametrize(
    ("texts", "means", "said"),
    [
        ({0.4: " rad"}, {0.4: -1.2}, "rad"),  # the likeliest
        ({0.4: LOOP, 0.8: " das"}, {0.4: -0.2, 0.8: -2.0}, "das"),  # no loop, though likelier
        (dict.fromkeys(safeguards.TEMPERATURES, LOOP), {}, LOOP.strip()),  # one that is left
    ],
)
def test_where_no_temperature_is_accepted_the_best_text_stands(
    tiny_base, monkeypatch, texts, means, said
):
    texts = dict.fromkeys(safeguards.TEMPERATURES, " red") | texts
    temperatures = scripted(monkeypatch, texts, dict.fromkeys(texts, -3.0) | means)
    assert said_of_noise(tiny_base) == said
    assert temperatures == list(safeguards.TEMPERATURES)


@pytest.mark.parametrize(("mean", "silence", "said"), [(-3.0, 0.9, ""), (-0.5, 0.9, "red")])
def test_an_unlikely_text_of_what_is_probably_silence_is_dropped(
    tiny_base, monkeypatch, mean, silence, said
):
    texts = dict.fromkeys(safeguards.TEMPERATURES, " red")
    temperatures = scripted(monkeypatch, texts, dict.fromkeys(texts, mean), silence)
    assert said_of_noise(tiny_base) == said
    assert temperatures == [0.0]


def test_a_drawn_text_depends_on_its_sound_and_the_seed_alone(timed_base, monkeypatch):
    monkeypatch.setattr(safeguards, "TEMPERATURES", (1.0,))
    prompts = [prompt_ids(timed_base.tokenizer, "de")] * 4

    def said(rows, seed=0):
        features = noise(4)[rows]
        encoded, heard = encode(timed_base, features), hearings(timed_base, features, seed)
        return [
            text_of(timed_base, [token for one in pieces for token in one.tokens])
            for pieces in decode_safely(timed_base, encoded, prompts[: len(rows)], heard)
        ]

    monkeypatch.setattr(safeguards, "MAX_NO_SPEECH", 2.0)
    together = said([0, 1, 2, 3])
    assert said([3, 1]) == [together[3], together[1]]
    torch.manual_seed(9)
    assert said([0, 1, 2, 3]) == together != said([0, 1, 2, 3], seed=1)


def test_a_text_is_no_longer_than_its_sound_allows(tiny_base):
    features = noise(3)
    features[1, :, 10:] = features.min()
    features[2] = -1.5
    heard = hearings(tiny_base, features)
    assert [one.limit for one in heard] == [72, 36, 32]
    assert [one.is_silent for one in heard] == [False, False, True]
    prompts = [prompt_ids(tiny_base.tokenizer, "de")] * 2
    short = [Hearing(False, limit, 0) for limit in (3, 7)]
    rows = decode_safely(tiny_base, encode(tiny_base, features[:2]), prompts, short)
    assert [len(pieces[0].tokens) for pieces in rows] == [3, 7]


def test_silence_is_not_asked_about(tiny_base, monkeypatch):
    monkeypatch.setattr(safeguards, "decode", None)
    silent = torch.full((2, 8, 100), -1.5, dtype=torch.float16)
    prompts = [prompt_ids(tiny_base.tokenizer, "de")] * 2
    assert transcribe_features(tiny_base, silent, prompts) == ["", ""]


def test_a_text_that_repeats_itself_is_a_loop():
    assert is_loop("Please wait while I connect your call. " * 6)
    assert not is_loop("Please wait while I connect your call. Please wait.")
    assert not is_loop("")
