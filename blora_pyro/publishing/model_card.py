"""The model card of a run: its metadata for the Hub, and what `model_card.md.jinja` shows."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from blora_pyro.data import is_hub_id
from blora_pyro.declarations import declarations, default_of, flag_of
from blora_pyro.hub import is_run_id
from blora_pyro.languages import prompt_codes
from blora_pyro.options import MACHINE_OPTIONS, POCKET, FitConfig
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.storage import DOMAIN_FOLDERS
from blora_pyro.runs.report import fit_tables, prune_tables
from blora_pyro.tables import Table, report_markdown, text_columns

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

    Results are also in its metadata (`model-index`) if they were measured on data sets of the Hub:
    WER and CER, in percent. `about` and `metrics` are the content of `run.json` and of
    `metrics.json`, empty if nothing was measured; all three have public names only.
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
        has_spread=any(bool(value.any()) for value in posterior.stddev.values()),
        origin=_origin(about),
        measured=_measured(about, metrics),
        fit=_fit_table(posterior, about),
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
        name, _, config = source.partition(":")
        for measure in HUB_METRICS:
            rate = both["adapted"].get(measure)
            if not is_hub_id(source) or rate is None or rate["rate"] is None:
                continue
            low, high = (f"{100 * end:.1f}" for end in rate["interval"])
            yield EvalResult(
                task_type=TASK,
                dataset_type=name,
                dataset_name=name,
                dataset_config=config or None,
                dataset_split=metrics.get("split", "test"),
                metric_type=measure,
                metric_value=round(100 * rate["rate"], 2),
                metric_name=f"{measure.upper()} in % [95% interval {low}, {high}], "
                f"normalizer {metrics.get('normalizer', 'unknown')}",
            )


def _measured(about: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Return the tables of what was measured as Markdown, "" if nothing was."""
    if "size" in metrics:
        before = f"The full adapter, before, and this one, pruned: {_origin(about)}"
        return report_markdown([before, *prune_tables(metrics)])
    if not any(metrics.get(name) for name in ("new_domain", "domains", "backward")):
        return ""
    parts = fit_tables(metrics)
    if "adapter" not in metrics:
        parts.append(
            "measured by an older version of blora-pyro, which did not keep the adapter's "
            "fingerprint with the results"
        )
    return report_markdown(parts)


def _origin(about: Mapping[str, Any]) -> str:
    """Return how a run was made of others, "" if it was fitted."""
    if pruned := about.get("pruned"):
        ways = ("snr", "rank", "sparsity")
        kept = [f"{name} {pruned[name]}" for name in ways if pruned[name] is not None]
        return f"`blora-pyro prune` of {pruned['from']}, by {', '.join(kept)}."
    if combined := about.get("combined"):
        return f"`blora-pyro combine`, {combined['method']} of {', '.join(combined['from'])}."
    return ""


def _fit_table(posterior: Posterior, about: Mapping[str, Any]) -> str:
    """Return sizes of the fit, and its options, as Markdown tables."""
    config = dict(about["config"]) | {"base": posterior.base, "revision": posterior.revision}
    config["guide"] = config["guide"] or posterior.family.guide
    sizes = {
        "made by": _origin(about) + " Below: the first one's fit." * ("combined" in about),
        "posteriors before": ", ".join(link["run"] for link in about.get("chain", ())),
        "training utterances": about.get("training_utterances"),
        "target tokens N": about.get("training_tokens"),
        "effective temperature T = beta · N": about.get("temperature"),
        "strength that keeps the contract": posterior.strength if "kept" in about else None,
        "adapter weights": f"{posterior.num_weights:,}",
        "versions": ", ".join(f"{n} {v}" for n, v in about.get("versions", {}).items()),
    }
    table, options = Table(text_columns("fit", "value")), Table(text_columns("option", "value"))
    for name, value in sizes.items():
        if text := _text(value):
            table.add_row(name, text)
    for name in declarations(FitConfig):
        value = config.get(name)
        is_off = value is False or (value == 0 and isinstance(default_of(FitConfig, name), float))
        if (text := _text(value)) and not is_off and name not in MACHINE_OPTIONS:
            options.add_row(flag_of(FitConfig, name), text)
    return report_markdown([table, options])


def _text(value: Any) -> str:
    """Return an option's value as text, "" for one that is not set."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={_text(one)}" for name, one in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value}"
