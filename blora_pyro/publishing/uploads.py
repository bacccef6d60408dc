"""Upload of a run to the Hugging Face Hub, without anything private.

The posterior is saved anew, `run.json` has the parts that commands read, and `metrics.json` is
copied; of every local path, to data, code or runs, only the last part is kept. The transcripts of
the test sets (`utterances.jsonl`), checkpoints, plots and the report, which has these transcripts,
are not uploaded; the report is if that is asked for, without audio.
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
)

from blora_pyro.data import DOMAINS, LANGUAGES, is_hub_id
from blora_pyro.errors import UserError
from blora_pyro.families import is_code
from blora_pyro.files import write_json
from blora_pyro.hub import REPO_ID, is_run_id
from blora_pyro.options import POCKET
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.storage import DOMAIN_FOLDERS, POSTERIOR_FILE
from blora_pyro.publishing.model_card import model_card
from blora_pyro.runs.folders import ADAPTER, REPORT, UTTERANCES, read_run
from blora_pyro.runs.measurements import read_metrics
from blora_pyro.runs.record import FINISHED, METRICS, RUN, RunRecord
from blora_pyro.runs.report_page import report_html
from blora_pyro.runs.scoring import domain_set
from blora_pyro.runs.shown import ShownRun
from blora_pyro.runs.utterances import read_utterances

UPLOADED = (*ADAPTER, POSTERIOR_FILE, RUN, METRICS, REPORT, f"{DOMAIN_FOLDERS}/*", "README.md")


def push_run(
    run: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    base: str | None = None,
    license: str | None = None,
    with_report: bool = False,
) -> str:
    """Upload a run to the Hub, with a model card, over files of the same names.

    Args:
        run: A run folder.
        repo_id: `OWNER/NAME`; created if it does not exist.
        private: Create a private repository; None is the owner's default.
        revision: Branch to write to, created if it does not exist; None is the main one.
        commit_message: None is a general one.
        create_pr: Open a pull request instead of writing to the main branch.
        token: Access token; None is that of `hf auth login`, or `HF_TOKEN`.
        base: The base's id on the Hub, if the fit had it in a local folder; None is the fit's own.
        license: License of the adapter, as the Hub calls it (`apache-2.0`); None leaves it out.
        with_report: Upload the report, too: with transcripts of the test sets, without audio.

    Returns:
        The URL of the commit, or of the pull request.

    Raises:
        UserError: If the run can't be read or made public, or the Hub refuses.
    """
    if create_pr and revision is not None:
        raise UserError(f"create_pr and revision '{revision}' are given; give one")
    with TemporaryDirectory() as folder:
        about = {"revision": revision, "base": base, "license": license}
        write_public_run(run, Path(folder), repo_id, **about, with_report=with_report)
        api = HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or "Upload an adapter and its posterior",
                revision=revision,
                create_pr=create_pr,
                allow_patterns=list(UPLOADED),
                delete_patterns=list(UPLOADED),
            )
        except (HTTPError, OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
            raise UserError(_refused(repo_id, error)) from None
    return commit.pr_url or commit.commit_url


def _refused(repo_id: str, error: Exception) -> str:
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # huggingface_hub says only which file it was
    reason = " ".join(str(error).split())[:300]
    match error:
        case OfflineModeIsEnabled():
            return f"'{repo_id}' can't be uploaded, for HF_HUB_OFFLINE is set; leave that out"
        case HfHubHTTPError() if (status := error.response.status_code) in (401, 403):
            return (
                f"the Hub lets no one write to '{repo_id}' as you are logged in ({status}); log in "
                "with a token that may: hf auth login, or HF_TOKEN; or give a repository of your "
                "own"
            )
        case HFValidationError():
            return f"'{repo_id}' can't be a repository of the Hub ({reason}); give OWNER/NAME"
    return (
        f"'{repo_id}' can't be uploaded ({type(error).__name__}: {reason}); try again, or write "
        "what would be uploaded to a folder: --output"
    )


def write_public_run(
    run: str | Path,
    folder: Path,
    repo_id: str,
    *,
    revision: str | None = None,
    base: str | None = None,
    license: str | None = None,
    with_report: bool = False,
) -> None:
    """Write what `push_run` uploads to an existing folder, for a repository of this id.

    Raises:
        UserError: If the run can't be read, or its base is a local folder and `base` is None.
    """
    if not REPO_ID.fullmatch(repo_id):
        raise UserError(f"repository is '{repo_id}'; give OWNER/NAME")
    if is_run_id(Path(run).as_posix()):
        raise UserError(f"{run} is no folder here; give a run folder")
    posterior, record = read_run(run, pooled=True)
    about = replace(record, options=None, seconds=None, other={}).to_json()
    config = about["config"]
    names = _public_names(config, about)
    config["base"] = _public_base(config["base"], base)
    config["revision"] = config["revision"] if base is None else None
    config["local_files_only"] = False
    content = _public(about, names)
    is_measured = (Path(run) / METRICS).is_file()
    metrics = read_metrics(Path(run), record, posterior) if is_measured else {}
    metrics = _public(metrics, names)
    family = posterior.family
    prior, guide = (names.get(name, name) for name in (family.prior, family.guide))
    family = replace(family, prior=prior, guide=guide, prior_args=_public(family.prior_args, names))
    posterior = replace(posterior, base=config["base"], revision=config["revision"], family=family)
    posterior.save(folder)
    write_json(folder / RUN, content)
    if metrics:
        write_json(folder / METRICS, metrics)
    if with_report:
        rows = read_utterances(run) if (Path(run) / UTTERANCES).is_file() else []
        html = _public_report(repo_id, posterior, content, metrics, rows, names)
        (folder / REPORT).write_text(html, encoding="utf-8")
    card = model_card(repo_id, posterior, content, metrics, revision, license)
    (folder / "README.md").write_text(str(card).rstrip() + "\n", encoding="utf-8")


def _public_base(name: str, given: str | None) -> str:
    if given is not None and given != POCKET and not REPO_ID.fullmatch(given):
        raise UserError(f"base is '{given}'; give its id on the Hub, OWNER/NAME")
    if given is None and name != POCKET and not is_run_id(name):
        raise UserError(
            f"the run was fitted on a local folder, '{name}', which no one else has; give base, "
            "its id on the Hub"
        )
    return given or name


def _public_names(config: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, str]:
    """Return local path -> its last part, with a number before it where two are the same.

    A set that was given no name is called by its path.
    """
    data, backward = config["data"], config["backward"] or {}
    domains = list(data)  # names, or sources without names
    sources = [*domains, *backward, *backward.values(), config["test"], config["dev"]]
    sources += data.values() if isinstance(data, Mapping) else ()
    local = [name for name in sources if name is not None and _is_local_set(name)]
    runs = [config["prior_from"], *(link["run"] for link in about.get("chain", ()))]
    runs += [about.get("pruned", {}).get("from"), *about.get("combined", {}).get("from", ())]
    local += [name for name in runs if name and not is_run_id(name)]
    local += [name for name in (config["prior"], config["guide"]) if is_code(name)]
    names = _last_parts(local)
    pairs = [(name, domain) for name in backward for domain in domains]
    return names | {f"{one} ({of})": f"{names.get(one, one)} ({of})" for one, of in pairs}


def _is_local_set(name: str) -> bool:
    is_object = name.startswith("<")  # of `datasets`, described
    return not (is_object or name in (*DOMAINS, *LANGUAGES) or is_hub_id(name))


def _last_parts(paths: Iterable[str]) -> dict[str, str]:
    names: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for path in sorted(set(paths), key=len):  # a path of one part keeps its name
        last = PureWindowsPath(os.path.abspath(path)).name
        seen[last] += 1
        names[path] = f"{seen[last]}-{last}" if seen[last] > 1 else last
    return names


def _public(content: Any, names: Mapping[str, str]) -> Any:
    """Return JSON with public names for local ones, and the last part of other absolute paths."""
    if isinstance(content, Mapping):
        return {_public(key, names): _public(value, names) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_public(value, names) for value in content]
    if not isinstance(content, str):
        return content
    windows, posix = PureWindowsPath(content), PurePosixPath(content)
    is_path = windows.is_absolute() or posix.is_absolute()
    return names.get(content, windows.name if is_path else content)


def _public_report(
    name: str,
    posterior: Posterior,
    about: dict[str, Any],
    metrics: Mapping[str, Any],
    rows: Iterable[Mapping[str, Any]],
    names: Mapping[str, str],
) -> str:
    """Return the report of a run with its texts, and with public names for local ones."""
    names = {**names, **{domain_set(one): domain_set(new) for one, new in names.items()}}
    places = ("set", "audio", "origin")
    public = [{**row, **_public({key: row.get(key) for key in places}, names)} for row in rows]
    run = ShownRun(name, FINISHED, RunRecord.from_json(about), posterior, {**metrics}, public)
    return report_html([run], with_audio=False)
