"""Everything that decides a fit, in one place, checked before anything is loaded."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal

from blora_pyro.adapters import ALL_LINEAR
from blora_pyro.config.pooling import check_pooling
from blora_pyro.config.priors import check_prior
from blora_pyro.config.streaming import check_streaming
from blora_pyro.config.training import TEMPERATURES, check_training, check_warm_up
from blora_pyro.data import (
    BUFFER,
    LANGUAGES,
    TASKS,
    Source,
    as_domains,
    as_sources,
    check_weights,
    describe_source,
    is_language,
    language_code,
    named_sources,
)
from blora_pyro.errors import UserError
from blora_pyro.fitting.schedules import Schedule, default_warmup_steps
from blora_pyro.guides import previous_posterior, prior_arguments
from blora_pyro.metrics.normalizers import check_normalizer
from blora_pyro.models import (
    POCKET,
    Base,
    Pooling,
    build_estimator,
    check_device,
    check_dtype,
    load_base,
)
from blora_pyro.models.pooling import COMPLETE, SCALE


@dataclass(frozen=True)
class FitConfig:
    """Everything that decides a fit; `run.json` holds it resolved.

    Attributes:
        base: `"pocket"`, a folder with a Whisper checkpoint or an adapter, or a Hub id of either.
        dtype: Of the frozen base's weights, `float32`, `bfloat16` or `float16`.
        revision: Branch, tag or commit of the base, if it is a Hub id.
        local_files_only: Look for a Hub id in the Hub's local cache alone.
        data: One or more sources of training data, the first of them the new domain; see
            `data.load_split` for what a source may be. Also a mapping of names to sources, or texts
            "NAME=SOURCE".
        data_weights: How often each source is drawn from, in proportion; None takes every
            utterance once an epoch.
        pooling: What several sources have in common: `none`, an adapter for each;
            `hierarchical`, a shared one and the deviations of each (see `models.pooling`);
            `complete`, kept as None, one adapter for all of them.
        pooling_scale: Width of those deviations in units of the prior's own; None is
            `models.pooling.SCALE`.
        max_utterances: Use at most so many utterances of the new domain's training data, drawn at
            random by `seed`; None uses all.
        streaming: Read, featurise and tokenise the training data as the fit draws them, and keep
            none of them (see `data.Stream`); for more than fits into memory or on the disk.
        shuffle_buffer: Rows that a stream is shuffled in at a time; None is 1000.
        test: The new domain's test set; None is the test split of its source, if it has one.
        dev: The new domain's dev set, for `eval_every`; None is the dev split of its source.
        backward: Held-out sets of what the base already knows: a mapping of names to sources, or
            texts "NAME=SOURCE" or "SOURCE". None is the six pocket languages for the pocket base
            and none otherwise.
        language: Of the rows of any set that name none: "de", "German", or "de-en" for
            code-switched speech. A backward set that is called by a language has that one instead.
        task: `transcribe` or `translate`, in every prompt.
        on_bad_row: `stop` at a row of any set that can't be used, or `skip` it.
        prior: A family of `blora_pyro.guides`, or the path of a file with one.
        guide: None is the family's own; else `point`, `auto-normal`, or a file's path.
        beta: Weight of the KL term. With N target tokens in the training set `"elbo"` is 1/N, the
            exact negative ELBO per token, and `"auto"` is `AUTO_TEMPERATURE` / N.
        prior_scale: The prior's `scale`, before that of `prior_args`; None is the family's default.
        prior_args: Further arguments of the prior family, by name (see `blora-pyro priors`).
        prior_from: Folder, or Hub id, of a run whose posterior is the prior, in place of a
            family's, and where the fit starts; see `chains`.
        prior_inflation: Factor on that posterior's standard deviations, to forget on purpose, 1 or
            more; None is 1.
        rank: Rank of every update.
        alpha: Updates are scaled by alpha / rank; None is 2 · rank.
        target_modules: As in PEFT: `all-linear`, suffixes with commas between, or a regex.
        lr: Peak learning rate of Adam.
        steps: Steps of SVI.
        epochs: Passes over the training data; takes precedence over `steps`.
        schedule: Of the learning rate, from its peak: `cosine`, `linear` or `constant`.
        warmup_steps: Steps of the linear warm-up before; None is a tenth of the steps.
        batch_size: Utterances a step.
        gradient_accumulation: Micro-batches that a step's batch is taken in, one after the other,
            to save memory; the gradient is that of the whole batch.
        gradient_checkpointing: Compute Whisper's activations twice, to save memory.
        max_grad_norm: Clip the gradient to this norm, all parameters together; None does not.
        spec_augment: Mask the features of the training data (see `augmentation`).
        cache_encoder: Compute the encoder's states before its first adapted layer once for every
            utterance, and keep them on disk during the fit (see `EncoderCache`).
        trim_audio: Cut every batch after its longest utterance, in the fit and wherever the run is
            used (see `data.trim`).
        estimator: `shared`, `flipout`, `flipout-token` or `local` (see `models.estimators`).
        precision: `fp32`, or `bf16` for Whisper under autocast with float32 factors.
        distillation: Weight of the divergence from the frozen base where the new domain's audio is
            prompted in other languages (see `Distillation`); 0 is none.
        distillation_languages: Those languages; None is those that backward sets are called by.
        ewc: Strength of elastic weight consolidation, with the Fisher information of the backward
            sets' train splits (see `ElasticPenalty`); 0 is none.
        average_from: Share of the steps after which the guide's parameters are averaged over the
            steps, and the average is the fit's; None takes the last ones.
        eval_every: Steps between two measurements of the dev error of the posterior mean; the best
            of those posteriors is the fit's. None measures nothing and takes the last.
        patience: End the fit after so many measurements without a new lowest error; None does not.
        normalizer: Of texts before they are scored: `whisper`, `basic` or `none` (see
            `blora_pyro.metrics.normalizers`).
        seed: Of the start, the data order and the noise.
        device: A torch device.
        track: Experiment trackers that are told of the fit, names with commas between or a
            sequence of them (see `tracking`); None is none. What the fit finds does not depend on
            them.
    """

    base: str = POCKET
    dtype: str = "float32"
    revision: str | None = None
    local_files_only: bool = False
    data: Source | Sequence[Source] | Mapping[str, Source] = "de-en"
    data_weights: Sequence[float] | None = None
    pooling: Literal["complete", "hierarchical", "none"] | None = None
    pooling_scale: float | None = None
    max_utterances: int | None = None
    streaming: bool = False
    shuffle_buffer: int | None = None
    test: Source | None = None
    dev: Source | None = None
    backward: Mapping[str, Source] | Sequence[str] | None = None
    language: str | None = None
    task: str = "transcribe"
    on_bad_row: Literal["stop", "skip"] = "stop"
    prior: str = "normal"
    guide: str | None = None
    beta: float | Literal["auto", "elbo"] = 1e-4
    prior_scale: float | None = None
    prior_args: Mapping[str, Any] = field(default_factory=dict)
    prior_from: str | None = None
    prior_inflation: float | None = None
    rank: int = 16
    alpha: float | None = None
    target_modules: str = ALL_LINEAR
    lr: float = 5e-3
    steps: int = 400
    epochs: float | None = None
    schedule: Schedule = "cosine"
    warmup_steps: int | None = None
    batch_size: int = 16
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    max_grad_norm: float | None = None
    spec_augment: bool = False
    cache_encoder: bool = False
    trim_audio: bool = False
    estimator: str = "shared"
    precision: Literal["fp32", "bf16"] = "fp32"
    distillation: float = 0.0
    distillation_languages: Sequence[str] | None = None
    ewc: float = 0.0
    average_from: float | None = None
    eval_every: int | None = None
    patience: int | None = None
    normalizer: str = "whisper"
    seed: int = 0
    device: str = "cpu"
    track: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Refuse what can't be fitted.

        Raises:
            UserError: Naming the value, what is allowed and what to do.
        """
        keep = partial(object.__setattr__, self)
        keep("data", as_domains(self.data))
        if self.pooling == COMPLETE:  # as it was before there was a choice, in all that is stored
            keep("pooling", None)
        if self.backward is not None:
            keep("backward", named_sources(self.backward))
        if self.data_weights is not None:
            keep("data_weights", tuple(self.data_weights))
        check_weights(self.data_weights, self.sources)
        if self.track is not None:
            names = self.track.split(",") if isinstance(self.track, str) else self.track
            keep("track", tuple(dict.fromkeys(name.strip() for name in names)) or None)
        if self.language is not None:
            keep("language", language_code(self.language))
        if self.distillation_languages is not None:
            keep("distillation_languages", tuple(map(language_code, self.distillation_languages)))
        if self.prior_from is not None:
            keep("prior_from", str(self.prior_from))
        if self.task not in TASKS:
            raise UserError(f"task is '{self.task}'; give {' or '.join(TASKS)}")
        if self.on_bad_row not in ("stop", "skip"):
            raise UserError(f"on_bad_row is '{self.on_bad_row}'; give stop or skip")
        if self.prior_from is not None:
            keep("prior_from", str(self.prior_from))
        check_training(self)
        check_prior(self)
        check_pooling(self)
        check_streaming(self)
        check_dtype(self.dtype)
        build_estimator(self.estimator)
        check_normalizer(self.normalizer)
        check_device(self.device)

    def with_prior_args(self) -> "FitConfig":
        """The same with every argument of the prior in `prior_args`, and the guide's name.

        Loads the family: a user's own file is run here.

        Raises:
            UserError: If there is no such family, argument or value.
        """
        if self.prior_from is not None:
            inflation = {"inflation": self.prior_inflation or 1.0}
            return replace(
                self, prior=previous_posterior.NAME, prior_args=inflation, guide="normal"
            )
        given = dict(self.prior_args)
        if self.prior_scale is not None:
            given["scale"] = self.prior_scale
        arguments = prior_arguments(self.prior, **given)
        return replace(self, prior_args=arguments, guide=self.guide or self.prior)

    def resolved(self, num_tokens: int | None, num_utterances: int | None) -> "FitConfig":
        """The same with every default worked out, given the size of the training set.

        Args:
            num_tokens: Target tokens in it; None is not known, of a stream.
            num_utterances: Likewise.

        Raises:
            UserError: If the warm-up is longer than the fit.
        """
        steps, beta = self.steps, self.beta
        if self.epochs is not None and num_utterances is not None:
            steps = max(1, round(self.epochs * math.ceil(num_utterances / self.batch_size)))
        if isinstance(beta, str) and num_tokens is not None:
            beta = TEMPERATURES[beta] / num_tokens
        warm_up, pooled = self.warmup_steps, self.pooled
        resolved = replace(
            self,
            backward=self.backward_sets,
            beta=beta,
            alpha=self.alpha or 2.0 * self.rank,
            steps=steps,
            warmup_steps=default_warmup_steps(steps) if warm_up is None else warm_up,
            pooling_scale=pooled.scale if pooled is not None and pooled.is_shared else None,
            shuffle_buffer=(self.shuffle_buffer or BUFFER) if self.streaming else None,
        )
        check_warm_up(resolved)
        return resolved

    @property
    def backward_sets(self) -> dict[str, Source]:
        """The backward sets by name, the default worked out."""
        if self.backward is None:
            return named_sources(LANGUAGES if self.base == POCKET else ())
        return named_sources(self.backward)

    @property
    def taught_languages(self) -> tuple[str, ...]:
        """The languages of distillation, the default worked out."""
        if self.distillation_languages is not None:
            return tuple(self.distillation_languages)
        return tuple(language_code(name) for name in self.backward_sets if is_language(name))

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources of training data."""
        return as_sources(self.data)

    @property
    def domains(self) -> dict[str, Source]:
        """The sources by name; one that has none is called as it is given."""
        if isinstance(self.data, Mapping):
            return dict(self.data)
        return named_sources([describe_source(source) for source in self.sources])

    @property
    def pooled(self) -> Pooling | None:
        """What the domains have in common; None for complete pooling."""
        if self.pooling is None:
            return None
        kind: Any = self.pooling
        return Pooling(kind, tuple(self.domains), self.pooling_scale or SCALE)

    @property
    def new_domain(self) -> Source:
        """What the new domain's test set is read from."""
        return self.sources[0] if self.test is None else self.test

    def to_json(self) -> dict[str, Any]:
        """Attributes by name, as JSON has them; objects of `datasets` are described."""
        content = {one.name: getattr(self, one.name) for one in fields(self)}
        if isinstance(self.data, tuple):
            content["data"] = [describe_source(source) for source in self.sources]
        else:
            content["data"] = {name: describe_source(one) for name, one in self.domains.items()}
        for name in ("test", "dev"):
            source = getattr(self, name)
            content[name] = None if source is None else describe_source(source)
        if self.backward is not None:
            sets = self.backward_sets.items()
            content["backward"] = {name: describe_source(source) for name, source in sets}
        return content


def base_of(config: FitConfig) -> Base:
    """The base model of a configuration; see `load_base`."""
    base = load_base(
        config.base, config.device, config.dtype, config.revision, config.local_files_only
    )
    return replace(base, trim_audio=config.trim_audio)
