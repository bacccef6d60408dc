"""Log-mels without the silence that fills the window up."""

from torch import Tensor

MARGIN = 50  # frames of 10 ms that are left: Whisper was never taught to stop right after a word


def trim(features: Tensor) -> Tensor:
    """Cut a batch of log-mels half a second after its longest utterance.

    A window is filled up with zeros, whose log-mels are the lowest value that those of the window
    have (Whisper's features are cut off at the loudest minus 80 dB). So an utterance ends with the
    last frame that has any other; silence of zeros at the end of a recording counts as filling.

    Whisper itself never sees that: it was trained on full windows, and its encoder attends to the
    filling. What it says changes.

    Args:
        features: (batch, mels, frames), all frames of a window.

    Returns:
        (batch, mels, fewer frames), an even number; a view.
    """
    frames = features.shape[-1]
    is_sound = (features > features.amin((1, 2), keepdim=True)).any(1).any(0)
    last = int(is_sound.nonzero().max()) + 1 if is_sound.any() else 0
    end = last + MARGIN
    return features[..., : min(end + end % 2, frames)]
