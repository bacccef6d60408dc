"""Downloads from the Hugging Face Hub, whose refusals become errors of one line."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from blora_pyro.errors import UserError, is_out_of_memory, reason

REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_RUN_ID = re.compile(rf"{REPO_ID.pattern}(@\S+)?")
# Of a branch, tag or commit, whose parts become folders of the Hub's cache.
_REVISION = re.compile(r"\w[\w.+@#=-]*(/\w[\w.+@#=-]*)*")
_POSTERIOR, _ADAPTER = "posterior.safetensors", "adapter_config.json"
_RUN_FILES = (_POSTERIOR, "run.json", "metrics.json", _ADAPTER)


@dataclass(frozen=True)
class Kind:
    """What is looked for, for error messages: its name, on disk, and what else can be given."""

    name: str
    local: str
    instead: str


BASE = Kind("base model", "local folder", "'pocket', or a folder with a Whisper checkpoint")
RUN = Kind("run", "run folder", "the --output of a fit")


def is_run_id(name: str) -> bool:
    """Whether a name has the form `OWNER/NAME[@REVISION]`, and is no path that exists."""
    return not os.path.exists(name) and bool(_RUN_ID.fullmatch(name))


def find_run(run: str | Path, local_files_only: bool = False) -> Path:
    """Return the folder of a run, for `OWNER/NAME[@REVISION]` that in the Hub's cache.

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
    """Return the folder of a Hub id in the Hub's cache; what the cache lacks is downloaded.

    Args:
        kind: Of the message if it fails.
        name: The Hub id.
        revision: Branch, tag or commit; None is its main branch.
        local_files_only: Ask nothing of the Hub.
        files: Patterns of what is wanted.

    Raises:
        UserError: If there is none, it can't be reached, or it answers what no Hub does.
    """
    if revision is None:
        _check_no_path(kind, name)
    if revision is not None and not _REVISION.fullmatch(revision):
        raise UserError(
            f"{kind.name} '{name}' at revision {revision!r:.80}: that is none; give a branch, tag "
            "or commit"
        )
    from huggingface_hub import snapshot_download  # slow, and of no use for what is here
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            name, revision=revision, local_files_only=local_files_only, allow_patterns=list(files)
        )
    except LocalEntryNotFoundError as error:
        folder = getattr(error, "snapshot_path", None) or ""
        if not folder or kind is not BASE:  # all that a base needs may be there
            what = f"{kind.name} '{name}'" + (f" at revision '{revision}'" if revision else "")
            raise UserError(_unreached(kind, what, error.__cause__, local_files_only)) from None
    except Exception as error:  # a portal, a drop or a circle is an error of many libraries
        if is_out_of_memory(error):
            raise
        raise UserError(_refused(kind, name, revision, error)) from None
    return Path(folder)


def _check_no_path(kind: Kind, name: str) -> None:
    """Refuse what is likely a mistyped path: the Hub is not asked for what is in a folder here."""
    folder, _, last = name.rpartition("/")
    if not folder or not os.path.isdir(folder):
        return
    near = get_close_matches(last, os.listdir(folder), n=1)
    raise UserError(
        f"{kind.name} '{name}' does not exist, and folder '{folder}' does"
        + (f"; did you mean '{folder}/{near[0]}'?" if near else f"; give {kind.instead},")
        + f" or, if '{name}' is on the Hub, its revision too"
        + (f": {name}@main" if kind is RUN else ": --revision main")
    )


def _unreached(kind: Kind, what: str, cause: BaseException | None, local_files_only: bool) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if local_files_only or isinstance(cause, OfflineModeIsEnabled):
        why = "local-files-only is given" if local_files_only else "HF_HUB_OFFLINE is set"
        return (
            f"{what} is no {kind.local} and not in the Hub's cache, and {why}; leave that out to "
            f"download it, or give {kind.instead}"
        )
    why = f"{type(cause).__name__}: {reason(cause)}" if cause else "no word"
    return (
        f"{what} is no {kind.local}, is not in the Hub's cache, and the Hub can't be reached "
        f"({why}); go online, or give {kind.instead}"
    )


def _refused(kind: Kind, name: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    match error:
        case HFValidationError():
            why = f"does not exist; give {kind.instead}, or a Hub id such as openai/whisper-tiny"
        case GatedRepoError():  # a RepositoryNotFoundError, too
            page = f"https://hf.co/{name}"
            why = f"is gated; ask for access on its page, {page}, and log in with: hf auth login"
        case RepositoryNotFoundError():
            why = (
                f"is no {kind.local}, and the Hub has no such repository, or a private one; "
                "check the spelling, or log in with: hf auth login"
            )
        case RevisionNotFoundError():
            page = f"https://hf.co/{name}/commits/main"
            why = f"has no revision '{revision}'; give a branch, tag or commit of {page}"
        case _:
            why = (
                f"can't be downloaded ({type(error).__name__}: {reason(error)}); what the Hub's "
                f"cache holds is as it was; try again, or give {kind.instead}"
            )
    return f"{kind.name} '{name}' {why}"
