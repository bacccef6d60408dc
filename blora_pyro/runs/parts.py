"""The parts of a fit by its configuration: data, program, guide, teacher and penalty."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import torch

from blora_pyro.data import Examples, Stream, split_names
from blora_pyro.errors import UserError
from blora_pyro.fitting import Teacher
from blora_pyro.fitting.checkpoints import RandomState
from blora_pyro.fitting.distillation import Distillation
from blora_pyro.fitting.elastic import ElasticPenalty, fisher_information
from blora_pyro.fitting.encoder_cache import EncoderCache
from blora_pyro.guides import build_guide, build_prior, prepare_prior
from blora_pyro.languages import is_language
from blora_pyro.models import Base, BLoRA, PooledBLoRA, pooling_of
from blora_pyro.options import FitConfig
from blora_pyro.runs.chains import Previous, previous_of
from blora_pyro.runs.loading import Loader, SkippedRow
from blora_pyro.sources import describe_source


def training_set(
    loader: Loader, on_skipped: Callable[[SkippedRow], object]
) -> tuple[Examples | Stream, dict[str, int | None]]:
    """Return the training data, and their numbers of `tokens` and `utterances`, if known.

    Args:
        loader: Loader of the fit's configuration.
        on_skipped: See `Loader.stream`.
    """
    config = loader.config
    if config.streaming:
        stream = loader.stream(config.sources[0], on_skipped)
        return stream, {"tokens": None, "utterances": None}
    examples = loader.load(config.sources, "train", limit=config.max_utterances)
    return examples, {"tokens": examples.num_tokens, "utterances": len(examples)}


def teacher_of(
    base: Base, model: BLoRA, config: FitConfig, utterances: int | None
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
    assert utterances is not None  # a stream can't have it
    return EncoderCache(model, utterances, teacher)


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
    model.penalty = ElasticPenalty(model.groups, model.adapters.scaling, fisher, config.ewc)


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
        previous: The run that is carried on; None reads it, if the configuration names one.
        train: Training data, for a prior that prepares itself on them.

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
    )
    if previous is not None:
        previous.check(model.groups, config.target_modules)
    if train is not None:
        _prepare(model, train, config)
    guide: Any = build_guide(str(config.guide), model)
    if previous is not None:
        previous.start(guide)
    if pooling is not None:
        pooling.start(guide)
    return model, guide


def _prepare(model: BLoRA, train: Examples | Stream, config: FitConfig) -> None:
    """Run the `prepare` of the model's prior; a fit that is resumed gets the same tensors again."""
    examples, size = train.sample if isinstance(train, Stream) else train, config.batch_size
    batches = (
        examples.batch(range(first, min(first + size, len(examples)))).to(model.device)
        for first in range(0, len(examples), size)
    )
    with RandomState.kept(model.device):
        pyro.set_rng_seed(config.seed)
        prepare_prior(model.prior, model.net, batches)
