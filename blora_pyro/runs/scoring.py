"""What a fit gained and what was forgotten: test sets, measured before and after, compared."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blora_pyro.data import Examples, split_names
from blora_pyro.errors import UserError
from blora_pyro.evaluation import (
    Evaluation,
    change_summary,
    evaluate,
    normalizer_for,
    rate_summary,
    score,
)
from blora_pyro.files import write_json
from blora_pyro.fitting.stopping import DevError, EarlyStopping
from blora_pyro.languages import is_language
from blora_pyro.models import Base, base_of
from blora_pyro.options import FitConfig
from blora_pyro.posterior import Posterior
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.loading import Loader
from blora_pyro.sources import Source, describe_source
from blora_pyro.transcription import transcribe_features

NEW_DOMAIN = "new_domain"
SPLITS = ("test", "dev")
DEV_SPLITS = ("dev", "validation")  # the second is what data sets of the Hub call it


def evaluation_sets(
    base: Base, config: FitConfig, loader: Loader | None = None, split: str = "test"
) -> dict[str, Examples]:
    """The new domain's set under `new_domain`, and every backward set under its name.

    Of domains with factors of their own each one's set, under `domain NAME`, and where they share
    none every backward set for each of them, `BACKWARD (NAME)`; see `measure_adapted`.

    Args:
        base: Whose tokenizer and feature extractor are to be used.
        config: Names the sets.
        loader: Reads them; None is a silent one.
        split: `test`, or `dev` (of the Hub, `validation`) to choose by. A source without splits
            serves as any, but not training data as the new domain's dev set.

    Raises:
        UserError: If there is no such split, or see `Loader.load`.
    """
    check_split(split)
    loader = loader or Loader(base, config)
    load = loader.load
    sets = {}
    for key, source in _new_domains(config, split).items():
        if split == "dev":
            is_held_out = config.dev is not None or config.test == source
            sets[key] = load(source, _existing_dev_split(loader, source, is_held_out))
        elif config.test is not None or "test" in split_names(source):
            sets[key] = load(source, "test")
    apart = config.domains if config.pooling == "none" else None
    for name, source in config.backward_sets.items():
        its = _existing_dev_split(loader, source) if split == "dev" else "test"
        examples = load(source, its, name if is_language(name) else None)
        sets |= dict.fromkeys(_names_for(name, apart), examples)
    return sets


def _new_domains(config: FitConfig, split: str) -> dict[str, Source]:
    """What the domains' sets of a split are read from, by the names of the sets."""
    if config.pooling is None:
        return {NEW_DOMAIN: _new_domain(config, split)}
    return {domain_set(name): source for name, source in config.domains.items()}


def domain_set(name: str) -> str:
    """What the set of a domain with factors of its own is called."""
    return f"domain {name}"


def _names_for(backward: str, domains: Iterable[str] | None) -> list[str]:
    """What a backward set is called: once, or with each domain that it is measured for."""
    return [backward] if domains is None else [f"{backward} ({name})" for name in domains]


def check_split(split: str) -> None:
    """Refuse what is not in `SPLITS`.

    Raises:
        UserError: Naming them.
    """
    if split not in SPLITS:
        raise UserError(f"split is '{split}'; give {' or '.join(SPLITS)}")


def domain_name(config: FitConfig, split: str) -> str:
    """What the new domain's set of a split is read from, in words."""
    return describe_source(_new_domain(config, split))


def _new_domain(config: FitConfig, split: str) -> Source:
    if split == "test":
        return config.new_domain
    return config.sources[0] if config.dev is None else config.dev


def early_stopping(
    loader: Loader,
    config: FitConfig,
    on_error: Callable[[DevError, DevError], None],
    once: Callable[[Callable[[], float]], Callable[[], float]] = lambda measure: measure,
) -> EarlyStopping | None:
    """What measures the net, as it is then, on the new domain's dev set; None if nothing is to.

    Args:
        loader: Of the base.
        config: Of the fit.
        on_error: See `EarlyStopping`.
        once: Of several processes, has one measure for all; see `Processes.once`.

    Raises:
        UserError: If there is no dev set.
    """
    if config.eval_every is None:
        return None
    source = _new_domain(config, "dev")
    split = _dev_split(split_names(source), is_held_out=config.dev is not None)
    if split is None:
        raise UserError(
            f"{describe_source(source)} has no dev split, and eval_every is {config.eval_every}; "
            "give a set that has one as dev, or leave eval_every out"
        )
    examples = loader.load(source, split)

    def dev_error() -> float:
        return evaluate(loader.base, examples, config.normalizer).main.rate

    return EarlyStopping(once(dev_error), config.eval_every, config.patience, on_error)


def _dev_split(names: Sequence[str], is_held_out: bool) -> str | None:
    """What a source calls its dev split; None if it has none.

    Args:
        names: Of its splits; if it is without splits,
        is_held_out: whether it may serve as dev set whole.
    """
    if not names:
        return "dev" if is_held_out else None
    return next((split for split in DEV_SPLITS if split in names), None)


def _existing_dev_split(loader: Loader, source: Source, is_held_out: bool = True) -> str:
    name, names = describe_source(source), split_names(source)
    if (split := _dev_split(names, is_held_out)) is None:
        raise UserError(f"{name} has no dev split; give a set that has one")
    if not names:
        loader.on_note(f"{name} is one set without splits: the same for dev as for test")
    return split


def measure(
    base: Base,
    sets: dict[str, Examples],
    on_set: Callable[[str], None],
    keep: Path | None = None,
    normalizer: str = "whisper",
) -> dict[str, Evaluation]:
    """Evaluate the net, as it is, on every set, and a set that is there twice once.

    Args:
        base: The net.
        sets: By name.
        on_set: Told what is transcribed.
        keep: A JSON file for the transcripts; sets that are in it already are only scored.
        normalizer: One of `normalizers.NORMALIZERS`.
    """
    normalize = normalizer_for(base, normalizer)
    known = _read_transcripts(keep)
    results, heard = {}, {}
    for name, examples in sets.items():
        if len(known.get(name, ())) != len(examples):
            if examples not in heard:
                on_set("the new domain" if name == NEW_DOMAIN else name)
                heard[examples] = transcribe_features(base, examples.features, examples.prompts)
            known[name] = heard[examples]
            if keep:
                write_json(keep, known)
        results[name] = score(examples, known[name], normalize)
    return results


def measure_adapted(
    base: Base,
    posterior: Posterior,
    sets: dict[str, Examples],
    on_set: Callable[[str], None],
    keep: Path | None = None,
    normalizer: str = "whisper",
) -> dict[str, Evaluation]:
    """Evaluate the net adapted by the posterior mean on every set.

    Of several domains each one's set is measured with its own factors, and the backward sets with
    what the domains share; where that is nothing, with the factors of each.

    Args:
        base: The net.
        posterior: What adapts it.
        sets: Of `evaluation_sets`.
        on_set: Told what is transcribed.
        keep: See `measure`.
        normalizer: See `measure`.
    """
    results: dict[str, Evaluation] = {}
    for domain, chosen in _by_domain(posterior, sets).items():
        with posterior.for_domain(domain).applied(base.net):
            results |= measure(base, chosen, on_set, keep, normalizer)
    return {name: results[name] for name in sets}


def _by_domain(
    posterior: Posterior, sets: dict[str, Examples]
) -> dict[str | None, dict[str, Examples]]:
    """The sets that are measured with the factors of each domain, or with the shared ones, None."""
    pooling, rest = posterior.pooling, dict(sets)
    found: dict[str | None, dict[str, Examples]] = {}
    for domain in () if pooling is None else pooling.domains:
        names = {domain_set(domain)}
        if pooling is not None and not pooling.is_shared:
            names |= {name for name in rest if name.endswith(f" ({domain})")}
        found[domain] = {name: rest.pop(name) for name in sets if name in names}
    return {**found, None: rest} if rest else found


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
    split: str = "test",
) -> dict[str, Any]:
    """The content of `metrics.json`: rates before and after, forgetting, sparsity.

    With factors for every domain there is `domains`, by name, and no `new_domain`.
    """
    metrics: dict[str, Any] = {
        "normalizer": config.normalizer,
        "split": split,
        "backward": {},
        "sparsity": posterior.sparsity(),
    }
    domains = {domain_set(name): name for name in config.domains} if config.pooling else {}
    backward = [name for name in before if name != NEW_DOMAIN and name not in domains]
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
            metrics[NEW_DOMAIN] = {"name": domain_name(config, split), **both}
        elif name in domains:
            metrics.setdefault("domains", {})[domains[name]] = both
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


@dataclass(frozen=True)
class Scoring:
    """A base and the sets that runs on it are scored on.

    Attributes:
        base: The base model.
        sets: By name, see `evaluation_sets`.
        normalizer: Of texts before scoring.
        progress: Listener of stages.
    """

    base: Base
    sets: dict[str, Examples]
    normalizer: str
    progress: Listener

    @classmethod
    def of(cls, config: FitConfig, split: str, progress: Listener) -> "Scoring":
        """Load the base of a configuration, and a split of its sets.

        Raises:
            UserError: See `evaluation_sets`.
        """
        check_split(split)
        base = base_of(config)
        loader = Loader(base, config, progress.features, progress.note)
        sets = evaluation_sets(base, config, loader, split)
        loader.tell()
        return cls(base, sets, config.normalizer, progress)

    def score(self, posterior: Posterior | None, what: str | None = None) -> dict[str, Evaluation]:
        """Score the base adapted by a posterior mean, or as it is, on every set.

        Args:
            posterior: None is the base.
            what: It is called in the stages, one a set; None tells none.
        """

        def stage(name: str) -> None:
            if what is not None:
                self.progress.stage(f"{what} on {name}")

        if posterior is None:
            return measure(self.base, self.sets, stage, normalizer=self.normalizer)
        return measure_adapted(self.base, posterior, self.sets, stage, normalizer=self.normalizer)
