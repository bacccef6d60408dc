"""Base models: a Whisper with its tokenizer and feature extractor."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

from blora_pyro.data import MODEL_DIR
from blora_pyro.errors import UserError

POCKET = "pocket"


@dataclass(frozen=True)
class Base:
    """A pretrained Whisper and what it takes to feed and read it."""

    name: str
    net: WhisperForConditionalGeneration
    tokenizer: WhisperTokenizer
    feature_extractor: WhisperFeatureExtractor

    def save_pretrained(self, folder: Path) -> None:
        """A plain checkpoint folder that transformers loads."""
        for part in (self.net, self.tokenizer, self.feature_extractor):
            part.save_pretrained(folder)


def check_device(device: str) -> None:
    """Raise UserError unless tensors can be made on the device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"device '{device}' can't be used ({reason}); try cpu") from None


def load_base(name: str = POCKET, device: str = "cpu") -> Base:
    """Load a Whisper in float32.

    Args:
        name: `"pocket"`, a local checkpoint folder, or a Hub id.
        device: A torch device.

    Raises:
        UserError: If there is no such checkpoint, it is no Whisper, or the device can't be used.
    """
    check_device(device)
    source = MODEL_DIR if name == POCKET else name
    try:
        net = WhisperForConditionalGeneration.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True
        )
        tokenizer = WhisperTokenizer.from_pretrained(source)
        feature_extractor = WhisperFeatureExtractor.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"base model '{name}' can't be loaded ({reason}); "
            "give 'pocket', a folder with a Whisper checkpoint, or a Hub id within reach"
        ) from None
    return Base(name, net.to(device).eval(), tokenizer, feature_extractor)
