import itertools
import math
from dataclasses import replace

import pytest
import torch

from blora_pyro.data import featurise, prompt_ids, read_audio
from blora_pyro.models.decoding import (
    alike_in_length,
    decode,
    decode_timed,
    detect_languages,
    encode,
    score_tokens,
    time_pieces,
    timestamp_begin,
)
from blora_pyro.models.logits import allow, allowing

FILES = ("en1", "de3", "en0", "de2")


@pytest.fixture
def features(fluent_base, tones_folder) -> torch.Tensor:
    waves = ((name, read_audio({"path": str(tones_folder / f"{name}.wav")})) for name in FILES)
    return featurise(waves, fluent_base.feature_extractor)


def noise(count: int) -> torch.Tensor:
    return torch.randn((count, 8, 100), generator=torch.Generator().manual_seed(3))


def ids(base, *names) -> list[int]:
    return base.tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in names])


def test_every_row_follows_its_own_prompt(fluent_base, features):
    prompts = [prompt_ids(fluent_base.tokenizer, code) for code in ("en", "de", "de", "en")]
    encoded = encode(fluent_base, features)
    together = decode(fluent_base, encoded, prompts)
    alone = [decode(fluent_base, encoded[i : i + 1], [p])[0] for i, p in enumerate(prompts)]
    assert together == alone
    assert together[0] != decode(fluent_base, encoded[:1], prompts[1:2])[0]
    assert all(fluent_base.net.config.eos_token_id not in row for row in together)


def test_a_half_encoder_computes_in_bfloat16_and_gives_what_the_net_computes_in(
    fluent_base, features
):
    exact = encode(fluent_base, features)
    half = encode(replace(fluent_base, half_encoder=True), features)
    assert half.dtype == exact.dtype == torch.float32
    distance = float((half - exact).norm() / exact.norm())
    assert 1e-4 < distance < 5e-2  # bfloat16 has 8 bits


def test_suppressed_tokens_are_said_where_they_are_allowed(fluent_base, features):
    net, prompts = fluent_base.net, [prompt_ids(fluent_base.tokenizer, "de")]
    encoded = encode(fluent_base, features[3:])  # "das rote"
    (said,) = decode(fluent_base, encoded, prompts)
    net.generation_config.suppress_tokens = [said[-1], 0]
    net.generation_config.begin_suppress_tokens = [said[0]]
    (unlike,) = decode(fluent_base, encoded, prompts)
    assert said[-1] not in unlike and unlike[:1] != said[:1]
    with allowing(net, said):
        assert net.generation_config.suppress_tokens == [0]
        assert decode(fluent_base, encoded, prompts) == [said]
    assert decode(fluent_base, encoded, prompts) == [unlike]
    allow(net, said)
    assert decode(fluent_base, encoded, prompts) == [said]


def test_languages_are_detected(fluent_base, features):
    codes = detect_languages(fluent_base, encode(fluent_base, features))
    assert codes == [name[:2] for name in FILES]


def test_languages_of_any_net_are_codes_that_it_knows(tiny_base):
    codes = detect_languages(tiny_base, encode(tiny_base, noise(6)))
    assert len(codes) == 6
    assert set(codes) <= {"de", "en"}


def test_a_model_has_timestamps_if_it_has_one_for_every_place_in_its_window(timed_base, tiny_base):
    assert timestamp_begin(timed_base) == ids(timed_base, "0.00")[0]
    assert timestamp_begin(tiny_base) is None
    timed_base.net.config.vocab_size -= 1
    assert timestamp_begin(timed_base) is None
    del tiny_base.net.generation_config.no_timestamps_token_id
    assert timestamp_begin(tiny_base) is None


@torch.inference_mode()
def test_timestamps_said_unasked_neither_cut_nor_repeat_a_window(timed_base):
    prompt = ids(timed_base, "startoftranscript", "de", "transcribe", "notimestamps")
    encoded = encode(timed_base, noise(4))
    said = decode(timed_base, encoded, [prompt] * 4)
    assert any(token >= timestamp_begin(timed_base) for row in said for token in row)
    for states, row in zip(encoded, said, strict=True):
        tokens = torch.tensor([[*prompt, *row]])
        logits = timed_base.net(encoder_outputs=(states[None],), decoder_input_ids=tokens).logits
        assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == row


def test_timed_pieces_are_those_of_transformers(timed_base):
    features = noise(4)
    prompt = ids(timed_base, "startoftranscript", "de", "transcribe")
    said = decode_timed(timed_base, encode(timed_base, features), [prompt] * 4)
    expected = timed_base.net.generate(
        features,
        language="de",
        task="transcribe",
        return_timestamps=True,
        return_segments=True,
        force_unique_generate_call=True,
    )["segments"]
    assert sum(map(len, said)) > 4
    for pieces, segments in zip(said, expected, strict=True):
        assert [piece.tokens for piece in pieces] == [one["tokens"].tolist() for one in segments]
        assert [piece.start for piece in pieces] == [float(one["start"]) for one in segments]
        assert [piece.end for piece in pieces] == [float(one["end"]) for one in segments]


def test_audio_is_encoded_as_long_as_it_is(tiny_base):
    assert encode(tiny_base, noise(2)).shape[1] == 50
    assert encode(tiny_base, noise(2)[..., :60]).shape[1] == 30


def test_of_shorter_audio_is_said_what_a_model_of_that_window_would_say(tiny_base, timed_base):
    features = noise(4)[..., :60]
    plain = [prompt_ids(tiny_base.tokenizer, "de")] * 4
    timed = [ids(timed_base, "startoftranscript", "de", "transcribe")] * 4

    def said():
        heard, other = encode(tiny_base, features), encode(timed_base, features)
        pieces = decode_timed(timed_base, other, timed)
        return decode(tiny_base, heard, plain), detect_languages(tiny_base, heard), pieces

    before = said()
    assert sum(map(len, before[2])) > 4
    tiny_base.net.config.max_source_positions = timed_base.net.config.max_source_positions = 30
    assert said() == before


def test_a_prompt_of_two_languages_is_given_as_it_is(timed_base):
    encoded = encode(timed_base, noise(1))
    mixed = ids(timed_base, "startoftranscript", "de", "en", "transcribe")
    (pieces,) = decode_timed(timed_base, encoded, [mixed])
    # The first token is a timestamp of the first two; the most probable after this very prompt.
    with torch.no_grad():
        logits = timed_base.net(
            encoder_outputs=(encoded,), decoder_input_ids=torch.tensor([mixed])
        ).logits[0, -1]
    begin = timestamp_begin(timed_base)
    assert pieces[0].tokens[0] == begin + int(logits[begin:].argmax())


def test_given_tokens_are_timed_as_they_are(timed_base):
    encoded = encode(timed_base, noise(3))
    prompts = [ids(timed_base, "startoftranscript", "de", "transcribe")] * 3
    said = [[5, 7, 9, 30, 8, 4, 6], [8], list(range(4, 24))]  # the last fills the decoder
    breaks = [[2, 5], [], range(1, 20)]
    ends = [1.0, 0.4, 0.7]
    pieces = time_pieces(timed_base, encoded, prompts, said, breaks, ends)
    for row, tokens, places, end in zip(pieces, said, breaks, ends, strict=True):
        assert [token for one in row for token in one.tokens] == tokens
        cuts = [*itertools.accumulate(len(one.tokens) for one in row)][:-1]
        assert set(cuts) <= set(places)
        times = [time for one in row for time in (one.start, one.end)]
        assert times == sorted(times) and times[-1] <= end
        assert all(one.start < one.end for one in row)
    assert any(len(row) > 1 for row in pieces)


def test_thresholds_of_a_checkpoint_do_not_interfere(timed_base):
    encoded = encode(timed_base, noise(2))
    prompts = [ids(timed_base, "startoftranscript", "de", "transcribe")] * 2
    expected = decode_timed(timed_base, encoded, prompts)
    config = timed_base.net.generation_config
    config.logprob_threshold, config.no_speech_threshold = -0.01, 1e-6
    assert decode_timed(timed_base, encoded, prompts) == expected
    assert (config.logprob_threshold, config.no_speech_threshold) == (-0.01, 1e-6)


def test_scores_are_those_of_one_token_at_a_time(timed_base):
    net, encoded = timed_base.net, encode(timed_base, noise(2))
    prompt = ids(timed_base, "startoftranscript", "de", "transcribe")
    said = [[5, 7, 9, 300], [8]]
    scores = score_tokens(timed_base, encoded, [prompt] * 2, said)
    for row, (tokens, one) in enumerate(zip(said, scores, strict=True)):
        expected = []
        for place, token in enumerate([*tokens, net.config.eos_token_id]):
            with torch.no_grad():
                logits = net(
                    encoder_outputs=(encoded[row : row + 1],),
                    decoder_input_ids=torch.tensor([[*prompt, *tokens[:place]]]),
                ).logits[0]
            expected.append(logits[-1].log_softmax(-1)[token].item())
        assert one.log_probs.tolist() == pytest.approx(expected[:-1], abs=1e-4)
        assert one.mean == pytest.approx(sum(expected) / len(expected), abs=1e-4)
        silence = logits[0].softmax(-1)[ids(timed_base, "nospeech")[0]].item()
        assert one.no_speech == pytest.approx(silence, abs=1e-5)


def test_scores_of_a_transcript_that_fills_the_decoder(tiny_base):
    prompt = prompt_ids(tiny_base.tokenizer, "de")
    most = tiny_base.net.config.max_target_positions - len(prompt)
    (one,) = score_tokens(tiny_base, encode(tiny_base, noise(1)), [prompt], [[5] * most])
    assert len(one.log_probs) == most
    assert math.isfinite(one.mean)
    assert one.no_speech == 0  # without such a token


def test_prompts_are_taken_together_that_are_alike_in_length():
    prompts = [[1, 2], [1], [3, 4], [5, 6], [7]]
    assert [*alike_in_length(prompts, 2)] == [[0, 2], [3], [1, 4]]
