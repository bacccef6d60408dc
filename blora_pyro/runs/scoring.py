"""What a fit gained and what was forgotten: its sets, scored before and after, and compared."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from blora_pyro.data import Examples, split_names
from blora_pyro.errors import UserError
from blora_pyro.evaluation import (
    Evaluation,
    change_summary,
    normalizer_for,
    rate_summary,
    score,
    transcribe_examples,
)
from blora_pyro.files import read_json, write_json
from blora_pyro.languages import is_language
from blora_pyro.metrics.normalizers import NORMALIZERS
from blora_pyro.models import Base, base_of
from blora_pyro.options import FitConfig, read_columns
from blora_pyro.posterior import Posterior
from blora_pyro.runs.base_transcripts import kept_transcripts
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.loading import Loader
from blora_pyro.sources import Source, describe_source

NEW_DOMAIN = "new_domain"
OTHER_DATA = "data"  # a set that a run was given to be scored on, and no set of its fit
HEARD = "in full windows, with Whisper's safeguards"  # up to 0.2.0 without, and maybe trimmed
SPLITS = ("test", "dev")
DEV_SPLITS = ("dev", "validation")  # the second is what data sets of the Hub call it


# ---- which sets


def evaluation_sets(
    base: Base, config: FitConfig, loader: Loader | None = None, split: str = "test"
) -> dict[str, Examples]:
    """Return the new domain's set under `new_domain`, and every backward set under its name.

    If domains have factors of their own, the set of each is under `domain NAME`; if they share
    none, every backward set is there for each of them, as `BACKWARD (NAME)`. See `Scoring.score`.

    Args:
        base: Model whose tokenizer and feature extractor are used.
        config: Names the sets.
        loader: Reads them; None is a silent one.
        split: `test`, or `dev` (of the Hub, `validation`) to choose by. A source without splits
            serves as any, but not training data as the new domain's dev set.

    Raises:
        UserError: If there is no such split, or see `Loader.load`.
    """
    loader = loader or Loader(base, config)
    limit, loaded = config.max_eval_utterances, dict[SetSource, Examples]()
    sets = {}
    for name, its in set_sources(config, split, loader.on_note).items():
        if its not in loaded:
            examples = loader.load(its.source, its.split, its.language, limit)
            if its.backward:
                examples = with_references(base, its.backward, examples)
            loaded[its] = examples
        sets[name] = loaded[its]
    return sets


@dataclass(frozen=True, eq=False)
class SetSource:
    """Where a set that is scored comes from; one that has several names is one object.

    Attributes:
        source: Its source.
        split: Split of the source.
        language: Language of rows that name none; None is that of the configuration.
        backward: Name of the backward set; "" is the new domain's.
    """

    source: Source
    split: str
    language: str | None = None
    backward: str = ""


def set_sources(
    config: FitConfig, split: str, on_note: Callable[[str], object] = lambda note: None
) -> dict[str, SetSource]:
    """Return where the sets come from that `evaluation_sets` loads, by name; arguments as there.

    Raises:
        UserError: If there is no such split.
    """
    check_split(split)
    domains = {domain_set(name): source for name, source in config.domains.items()}
    if config.pooling is None:
        domains = {NEW_DOMAIN: _new_domain(config, split)}
    sets = {}
    for key, source in domains.items():
        if split == "dev":
            is_held_out = config.dev is not None or config.test == source
            sets[key] = SetSource(source, _existing_dev_split(source, on_note, is_held_out))
        elif config.test is not None or "test" in split_names(source):
            sets[key] = SetSource(source, "test")
    for name, source in config.backward_sets.items():
        its = _existing_dev_split(source, on_note) if split == "dev" else "test"
        language = name if is_language(name) else None
        apart = config.domains if config.pooling == "none" else None
        names = [name] if apart is None else [f"{name} ({domain})" for domain in apart]
        sets |= dict.fromkeys(names, SetSource(source, its, language, name))
    return sets


def with_references(base: Base, name: str, examples: Examples) -> Examples:
    """Return a backward set with texts: its own, or if it has none, what the base says to it.

    Args:
        base: The net as it is.
        name: Of the set.
        examples: The set.

    Raises:
        UserError: If some of its utterances have texts, and others have none.
    """
    empty = [row for row, text in enumerate(examples.texts) if not text.strip()]
    if examples.is_drift or not empty:
        return examples
    if len(empty) < len(examples):
        raise UserError(
            f"backward set {name} has {len(empty):,} utterances without a text and "
            f"{len(examples) - len(empty):,} with one (the first without: "
            f"{examples.origins[empty[0]]}); give texts to all of them or to none, to be scored "
            "against the base's own"
        )
    transcribe = partial(transcribe_examples, base, examples, True)
    return examples.against(kept_transcripts(base, examples, transcribe))


def scoring_config(
    config: FitConfig,
    data: Source | None,
    normalizer: str | None,
    column: Mapping[str, str] | Sequence[str] | None = None,
) -> FitConfig:
    """Return a configuration with other data, normaliser or columns to score with; None keeps.

    Other data have their columns called as usual, unless they are given.
    """
    if data is not None:
        # all the sets of its new domain come from `data`, which are no training data here
        config = replace(config, data=data, data_weights=None, test=data, dev=None, backward={})
        column = column or {}
    if column is not None:
        config = replace(config, column=read_columns(column))
    return config if normalizer is None else replace(config, normalizer=normalizer)


def check_split(split: str) -> None:
    """Refuse a split that is not one of `SPLITS`."""
    if split not in SPLITS:
        raise UserError(f"split is '{split}'; give {' or '.join(SPLITS)}")


def domain_set(name: str) -> str:
    """Return the name of the set of a domain with factors of its own."""
    return f"domain {name}"


def is_new_domain(name: str) -> bool:
    """Return whether a set's name, see `evaluation_sets`, is that of new-domain data."""
    return name == NEW_DOMAIN or name.startswith(domain_set(""))


def domain_name(config: FitConfig, split: str) -> str:
    """Return the source of the new domain's set of a split, in words."""
    return describe_source(_new_domain(config, split))


def _new_domain(config: FitConfig, split: str) -> Source:
    if split == "test":
        return config.new_domain
    return config.sources[0] if config.dev is None else config.dev


def _dev_split(names: Sequence[str], is_held_out: bool) -> str | None:
    """Return which of a source's splits is dev; a source without splits is, if it `is_held_out`."""
    if not names:
        return "dev" if is_held_out else None
    return next((split for split in DEV_SPLITS if split in names), None)


def _existing_dev_split(
    source: Source, on_note: Callable[[str], object], is_held_out: bool = True
) -> str:
    name, names = describe_source(source), split_names(source)
    if (split := _dev_split(names, is_held_out)) is None:
        raise UserError(f"{name} has no dev split; give a set that has one")
    if not names:
        on_note(f"{name} is one set without splits: the same for dev as for test")
    return split


def stopping_set(config: FitConfig) -> SetSource:
    """Return the dev set that `eval_every` measures on.

    Raises:
        UserError: If there is none.
    """
    source = _new_domain(config, "dev")
    split = _dev_split(split_names(source), is_held_out=config.dev is not None)
    if split is None:
        raise UserError(
            f"{describe_source(source)} has no dev split, and eval_every is {config.eval_every}; "
            "give a set that has one as dev, or leave eval_every out"
        )
    return SetSource(source, split)


# ---- their scores


def measure(
    base: Base,
    sets: dict[str, Examples],
    on_set: Callable[[str], None],
    keep: Path | None = None,
    normalizer: str = NORMALIZERS[0],
    *,
    is_base: bool = False,
    shares_encoder: bool = False,
    on_done: Callable[..., object] = lambda name, done, total: None,
) -> dict[str, Evaluation]:
    """Evaluate the net as it is on every set. Examples under two names are transcribed once.

    Args:
        base: The net.
        sets: Examples by name.
        on_set: Called with the name of a set before it is transcribed.
        keep: JSON file for the transcripts; sets that it holds already are only scored.
        normalizer: One of `normalizers.NORMALIZERS`.
        is_base: The net is the base as it is, whose transcripts are cached.
        shares_encoder: The net's encoder is the base's, see `transcribe_examples`.
        on_done: Called with a set's name, how many of its utterances are transcribed, and, as
            `total`, of how many.
    """
    normalize = normalizer_for(base, normalizer)
    known = _read_transcripts(keep)
    results, transcribed = {}, {}
    for name, examples in sets.items():
        fingerprint, texts = known.get(name, ("", []))
        if len(texts) != len(examples) or fingerprint not in ("", examples.fingerprint):
            if examples not in transcribed:
                shown = "the new domain" if name == NEW_DOMAIN else name
                on_set(shown)
                told = partial(on_done, shown, total=len(examples))
                transcribe = partial(transcribe_examples, base, examples, shares_encoder, told)
                transcribed[examples] = (
                    kept_transcripts(base, examples, transcribe) if is_base else transcribe()
                )
            texts = transcribed[examples]
            known[name] = examples.fingerprint, texts
            if keep:
                write_json(keep, known)
        found = score(examples, texts, normalize)
        results[name] = replace(found, examples=examples.fingerprint, is_drift=examples.is_drift)
    return results


def _read_transcripts(path: Path | None) -> dict[str, tuple[str, list[str]]]:
    """Return fingerprint and transcripts by set; none if there is no such file, or it is damaged.

    Older versions kept transcripts alone, whose fingerprint is "".
    """
    try:
        content = read_json(path) if path else {}
        pairs = {
            name: ("", one) if all(isinstance(text, str) for text in one) else one
            for name, one in content.items()
        }
        return {
            name: (str(one), [str(text) for text in texts]) for name, (one, texts) in pairs.items()
        }
    except (OSError, ValueError, TypeError):
        return {}


@dataclass(frozen=True)
class Scoring:
    """A base and the sets that runs on it are scored on.

    Attributes:
        base: The base model.
        sets: Examples by name, see `evaluation_sets`.
        normalizer: Normalizer of texts before scoring.
        progress: Listener to the stages.
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
        check_split(split)  # before the base is loaded
        base = base_of(config)
        loader = Loader(base, config, progress.features, progress.note)
        sets = evaluation_sets(base, config, loader, split)
        loader.report_skipped()
        return cls(base, sets, config.normalizer, progress)

    def score(
        self, posterior: Posterior | None, what: str | None = None, keep: Path | None = None
    ) -> dict[str, Evaluation]:
        """Score the base adapted by a posterior mean, or as it is, on every set.

        If domains have factors of their own, the set of each is scored with these, and the backward
        sets with what the domains share; where they share nothing, with the factors of each.

        Args:
            posterior: None is the base.
            what: Its name in the stages, of which there is one a set; None shows none.
            keep: See `measure`.
        """

        def on_set(name: str) -> None:
            if what is not None:
                self.progress.stage(f"{what} on {name}")

        def on_done(name: str, done: int, total: int) -> None:
            if what is not None:
                self.progress.transcripts(f"{what} on {name}", done, total)

        if posterior is None:
            return measure(
                self.base,
                self.sets,
                on_set,
                keep,
                self.normalizer,
                is_base=True,
                shares_encoder=True,
                on_done=on_done,
            )
        frozen = posterior.leaves_encoder(self.base.net)
        results: dict[str, Evaluation] = {}
        for domain, sets in _by_domain(posterior, self.sets).items():
            with posterior.for_domain(domain).applied(self.base.net):
                results |= measure(
                    self.base,
                    sets,
                    on_set,
                    keep,
                    self.normalizer,
                    shares_encoder=frozen,
                    on_done=on_done,
                )
        return {name: results[name] for name in self.sets}


def _by_domain(
    posterior: Posterior, sets: dict[str, Examples]
) -> dict[str | None, dict[str, Examples]]:
    """Return the sets that are scored with each domain's factors; None has the shared factors."""
    pooling, rest = posterior.pooling, dict(sets)
    found: dict[str | None, dict[str, Examples]] = {}
    for domain in () if pooling is None else pooling.domains:
        names = {domain_set(domain)}
        if pooling is not None and not pooling.is_shared:
            names |= {name for name in rest if name.endswith(f" ({domain})")}
        found[domain] = {name: rest.pop(name) for name in sets if name in names}
    return {**found, None: rest} if rest else found


def compare(
    posterior: Posterior,
    before: dict[str, Evaluation],
    after: dict[str, Evaluation],
    config: FitConfig,
    split: str = "test",
) -> dict[str, Any]:
    """Return the content of `metrics.json`: rates before and after, forgetting, sparsity.

    `adapter` and `sets` are fingerprints of the posterior and of the sets: nobody else's results.
    With factors for every domain there is `domains`, by name, and no `new_domain`; the latter is
    called `data` if it is no set of the fit, see `evaluate_run`.
    """
    metrics: dict[str, Any] = {
        "normalizer": config.normalizer,
        "heard": HEARD,
        "split": split,
        "adapter": posterior.fingerprint,
        "sets": {name: one.examples for name, one in before.items()},
        "backward": {},
        "sparsity": posterior.sparsity(),
    }
    domains = {domain_set(name): name for name in config.domains} if config.pooling else {}
    for name, base in before.items():
        both: dict[str, Any] = {"base": base.summary(), "adapted": after[name].summary()}
        if base.is_drift:
            both["drift"] = True
        both["change"] = {
            measure: change_summary([base], [after[name]], measure) for measure in base.counts
        }
        if name == NEW_DOMAIN:
            metrics[NEW_DOMAIN] = {"name": domain_name(config, split), **both}
        elif name == OTHER_DATA:
            metrics[OTHER_DATA] = {"name": domain_name(config, split), **both}
        elif name in domains:
            metrics.setdefault("domains", {})[domains[name]] = both
        else:
            metrics["backward"][name] = both
    if backward := list(metrics["backward"]):
        sets = [before[name] for name in backward], [after[name] for name in backward]
        metrics["backward_error"] = {
            "base": rate_summary(sets[0]),
            "adapted": rate_summary(sets[1]),
            "change": change_summary(*sets),  # this is the forgetting
        }
    return metrics
