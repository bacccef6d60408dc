"""Where the built-in pocket corpora and the pocket Whisper lie, and the cache."""

import os
from pathlib import Path

from blora_pyro.errors import UserError

POCKET_DIR = Path(__file__).parent / "pocket"  # a folder of assets beside this module
MODEL_DIR = POCKET_DIR / "model"
DOMAINS = ("de-en", "es-en", "zh-en")  # code-switched, matrix language first
LANGUAGES = ("en", "de", "es", "fr", "tr", "zh")


def cache_dir() -> Path | None:
    """Return the folder for what can be made again, `$BLORA_PYRO_CACHE`; None if that is empty.

    It is `~/.cache/blora-pyro` by default (None where there is no home folder), and may be deleted
    at any time.
    """
    folder = os.environ.get("BLORA_PYRO_CACHE", "~/.cache/blora-pyro")
    try:
        return Path(folder).expanduser() if folder else None
    except RuntimeError:
        return None


def corpus_dir(name: str) -> Path:
    """Return the folder of a built-in corpus, which holds `{split}.parquet`.

    A corpus that is not shipped is looked for in `$BLORA_PYRO_CACHE/pocket/` (by default
    `~/.cache/blora-pyro/pocket/`), where `recipes/pocket/build.py` can put it.

    Raises:
        UserError: if no corpus has this name, or it is neither shipped nor built.
    """
    if name not in (*DOMAINS, *LANGUAGES):
        allowed = ", ".join((*DOMAINS, *LANGUAGES))
        raise UserError(f"no built-in corpus is called {name!r}; choose from {allowed}")
    cache = cache_dir()
    folders = [POCKET_DIR, *([cache / "pocket"] if cache else [])]
    for folder in folders:
        if (folder / name).is_dir():
            return folder / name
    raise UserError(
        f"the built-in corpus {name!r} is not in {' or '.join(map(str, folders))}; "
        "make it with: python recipes/pocket/build.py"
    )
