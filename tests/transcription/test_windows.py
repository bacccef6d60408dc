from itertools import pairwise

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blora_pyro.data import read_audio, stream_audio
from blora_pyro.errors import UserError
from blora_pyro.models.decoding import Piece
from blora_pyro.transcription.windows import (
    Recording,
    StreamedWave,
    Window,
    batched,
    cut_at_pauses,
)

SECOND = 16_000
BEGIN = 100  # the first timestamp


def window(span, *pieces, timed=True) -> Window:
    return Window(0, span, torch.zeros(1, 1), timed, pieces=list(pieces))


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([], 3.0),  # silence
        ([Piece(0.0, 2.0, [5, 6])], 3.0),  # no timestamps
        ([Piece(0.1, 0.7, [105, 6, 135])], 3.0),  # one at the end: no speech after it
        ([Piece(0.1, 0.7, [105, 6, 135, 135])], 2.7),  # two: another segment begins
        ([Piece(0.1, 0.7, [105, 6, 135]), Piece(0.7, 0.9, [135, 6, 145, 146])], 2.9),
        ([Piece(0.0, 0.02, [100, 6, 101, 101])], 3.0),  # hardly any progress
        ([Piece(0.1, 1.2, [105, 6, 160, 160])], 3.0),  # after the audio's end
    ],
)
def test_the_next_window_begins_after_the_last_complete_segment(pieces, expected):
    heard = window((2 * SECOND, 3 * SECOND), *pieces)
    assert heard.next_sample(BEGIN) / SECOND == pytest.approx(expected)


@pytest.mark.parametrize(
    ("sounds_at", "pieces", "expected"),
    [
        (2.5, (), 2.25),  # a little earlier
        (2.5, (Piece(0.1, 2.9, [105, 6, 135]),), 3.0),
        (0.5, (), 3.0),  # hardly any silence
        (None, (), 3.0),
    ],
)
def test_a_window_without_a_text_is_heard_again_from_its_first_sound(sounds_at, pieces, expected):
    heard = window((0, 3 * SECOND), *pieces)
    heard.features = torch.full((2, 300), -1.0)
    if sounds_at is not None:
        heard.features[1, int(100 * sounds_at) :] = 0.5
    assert heard.next_sample(BEGIN) / SECOND == pytest.approx(expected)


def test_spans_fit_the_window_and_leave_a_tiny_rest_out():
    recording = Recording("x", np.zeros(int(2.5 * SECOND), np.float32))
    assert recording.duration == 2.5
    assert recording.fixed_spans(3) == [(0, 40_000)]
    assert recording.span_from(0, 1) == [(0, SECOND)]
    assert recording.span_from(2 * SECOND, 1) == [(2 * SECOND, 40_000)]
    assert recording.span_from(39_000, 1) == []  # too little to say anything
    assert Recording("x", np.zeros(100, np.float32)).span_from(0, 1) == [(0, 100)]


def test_batches_hold_windows_of_a_kind_and_of_like_length():
    lengths = [(3, True), (1, False), (2, True), (1, True), (5, False)]
    windows = [window((0, seconds * SECOND), timed=timed) for seconds, timed in lengths]
    seen = [
        [(one.seconds, one.timed) for one in batch]
        for batch, features in batched(windows, 2, lambda one: one.seconds)
        if features.shape == (len(batch), 1, 1)
    ]
    assert seen == [[(1, False), (5, False)], [(1, True), (2, True)], [(3, True)]]


RATE = 16_000


def speech(seconds: float, level: float = 0.3) -> np.ndarray:
    wave = level * np.sin(2 * np.pi * 200 * np.arange(round(seconds * RATE)) / RATE)
    return wave.astype(np.float32)


def quiet(seconds: float) -> np.ndarray:
    return np.full(round(seconds * RATE), 1e-4, np.float32)


def seconds_of(wave, window=3.0):
    return [(first / RATE, end / RATE) for first, end in cut_at_pauses(wave, window)]


def test_speech_between_pauses_is_a_span_with_a_margin():
    wave = np.concatenate([quiet(1), speech(1), quiet(0.5), speech(2), quiet(1)])
    (a, b), (c, d) = seconds_of(wave)
    assert (a, b, c, d) == pytest.approx((0.9, 2.1, 2.4, 4.6), abs=0.03)


def test_a_gap_inside_a_word_is_no_pause():
    wave = np.concatenate([quiet(0.5), speech(0.8), quiet(0.1), speech(0.8), quiet(0.5)])
    assert len(seconds_of(wave)) == 1


def test_speech_longer_than_the_window_is_cut_where_it_is_quietest():
    wave = np.concatenate([quiet(0.5), speech(2.5), speech(0.1, 0.1), speech(2.0), quiet(0.5)])
    (_, cut), (again, _) = seconds_of(wave)
    assert cut == again
    assert 3.0 <= cut <= 3.1


def test_audio_of_one_level_is_cut_all_the_same():
    assert [round(end - first, 1) for first, end in seconds_of(speech(10.0))]
    assert seconds_of(speech(10.0))[-1][1] == 10.0
    assert seconds_of(np.zeros(5 * RATE, np.float32))[-1][1] == 5.0


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.floats(0.05, 4), st.floats(0.001, 0.5)), min_size=1, max_size=6),
    st.sampled_from([1.0, 3.0]),
)
def test_parts_are_in_order_fit_the_window_and_hold_all_that_is_loud(stretches, window):
    parts = [np.concatenate([speech(length, level), quiet(0.4)]) for length, level in stretches]
    wave = np.concatenate(parts)
    spans = cut_at_pauses(wave, window)
    assert all(0 <= first < end <= len(wave) for first, end in spans)
    assert all(end - first <= window * RATE for first, end in spans)
    assert all(end <= first for (_, end), (first, _) in pairwise(spans))
    heard = np.zeros(len(wave), bool)
    for first, end in spans:
        heard[first:end] = True
    assert np.abs(wave[~heard]).max(initial=0) < np.abs(wave).max() / 2


# ---- long recordings


@pytest.fixture
def counted():
    """Blocks of 0, 1, 2, ..., and how often they were begun."""
    begun = []

    def blocks():
        begun.append(True)
        yield from np.arange(100, dtype=np.float32).reshape(10, 10)

    return blocks, begun


def test_slices_are_those_of_the_array_and_read_once_from_front_to_back(counted):
    blocks, begun = counted
    wave = StreamedWave("a.wav", blocks)
    assert (len(wave), len(begun)) == (100, 1)
    for first, end in ((0, 25), (20, 50), (50, 50), (73, 81), (95, 200)):
        assert wave[first:end].tolist() == list(range(first, min(end, 100)))
        assert len(wave._held) <= 40
    assert len(begun) == 2
    assert wave[3:5].tolist() == [3, 4]  # back again
    assert len(begun) == 3


def test_a_file_that_becomes_shorter_is_refused(counted):
    blocks, _ = counted
    wave = StreamedWave("a.wav", blocks)
    wave._blocks = lambda: iter([np.zeros(10, np.float32)])
    wave._restart()
    with pytest.raises(UserError, match=r"a\.wav was changed while it was read"):
        wave[0:20]


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_a_file_in_blocks_is_the_file(tmp_path, rate):
    wave = 0.3 * np.sin(2 * np.pi * 300 * np.arange(5 * rate) / rate)
    soundfile.write(tmp_path / "a.flac", np.stack([wave, 0 * wave], axis=1), rate)
    audio = {"path": str(tmp_path / "a.flac")}
    blocks = list(stream_audio(audio))
    assert len(blocks) > 1
    np.testing.assert_allclose(np.concatenate(blocks), read_audio(audio), atol=1e-3)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "a.wav").write_text("no audio")
    with pytest.raises(UserError, match=r"a\.wav"):
        StreamedWave("a.wav", lambda: stream_audio({"path": str(tmp_path / "a.wav")}))
