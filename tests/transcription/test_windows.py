import numpy as np
import pytest
import torch

from blora_pyro.models.decoding import Piece
from blora_pyro.transcription.windows import Recording, Window, batched

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
def test_where_the_next_window_begins(pieces, expected):
    heard = window((2 * SECOND, 3 * SECOND), *pieces)
    assert heard.next_sample(BEGIN) / SECOND == pytest.approx(expected)


def test_spans():
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
