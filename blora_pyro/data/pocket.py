"""The built-in pocket corpora and the pocket Whisper: where they lie."""

import os
from pathlib import Path

from blora_pyro.errors import UserError

POCKET_DIR = Path(__file__).parent / "pocket"  # a folder of assets beside this module
MODEL_DIR = POCKET_DIR / "model"
DOMAINS = ("de-en", "es-en", "zh-en")  # code-switched, matrix language first
LANGUAGES = ("en", "de", "es", "fr", "tr", "zh")


def corpus_dir(name: str) -> Path:
    """Return the folder of a built-in corpus, which holds `{split}.jsonl` and the audio.

    A corpus that is not shipped is looked for in `$BLORA_PYRO_CACHE/pocket/` (by default
    `~/.cache/blora-pyro/pocket/`), where `recipes/pocket/build.py` can put it.

    Raises:
        UserError: if no corpus has this name, or it is neither shipped nor built.
    """
    if name not in (*DOMAINS, *LANGUAGES):
        allowed = ", ".join((*DOMAINS, *LANGUAGES))
        raise UserError(f"no built-in corpus is called {name!r}; choose from {allowed}")
    cache = Path(os.environ.get("BLORA_PYRO_CACHE", "~/.cache/blora-pyro")).expanduser() / "pocket"
    for folder in (POCKET_DIR / name, cache / name):
        if folder.is_dir():
            return folder
    raise UserError(
        f"the built-in corpus {name!r} is not in {POCKET_DIR} or {cache}; "
        "make it with: python recipes/pocket/build.py"
    )
