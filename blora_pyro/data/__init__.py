"""Manifests, audio, features, prompts and batches, and the built-in pocket corpora."""

from blora_pyro.data.audio import SAMPLING_RATE, AudioHeader, read_audio, read_header
from blora_pyro.data.collation import IGNORED, Batch, Examples, SoftTargets
from blora_pyro.data.features import (
    Digests,
    Features,
    OnNote,
    OnProgress,
    featurise,
    trim,
    usable_cores,
)
from blora_pyro.data.languages import is_language, language_code
from blora_pyro.data.manifest import read_manifest
from blora_pyro.data.mixtures import (
    as_domains,
    as_sources,
    batch_indices,
    check_weights,
    load_mixture,
    named_sources,
)
from blora_pyro.data.prompts import TASKS, Encoder, language_codes, prompt_ids, text_ids
from blora_pyro.data.rows import BadRow, OnBadRow, all_bad, stop
from blora_pyro.data.sources import (
    DOMAINS,
    LANGUAGES,
    MODEL_DIR,
    POCKET_DIR,
    Source,
    cache_dir,
    corpus_dir,
    describe_source,
    is_hub_id,
    load_split,
    split_names,
    stream_split,
)
from blora_pyro.data.streaming import BUFFER, Stream, StreamPosition

__all__ = [
    "BUFFER",
    "DOMAINS",
    "IGNORED",
    "LANGUAGES",
    "MODEL_DIR",
    "POCKET_DIR",
    "SAMPLING_RATE",
    "TASKS",
    "AudioHeader",
    "BadRow",
    "Batch",
    "Digests",
    "Encoder",
    "Examples",
    "Features",
    "OnBadRow",
    "OnNote",
    "OnProgress",
    "SoftTargets",
    "Source",
    "Stream",
    "StreamPosition",
    "all_bad",
    "as_domains",
    "as_sources",
    "batch_indices",
    "cache_dir",
    "check_weights",
    "corpus_dir",
    "describe_source",
    "featurise",
    "is_hub_id",
    "is_language",
    "language_code",
    "language_codes",
    "load_mixture",
    "load_split",
    "named_sources",
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
