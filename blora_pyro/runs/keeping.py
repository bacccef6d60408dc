"""An adapter that exists, turned down to the strength that keeps a contract: no fit is needed."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from blora_pyro.declarations import suggestion
from blora_pyro.errors import UserError
from blora_pyro.files import write_json
from blora_pyro.hub import RUN as RUN_KIND
from blora_pyro.hub import download, is_run_id
from blora_pyro.models import base_of
from blora_pyro.models.base import map_languages
from blora_pyro.models.folders import ADAPTER_CONFIG, read_json_of
from blora_pyro.options import KEEP_OPTIONS, FitConfig
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.lora import read_lora, write_weaker
from blora_pyro.posterior.storage import POSTERIOR_FILE
from blora_pyro.posterior.strength import BASE, SCALE, at_strength
from blora_pyro.runs.contracts import check_dev_sets, keep_contract, verdict
from blora_pyro.runs.folders import (
    ADAPTER,
    KEPT,
    STRENGTH_PLOT,
    read_run,
    write_run,
    written_folder,
)
from blora_pyro.runs.listeners import Listener, heard_by
from blora_pyro.runs.loading import Loader
from blora_pyro.runs.record import FINISHED, METRICS, RUN, RunRecord
from blora_pyro.runs.report_page import write_own_report
from blora_pyro.runs.scoring import Scoring, compare, evaluation_sets
from blora_pyro.runs.shown import ShownRun
from blora_pyro.runs.strength_curves import save_strength_plot, used_directions
from blora_pyro.sources import as_domains, as_sources


def keep_adapter(
    adapter: str | Path,
    keep: Any,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: Listener | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Find how far an adapter must be turned down to keep a contract, and write it like that.

        keep_adapter("someone/lora", 1, "kept", data="calls", backward={"de": "german"})

    Args:
        adapter: A run, or any LoRA of a Whisper that PEFT wrote: its folder or Hub id.
        keep: The contract, see `FitConfig`.
        output: Folder for the adapter at that strength: a run folder if it is a run, else a PEFT
            adapter, with `keep.json` and `metrics.json`; None writes nothing.
        overwrite: Write into a folder that holds something.
        progress: Listener to the stages; None is bars in a notebook.
        options: Those of `FitConfig` that are in `options.KEEP_OPTIONS`. For a run those that are
            not given are those of its fit, and `data` is where the new domain's dev and test sets
            are; for another adapter `data` and `backward` must be given, and the base is what it
            names.

    Returns:
        `kept`, see `keep_contract`, and `metrics` of the test sets, see `compare`, with `contract`.

    Raises:
        UserError: If something can't be read or written, or see `check_dev_sets`, `read_lora` and
            `keep_contract`.
    """
    for one in options:
        if one not in KEEP_OPTIONS:
            hint = suggestion(one, KEEP_OPTIONS)
            raise TypeError(f"keep_adapter() has no option '{one}'{hint}")
    progress, name = heard_by(progress), Path(adapter).as_posix()
    folder = _find(name, bool(options.get("local_files_only")))
    posterior, record, config = None, None, None
    if (folder / POSTERIOR_FILE).is_file():
        posterior, record = read_run(folder)
        config = _config_of_run(record.resolved, keep, options)
    else:
        config = _config_of_lora(name, folder, keep, options)
    check_dev_sets(config)
    written: AbstractContextManager[Path | None] = nullcontext()
    if output is not None:
        written = written_folder(Path(output), overwrite, folder, config.base)
    with written as target:  # which is refused before anything is scored
        return _kept(name, folder, config, posterior, record, target, output, progress)


def _kept(
    name: str,
    folder: Path,
    config: FitConfig,
    posterior: Posterior | None,
    record: RunRecord | None,
    target: Path | None,
    output: str | Path | None,
    progress: Listener,
) -> dict[str, Any]:
    """Choose the strength, score the test sets, and write into `target`, which `output` becomes."""
    progress.stage("loading")
    base = base_of(config)
    if posterior is None:
        posterior = read_lora(name, folder, base.net, config.base, config.revision)
    map_languages(base.net, {**posterior.language_map, **base.language_map})
    loader = Loader(base, config, progress.features, progress.note)
    sets = {split: evaluation_sets(base, config, loader, split) for split in ("dev", "test")}
    loader.report_skipped()
    dev, test = (Scoring(base, sets[one], config.normalizer, progress) for one in sets)

    directions, by = None, config.strength_by or SCALE
    if by == BASE:
        directions = used_directions(base, config, posterior, progress)
    kept = keep_contract(dev, posterior, config, directions=directions)
    posterior = at_strength(posterior, kept["strength"], by, directions)
    before, after = test.score(None, "test, the base"), test.score(posterior, "test, adapted")
    metrics = compare(posterior, before, after, config)
    metrics |= verdict(kept, metrics)
    if target is not None:
        if record is not None:
            record = replace(record, state=FINISHED, options=None, config=config, kept=kept)
            write_run(target, posterior, record, metrics)
            shown = ShownRun(str(output), FINISHED, record, posterior, metrics)
            write_own_report(target, shown)
        else:
            write_weaker(name, folder, target, kept["strength"], directions)
            write_json(target / KEPT, {"adapter": name, **kept})
            write_json(target / METRICS, metrics)
        save_strength_plot(target / STRENGTH_PLOT, kept["curve"])
    return {"kept": kept, "metrics": metrics}


def _find(name: str, local_files_only: bool) -> Path:
    """Return the folder of an adapter, of a Hub id that in the Hub's cache."""
    if not is_run_id(name):
        return Path(name)
    repo_id, _, revision = name.partition("@")
    wanted = (POSTERIOR_FILE, RUN, *ADAPTER)
    return download(RUN_KIND, repo_id, revision or None, local_files_only, wanted)


def _config_of_run(config: FitConfig, keep: Any, options: dict[str, Any]) -> FitConfig:
    """Return the configuration of a run with the contract, and other sets and ways to score."""
    data = options.pop("data", None)
    if data is not None:  # what it was fitted to stays
        first, *_ = as_sources(as_domains(data))
        options = {"test": first, "dev": first, **options}
    return replace(config, keep=keep, **options)


def _config_of_lora(name: str, folder: Path, keep: Any, options: dict[str, Any]) -> FitConfig:
    """Return a configuration for an adapter that names its base, and nothing else."""
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{name} is neither a run folder nor a PEFT adapter (no {POSTERIOR_FILE}, no "
            f"{ADAPTER_CONFIG}); give one of them"
        )
    if missing := [one for one in ("data", "backward") if one not in options]:
        raise UserError(
            f"{name} is an adapter that was not fitted here, and {' and '.join(missing)} is not "
            "given; give data, the new domain, and backward, what the base already knew"
        )
    stored = read_json_of(name, folder, ADAPTER_CONFIG)
    named = {"base": stored.get("base_model_name_or_path"), "revision": stored.get("revision")}
    if "base" not in options and not isinstance(named["base"], str):
        raise UserError(f"{name} is an adapter that does not name its base; give base")
    return FitConfig(**{**({} if "base" in options else named), "keep": keep, **options})
