"""Manifests, audio, features, prompts and batches, and the built-in pocket corpora."""

from blora_pyro.data.audio import SAMPLING_RATE, AudioHeader, read_audio, read_header
from blora_pyro.data.collation import IGNORED, Batch, Examples, SoftTargets, batch_indices
from blora_pyro.data.feature_cache import Digests
from blora_pyro.data.features import Features, OnNote, featurise, trim, usable_cores
from blora_pyro.data.manifest import read_manifest
from blora_pyro.data.prompts import Encoder, Suppressed, language_codes, prompt_ids, text_ids
from blora_pyro.data.rows import BadRow, OnBadRow, all_bad, stop
from blora_pyro.data.splits import (
    DOMAINS,
    LANGUAGES,
    MODEL_DIR,
    POCKET_DIR,
    corpus_dir,
    is_hub_id,
    load_mixture,
    load_split,
    split_names,
    stream_split,
)
from blora_pyro.data.streaming import Stream, StreamPosition

__all__ = [
    "DOMAINS",
    "IGNORED",
    "LANGUAGES",
    "MODEL_DIR",
    "POCKET_DIR",
    "SAMPLING_RATE",
    "AudioHeader",
    "BadRow",
    "Batch",
    "Digests",
    "Encoder",
    "Examples",
    "Features",
    "OnBadRow",
    "OnNote",
    "SoftTargets",
    "Stream",
    "StreamPosition",
    "Suppressed",
    "all_bad",
    "batch_indices",
    "corpus_dir",
    "featurise",
    "is_hub_id",
    "language_codes",
    "load_mixture",
    "load_split",
    "prompt_ids",
    "read_audio",
    "read_header",
    "read_manifest",
    "split_names",
    "stop",
    "stream_split",
    "text_ids",
    "trim",
    "usable_cores",
]
