"""What a fit works with: data, program, guide, teacher and penalty of its configuration."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pyro
import torch

from blora_pyro.data import Batch, Examples, Stream, Suppressed, split_names
from blora_pyro.errors import UserError
from blora_pyro.evaluation import evaluate
from blora_pyro.fitting.batches import Teacher
from blora_pyro.fitting.checkpoints import RandomState
from blora_pyro.fitting.distillation import Distillation
from blora_pyro.fitting.elastic import ElasticPenalty, fisher_information
from blora_pyro.fitting.encoder_cache import EncoderCache
from blora_pyro.fitting.history import DevError
from blora_pyro.fitting.processes import Processes
from blora_pyro.fitting.stopping import EarlyStopping
from blora_pyro.guides import Guide, build_guide, build_prior, prepare_prior
from blora_pyro.languages import is_language, language_code
from blora_pyro.models import Base, BLoRA, PooledBLoRA, base_of, map_languages, pooling_of
from blora_pyro.models.logits import allowing
from blora_pyro.models.second_moments import BACKWARD, UTTERANCES
from blora_pyro.options import AVERAGE, FitConfig
from blora_pyro.runs.chains import Previous, previous_of
from blora_pyro.runs.contracts import check_dev_sets, limits_of, losses, strength_within
from blora_pyro.runs.fit_folders import FitFolder
from blora_pyro.runs.listeners import Heard, Listener
from blora_pyro.runs.loading import Loader, SkippedRow
from blora_pyro.runs.record import FITTING
from blora_pyro.runs.scoring import (
    DEV_SPLITS,
    NEW_DOMAIN,
    Scoring,
    domain_name,
    evaluation_sets,
    is_new_domain,
    measure,
    stopping_set,
)
from blora_pyro.sources import describe_source
from blora_pyro.transcription import transcribe_features

SHOWN = 3  # utterances of the dev set that a fit shows on its way


@dataclass(frozen=True)
class Parts:
    """What a fit works with.

    Attributes:
        config: Its resolved configuration.
        loader: Loader of all sets.
        train: Training data.
        size: Their numbers of target `tokens` and `utterances`; None if unknown.
        scoring: The base and the test sets; no sets if nothing is to be scored.
        dev: The base and the dev sets, on which a strength that keeps the contract is to be chosen;
            None if none is.
        unsuppressed: Tokens that the adapted base may say, see `Posterior`.
        fit: Program, guide, teacher and early stopping; None once the fit is done.
    """

    config: FitConfig
    loader: Loader
    train: Examples | Stream
    size: dict[str, int | None]
    scoring: Scoring
    dev: Scoring | None = None
    unsuppressed: tuple[int, ...] = ()
    fit: tuple[BLoRA, Guide, Teacher | None, EarlyStopping | None] | None = None

    @classmethod
    def load(
        cls, folder: FitFolder, evaluate: bool, progress: Listener, processes: Processes
    ) -> "Parts":
        """Load base and data; for a fit that is not done yet build program and guide, too.

        Raises:
            UserError: If something can't be loaded or built.
        """
        progress.stage("loading")
        config = folder.with_prior
        if is_choosing := config.keep is not None and folder.record.kept is None:
            check_dev_sets(config)
        pyro.set_rng_seed(config.seed)
        base = base_of(config)
        if folder.previous:
            known = {**folder.previous.posterior.language_map, **base.language_map}
            map_languages(base.net, known)
        loader = Loader(base, config, progress.features, progress.note)
        train, size = training_set(loader, lambda row: folder.list_skipped([row]))
        config = config.resolved(size["tokens"], size["utterances"])
        if base.language_map:
            config = replace(config, language_map=base.language_map)
        kept = {language_code(name) for name in config.backward_sets if is_language(name)}
        for code, token in base.language_map.items():
            if taken := kept & {*token.split("-")}:
                progress.note(
                    f"language_map {code}={token} takes the token of the backward set "
                    f"{taken.pop()}, which is then heard as the new language is; auto takes one "
                    "that no set needs"
                )
        sets = evaluation_sets(base, config, loader) if evaluate else {}
        if evaluate and not any(map(is_new_domain, sets)):
            progress.note(
                f"{domain_name(config, 'test')} has no test split and no test set is given: the "
                "new domain will not be scored"
            )
        scoring = Scoring(base, sets, config.normalizer, progress)
        dev = None
        if is_choosing and processes.is_main:
            dev = replace(scoring, sets=evaluation_sets(base, config, loader, "dev"))
        parts = cls(config, loader, train, size, scoring, dev)
        if folder.state == FITTING:
            earlier = folder.previous.posterior.unsuppressed if folder.previous else ()
            allowed = tuple(sorted({*unsuppressed(loader, train), *earlier}))
            model, guide = build(base, config, folder.previous, train)
            shares = model.likelihood.first_adapted == base.net.config.encoder_layers
            stopping = early_stopping(
                loader, config, progress.evaluated, progress.heard, processes, allowed, shares, dev
            )
            regularise(model, loader, progress.stage)
            teacher = teacher_of(base, model, config, train)
            languages = (
                train.source_languages if isinstance(train, Examples) and config.pooling else ()
            )
            counts = size["utterances"], size["tokens"], model.num_weights
            folder.begin(config, train.main_language, *counts, languages)
            progress.built(model, guide)
            fitting = model, guide, teacher, stopping
            parts = replace(parts, unsuppressed=allowed, fit=fitting)
        loader.report_skipped(folder.list_skipped(loader.skipped))
        return parts


def early_stopping(
    loader: Loader,
    config: FitConfig,
    on_error: Callable[[DevError, DevError], None],
    on_heard: Callable[[Sequence[Heard]], None] = lambda some: None,
    processes: Processes | None = None,
    unsuppressed: Sequence[int] = (),
    shares_encoder: bool = False,
    watched: Scoring | None = None,
) -> EarlyStopping | None:
    """Return what measures the net on the new domain's dev set during a fit; None if nothing is to.

    With a contract (`keep`) the backward dev sets are measured, too.

    Args:
        loader: Loader of the base.
        config: Options of the fit.
        on_error: See `EarlyStopping`.
        on_heard: Called before that with a few utterances, always the same.
        processes: Those of the fit, of which the main one measures for all.
        unsuppressed: Tokens that the net may say, see `Posterior`.
        shares_encoder: The fit leaves the encoder as it is, see `transcribe_examples`.
        watched: The dev sets of a contract, in the main process.

    Raises:
        UserError: If there is no dev set.
    """
    if config.eval_every is None:
        return None
    its = stopping_set(config)
    examples = loader.load(its.source, its.split, limit=config.max_eval_utterances)

    processes = processes or Processes()
    rows = sorted({round(place) for place in np.linspace(0, len(examples) - 1, SHOWN)})
    rows = rows if processes.is_main else []  # which measures for all
    shown = [examples.prompts[row] for row in rows]
    first = transcribe_features(loader.base, examples.features[rows], shown)

    def dev_error() -> float:
        with allowing(loader.base.net, unsuppressed):
            found = evaluate(loader.base, examples, config.normalizer, shares_encoder)
        texts = (found.raw or found).hypotheses
        heard = zip(rows, first, strict=True)
        on_heard([Heard(examples.texts[row], before, texts[row]) for row, before in heard])
        return found.main.rate

    before = watched.score(None, "dev, the base") if watched else {}
    sets = {name: watched.sets[name] for name in before if name != NEW_DOMAIN} if watched else {}

    def forgetting(error: float) -> list[float]:
        """Both errors are taken to lie on straight lines between the base and the fit as it is."""
        with allowing(loader.base.net, unsuppressed):
            after = measure(
                loader.base,
                sets,
                lambda name: None,
                normalizer=config.normalizer,
                shares_encoder=shares_encoder,
            )
        lost = losses(before, after)
        first = before[NEW_DOMAIN].main.rate
        return [lost[AVERAGE], first + strength_within(limits_of(config), lost) * (error - first)]

    from_main = processes.from_main
    return EarlyStopping(
        partial(from_main, dev_error),
        config.eval_every,
        config.patience,
        on_error,
        None if config.keep is None else lambda error: from_main(partial(forgetting, error)),
    )


def training_set(
    loader: Loader, on_skipped: Callable[[SkippedRow], object]
) -> tuple[Examples | Stream, dict[str, int | None]]:
    """Return the training data, and their numbers of `tokens` and `utterances`, if known."""
    config = loader.config
    if config.streaming:
        stream = loader.stream(config.sources[0], on_skipped)
        return stream, {"tokens": None, "utterances": None}
    examples = loader.load(config.sources, "train", limit=config.max_utterances)
    return examples, {"tokens": examples.num_tokens, "utterances": len(examples)}


def unsuppressed(loader: Loader, train: Examples | Stream) -> tuple[int, ...]:
    """Return tokens of the training texts that the base's `generate` suppresses, and note them.

    They are what the adapted base may say all the same; of a stream those of its first rows.
    """
    suppressed = Suppressed.of(loader.base.net.generation_config)
    targets = train.targets if isinstance(train, Examples) else train.sample.targets
    found = [tokens for target in targets if (tokens := suppressed.of_target(target))]
    lifted = tuple(sorted({token for tokens in found for token in tokens}))
    if lifted:
        tokenizer = loader.base.tokenizer
        some = ", ".join(repr(tokenizer.decode([token])) for token in lifted[:8])
        loader.on_note(
            f"{len(found):,} of {len(targets):,} training texts hold tokens that the base's "
            f"generation config suppresses ({some}{', ...' if len(lifted) > 8 else ''}); "
            "the adapted model may say them"
        )
    return lifted


def teacher_of(
    base: Base, model: BLoRA, config: FitConfig, train: Examples | Stream
) -> Teacher | None:
    """Return what completes batches: states of the encoder, answers of the base.

    Raises:
        UserError: See `EncoderCache` and `Distillation`.
    """
    teacher: Teacher | None = None
    if config.distillation:
        languages, weight = config.taught_languages, config.distillation
        teacher = Distillation(base, model.adapters, languages, weight, config.seed, config.task)
    if not config.cache_encoder:
        return teacher
    assert isinstance(train, Examples)  # a stream can't have it
    return EncoderCache(model, len(train), teacher, train.fingerprint)


def regularise(
    model: BLoRA, loader: Loader, on_stage: Callable[[str], object] = lambda stage: None
) -> None:
    """Give the program the EWC penalty, if its configuration has one.

    Raises:
        UserError: If a backward set has no train split: one set for all would be learned from and
            scored.
    """
    config = loader.config
    if not config.ewc:
        return
    on_stage("Fisher information")
    for source in config.backward_sets.values():
        if "train" not in split_names(source):
            raise UserError(
                f"backward set {describe_source(source)} has no train split, which ewc "
                "takes its Fisher information from; give a folder or a Hub data set with train and "
                "test, or leave ewc out"
            )
    sets = [
        loader.load(source, "train", name if is_language(name) else None)
        for name, source in config.backward_sets.items()
    ]
    fisher = fisher_information(model.net, model.groups, sets, config.seed)
    model.penalty = ElasticPenalty(model.groups, model.adapters.scalings, fisher, config.ewc)


def build(
    base: Base,
    config: FitConfig,
    previous: Previous | None = None,
    train: Examples | Stream | None = None,
) -> tuple[BLoRA, Any]:
    """Return the Pyro program of a resolved configuration, and its guide.

    Args:
        base: The base model.
        config: As resolved.
        previous: The run that is continued; None reads it, if the configuration names one.
        train: Training data, for a prior that prepares itself on them, or on the backward sets.

    Raises:
        UserError: If prior, guide or target layers can't be, or are not those of that run.
    """
    previous = previous or previous_of(config)
    prior = (
        build_prior(config.prior, **config.prior_args)
        if previous is None
        else previous.prior(config.prior_inflation)
    )
    pooling = pooling_of(config)
    program: Any = BLoRA if pooling is None else partial(PooledBLoRA, pooling=pooling)
    model = program(
        base.net,
        prior,
        rank=config.rank,
        alpha=float(config.alpha or 2 * config.rank),
        target_modules=config.target_modules,
        autocast=torch.bfloat16 if config.precision == "bf16" else None,
        gradient_checkpointing=config.gradient_checkpointing,
        exclude_modules=config.exclude_modules,
        layers=config.layers_to_transform,
        rank_pattern=config.rank_pattern,
        use_rslora=config.use_rslora,
    )
    if previous is not None:
        previous.check(model.groups, config.target_modules)
    if train is not None:
        _prepare(model, train, base, config)
    guide: Any = build_guide(str(config.guide), model)
    if previous is not None:
        previous.start(guide)
    if pooling is not None:
        pooling.start(guide)
    return model, guide


def _prepare(model: BLoRA, train: Examples | Stream, base: Base, config: FitConfig) -> None:
    """Run the `prepare` of the model's prior; a fit that is resumed gets the same tensors again.

    Raises:
        UserError: If it asks for backward sets, and one has neither a train nor a dev split.
    """

    def batches(examples: Examples, is_train: bool) -> Iterator[Batch]:
        cache, size = None, config.batch_size
        if config.cache_encoder and is_train:  # the fit's own, which it fills
            cache = EncoderCache(model, len(examples), fingerprint=examples.fingerprint)
        for first in range(0, len(examples), size):
            indices = range(first, min(first + size, len(examples)))
            batch = examples.batch(indices, full=True)
            yield (batch if cache is None else cache(batch, indices, 0)).to(model.device)

    heard: Iterator[Batch]
    if getattr(model.prior, "statistics", None) == BACKWARD:
        old = old_data(Loader(base, config), getattr(model.prior, "utterances", UTTERANCES))
        heard = chain.from_iterable(batches(one, False) for one in old)
    elif isinstance(train, Stream):
        heard = batches(train.sample, False)
    else:
        heard = batches(train, True)
    modules = [name for group in model.groups for name in group.modules]
    with RandomState.kept(model.device):
        pyro.set_rng_seed(config.seed)
        prepare_prior(model.prior, model.net, heard, modules)


def old_data(loader: Loader, utterances: int) -> list[Examples]:
    """Return as many utterances of every backward set, of its train split, or else of dev.

    Raises:
        UserError: If a set has neither: one set for all would be learned from and scored.
    """
    sets, splits = loader.config.backward_sets, {}
    for name, source in sets.items():
        known = split_names(source)
        splits[name] = next((one for one in ("train", *DEV_SPLITS) if one in known), None)
        if splits[name] is None:
            raise UserError(
                f"backward set {describe_source(source)} has neither a train nor a dev split, one "
                "of which the prior's statistics=backward are taken from; give a folder or a Hub "
                "data set with one, or statistics=own"
            )
    share = math.ceil(utterances / max(len(sets), 1))
    return [
        loader.load(source, str(splits[name]), name if is_language(name) else None, share)
        for name, source in sets.items()
    ]
