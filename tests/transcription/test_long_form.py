import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional

from blora_pyro.data import featurise, prompt_ids, read_audio
from blora_pyro.models.decoding import text_of, timestamp_begin
from blora_pyro.transcription import long_form, safeguards, transcribe_features, windows
from blora_pyro.transcription.long_form import LongFormDecoder
from blora_pyro.transcription.windows import Recording

SECOND = 16_000


def noise(seconds: float, seed: int = 0) -> Recording:
    wave = np.random.default_rng(seed).standard_normal(round(seconds * SECOND)) * 0.1
    return Recording(f"noise{seed}", wave.astype(np.float32))


@pytest.fixture
def plain(monkeypatch):
    """Greedy at any price, as transformers' `generate` is by default."""
    monkeypatch.setattr(safeguards, "TEMPERATURES", (0.0,))
    monkeypatch.setattr(safeguards, "MAX_NO_SPEECH", 2.0)
    monkeypatch.setattr(safeguards, "SILENCE", -9.0)


def decoded_by(decoder, recordings):
    """Windows of every recording."""
    rows = [[] for _ in recordings]
    for window in itertools.chain.from_iterable(decoder.decode(recordings)):
        rows[window.recording].append(window)
    return rows


def pieces_of(windows):
    """(start, end, tokens) of every piece, in seconds of the recording."""
    return [
        (window.start + piece.start, window.start + piece.end, piece.tokens)
        for window in windows
        for piece in window.pieces
    ]


def test_long_audio_is_decoded_as_by_transformers_own_long_form(timed_base, plain, monkeypatch):
    # The features of both are cut from the same log-mels: the samples tell the place.
    frames = [700, 430, 101]
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
    decoded = decoded_by(LongFormDecoder(timed_base, "de", batch_size=2), recordings)
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


@pytest.mark.usefixtures("two_temperatures")
@pytest.mark.parametrize("language", ["de-en", None])
def test_long_audio_of_any_language_is_decoded_to_its_end(timed_base, language):
    recordings = [noise(2.2, 1), noise(0.5, 2), noise(1.2, 3)]
    decoded = decoded_by(LongFormDecoder(timed_base, language), recordings)
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


@pytest.mark.usefixtures("two_temperatures")
def test_the_batch_size_changes_nothing(timed_base):
    recordings = [noise(1.6, 1), noise(1.2, 2), noise(0.5, 3)]
    first, second = (
        decoded_by(LongFormDecoder(timed_base, None, batch_size=size), recordings)
        for size in (1, 16)
    )
    assert [pieces_of(row) for row in first] == [pieces_of(row) for row in second]


def test_audio_of_one_window_is_what_evaluation_hears_with_times(timed_base, monkeypatch):
    monkeypatch.setattr(long_form, "join_texts", "".join)  # as of a script without spaces
    recording = noise(0.8)
    features = featurise([("", recording.wave)], timed_base.feature_extractor)
    prompt = prompt_ids(timed_base.tokenizer, "de")
    (text,) = transcribe_features(timed_base, features, [prompt])
    (window,) = decoded_by(LongFormDecoder(timed_base, "de"), [recording])[0]
    assert (window.timed, window.prompt) == (False, prompt)
    assert window.pieces[0].start > 0  # as the model says
    assert "".join(text_of(timed_base, one.tokens) for one in window.pieces) == text
    times = [time for one in window.pieces for time in (one.start, one.end)]
    assert times == sorted(times)
    assert max(window.tokens) < timestamp_begin(timed_base)


def test_a_model_without_timestamps_gives_one_piece(tiny_base):
    (window,) = decoded_by(LongFormDecoder(tiny_base, "de"), [noise(0.8)])[0]
    assert not window.timed
    assert len(window.pieces) == 1


def test_nothing_is_made_of_silence_and_its_language_is_not_guessed(fluent_base, tones_folder):
    sound = read_audio({"path": str(tones_folder / "de2.wav")})
    quiet = np.zeros(16_000, np.float32)
    late = Recording("late", np.concatenate([quiet, quiet, sound]))
    silent, spoken = decoded_by(LongFormDecoder(fluent_base), [Recording("no", quiet), late])
    assert [(one.language, one.pieces) for one in silent] == [("", [])]
    assert [one.language for one in spoken if one.pieces] == ["de"]
    assert [one.language for one in spoken if not one.pieces] == [""] * (len(spoken) - 1)


def test_without_timestamps_long_audio_is_cut_at_its_pauses(fluent_base, tones_folder):
    names = ["de3", "en0", "de2"]
    tones = [read_audio({"path": str(tones_folder / f"{name}.wav")}) for name in names]
    rest = 1e-4 * np.random.default_rng(0).standard_normal(6000).astype(np.float32)
    recording = Recording("long", np.concatenate([part for one in tones for part in (one, rest)]))
    (row,) = decoded_by(LongFormDecoder(fluent_base, "de"), [recording])
    assert [window.timed for window in row] == [False] * 3
    assert [window.start for window in row] == pytest.approx([0, 0.775, 1.65], abs=0.05)
    assert [window.seconds for window in row] == pytest.approx([0.62, 0.74, 0.74], abs=0.05)


def test_few_windows_are_in_memory_at_a_time(fluent_base, monkeypatch):
    monkeypatch.setattr(long_form, "BATCHES_IN_MEMORY", 2)
    rounds = LongFormDecoder(fluent_base, "de", batch_size=3).decode([noise(20.0)])
    sizes = [len(windows) for windows in rounds]
    assert max(sizes) == 6 and sum(sizes) >= 20


def test_no_recordings_give_no_windows(timed_base):
    assert list(LongFormDecoder(timed_base).decode([])) == []
