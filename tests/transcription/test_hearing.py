import numpy as np
import pytest
import torch
from torch.nn import functional

from blora_pyro.data import read_audio
from blora_pyro.models.decoding import Piece, Scores
from blora_pyro.transcription import hearing, windows
from blora_pyro.transcription.hearing import Hearing, text_of
from blora_pyro.transcription.windows import Recording

SECOND = 16_000


def noise(seconds: float, seed: int = 0) -> Recording:
    wave = np.random.default_rng(seed).standard_normal(round(seconds * SECOND)) * 0.1
    return Recording(f"noise{seed}", wave.astype(np.float32))


@pytest.fixture
def plain(monkeypatch):
    """Greedy at any price, as transformers' `generate` is by default."""
    monkeypatch.setattr(hearing, "TEMPERATURES", (0.0,))
    monkeypatch.setattr(hearing, "SILENT", 2.0)


def pieces_of(windows):
    """(start, end, tokens) of every piece, in seconds of the recording."""
    return [
        (window.start + piece.start, window.start + piece.end, piece.tokens)
        for window in windows
        for piece in window.pieces
    ]


def test_long_audio_is_said_as_by_transformers_own_long_form(timed_base, plain, monkeypatch):
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

    monkeypatch.setattr(hearing, "featurise", featurise)
    monkeypatch.setattr(windows, "LEAST", 0.0)
    recordings = [
        Recording(str(i), np.arange(160 * count, dtype=np.float32))
        for i, count in enumerate(frames)
    ]
    heard = Hearing(timed_base, "de", timestamps=True, batch_size=2).hear(recordings)
    mask = torch.arange(700)[None] < torch.tensor(frames)[:, None]
    expected = timed_base.net.generate(
        mels,
        attention_mask=mask.long(),
        language="de",
        task="transcribe",
        return_timestamps=True,
        return_segments=True,
    )["segments"]
    assert len(heard[0]) > 7 and len(heard[1]) > 4  # more windows than seconds
    for row, segments, count in zip(heard, expected, frames, strict=True):
        found = pieces_of(row)
        inside = [one for one in segments if float(one["start"]) < count / 100]
        assert [tokens for *_, tokens in found] == [one["tokens"].tolist() for one in inside]
        starts, ends = ([float(one[name]) for one in inside] for name in ("start", "end"))
        assert [start for start, *_ in found] == pytest.approx(starts)
        assert [end for _, end, _ in found] == pytest.approx(ends)


@pytest.mark.parametrize("language", ["de", "de-en", None])
def test_long_audio_of_any_language_is_heard_to_its_end(timed_base, language):
    recordings = [noise(3.3, 1), noise(0.5, 2), noise(2.0, 3)]
    heard = Hearing(timed_base, language).hear(recordings)
    for recording, row in zip(recordings, heard, strict=True):
        assert row[0].span[0] == 0
        assert recording.duration - 0.1 <= row[-1].span[1] / SECOND <= recording.duration
        starts = [window.span[0] for window in row]
        assert starts == sorted(set(starts))
        assert all(start < end for start, end, _ in pieces_of(row))
        assert len({window.language for window in row}) == 1
    assert [row[0].timed for row in heard] == [True, False, True]
    names = timed_base.tokenizer.convert_ids_to_tokens(heard[0][-1].prompt)
    codes = heard[0][0].language.split("-")
    assert names == ["<|startoftranscript|>", *(f"<|{code}|>" for code in codes), "<|transcribe|>"]
    assert language in (None, heard[0][0].language)


def test_the_batch_size_changes_nothing(timed_base, plain):
    recordings = [noise(2.5, 1), noise(1.4, 2), noise(0.5, 3)]
    first, second = (
        Hearing(timed_base, None, batch_size=size).hear(recordings) for size in (1, 16)
    )
    assert [pieces_of(row) for row in first] == [pieces_of(row) for row in second]


def test_audio_of_one_window_is_timed_on_request_and_if_the_model_can(timed_base, tiny_base):
    (untimed,) = Hearing(timed_base, "de").hear([noise(0.8)])[0]
    (first, *_) = Hearing(timed_base, "de", timestamps=True).hear([noise(0.8)])[0]
    assert (untimed.timed, first.timed) == (False, True)
    assert untimed.prompt == [*first.prompt, untimed.prompt[-1]]
    assert untimed.pieces[0].end == untimed.seconds
    (window,) = Hearing(tiny_base, "de", timestamps=True).hear([noise(0.8)])[0]
    assert not window.timed


def test_without_timestamps_long_audio_is_cut_at_its_pauses(fluent_base, tones_folder):
    names = ["de3", "en0", "de2"]
    tones = [read_audio({"path": str(tones_folder / f"{name}.wav")}) for name in names]
    rest = 1e-4 * np.random.default_rng(0).standard_normal(6000).astype(np.float32)
    recording = Recording("long", np.concatenate([part for one in tones for part in (one, rest)]))
    (row,) = Hearing(fluent_base, "de").hear([recording])
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
        return [Scores(torch.zeros(len(row)), mean, silence) for row in said]

    monkeypatch.setattr(hearing, "decode_timed", decode_timed)
    monkeypatch.setattr(hearing, "score_tokens", score_tokens)
    return asked


@pytest.mark.parametrize(
    ("texts", "means", "asked", "said"),
    [
        ({0.0: " red"}, {0.0: -0.5}, [0.0], "red"),
        ({0.0: " red", 0.2: " rad"}, {0.0: -1.5, 0.2: -0.5}, [0.0, 0.2], "rad"),
        ({0.0: " red" * 50, 0.2: " rad"}, {0.0: -0.5, 0.2: -0.5}, [0.0, 0.2], "rad"),
    ],
)
def test_a_window_that_went_astray_is_drawn_anew(
    timed_base, monkeypatch, texts, means, asked, said
):
    temperatures = scripted(monkeypatch, texts, means)
    (row,) = Hearing(timed_base, "de", timestamps=True).hear([noise(0.9)])
    assert temperatures == asked
    assert text_of(timed_base, row[0].tokens) == said


def test_the_last_temperature_is_final(timed_base, monkeypatch):
    texts = dict.fromkeys(hearing.TEMPERATURES, " red") | {1.0: " rad"}
    temperatures = scripted(monkeypatch, texts, dict.fromkeys(texts, -3.0))
    (row,) = Hearing(timed_base, "de", timestamps=True).hear([noise(0.9)])
    assert temperatures == list(hearing.TEMPERATURES)
    assert text_of(timed_base, row[0].tokens) == "rad"


@pytest.mark.parametrize(("mean", "silence", "said"), [(-3.0, 0.9, ""), (-0.5, 0.9, "red")])
def test_what_is_unlikely_and_rather_silence_is_dropped(
    timed_base, monkeypatch, mean, silence, said
):
    texts = dict.fromkeys(hearing.TEMPERATURES, " red")
    temperatures = scripted(monkeypatch, texts, dict.fromkeys(texts, mean), silence)
    (row,) = Hearing(timed_base, "de", timestamps=True).hear([noise(0.9)])
    assert temperatures == [0.0]
    assert text_of(timed_base, row[0].tokens) == said


def test_nothing_is_heard_of_nothing(timed_base):
    assert Hearing(timed_base).hear([]) == []
