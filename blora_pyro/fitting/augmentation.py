"""SpecAugment, for the batches that are fitted to and no others."""

import copy
from dataclasses import replace
from types import SimpleNamespace

from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperModel

from blora_pyro.data import Batch

SHARES = {"time": 0.05, "feature": 0.1}  # of frames and of mel bins, where a base has none
WIDEST = 0.25  # a span, of the window or of the bins


class SpecAugment:
    """Whisper's own SpecAugment (Park et al., arXiv 1904.08779), as transformers has it.

    Random spans of frames and of mel bins are set to 0, which is about the mean of Whisper's
    features. Lengths and shares are those of the base's configuration (`mask_time_prob`,
    `mask_time_length`, `mask_feature_prob`, ...), also where its `apply_spec_augment` is off. A
    share of 0 there, as OpenAI's checkpoints have it for the bins, is 5% of the frames
    (transformers' default) or 10% of the bins: no more than the mildest policy of the paper, LB,
    which masks 4% and 17% on average. No span is wider than a quarter of what it is cut from.

    The random numbers are NumPy's global ones.
    """

    def __init__(self, config: WhisperConfig) -> None:
        """As the base of this configuration has it."""
        config = copy.copy(config)
        config.apply_spec_augment = True
        frames = 2 * config.max_source_positions
        for axis, size in (("time", frames), ("feature", config.num_mel_bins)):
            share = getattr(config, f"mask_{axis}_prob") or SHARES[axis]
            length = min(getattr(config, f"mask_{axis}_length"), max(1, int(WIDEST * size)))
            setattr(config, f"mask_{axis}_prob", share)
            setattr(config, f"mask_{axis}_length", length)
        self.config = config

    def __call__(self, batch: Batch) -> Batch:
        """The batch with masked features; the given one is left as it is."""
        # transformers masks in training mode only, which would bring dropout, too
        whisper = SimpleNamespace(config=self.config, training=True)
        features = WhisperModel._mask_input_features(whisper, batch.input_features.clone())
        return replace(batch, input_features=features)
