"""What is read from the Hugging Face Hub, and in one line what it refuses."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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

REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_RUN_ID = re.compile(rf"{REPO_ID.pattern}(@\S+)?")
_POSTERIOR, _ADAPTER = "posterior.safetensors", "adapter_config.json"
_RUN_FILES = (_POSTERIOR, "run.json", _ADAPTER)


@dataclass(frozen=True)
class Kind:
    """What is looked for, in the words of an error message.

    Attributes:
        name: What it is called.
        local: What it is on disk.
        instead: What else can be given.
    """

    name: str
    local: str
    instead: str


BASE = Kind("base model", "local folder", "'pocket', or a folder with a Whisper checkpoint")
RUN = Kind("run", "run folder", "the --output of a fit")


def is_run_id(name: str) -> bool:
    """Whether a name has the form `OWNER/NAME[@REVISION]`, and is no path that exists."""
    return not os.path.exists(name) and bool(_RUN_ID.fullmatch(name))


def find_run(run: str | Path, local_files_only: bool = False) -> Path:
    """The folder of a run: a local one, or that of `OWNER/NAME[@REVISION]` in the Hub's cache.

    Of a repository the posterior and its JSON files are downloaded, which `push_run` put there. A
    path that exists comes first, and so does a name that can't be a Hub id, whatever it is.

    Raises:
        UserError: If the Hub has none, can't be reached, or has there no run.
    """
    name = Path(run).as_posix()
    if not is_run_id(name):
        return Path(run)
    repo_id, _, revision = name.partition("@")
    folder = download(RUN, repo_id, revision or None, local_files_only, _RUN_FILES)
    if (folder / _POSTERIOR).is_file():
        return folder
    what = "is a stock PEFT adapter" if (folder / _ADAPTER).is_file() else "holds no adapter"
    raise UserError(
        f"{name} on the Hub {what}, without a {_POSTERIOR}; give what 'blora-pyro push-to-hub' "
        "uploaded, or a run folder (a PEFT adapter will do as --base)"
    )


def download(
    kind: Kind, name: str, revision: str | None, local_files_only: bool, files: Sequence[str]
) -> Path:
    """The folder of a Hub id in the Hub's cache; what the cache lacks is downloaded.

    One request tells whether the Hub can be reached, so that a refusal takes no longer.

    Args:
        kind: What it is to be.
        name: The Hub id.
        revision: Branch, tag or commit; None is its main branch.
        local_files_only: Ask nothing of the Hub.
        files: Patterns of what is wanted.

    Raises:
        UserError: If there is none, or it can't be reached.
    """
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                local_files_only=local_files_only,
                allow_patterns=list(files),
            )
        )
    except LocalEntryNotFoundError as error:
        partial = getattr(error, "snapshot_path", None)
        if partial and kind is BASE:
            return Path(partial)  # all that is needed may be there
        cause = error.__cause__
        raise UserError(_unreached(kind, name, revision, cause, local_files_only)) from None
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise UserError(_refused(kind, name, revision, error)) from None


def _unreached(
    kind: Kind,
    name: str,
    revision: str | None,
    cause: BaseException | None,
    local_files_only: bool,
) -> str:
    what = f"{kind.name} '{name}'" + (f" at revision '{revision}'" if revision else "")
    if local_files_only or isinstance(cause, OfflineModeIsEnabled):
        why = "local-files-only is given" if local_files_only else "HF_HUB_OFFLINE is set"
        return (
            f"{what} is no {kind.local} and not in the Hub's cache, and {why}; leave that out to "
            f"download it, or give {kind.instead}"
        )
    reason = f"{type(cause).__name__}: {str(cause).strip().splitlines()[0]}" if cause else "no word"
    return (
        f"{what} is no {kind.local}, is not in the Hub's cache, and the Hub can't be reached "
        f"({reason}); go online, or give {kind.instead}"
    )


def _refused(kind: Kind, name: str, revision: str | None, error: Exception) -> str:
    """What the Hub says no to, most special first."""
    what = f"{kind.name} '{name}'"
    if isinstance(error, HFValidationError):
        return (
            f"{what} does not exist; give {kind.instead}, or a Hub id such as openai/whisper-tiny"
        )
    if isinstance(error, GatedRepoError):
        return (
            f"{what} is gated; ask for access on its page, https://hf.co/{name}, and log in with: "
            "hf auth login"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{what} is no {kind.local}, and the Hub has no such repository, or a private one; "
            "check the spelling, or log in with: hf auth login"
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{what} has no revision '{revision}'; give a branch, tag or commit of "
            f"https://hf.co/{name}/commits/main"
        )
    reason = " ".join(str(error).split())
    return f"{what} can't be downloaded ({reason}); try again, or give {kind.instead}"
