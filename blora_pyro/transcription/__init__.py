"""Transcripts of recordings of any length.

- `transcriber`: from audio files or log-mels to transcripts;
- `long_form`: decoding window by window; `windows`: recordings, and where their
  windows begin and end;
- `safeguards`: Whisper's fallback against loops and inventions, for scores as well;
- `words`: what spells the words, when they are said, and how sure they are by posterior draws;
- `ct2`: the same by CTranslate2, without torch;
- `transcripts`: transcripts as objects, JSON, SRT and VTT; `outputs`: files of transcripts.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blora_pyro.transcription.transcriber import (
        Transcriber,
        transcribe_features,
        transcribe_files,
    )

__all__ = ["Transcriber", "transcribe_features", "transcribe_files"]


def __getattr__(name: str) -> Any:  # CTranslate2 does without torch
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.transcriber"), name)
