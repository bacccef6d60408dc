"""The model card of a run: what it is, what was measured, how to use it, where it ends."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from blora_pyro.data import is_hub_id
from blora_pyro.hub import is_run_id
from blora_pyro.options import POCKET
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.storage import DOMAIN_FOLDERS
from blora_pyro.runs.report import fit_tables, prune_tables
from blora_pyro.tables import report_markdown

TASK = "automatic-speech-recognition"
HUB_METRICS = ("wer", "cer")  # MER of the Hub is another measure, the match error rate
ISO_CODES = {"jw": "jv"}  # where Whisper's code is not ISO's
REGULARIZERS = ("distillation", "ewc", "average_from", "spec_augment", "max_grad_norm")


def model_card(
    repo_id: str,
    posterior: Posterior,
    about: Mapping[str, Any],
    metrics: dict[str, Any],
    revision: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """The card of a run, with the metadata that the Hub reads.

    The results are in its metadata, too (`model-index`), where anyone can get at what they were
    measured on: WER and CER, in percent, on data sets of the Hub.

    Args:
        repo_id: Where it will be on the Hub.
        posterior: Of the run, under names for all the world.
        about: What `run.json` holds, likewise.
        metrics: What `metrics.json` holds, likewise; nothing if nothing was measured.
        revision: Its branch there.
        license: Of the adapter, as the Hub calls it.
    """
    codes = _languages(about)
    measured = {measure for _, both in _sets(about, metrics) for measure in both["adapted"]}
    results = list(_eval_results(about, metrics))
    data = ModelCardData(
        base_model=posterior.base if is_run_id(posterior.base) else None,
        base_model_relation="adapter" if is_run_id(posterior.base) else None,
        library_name="peft",
        pipeline_tag=TASK,
        language=codes or None,
        license=license,
        datasets=_hub_data_sets(about) or None,
        metrics=[measure for measure in HUB_METRICS if measure in measured] or None,
        tags=["blora-pyro", "whisper", "lora", "bayesian", "variational-inference"],
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    parts = [
        _title(repo_id, posterior, codes),
        _measured(about, metrics),
        _use(repo_id, posterior, about, revision),
        _fit(posterior, about),
        _limits(posterior, about, metrics),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _languages(about: Mapping[str, Any]) -> list[str]:
    """ISO codes of what the training data are in."""
    named = [about["language"], *about.get("domain_languages", {}).values()]
    codes = [code for name in named if name for code in name.split("-")]
    return [ISO_CODES.get(code, code) for code in dict.fromkeys(codes)]


def _hub_data_sets(about: Mapping[str, Any]) -> list[str]:
    data = about["config"]["data"]
    sources = list(data.values()) if isinstance(data, Mapping) else data
    return [name.partition(":")[0] for name in dict.fromkeys(sources) if is_hub_id(name)]


def _sets(
    about: Mapping[str, Any], metrics: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(source, what was measured on it before and after) of every set."""
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


def _title(repo_id: str, posterior: Posterior, codes: Sequence[str]) -> str:
    speech = f" for speech in {' and '.join(codes)}" if codes else ""
    return (
        f"# {repo_id.rpartition('/')[2]}\n\n"
        f"A low-rank adapter of Whisper (`{posterior.base}`){speech}, fitted with blora-pyro by "
        "variational inference ([BLoRA](https://arxiv.org/abs/2510.18723)): to learn a new domain "
        "and forget little. `adapter_model.safetensors` is the posterior mean, an ordinary PEFT "
        "adapter; `posterior.safetensors` has mean and standard deviation of every weight."
    )


def _measured(about: Mapping[str, Any], metrics: dict[str, Any]) -> str:
    if "size" in metrics:
        what = f"The full adapter, before, and this one, pruned: {_origin(about)}"
        return f"## Measured\n\n{what}\n\n{report_markdown(prune_tables(metrics))}"
    if not _is_measured(metrics):
        return "## Measured\n\nNothing: there was no evaluation, or no set to evaluate on."
    return f"## Measured\n\n{report_markdown(fit_tables(metrics))}"


def _is_measured(metrics: Mapping[str, Any]) -> bool:
    return any(metrics.get(name) for name in ("new_domain", "domains", "backward"))


def _origin(about: Mapping[str, Any]) -> str:
    if pruned := about.get("pruned"):
        ways = ("snr", "rank", "sparsity")
        kept = [f"{name} {pruned[name]}" for name in ways if pruned[name] is not None]
        return f"`blora-pyro prune` of {pruned['from']}, by {', '.join(kept)}."
    if combined := about.get("combined"):
        return f"`blora-pyro combine`, {combined['method']} of {', '.join(combined['from'])}."
    return ""


def _use(repo_id: str, posterior: Posterior, about: Mapping[str, Any], revision: str | None) -> str:
    place = repo_id + (f"@{revision}" if revision else "")
    at = f', revision="{revision}"' if revision else ""
    pooling = posterior.pooling
    domain = pooling.domains[0] if pooling is not None else ""
    if pooling is not None and not pooling.is_shared:
        at += f', subfolder="{DOMAIN_FOLDERS}/{domain}"'
    base = f'"{posterior.base}"' + (f', revision="{posterior.revision}"' * bool(posterior.revision))
    lines = [
        "from peft import PeftModel",
        "from transformers import WhisperForConditionalGeneration\n",
        f"whisper = WhisperForConditionalGeneration.from_pretrained({base})",
        f'whisper = PeftModel.from_pretrained(whisper, "{repo_id}"{at})',
    ]
    if posterior.base == POCKET:
        lines[0] = "from blora_pyro.data import MODEL_DIR\n" + lines[0]
        lines[2] = lines[2].replace(f'"{POCKET}"', "MODEL_DIR")
    commands = [
        f"blora-pyro transcribe talk.wav --adapter {place}",
        f"blora-pyro merge {place} merged  # a plain Whisper checkpoint",
    ]
    if _has_spread(posterior) and not _origin(about):
        commands.append(
            f"blora-pyro fit --data more --prior-from {place}  # this posterior as the prior"
        )
    if pooling is not None:
        commands = [f"{line.partition('  #')[0]} --domain {domain}" for line in commands[:2]]
    return "\n".join(
        [
            "## Use\n\nWith PEFT and transformers:\n\n```python",
            *lines,
            "```\n\nWith blora-pyro:\n\n```bash",
            *commands,
            f'```\n\nIn Python `blora_pyro.Posterior.load("{place}")` is the posterior.'
            f"{_prompt(about)}{_subfolders(posterior)}",
        ]
    )


def _has_spread(posterior: Posterior) -> bool:
    return any(bool(value.any()) for value in posterior.stddev.values())


def _prompt(about: Mapping[str, Any]) -> str:
    if "-" not in (about["language"] or ""):
        return ""
    tokens = "".join(f"<|{code}|>" for code in about["language"].split("-"))
    return f" The training data were prompted with the tokens of both languages, `{tokens}`."


def _subfolders(posterior: Posterior) -> str:
    if posterior.pooling is None:
        return ""
    names = ", ".join(f"`{DOMAIN_FOLDERS}/{name}`" for name in posterior.pooling.domains)
    return f" Every domain has an adapter of its own, in {names}."


def _fit(posterior: Posterior, about: Mapping[str, Any]) -> str:
    config, family = about["config"], posterior.family
    arguments = config["prior_args"].items()
    prior = config["prior"] + "".join(f", {name} {value}" for name, value in arguments)
    data = config["data"]
    sources = [f"{n}={s}" for n, s in data.items()] if isinstance(data, Mapping) else data
    rows = {
        "made by": _origin(about) + " Below: the first one's fit." * ("combined" in about),
        "base": posterior.base + (f" at {posterior.revision}" * bool(posterior.revision)),
        "training data": ", ".join(sources),
        "pooling of the domains": config["pooling"],
        "utterances": about.get("training_utterances"),
        "target tokens N": about.get("training_tokens"),
        "prior": prior,
        "guide": config["guide"] or family.guide,
        "posteriors before": ", ".join(link["run"] for link in about.get("chain", ())),
        "beta (weight of the KL)": f"{config['beta']:.4g}",
        "effective temperature T = beta · N": _form(about.get("temperature")),
        "rank, alpha": f"{posterior.rank}, {posterior.alpha:g}",
        "target modules": config["target_modules"],
        "adapter weights": f"{posterior.num_weights:,}",
        "steps, batch size": f"{config['steps']}, {config['batch_size']}",
        "peak learning rate, schedule": f"{config['lr']:g}, {config['schedule']}",
        "gradient estimator": config["estimator"],
        **{name.replace("_", " "): config[name] or None for name in REGULARIZERS},
        "seed": config["seed"],
        "versions": ", ".join(f"{n} {v}" for n, v in about.get("versions", {}).items()),
    }
    texts = {
        name: f"{value}".replace("|", "\\|") for name, value in rows.items() if value is not None
    }
    lines = [f"| {name} | {text} |" for name, text in texts.items() if text]
    return "\n".join(["## How it was fitted\n", "| | |", "|---|---|", *lines])


def _form(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _limits(posterior: Posterior, about: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    lines = []
    if _is_measured(metrics):
        lines.append(
            "The error rates are those of the sets in the table, and of no others. The intervals "
            "are over utterances of one fit; another seed may lie outside of them."
        )
    if backward := metrics.get("backward"):
        lines.append(
            f"What was forgotten was measured on {', '.join(backward)}, and nowhere else: of other "
            "languages and domains that the base knows nothing is said."
        )
    else:
        lines.append("What it has forgotten of what the base knew was not measured.")
    if posterior.base == POCKET:
        lines.append(
            "The base is the pocket Whisper of blora-pyro, trained on synthetic speech: it is for "
            "comparing methods, and recognises no human speech."
        )
    if not _has_spread(posterior):
        lines.append("It is a point estimate: its standard deviations are zero.")
    elif about.get("temperature") not in (None, 1.0):
        lines.append(
            "The posterior is tempered, T is not 1: it is not that of Bayes' rule with this prior, "
            "and its spread tells more from less sure weights, not calibrated errors."
        )
    if posterior.family.files:
        files = " and ".join(posterior.family.files)
        lines.append(f"The prior is code, {files}, which is not here: without it there is no draw.")
    lines.append("Data, code and runs that were local are called by the last part of their path.")
    return "\n".join(["## Limits\n", *(f"- {line}" for line in lines)])
