"""Where long audio is cut for a model without timestamp tokens: at its pauses, by energy alone."""

import numpy as np
import numpy.typing as npt

from blora_pyro.data.audio import SAMPLING_RATE, Wave

FRAME = SAMPLING_RATE // 100  # samples: 10 ms
SMOOTHING = 5  # frames that a level is averaged over
PAUSE = 0.25  # seconds that a pause lasts at least
MARGIN = 0.1  # seconds of a pause that are left on either side of speech
DEPTH = 0.3  # how far up from the quiet level to the loud one, in decibels, a pause may be
CONTRAST = 10.0  # decibels between quiet and loud, below which no pauses are told

Levels = npt.NDArray[np.float64]


def cut_at_pauses(wave: Wave, window: float) -> list[tuple[int, int]]:
    """Cut audio so that every part fits the window, at pauses where it has them.

    A frame is quiet if it lies below `DEPTH` of the way from the 5th to the 95th percentile of the
    levels. Between two pauses lies one part; one that is too long is cut at the quietest place of
    the second half of its first window, again and again. The pauses themselves are left out.

    Args:
        wave: (samples,) at 16 kHz.
        window: In seconds.

    Returns:
        First sample and end of every part, in order.
    """
    levels = _levels(wave)
    parts = []
    for first, end in _speech(levels):
        while end - first > (most := int(window * SAMPLING_RATE) // FRAME):
            half = first + most // 2
            cut = half + int(np.argmin(levels[half : first + most]))
            parts.append((first, cut))
            first = cut
        parts.append((first, end))
    return [(first * FRAME, min(end * FRAME, len(wave))) for first, end in parts]


def _levels(wave: Wave) -> Levels:
    """Level of every frame in decibels, averaged over a few."""
    padded = np.pad(wave, (0, -len(wave) % FRAME)).astype(np.float64)
    power = (padded.reshape(-1, FRAME) ** 2).mean(1)
    kernel = np.ones(SMOOTHING) / SMOOTHING
    smooth = np.convolve(np.pad(power, SMOOTHING // 2, mode="edge"), kernel, mode="valid")
    return 10 * np.log10(smooth + 1e-10)


def _speech(levels: Levels) -> list[tuple[int, int]]:
    """First frame and end of what lies between pauses."""
    quiet, loud = np.percentile(levels, (5, 95))
    if loud - quiet < CONTRAST:
        return [(0, len(levels))]
    heard = np.flatnonzero(levels > quiet + DEPTH * (loud - quiet))
    gaps = np.flatnonzero(np.diff(heard) > PAUSE * SAMPLING_RATE / FRAME)
    margin = round(MARGIN * SAMPLING_RATE / FRAME)
    firsts = heard[np.concatenate([[0], gaps + 1])] - margin
    ends = heard[np.concatenate([gaps, [len(heard) - 1]])] + 1 + margin
    return [
        (max(int(first), 0), min(int(end), len(levels)))
        for first, end in zip(firsts, ends, strict=True)
    ]
