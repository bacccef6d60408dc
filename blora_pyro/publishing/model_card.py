"""The model card of a run: its metadata for the Hub, and what `model_card.md.jinja` shows."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from blora_pyro.data import is_hub_id
from blora_pyro.hub import is_run_id
from blora_pyro.languages import prompt_codes
from blora_pyro.options import BUILT_IN, POCKET
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.storage import DOMAIN_FOLDERS
from blora_pyro.runs.report import fit_tables, prune_tables
from blora_pyro.runs.report_page import may_be_a_prior
from blora_pyro.runs.shown import about_tables, origin
from blora_pyro.tables import report_markdown

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
TASK = "automatic-speech-recognition"
HUB_METRICS = ("wer", "cer")  # MER of the Hub is another measure, the match error rate
ISO_CODES = {"jw": "jv"}  # where Whisper's code is not ISO's


def model_card(
    repo_id: str,
    posterior: Posterior,
    about: Mapping[str, Any],
    metrics: dict[str, Any],
    revision: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """Return the card of a run, with the metadata that the Hub reads.

    Results are also in its metadata, as `model-index`: WER and CER in percent, of every set with
    texts of its own. The `type` of a set is its id on the Hub, `local`, or `blora-pyro-pocket`.

    Args:
        repo_id: The repository that the card is for.
        posterior: The run's.
        about: The content of `run.json`, as of the next, with public names only.
        metrics: The content of `metrics.json`; empty if nothing was measured.
        revision: Branch that the run is on; None is the main one.
        license: License of the adapter, as the Hub calls it; None leaves it out.
    """
    named = [about.get("language"), *about.get("domain_languages", {}).values()]
    prompts = {name: prompt_codes(name, posterior.language_map) for name in named if name}
    codes = dict.fromkeys(code for name in named if name for code in name.split("-"))
    languages = [ISO_CODES.get(code, code) for code in codes]
    sources = about["config"]["data"]
    sources = sources.values() if isinstance(sources, Mapping) else sources
    on_hub = [name.partition(":")[0] for name in dict.fromkeys(sources) if is_hub_id(name)]
    measured = {measure for _, both in _sets(about, metrics) for measure in both["adapted"]}
    results = list(_eval_results(about, metrics))
    data = ModelCardData(
        base_model=posterior.base if is_run_id(posterior.base) else None,
        base_model_relation="adapter" if is_run_id(posterior.base) else None,
        library_name="peft",
        pipeline_tag=TASK,
        language=languages or None,
        license=license,
        datasets=on_hub or None,
        metrics=[measure for measure in HUB_METRICS if measure in measured] or None,
        tags=["blora-pyro", "whisper", "lora", "bayesian", "variational-inference"],
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    domains = posterior.pooling.domains if posterior.pooling else ()
    is_shared = posterior.pooling is None or posterior.pooling.is_shared
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        revision=revision,
        address=repo_id + (f"@{revision}" if revision else ""),
        posterior=posterior,
        about=about,
        metrics=metrics,
        languages=languages,
        prompts={name: one for name, one in prompts.items() if len(one) > 1 or one != (name,)},
        domains=domains,
        subfolder=None if is_shared else f"{DOMAIN_FOLDERS}/{domains[0]}",
        is_pocket=posterior.base == POCKET,
        may_be_a_prior=may_be_a_prior(posterior),
        has_spread=any(bool(value.any()) for value in posterior.stddev.values()),
        origin=origin(about),
        measured=_measured(about, metrics),
        fit=report_markdown(about_tables(about, posterior)),
    )


def _sets(
    about: Mapping[str, Any], metrics: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (source, what was measured on it before and after) of every set."""
    config, data = about["config"], about["config"]["data"]
    if both := metrics.get("new_domain"):
        yield both["name"], both
    for name, both in metrics.get("domains", {}).items():
        yield (data[name] if isinstance(data, Mapping) else name), both
    for name, both in metrics.get("backward", {}).items():
        yield (config["backward"] or {}).get(name, name), both


def _eval_results(about: Mapping[str, Any], metrics: Mapping[str, Any]) -> Iterator[EvalResult]:
    for source, both in _sets(about, metrics):
        is_of_one_domain = about["config"].get("pooling") == "none" and source.endswith(")")
        if both.get("drift") or is_of_one_domain:  # the first is against the base's own transcripts
            continue
        size, dataset = both["adapted"].get("utterances"), _dataset(source)
        for measure in HUB_METRICS:
            rate = both["adapted"].get(measure)
            if rate is None or rate["rate"] is None:
                continue
            low, high = (f"{100 * end:.1f}" for end in rate["interval"])
            about_it = [f"95% interval {low}, {high}", *([f"{size} utterances"] if size else [])]
            yield EvalResult(
                task_type=TASK,
                **dataset,
                dataset_split=metrics.get("split", "test"),
                metric_type=measure,
                metric_value=round(100 * rate["rate"], 2),
                metric_name=f"{measure.upper()} in % [{'; '.join(about_it)}], "
                f"normalizer {metrics.get('normalizer', 'unknown')}",
            )


def _dataset(source: str) -> dict[str, Any]:
    """Return name, type and configuration of a set; the Hub tells sets apart by the last two."""
    if is_hub_id(source):
        name, _, config = source.partition(":")
        kind = name
    elif source in BUILT_IN:
        name, kind, config = (
            f"{source}, a corpus of the pocket Whisper",
            "blora-pyro-pocket",
            source,
        )
    else:
        name, kind, config = source, "local", source
    return {"dataset_name": name, "dataset_type": kind, "dataset_config": config or None}


def _measured(about: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Return the tables of what was measured as Markdown, "" if nothing was."""
    if "size" in metrics:
        before = f"The full adapter, before, and this one, pruned: {origin(about)}"
        return report_markdown([before, *prune_tables(metrics, sizes=True)])
    if not any(metrics.get(name) for name in ("new_domain", "domains", "backward")):
        return ""
    parts = fit_tables(metrics, sizes=True)
    if "adapter" not in metrics:
        parts.append(
            "measured by an older version of blora-pyro, which did not keep the adapter's "
            "fingerprint with the results"
        )
    return report_markdown(parts)
