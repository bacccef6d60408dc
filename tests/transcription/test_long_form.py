import numpy as np
import pytest
import torch
from torch.nn import functional

from blora_pyro.data import read_audio
from blora_pyro.models.decoding import Piece, TokenScores
from blora_pyro.transcription import long_form, windows
from blora_pyro.transcription.long_form import LongFormDecoder, text_of
from blora_pyro.transcription.windows import Recording

SECOND = 16_000


def noise(seconds: float, seed: int = 0) -> Recording:
    wave = np.random.default_rng(seed).standard_normal(round(seconds * SECOND)) * 0.1
    return Recording(f"noise{seed}", wave.astype(np.float32))


@pytest.fixture
def plain(monkeypatch):
    """Greedy at any price, as transformers' `generate` is by default."""
    monkeypatch.setattr(long_form, "DECODING_TEMPERATURES", (0.0,))
    monkeypatch.setattr(long_form, "MAX_NO_SPEECH", 2.0)


def pieces_of(windows):
    """(start, end, tokens) of every piece, in seconds of the recording."""
    return [
        (window.start + piece.start, window.start + piece.end, piece.tokens)
        for window in windows
        for piece in window.pieces
    ]


def test_long_audio_is_decoded_as_by_transformers_own_long_form(timed_base, plain, monkeypatch):
    # The features of both are cut from the same log-mels: the samples tell the place.
    frames = [700, 430, 100]
    mels = torch.randn((3, 8, 700), generator=torch.Generator().manual_seed(1))

    def featurise(waves, extractor):
        cut = []
        for name, wave in waves:
            first = round(float(wave[0]) / 160)
            part = mels[int(name), :, first : first + len(wave) // 160]
            cut.append(functional.pad(part, (0, 100 - part.shape[1])))
        return torch.stack(cut)

    monkeypatch.setattr(long_form, "featurise", featurise)
    monkeypatch.setattr(windows, "MIN_WINDOW", 0.0)
    recordings = [
        Recording(str(i), np.arange(160 * count, dtype=np.float32))
        for i, count in enumerate(frames)
    ]
    decoded = LongFormDecoder(timed_base, "de", timestamps=True, batch_size=2).decode(recordings)
    mask = torch.arange(700)[None] < torch.tensor(frames)[:, None]
    expected = timed_base.net.generate(
        mels,
        attention_mask=mask.long(),
        language="de",
        task="transcribe",
        return_timestamps=True,
        return_segments=True,
    )["segments"]
    assert len(decoded[0]) > 7 and len(decoded[1]) > 4  # more windows than seconds
    for row, segments, count in zip(decoded, expected, frames, strict=True):
        found = pieces_of(row)
        inside = [one for one in segments if float(one["start"]) < count / 100]
        assert [tokens for *_, tokens in found] == [one["tokens"].tolist() for one in inside]
        starts, ends = ([float(one[name]) for one in inside] for name in ("start", "end"))
        assert [start for start, *_ in found] == pytest.approx(starts)
        assert [end for _, end, _ in found] == pytest.approx(ends)


@pytest.mark.parametrize("language", ["de-en", None])
def test_long_audio_of_any_language_is_decoded_to_its_end(timed_base, language):
    recordings = [noise(2.2, 1), noise(0.5, 2), noise(1.2, 3)]
    decoded = LongFormDecoder(timed_base, language).decode(recordings)
    for recording, row in zip(recordings, decoded, strict=True):
        assert row[0].span[0] == 0
        assert recording.duration - 0.1 <= row[-1].span[1] / SECOND <= recording.duration
        starts = [window.span[0] for window in row]
        assert starts == sorted(set(starts))
        assert all(start < end for start, end, _ in pieces_of(row))
        assert len({window.language for window in row}) == 1
    assert [row[0].timed for row in decoded] == [True, False, True]
    names = timed_base.tokenizer.convert_ids_to_tokens(decoded[0][-1].prompt)
    codes = decoded[0][0].language.split("-")
    assert names == ["<|startoftranscript|>", *(f"<|{code}|>" for code in codes), "<|transcribe|>"]
    assert language in (None, decoded[0][0].language)


def test_the_batch_size_changes_nothing(timed_base, plain):
    recordings = [noise(2.5, 1), noise(1.4, 2), noise(0.5, 3)]
    first, second = (
        LongFormDecoder(timed_base, None, batch_size=size).decode(recordings) for size in (1, 16)
    )
    assert [pieces_of(row) for row in first] == [pieces_of(row) for row in second]


def test_audio_of_one_window_is_timed_on_request_and_if_the_model_can(timed_base, tiny_base):
    (untimed,) = LongFormDecoder(timed_base, "de").decode([noise(0.8)])[0]
    (first, *_) = LongFormDecoder(timed_base, "de", timestamps=True).decode([noise(0.8)])[0]
    assert (untimed.timed, first.timed) == (False, True)
    assert untimed.prompt == [*first.prompt, untimed.prompt[-1]]
    assert untimed.pieces[0].end == untimed.seconds
    (window,) = LongFormDecoder(tiny_base, "de", timestamps=True).decode([noise(0.8)])[0]
    assert not window.timed


def test_without_timestamps_long_audio_is_cut_at_its_pauses(fluent_base, tones_folder):
    names = ["de3", "en0", "de2"]
    tones = [read_audio({"path": str(tones_folder / f"{name}.wav")}) for name in names]
    rest = 1e-4 * np.random.default_rng(0).standard_normal(6000).astype(np.float32)
    recording = Recording("long", np.concatenate([part for one in tones for part in (one, rest)]))
    (row,) = LongFormDecoder(fluent_base, "de").decode([recording])
    assert [window.timed for window in row] == [False] * 3
    assert [window.start for window in row] == pytest.approx([0, 0.775, 1.65], abs=0.05)
    assert [window.seconds for window in row] == pytest.approx([0.62, 0.74, 0.74], abs=0.05)


def scripted(monkeypatch, texts, means, silence=0.0):
    """A decoder that says one text at each temperature, with one mean log-probability."""
    asked = []

    def decode_timed(base, encoded, prompts, temperature):
        asked.append(temperature)
        tokens = base.tokenizer.encode(texts[temperature], add_special_tokens=False)
        return [[Piece(0.0, 1.0, tokens)] for _ in prompts]

    def score_tokens(base, encoded, prompts, said):
        mean = means[asked[-1]]
        return [TokenScores(torch.zeros(len(row)), mean, silence) for row in said]

    monkeypatch.setattr(long_form, "decode_timed", decode_timed)
    monkeypatch.setattr(long_form, "score_tokens", score_tokens)
    return asked


@pytest.mark.parametrize(
    ("texts", "means", "asked", "said"),
    [
        ({0.0: " red"}, {0.0: -0.5}, [0.0], "red"),
        ({0.0: " red", 0.2: " rad"}, {0.0: -1.5, 0.2: -0.5}, [0.0, 0.2], "rad"),
        ({0.0: " red" * 50, 0.2: " rad"}, {0.0: -0.5, 0.2: -0.5}, [0.0, 0.2], "rad"),
    ],
)
def test_an_unlikely_or_repetitive_window_is_sampled_again(
    timed_base, monkeypatch, texts, means, asked, said
):
    temperatures = scripted(monkeypatch, texts, means)
    (row,) = LongFormDecoder(timed_base, "de", timestamps=True).decode([noise(0.9)])
    assert temperatures == asked
    assert text_of(timed_base, row[0].tokens) == said


def test_the_last_temperature_is_final(timed_base, monkeypatch):
    texts = dict.fromkeys(long_form.DECODING_TEMPERATURES, " red") | {1.0: " rad"}
    temperatures = scripted(monkeypatch, texts, dict.fromkeys(texts, -3.0))
    (row,) = LongFormDecoder(timed_base, "de", timestamps=True).decode([noise(0.9)])
    assert temperatures == list(long_form.DECODING_TEMPERATURES)
    assert text_of(timed_base, row[0].tokens) == "rad"


@pytest.mark.parametrize(("mean", "silence", "said"), [(-3.0, 0.9, ""), (-0.5, 0.9, "red")])
def test_an_unlikely_window_that_is_probably_silence_is_dropped(
    timed_base, monkeypatch, mean, silence, said
):
    texts = dict.fromkeys(long_form.DECODING_TEMPERATURES, " red")
    temperatures = scripted(monkeypatch, texts, dict.fromkeys(texts, mean), silence)
    (row,) = LongFormDecoder(timed_base, "de", timestamps=True).decode([noise(0.9)])
    assert temperatures == [0.0]
    assert text_of(timed_base, row[0].tokens) == said


def test_no_recordings_give_no_windows(timed_base):
    assert LongFormDecoder(timed_base).decode([]) == []
