"""What a fit gained and what was forgotten: test sets, measured before and after, compared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blora_pyro.config import FitConfig
from blora_pyro.data import Examples, Source, describe_source, is_language, split_names
from blora_pyro.errors import UserError
from blora_pyro.evaluation import (
    Evaluation,
    change_summary,
    evaluate,
    normalizer_for,
    rate_summary,
    score,
)
from blora_pyro.loading import Loader
from blora_pyro.models import Base
from blora_pyro.posterior import Posterior
from blora_pyro.run_folders import write_json
from blora_pyro.stopping import DevError, EarlyStopping
from blora_pyro.transcription import transcribe_features

NEW_DOMAIN = "new_domain"
DEV_SPLITS = ("dev", "validation")  # the second is what data sets of the Hub call it


def evaluation_sets(
    base: Base, config: FitConfig, loader: Loader | None = None
) -> dict[str, Examples]:
    """The new domain's test set under `new_domain`, and every backward set under its name.

    Args:
        base: Whose tokenizer and feature extractor are to be used.
        config: Names the sets.
        loader: Reads them; None is a silent one.
    """
    load = (loader or Loader(base, config)).load
    sets = {}
    if config.test is not None or "test" in split_names(config.new_domain):
        sets[NEW_DOMAIN] = load(config.new_domain, "test")
    for name, source in config.backward_sets.items():
        sets[name] = load(source, "test", name if is_language(name) else None)
    return sets


def early_stopping(
    loader: Loader, config: FitConfig, on_error: Callable[[DevError, DevError], None]
) -> EarlyStopping | None:
    """What measures the net, as it is then, on the new domain's dev set; None if nothing is to.

    Raises:
        UserError: If there is no dev set.
    """
    if config.eval_every is None:
        return None
    source, split = _dev_split(config)
    examples = loader.load(source, split)

    def dev_error() -> float:
        return evaluate(loader.base, examples, config.normalizer).main.rate

    return EarlyStopping(dev_error, config.eval_every, config.patience, on_error)


def _dev_split(config: FitConfig) -> tuple[Source, str]:
    source = config.sources[0] if config.dev is None else config.dev
    names = split_names(source)
    found = [split for split in DEV_SPLITS if split in names]
    if not found and (names or config.dev is None):
        raise UserError(
            f"{describe_source(source)} has no dev split, and eval_every is {config.eval_every}; "
            "give a set that has one as dev, or leave eval_every out"
        )
    return source, (found or ["dev"])[0]  # a set without splits serves as any


def measure(
    base: Base,
    sets: dict[str, Examples],
    on_set: Callable[[str], None],
    keep: Path | None = None,
    normalizer: str = "whisper",
) -> dict[str, Evaluation]:
    """Evaluate the net, as it is, on every set.

    Args:
        base: The net.
        sets: By name.
        on_set: Told what is transcribed.
        keep: A JSON file for the transcripts; sets that are in it already are only scored.
        normalizer: One of `normalizers.NORMALIZERS`.
    """
    normalize = normalizer_for(base, normalizer)
    known = _read_transcripts(keep)
    results = {}
    for name, examples in sets.items():
        if len(known.get(name, ())) != len(examples):
            on_set("the new domain" if name == NEW_DOMAIN else name)
            known[name] = transcribe_features(base, examples.features, examples.prompts)
            if keep:
                write_json(keep, known)
        results[name] = score(examples, known[name], normalize)
    return results


def _read_transcripts(path: Path | None) -> dict[str, list[str]]:
    """Transcripts by set; none if there is no such file, or it is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path else {}
        return {name: [str(text) for text in texts] for name, texts in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def compare(
    posterior: Posterior,
    before: dict[str, Evaluation],
    after: dict[str, Evaluation],
    config: FitConfig,
) -> dict[str, Any]:
    """The content of `metrics.json`: rates before and after, forgetting, sparsity."""
    metrics: dict[str, Any] = {
        "normalizer": config.normalizer,
        "backward": {},
        "sparsity": posterior.sparsity(),
    }
    backward = [name for name in before if name != NEW_DOMAIN]
    for name, base in before.items():
        adapted = after[name]
        both = {
            "base": base.summary(),
            "adapted": adapted.summary(),
            "change": {
                measure: change_summary([base], [adapted], measure) for measure in base.counts
            },
        }
        if name == NEW_DOMAIN:
            metrics[NEW_DOMAIN] = {"name": describe_source(config.new_domain), **both}
        else:
            metrics["backward"][name] = both
    if backward:
        sets = [before[name] for name in backward], [after[name] for name in backward]
        metrics["backward_error"] = {
            "base": rate_summary(sets[0]),
            "adapted": rate_summary(sets[1]),
            "change": change_summary(*sets),  # this is the forgetting
        }
    return metrics
