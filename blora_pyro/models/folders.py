"""Where the files of a base model are, and what they lack: told before anything is loaded."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from blora_pyro.errors import UserError

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
HUB_FILES = (
    *TOKENIZER_FILES,
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "adapter_config.json",
    INDEX,
    WEIGHTS,
    "model-*-of-*.safetensors",
)


def find_folder(
    name: str,
    revision: str | None = None,
    local_files_only: bool = False,
    weights: bool = True,
) -> Path:
    """The folder of a checkpoint: a local one, or that of a Hub id in the Hub's cache.

    What the cache lacks is downloaded, unless `local_files_only`. One request tells whether the Hub
    can be reached, so that a refusal takes no longer.

    Args:
        name: A local folder, or a Hub id.
        revision: Branch, tag or commit of a Hub id; None is its main branch.
        local_files_only: Ask nothing of the Hub.
        weights: Whether the weights are wanted, too.

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
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                local_files_only=local_files_only,
                allow_patterns=[file for file in HUB_FILES if weights or "model" not in file],
            )
        )
    except LocalEntryNotFoundError as error:
        if partial := getattr(error, "snapshot_path", None):
            return Path(partial)  # what is needed may be there
        raise UserError(_unreached(name, revision, error.__cause__, local_files_only)) from None
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise UserError(_refused(name, revision, error)) from None


def _unreached(
    name: str, revision: str | None, cause: BaseException | None, local_files_only: bool
) -> str:
    what = f"base model '{name}'" + (f" at revision '{revision}'" if revision else "")
    if local_files_only or isinstance(cause, OfflineModeIsEnabled):
        why = "local-files-only is given" if local_files_only else "HF_HUB_OFFLINE is set"
        return (
            f"{what} is no local folder and not in the Hub's cache, and {why}; leave that out to "
            "download it, or give a folder with a Whisper checkpoint"
        )
    reason = f"{type(cause).__name__}: {str(cause).strip().splitlines()[0]}" if cause else "no word"
    return (
        f"{what} is no local folder, is not in the Hub's cache, and the Hub can't be reached "
        f"({reason}); go online, or give a folder with a Whisper checkpoint, or 'pocket'"
    )


def _refused(name: str, revision: str | None, error: Exception) -> str:
    """What the Hub says no to, most special first."""
    if isinstance(error, HFValidationError):
        return (
            f"base model '{name}' does not exist; give 'pocket', a folder with a Whisper "
            "checkpoint, or a Hub id such as openai/whisper-tiny"
        )
    if isinstance(error, GatedRepoError):
        return (
            f"base model '{name}' is gated; ask for access on its page, https://hf.co/{name}, and "
            "log in with: hf auth login"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"base model '{name}' is no local folder, and the Hub has no such repository, or a "
            "private one; check the spelling, or log in with: hf auth login"
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"base model '{name}' has no revision '{revision}'; give a branch, tag or commit of "
            f"https://hf.co/{name}/commits/main"
        )
    reason = " ".join(str(error).split())
    return f"base model '{name}' can't be downloaded ({reason}); try again, or give a local folder"


def check_folder(name: str, folder: Path) -> None:
    """Refuse a folder that holds no Whisper with safetensors weights, tokenizer and preprocessor.

    Args:
        name: What the user calls it.
        folder: Where it is.

    Raises:
        UserError: Naming what is wrong, or which file is missing.
    """
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"base model '{name}' holds an adapter (adapter_config.json); give the base that it is "
            "for, or what `blora-pyro merge` made of it"
        )
    config = _read_json(name, folder, "config.json")
    if (kind := config.get("model_type")) != "whisper":
        raise UserError(f"base model '{name}' is no Whisper but a '{kind}' model; give a Whisper")
    _check_weights(name, folder)
    files = {path.name for path in folder.iterdir()}
    if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files:
        raise UserError(
            f"base model '{name}' lacks its tokenizer: tokenizer.json, or vocab.json and "
            "merges.txt; copy them from the Whisper that it was made from"
        )
    if not {"preprocessor_config.json", "processor_config.json"} & files:
        raise UserError(
            f"base model '{name}' lacks preprocessor_config.json; copy it from the Whisper that it "
            "was made from"
        )


def _check_weights(name: str, folder: Path) -> None:
    if (folder / WEIGHTS).exists():
        return
    if (folder / INDEX).exists():
        shards = set(_read_json(name, folder, INDEX).get("weight_map", {}).values())
        if not shards or not all(str(shard).endswith(".safetensors") for shard in shards):
            raise UserError(f"base model '{name}' has a damaged {INDEX}; download it again")
        if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
            raise UserError(f"base model '{name}' lacks {', '.join(missing)}; download it again")
        return
    pickled = "pytorch_model.bin, which is pickled, is never read"
    raise UserError(
        f"base model '{name}' has no safetensors weights ({WEIGHTS}); {pickled}: where you trust "
        "it, convert it with transformers: WhisperForConditionalGeneration.from_pretrained"
        f"('{name}').save_pretrained(FOLDER), and copy the other files there"
    )


def _read_json(name: str, folder: Path, file: str) -> dict[str, Any]:
    if not (folder / file).is_file():
        raise UserError(
            f"base model '{name}' has no {file}; give a folder with a Whisper checkpoint, as "
            "save_pretrained writes it"
        )
    try:
        content = json.loads((folder / file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"base model '{name}' has a damaged {file} ({error}); download it again"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"base model '{name}' has a damaged {file}; download it again")
    return content
