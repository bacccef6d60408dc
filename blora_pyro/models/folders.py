"""The files of a base model: where they are, and whether they are complete before loading."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging

from blora_pyro.errors import UserError
from blora_pyro.files import read_json
from blora_pyro.hub import BASE, download

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "normalizer.json",
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SHARD = re.compile(r"[\w-][\w.-]*\.safetensors")  # in the folder, and in no other
HUB_FILES = (
    *TOKENIZER_FILES,
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    WEIGHTS,
    "model-*-of-*.safetensors",
)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the advice and the bars of transformers out of terminals and notebooks; decorates, too.

    What is wrong with a base or an adapter is refused by name, and not left to a warning.
    """
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


def find_folder(
    name: str,
    revision: str | None = None,
    local_files_only: bool = False,
    weights: bool = True,
) -> Path:
    """Return the folder of a checkpoint: a local one, or that of a Hub id in the Hub's cache.

    Missing files are downloaded, unless `local_files_only`; without `weights` only the others are.

    Raises:
        UserError: If there is none, or it can't be reached.
    """
    path = Path(name)
    if path.exists():
        if not path.is_dir():
            raise UserError(f"base model '{name}' is a file; give the folder that it is in")
        if revision is not None:
            raise UserError(
                f"revision '{revision}' is given with a local folder, '{name}'; leave one out"
            )
        return path
    files = [file for file in HUB_FILES if weights or "model" not in file]
    return download(BASE, name, revision, local_files_only, files)


def adapter_in(name: str, folder: Path) -> tuple[str, str | None] | None:
    """Return the base of a PEFT adapter and its revision; None if `folder` holds something else.

    Raises:
        UserError: If the adapter does not name its base.
    """
    if not (folder / ADAPTER_CONFIG).is_file() or (folder / "config.json").is_file():
        return None
    config = read_json_of(name, folder, ADAPTER_CONFIG)
    base, revision = (config.get(key) for key in ("base_model_name_or_path", "revision"))
    if not isinstance(base, str) or base == name:
        raise UserError(
            f"base model '{name}' is an adapter whose {ADAPTER_CONFIG} does not name its base; "
            "give what `blora-pyro merge` makes of it"
        )
    return base, revision


LONGEST_CHAIN = 20


def check_chain(name: str, folder: Path, above: tuple[str, ...]) -> tuple[str, ...]:
    """Return the folders of the adapters that lead to a base, `folder`, an adapter's, among them.

    Raises:
        UserError: If they lead in a circle, or there are too many.
    """
    own = str(folder.resolve())
    if own in above or len(above) >= LONGEST_CHAIN:
        raise UserError(
            f"base model '{name}' is an adapter that leads back to itself through {len(above)} "
            "adapters, or through too many; give what `blora-pyro merge` makes of it"
        )
    return *above, own


def check_folder(name: str, folder: Path) -> None:
    """Raise UserError unless a folder holds safetensors weights, tokenizer and preprocessor.

    `name` is the user's name for it.
    """
    if (folder / ADAPTER_CONFIG).exists():
        raise UserError(
            f"base model '{name}' holds an adapter ({ADAPTER_CONFIG}) beside a model; give a "
            "folder with one of them, or what `blora-pyro merge` made of it"
        )
    config = read_json_of(name, folder, "config.json")
    if (kind := config.get("model_type")) != "whisper":
        raise UserError(f"base model '{name}' is no Whisper but a '{kind}' model; give a Whisper")
    weight_files(name, folder)
    check_tokenizer_files(name, folder)
    files = {path.name for path in folder.iterdir()}
    if not {"preprocessor_config.json", "processor_config.json"} & files:
        raise UserError(
            f"base model '{name}' lacks preprocessor_config.json; copy it from the Whisper that it "
            "was made from"
        )


def check_tokenizer_files(name: str, folder: Path) -> None:
    """Raise UserError unless a folder holds a tokenizer."""
    if not any(
        all((folder / file).exists() for file in files)
        for files in (["tokenizer.json"], ["vocab.json", "merges.txt"])
    ):
        raise UserError(
            f"base model '{name}' lacks its tokenizer: tokenizer.json, or vocab.json and "
            "merges.txt; copy them from the Whisper that it was made from"
        )


def weight_files(name: str, folder: Path) -> list[Path]:
    """Return the files of a checkpoint's weights, all of them in its folder.

    Raises:
        UserError: If one is missing, or there are only pickled ones.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        stored = read_json_of(name, folder, INDEX).get("weight_map")
        shards = _texts(stored)
        if not shards or not all(_SHARD.fullmatch(shard) for shard in shards):
            raise UserError(f"base model '{name}' has a damaged {INDEX}; download it again")
        if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
            raise UserError(f"base model '{name}' lacks {', '.join(missing)}; download it again")
        return [folder / shard for shard in sorted(shards)]
    pickled = "pytorch_model.bin, which is pickled, is never read"
    raise UserError(
        f"base model '{name}' has no safetensors weights ({WEIGHTS}); {pickled}: where you trust "
        "it, convert it with transformers: WhisperForConditionalGeneration.from_pretrained"
        f"('{name}').save_pretrained(FOLDER), and copy the other files there"
    )


def _texts(stored: object) -> set[str]:
    """Return the values of a mapping, none if there is something else than texts."""
    values = [*stored.values()] if isinstance(stored, dict) else []
    return {*values} if all(isinstance(one, str) for one in values) else set()


def read_json_of(name: str, folder: Path, file: str) -> dict[str, Any]:
    """Return the content of a JSON file of a base model.

    Raises:
        UserError: If there is none, or it is damaged.
    """
    if not (folder / file).is_file():
        raise UserError(
            f"base model '{name}' has no {file}; give a folder with a Whisper checkpoint, as "
            "save_pretrained writes it"
        )
    try:
        content = read_json(folder / file)
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise UserError(
            f"base model '{name}' has a damaged {file} ({error}); download it again"
        ) from None
    return content


def is_same_place(one: str, other: str) -> bool:
    """Return whether two names of bases are equal, or paths of one folder."""
    return one == other or (
        Path(one).exists() and Path(other).exists() and Path(one).samefile(other)
    )
