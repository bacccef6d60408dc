"""Manifests, audio, features, prompts and batches, and the built-in pocket corpora."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blora_pyro.data.audio import SAMPLING_RATE, read_audio, stream_audio
    from blora_pyro.data.collation import IGNORED, Batch, Examples, SoftTargets, batch_indices
    from blora_pyro.data.containers import AUDIO_SUFFIXES
    from blora_pyro.data.feature_cache import Digests
    from blora_pyro.data.features import (
        Features,
        Heard,
        OnNote,
        decode_row,
        featurise,
        heard_of,
        sounding_frames,
        trim,
        usable_cores,
    )
    from blora_pyro.data.manifest import read_manifest
    from blora_pyro.data.prompts import (
        EncodedRow,
        Encoder,
        Suppressed,
        check_text,
        language_codes,
        prompt_ids,
        text_ids,
        unmapped_codes,
    )
    from blora_pyro.data.rows import BadRow, Columns, OnBadRow, all_bad, stop
    from blora_pyro.data.splits import (
        DOMAINS,
        LANGUAGES,
        MODEL_DIR,
        POCKET_DIR,
        corpus_dir,
        is_hub_id,
        load_mixture,
        load_split,
        row_batches,
        split_names,
        stream_split,
    )
    from blora_pyro.data.streaming import Stream, StreamPosition

__all__ = [
    "AUDIO_SUFFIXES",
    "DOMAINS",
    "IGNORED",
    "LANGUAGES",
    "MODEL_DIR",
    "POCKET_DIR",
    "SAMPLING_RATE",
    "BadRow",
    "Batch",
    "Columns",
    "Digests",
    "EncodedRow",
    "Encoder",
    "Examples",
    "Features",
    "Heard",
    "OnBadRow",
    "OnNote",
    "SoftTargets",
    "Stream",
    "StreamPosition",
    "Suppressed",
    "all_bad",
    "batch_indices",
    "check_text",
    "corpus_dir",
    "decode_row",
    "featurise",
    "heard_of",
    "is_hub_id",
    "language_codes",
    "load_mixture",
    "load_split",
    "prompt_ids",
    "read_audio",
    "read_manifest",
    "row_batches",
    "sounding_frames",
    "split_names",
    "stop",
    "stream_audio",
    "stream_split",
    "text_ids",
    "trim",
    "unmapped_codes",
    "usable_cores",
]

# What needs neither torch nor datasets first, so that whoever asks for that loads neither.
_MODULES = (
    *("containers", "audio", "prompts", "feature_cache", "features", "rows", "manifest"),
    *("collation", "splits", "streaming"),
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            found = importlib.import_module(f"{__name__}.{module}")
            if hasattr(found, name):
                globals()[name] = getattr(found, name)
                return globals()[name]
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
