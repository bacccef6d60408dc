"""Run folders: claiming, writing and reading them."""

import errno
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from blora_pyro.errors import UserError, reason
from blora_pyro.files import locked, new_folder, remove, sync, write_json
from blora_pyro.fitting import checkpoints
from blora_pyro.hub import find_run
from blora_pyro.models.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, HUB_FILES
from blora_pyro.posterior import Posterior, storage
from blora_pyro.runs.record import EVALUATING, FITTING, METRICS, RUN, RunRecord, state_of

CHECKPOINT, SKIPPED = checkpoints.FILE, "skipped_rows.jsonl"
UTTERANCES, STRENGTH_PLOT, REPORT = "utterances.jsonl", "strength.png", "report.html"
PLOTS, TRACKING = "diagnostics", "tracking"  # the second is a folder that trackers write to
KEPT = "keep.json"  # of an adapter that is no run
TRANSCRIPTS = "transcripts-*.json"  # of a state: base, adapted, or a strength on dev
ADAPTER = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
RESULTS = (  # names, and patterns of those of several splits and strengths
    storage.POSTERIOR_FILE,
    *ADAPTER,
    storage.DOMAIN_FOLDERS,
    METRICS,
    "metrics-*.json",
    UTTERANCES,
    "utterances-*.jsonl",
    SKIPPED,
    STRENGTH_PLOT,
    REPORT,
    KEPT,
    PLOTS,
    TRACKING,
)
HALF_WRITTEN = "posterior.new"
UNFINISHED = (CHECKPOINT, TRANSCRIPTS)
WITHOUT_STEP = {RUN, SKIPPED, TRACKING}  # files of a fit without checkpoint, but for transcripts
OWN = (
    RUN,
    *RESULTS,
    *UNFINISHED,
    f"{RUN}.new",
    "*.json.new",
    HALF_WRITTEN,
    "README.md",
    *HUB_FILES,
)
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def save_posterior(folder: Path, fitted: Posterior) -> None:
    """Write posterior and PEFT adapter; each file replaces the old one when it is complete.

    Raises:
        OSError: If they can't be written.
    """
    fresh = folder / HALF_WRITTEN
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fitted.save(fresh)
        for file in fresh.rglob("*"):
            sync(file)
        for file in fresh.iterdir():
            os.replace(file, folder / file.name)
        sync(folder)
    except SafetensorError as error:
        why = str(error).rpartition("error: ")[2]
        raise OSError(None, why, str(folder / storage.POSTERIOR_FILE)) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write_run(
    folder: Path, posterior: Posterior, record: RunRecord, metrics: Mapping[str, Any] | None = None
) -> None:
    """Write a run that is finished to an empty folder: posterior, adapter, metrics and record.

    Raises:
        UserError: If the posterior is none that can be read again, such as of an overflow.
        OSError: If that fails.
    """
    posterior.save(folder)
    try:
        Posterior.load(folder)
    except UserError as error:
        raise UserError(
            f"what is made of the adapter can't be one ({reason(error)}); give smaller weights, or "
            "other runs"
        ) from None
    if metrics:
        write_json(folder / METRICS, metrics)
    record.write(folder)


def remove_files(folder: Path, *names: str) -> None:
    """Remove files (or folders) by names or patterns, and what a killed process left of them."""
    remove(folder / HALF_WRITTEN)
    for name in names:
        for one in (*folder.glob(name), *folder.glob(f"{name}.new")):
            remove(one)


def claim(folder: Path, overwrite: bool) -> Path:
    """Make a folder for a run; files of a fit that has no checkpoint yet are removed.

    Whoever writes there holds its lock, see `locked`: what looks like a dead fit is none otherwise.

    Raises:
        UserError: If it can't be made or written, or holds something and `overwrite` is off.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".blora-pyro").touch()
        (folder / ".blora-pyro").unlink()
        ours = {f".{folder.resolve().name}.lock", ".new"}  # see `locked` and `new_folder`
        found = {path.name for path in folder.iterdir()} - ours
        left = {name.removesuffix(".new") for name in found}
        is_dead = found <= {f"{RUN}.new"}  # killed at the first write
        files = {name for name in left if not fnmatch(name, TRANSCRIPTS)}
        if is_dead or (state_of(folder) == FITTING and files <= WITHOUT_STEP):
            remove_files(folder, *left)
            left = set()
    except OSError as error:
        raise unwritable(folder, error) from None
    if left and not overwrite and state_of(folder) in (FITTING, EVALUATING):
        raise UserError(
            f"output '{folder}' holds an unfinished fit; --resume to go on with it, give another "
            "output, or --overwrite"
        )
    if left and not overwrite:
        raise UserError(f"output '{folder}' is not empty; give another, or --overwrite")
    return folder


def unwritable(output: Path, error: OSError) -> UserError:
    """Return the error of an output that can't be written."""
    what = "free some space, or " if error.errno in FULL else ""
    return UserError(f"output '{output}' can't be written ({error.strerror}); {what}give another")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that is written bit by bit.

    Raises:
        UserError: If another process holds it, or it can't be written.
    """
    with ExitStack() as ends:
        try:
            ends.enter_context(locked(folder))
        except OSError as error:
            raise unwritable(folder, error) from None
        yield


@contextmanager
def written_folder(output: Path, overwrite: bool, *read: str | Path) -> Iterator[Path]:
    """Give a folder for what a command makes, which is at `output`, whole, at the end.

    What is there is replaced, but for files of nobody here; see `new_folder`.

    Args:
        output: The folder.
        overwrite: Replace what is there.
        read: Folders of what the command reads, and Hub ids.

    Raises:
        UserError: If it can't be written, holds something and `overwrite` is off, another process
            writes there, or something that is read would be replaced.
    """
    for one in read:
        if Path(one).exists() and Path(one).resolve().is_relative_to(output.resolve()):
            raise UserError(
                f"output {output} is the run's own folder, or its base's, or holds them ({one}); "
                "give another"
            )
    try:
        with new_folder(output, OWN) as folder:
            if output.exists():
                claim(output, overwrite)
            yield folder
    except SafetensorError as error:
        full = OSError(None, reason(error).rpartition("error: ")[2])
        raise unwritable(output, full) from None
    except OSError as error:
        at = Path(str(error.filename or output)).resolve()
        mine = any(part.startswith(f".{output.resolve().name}.") for part in at.parts)
        if not (mine or at.is_relative_to(output.resolve()) or output.resolve().is_relative_to(at)):
            raise
        raise unwritable(output, error) from None


def claim_file(file: Path, overwrite: bool) -> None:
    """Check that a file may be written, before there is anything to write.

    Raises:
        UserError: If it can't be, or is there and `overwrite` is off.
    """
    if file.is_dir() or not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise UserError(f"output '{file}' can't be written; give a file in a folder that you own")
    if file.exists() and not overwrite:
        raise UserError(f"output '{file}' is there already; give another, or --overwrite")


def default_output(run: str | Path, name: str, option: str) -> Path:
    """Return the path of an output in the run's own folder.

    Args:
        run: The run as the user gave it.
        name: Name of the output.
        option: The option that gives another path.

    Raises:
        UserError: If the run is on the Hub.
    """
    if not Path(run).is_dir():
        raise UserError(f"{run} is on the Hub and has no folder for {name}; give {option}")
    return Path(run) / name


def read_run(
    folder: str | Path,
    device: str = "cpu",
    prior: str | None = None,
    *,
    pooled: bool = False,
    local_files_only: bool = False,
    trust_prior_file: bool = False,
) -> tuple[Posterior, RunRecord]:
    """Return the posterior of a run folder, and what its `run.json` says.

    Args:
        folder: Folder of the run, or `OWNER/NAME[@REVISION]` on the Hub, see `find_run`.
        device: A torch device, for the configuration.
        prior: File of the prior, if it is a user's own and its code is to be run.
        pooled: Allow a run of several domains with factors of their own.
        local_files_only: Look for a Hub id in the Hub's local cache alone.
        trust_prior_file: Run the file of the prior that the run names; see `Posterior.load`.

    Raises:
        UserError: If it is no run folder, unfinished, or damaged, or has several domains.
    """
    found = find_run(folder, local_files_only)
    unfinished = UserError(
        f"the fit in {folder} is not finished; go on with: blora-pyro fit --resume --output "
        f"{shlex.quote(str(folder))}"
    )
    if state_of(found) == FITTING:
        raise unfinished
    posterior = Posterior.load(found, prior, trust_prior_file)
    if posterior.pooling is not None and not pooled:
        raise UserError(
            f"{folder} was fitted with pooling {posterior.pooling.kind}, of which evaluate, "
            "transcribe and merge can take a domain, and nothing else can; give a run with pooling "
            "complete"
        )
    record = RunRecord.read(found)
    if record.config is None:
        raise UserError(f"{found / RUN} is missing or damaged (no 'config'); fit again")
    if record.awaits_contract:
        raise unfinished
    record.config = replace(record.config, device=device)
    return posterior, record
