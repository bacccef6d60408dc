"""Transcripts of base models, made once for a base, a set and a way of decoding, and kept on disk.

They lie in `$BLORA_PYRO_CACHE/transcripts/`, a JSON file for each set. Its name is a hash of all
that the texts depend on: the base's weights and generation config, the audio and the prompts, the
code that decodes, and the libraries and the kind of processor that it runs on. So nothing there is
ever out of date; the folder may be deleted at any time.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import torch
import transformers

from blora_pyro.data import Examples
from blora_pyro.data.features import feature_settings
from blora_pyro.files import cache_dir, read_json, write_json
from blora_pyro.models import Base, decoding, logits
from blora_pyro.models.base import unmapped_settings
from blora_pyro.models.encoder_states import weights_hash
from blora_pyro.transcription import safeguards, transcriber

_CODE = (decoding, logits, safeguards, transcriber)


def kept_transcripts(
    base: Base, examples: Examples, transcribe: Callable[[], list[str]]
) -> list[str]:
    """Return the transcripts of a set by a base as it is, from the cache if they are in it."""
    file = _file(base, examples)
    if file is None:
        return transcribe()
    with suppress(OSError, ValueError):
        texts = read_json(file).get("texts")
        if isinstance(texts, list) and [*map(type, texts)] == [str] * len(examples):
            return texts
    texts = transcribe()
    with suppress(OSError):  # a cache that can't be written is none
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"texts": texts})
    return texts


def _file(base: Base, examples: Examples) -> Path | None:
    """Return the file of a set's transcripts; None if they can't be kept."""
    folder, features = cache_dir(), feature_settings(base.feature_extractor)
    if folder is None or features is None:
        return None
    net = base.net
    about = {
        "weights": weights_hash(net),
        "settings": unmapped_settings(net),
        "features": features,
        "tokenizer": sha256(base.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "set": examples.fingerprint,
        "prompts": examples.prompts,
        "code": [sha256(Path(str(one.__file__)).read_bytes()).hexdigest() for one in _CODE],
        "libraries": [torch.__version__, transformers.__version__],
        "device": [net.device.type, str(net.dtype)],
    }
    content = json.dumps(about, sort_keys=True, default=str)
    return folder / "transcripts" / f"{sha256(content.encode()).hexdigest()}.json"
