"""Every option of a fit, declared once: default, help, allowed values, panel.

The command line, the checks, `fit_command`, what `--resume` compares, the reference in the docs and
the model card's list are made from these declarations. Adding an option takes its declaration here
and its use.

`FitConfig` is flat, as `run.json` stores it, and inherits its fields from groups by their use: a
function that needs a part takes that part (`fit_guide` takes `FittingOptions`), and is passed a
`FitConfig` as it is. Nothing here imports torch, so that a bad option is refused at once.
"""

import json
import math
import os
import shlex
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, Literal, SupportsFloat, TypeVar

from blora_pyro.declarations import (
    alternatives,
    check_kinds,
    check_names,
    check_value,
    declarations,
    default_of,
    flag_of,
    is_number,
    key_values,
    known_keywords,
    numbers,
    option,
    parse_value,
    reference,
    separated,
    suggestion,
    texts_of,
)
from blora_pyro.errors import UserError
from blora_pyro.families import (
    AUTO_LOWRANK,
    DEPENDENT_ROWS,
    FAMILIES,
    GUIDES,
    NOT_MEAN_FIELD,
    PREVIOUS_POSTERIOR,
)
from blora_pyro.files import check_name, read_json
from blora_pyro.languages import (
    is_language,
    language_code,
    read_language,
    read_language_map,
)
from blora_pyro.sources import (
    FLEURS,
    Source,
    as_domains,
    as_sources,
    describe_source,
    fleurs_sets,
    is_source,
    is_table,
    named_sources,
)

POCKET = "pocket"
AUTO = "auto"
POCKET_DOMAINS = ("de-en", "es-en", "zh-en")  # code-switched, matrix language first
POCKET_LANGUAGES = ("en", "de", "es", "fr", "tr", "zh")

BUILT_IN = {*POCKET_DOMAINS, *POCKET_LANGUAGES}  # the corpora of the pocket Whisper

# A cold posterior (Wenzel et al., arXiv 2002.02405): of the temperatures tried on the pocket dev
# sets the one of lowest new-domain and backward error, see experiments/pocket/forgetting.md.
AUTO_TEMPERATURE = 0.03
TEMPERATURES = {"auto": AUTO_TEMPERATURE, "elbo": 1.0}  # beta = T / N for N target tokens
SHUFFLE_BUFFER = 1000
POOLING_SCALE = 0.5

# The linear layers of the decoder; the encoder's states can then be computed once.
DECODER = ".*decoder.*"

TASKS = ("transcribe", "translate")
AVERAGE, EACH = "average", "each"  # limits of a contract; a further one is a backward set's own
COLUMNS = ("audio", "text", "language", "word_languages", "duration", "start", "end", "offset")
TARGETS = ("target_modules", "exclude_modules", "layers_to_transform")
ADAPTER_SHAPE = ("rank", "alpha", "rank_pattern", "use_rslora")  # those of --prior-from stay
KEEP_OPTIONS = (  # what an adapter is held to, on which sets, and how they are scored
    *("keep", "strength_by", "base", "revision", "local_files_only", "device", "dtype"),
    *("data", "test", "dev", "backward", "language", "language_map", "task", "column"),
    *("normalizer", "on_bad_row", "max_eval_utterances"),
)
PRIOR_OPTIONS = (  # what the draws of a prior, and where they move a base, depend on
    *("base", "revision", "local_files_only", "device", "dtype", "seed", *TARGETS, *ADAPTER_SHAPE),
    *("prior", "prior_scale", "prior_args", "data", "language", "language_map", "task", "column"),
    *("on_bad_row", "max_utterances"),
)
MACHINE_OPTIONS = ("device", "local_files_only", "track")  # they decide nothing of what is found

Schedule = Literal["cosine", "linear", "constant"]
PoolingKind = Literal["complete", "hierarchical", "none"]

BASE, DATA, PRIOR, FIT, REGULARISERS, KEEPING, EARLY_STOPPING, SCORING, OUTPUT = PANELS = (
    "Base model",
    "Data",
    "Prior, guide and adapter",
    "Fit",
    "Regularisers",
    "What may be forgotten",
    "Early stopping and averaging",
    "Scoring",
    "Output",
)


# Bounds of the many options that are a count, or a positive number.
COUNT: dict[str, Any] = {"at_least": 1}
POSITIVE: dict[str, Any] = {"above": 0}
LARGEST = 1e15  # that no number must reach: no product of what a posterior keeps overflows


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """The frozen base model, and where it computes."""

    PANEL: ClassVar[str] = BASE

    base: str = option(
        "'pocket', a folder with a Whisper checkpoint or with an adapter, which is merged into its "
        "base, or a Hub id of either. Data of your own need one.",
        POCKET,
    )
    dtype: str = option(
        "Data type of the base's weights; factors stay in float32.",
        "float32",
        choices=("float32", "bfloat16", "float16"),
    )
    revision: str | None = option(
        "Branch, tag or commit of a base on the Hub.", unset="the main branch"
    )
    local_files_only: bool = option("Look for a Hub id in the Hub's local cache alone.", False)
    device: str = option(
        "A torch device: cpu, cuda, cuda:1, mps; auto is CUDA, else MPS, else CPU.",
        AUTO,
    )
    language_map: Mapping[str, str] | str = option(
        "What prompts a language that the base has no token for: qu=mi; of code-switched speech "
        "also the pair, qu-es=mi. 'auto' takes the token under which the base finds the training "
        "texts likeliest; 'none' has such a language refused.",
        AUTO,
        metavar="LANG=TOKEN",
        listed="repeated",
        panel=DATA,
    )
    trim_audio: bool = option(
        "Cut every batch of the fit after its longest utterance; faster, not exact. Scores and "
        "transcripts are of full windows all the same.",
        False,
    )


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Training data, and the sets that are scored."""

    PANEL: ClassVar[str] = DATA

    data: Source | Sequence[Source] | Mapping[str, Source] = option(
        "Training data, the new domain: de-en, es-en, zh-en, a folder, a manifest (JSONL, CSV, "
        "TSV) or a Hub data set. Several are mixed, and the first is scored (but see --pooling).",
        "de-en",
        metavar="[NAME=]SOURCE",
        listed="repeated",
    )
    test: Source | None = option(
        "The new domain's test set.", metavar="SOURCE", unset="the test split of --data"
    )
    dev: Source | None = option(
        "The new domain's dev set, for --keep, --eval-every or a study.",
        metavar="SOURCE",
        unset="the dev split of --data",
    )
    backward: Mapping[str, Source] | Sequence[str] | None = option(
        "A held-out set of what the base already knows; several may be given, or with commas "
        "between; fleurs:de,fr are those of google/fleurs ('none': no set).",
        metavar="[NAME=]SOURCE",
        unset="the six pocket languages for the pocket base, none for another",
        listed="repeated",
    )
    language: str | None = option(
        "Language of rows that name none: de, German, or de-en for code-switched speech. A "
        "backward set called by a language has that one instead.",
        unset="none",
    )
    task: str = option("Task in every prompt.", "transcribe", choices=TASKS)
    column: Mapping[str, str] | None = option(
        "What a column is called in all data but the built-in ones: text=transcript; with commas, "
        "the first that a source has.",
        metavar="NAME=COLUMN",
        unset="its usual names",
        listed="repeated",
    )
    on_bad_row: Literal["stop", "skip"] = option(
        "Stop at a row that can't be used, or skip and list it.", "stop"
    )
    max_utterances: int | None = option(
        "Use at most this many utterances of the first --data, drawn at random by --seed.",
        unset="all",
        **COUNT,
    )
    streaming: bool = option(
        "Read the training data as they are needed, for more than memory or disk hold.", False
    )
    shuffle_buffer: int | None = option(
        "Rows that a stream is shuffled in at a time.", unset=f"{SHUFFLE_BUFFER}", **COUNT
    )
    cache_encoder: bool = option(
        "Compute the encoder's states before its first adapted layer once for every utterance, and "
        "keep them on disk during the fit; exact.",
        False,
        real=True,
    )
    pooling: PoolingKind | None = option(
        "What several --data share: one adapter for all (complete); one for each around a shared "
        "one (hierarchical); or nothing (none).",
        metavar="POOLING",
        unset="complete",
    )
    pooling_scale: float | None = option(
        "Width of the domains' deviations from the shared adapter, over the prior's own width.",
        unset=f"{POOLING_SCALE}, if --pooling hierarchical",
        **POSITIVE,
    )


@dataclass(frozen=True, kw_only=True)
class PriorOptions:
    """Prior, guide, and the adapter that they are of."""

    PANEL: ClassVar[str] = PRIOR

    prior: str = option(
        "Prior family (see 'blora-pyro priors'), or the path of a .py file with one.",
        "normal",
        metavar="NAME|FILE",
    )
    prior_scale: float | None = option(
        "The prior's argument 'scale'.", unset="the family's", below=LARGEST, **POSITIVE
    )
    prior_args: Mapping[str, Any] = option(
        "Further argument of the prior family (see 'blora-pyro priors').",
        default_factory=dict,
        metavar="KEY=VALUE",
        listed="repeated",
        flag="prior-arg",
    )
    prior_from: str | None = option(
        "Continue an earlier fit: its posterior is the prior, and where the guide starts; its "
        "base, rank, alpha and target modules are taken over.",
        metavar="RUN",
        unset="a prior family",
    )
    prior_inflation: float | None = option(
        "Factor on the deviations of --prior-from, 1 or more: forget some of it.",
        unset="1",
        at_least=1,
    )
    guide: str | None = option(
        "Guide: point (MAP; LoRA with --beta 0), Pyro's auto-normal or auto-lowrank, a family's, "
        "or a .py file.",
        metavar="NAME|FILE",
        unset="the family's own",
    )
    rank: int = option("Rank of every update.", 16, **COUNT)
    rank_pattern: Mapping[str, int] | None = option(
        "Another rank for the layers whose names end in KEY, or in what a regex KEY matches; the "
        "first that matches counts.",
        metavar="KEY=RANK",
        unset="--rank everywhere",
        listed="repeated",
    )
    alpha: float | None = option(
        "Updates are scaled by alpha / rank, a layer's own.",
        unset="2 * rank",
        below=LARGEST,
        **POSITIVE,
    )
    use_rslora: bool = option(
        "Scale updates by alpha / √rank instead (rank-stabilised LoRA).", False
    )
    target_modules: str = option(
        "Layers to adapt, as in PEFT: all-linear, suffixes such as q_proj,v_proj, or a regex.",
        "all-linear",
        metavar="MODULES",
        real=DECODER,
    )
    exclude_modules: str | None = option(
        "Those of them to leave out: suffixes or a regex.", metavar="MODULES", unset="none"
    )
    layers_to_transform: Sequence[int] | None = option(
        "Adapt only the layers in blocks of these numbers, which count from 0 in encoder and "
        "decoder alike; --target-modules '.*decoder.*' takes one of the two.",
        metavar="N,N,...",
        unset="all",
        listed="commas",
        flag="layers",
    )


@dataclass(frozen=True, kw_only=True)
class FittingOptions:
    """What `fit_guide` takes: how a guide is fitted to a model and its data."""

    PANEL: ClassVar[str] = FIT

    beta: float | Literal["auto", "elbo"] = option(
        "Weight of the KL, summed over all adapter weights; with N target tokens in the training "
        "data 'elbo' is 1/N, the exact negative ELBO per token, and 'auto' 0.03/N.",
        1e-4,
        at_least=0,
        below=LARGEST,
        real=1e-5,
    )
    lr: float = option("Peak learning rate of Adam.", 5e-3, below=LARGEST, real=1e-3, **POSITIVE)
    optimizer: Literal["adam", "natural-gradient"] = option(
        "adam for all parameters, which in a short fit leaves the deviations near their start; or "
        "natural-gradient for the deviations, which then converge, and Adam for the rest.",
        "adam",
    )
    steps: int = option("Steps of SVI.", 400, **COUNT)
    schedule: Schedule = option("Learning rate after its peak.", "cosine")
    warmup_steps: int | None = option(
        "Steps of the linear warm-up to the peak rate.", unset="a tenth of the steps", at_least=0
    )
    batch_size: int = option("Utterances a step.", 16, real=8, **COUNT)
    data_weights: Sequence[float] | None = option(
        "How often each --data is drawn from, in proportion.",
        metavar="W,W,...",
        unset="every utterance once an epoch",
        listed="commas",
        panel=DATA,
    )
    gradient_accumulation: int = option(
        "Parts to take a batch in, under one weight draw: less memory, the same gradient.",
        1,
        **COUNT,
    )
    max_grad_norm: float | None = option(
        "Clip the gradient to this norm, all parameters together.", unset="no clipping", **POSITIVE
    )
    spec_augment: bool = option("Mask features of the training data (SpecAugment).", False)
    estimator: str = option(
        "How the noise of a weight draw reaches a batch.",
        "shared",
        choices=("shared", "flipout", "flipout-token", "local"),
    )
    alarms: bool = option(
        "End a fit that goes wrong, with its last good posterior: the NLL far above its start, "
        "the gradient's norm far above its median, or the dev error running away.",
        True,
        panel=EARLY_STOPPING,
    )
    average_from: float | None = option(
        "Average the posterior over the steps after this share of them.",
        unset="no averaging",
        at_least=0,
        below=1,
        panel=EARLY_STOPPING,
    )
    seed: int = option("Seed of start, data order and noise.", 0, at_least=0, below=2**32)


def _remember_given(config: type[T]) -> type[T]:
    """Have the instances of a dataclass know which options they were made with, in `given`."""
    init: Callable[..., None] = known_keywords(config.__name__)(config.__init__)

    @wraps(init)
    def remembering(self: T, **options: Any) -> None:
        object.__setattr__(self, "given", frozenset(options))
        init(self, **options)

    config.__init__ = remembering  # type: ignore[method-assign,assignment]
    return config


@_remember_given
@dataclass(frozen=True, kw_only=True)
class FitConfig(FittingOptions, PriorOptions, DataOptions, BaseOptions):  # fields in reverse order
    """Everything that decides a fit; `run.json` holds it, as given and resolved.

    Values are checked when a configuration is made, one by one and against one another, without
    loading anything. What is not given has the declared default, of the pocket Whisper or of any
    other base. `blora-pyro fit --help` and docs/options.md describe every field.

    Attributes:
        given: Names of the options that were passed, for `--resume` and `--prior-from`, which take
            the rest from an earlier run.
    """

    PANEL: ClassVar[str] = FIT

    epochs: float | None = option(
        "Passes over the training data, instead of --steps.",
        unset="--steps",
        real=5.0,
        **POSITIVE,
    )
    precision: Literal["auto", "fp32", "bf16"] = option(
        "fp32, or bf16: Whisper under autocast, factors in float32; auto is bf16 where the device "
        "has units for it (CUDA, CPUs with AMX or AVX512_BF16).",
        "fp32",
        real=AUTO,
    )
    gradient_checkpointing: bool = option(
        "Compute Whisper's activations twice: less memory, the same gradient, a slower step.", False
    )
    distillation: float = option(
        "Weight of staying near the frozen base where the new domain's audio is prompted in other "
        "languages; 0 is none.",
        0.0,
        at_least=0,
        panel=REGULARISERS,
    )
    distillation_languages: Sequence[str] | None = option(
        "Those languages.",
        metavar="L,L,...",
        unset="those that --backward sets are called by",
        listed="commas",
        panel=REGULARISERS,
    )
    ewc: float = option(
        "Strength of elastic weight consolidation, with the Fisher information of the backward "
        "sets' train splits; 0 is none.",
        0.0,
        at_least=0,
        panel=REGULARISERS,
    )
    keep: Mapping[str, float] | Sequence[str] | SupportsFloat | None = option(
        "A contract: the points that the average over the backward sets may lose at most, or "
        "average=1,each=2,de=0.5. The fit is turned down to the strength of the lowest new-domain "
        "error among those that keep it on the dev sets.",
        metavar="[NAME=]POINTS",
        unset="no contract: the fit is kept at strength 1",
        listed="repeated",
        panel=KEEPING,
    )
    strength_by: Literal["scale", "base"] | None = option(
        "How --keep turns down: scale multiplies the update ΔW by the strength; base takes from "
        "it what the frozen base hears in old languages, and spares what it hears in the new "
        "domain.",
        unset="scale",
        panel=KEEPING,
    )
    eval_every: int | None = option(
        "Steps between two measurements of the dev error; the best posterior is kept.",
        unset="never; the last posterior is kept",
        **COUNT,
        panel=EARLY_STOPPING,
    )
    patience: int | None = option(
        "Stop after this many measurements without a new best.",
        unset="never",
        **COUNT,
        panel=EARLY_STOPPING,
    )
    normalizer: str = option(
        "Of texts before scoring: unicode keeps letters, marks and the language's own case "
        "(English is by Whisper's English one); whisper is Whisper's own by language (English, or "
        "basic for everything else), as in papers; basic for all; or none.",
        "unicode",
        choices=("unicode", "whisper", "basic", "none"),
        panel=SCORING,
    )
    max_eval_utterances: int | None = option(
        "Score at most this many utterances of every set, drawn at random once for all fits.",
        unset="all",
        **COUNT,
        panel=SCORING,
    )
    track: str | Sequence[str] | None = option(
        "Report every step to tensorboard, wandb, trackio or mlflow.",
        metavar="TRACKER,...",
        unset="none",
        listed="commas",
        panel=OUTPUT,
    )
    given: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Normalise and check.

        Raises:
            UserError: Naming the option, what it was given, and what is allowed.
        """
        for name, value in _values(self).items():
            if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
                object.__setattr__(self, name, value.item())
        for name, value in _suited(self).items():
            object.__setattr__(self, name, value)
        check_kinds(FitConfig, {name: getattr(self, name) for name in declarations(FitConfig)})
        for name, value in _normalised(self):
            object.__setattr__(self, name, value)
        for name in declarations(FitConfig):
            check_value(FitConfig, name, getattr(self, name))
        if not self.base:
            raise UserError("base is empty; give a folder, a Hub id, or pocket, the built-in toy")
        checks = (_check_data, _check_prior, _check_fit, _check_keep, _check_pooling)
        for check in (*checks, _check_streaming):
            check(self)

    @classmethod
    def with_given(cls, options: Mapping[str, Any], given: Iterable[str]) -> "FitConfig":
        """Return a configuration of which only some options count as given.

        Args:
            options: By name.
            given: Names.

        Raises:
            UserError: If an option is unknown or not possible.
        """
        check_names(cls, options, "a fit")
        config = cls(**options)
        object.__setattr__(config, "given", frozenset(given))
        return config

    def with_options(self, **options: Any) -> "FitConfig":
        """Return a copy with other values, which count as given, too."""
        given = self.given | options.keys()
        if (options.get("base", self.base) == POCKET) != (self.base == POCKET):
            usual = FitConfig(base=self.base)
            for name in REAL.keys() - given:  # those of the other base, unless an earlier run's
                if getattr(self, name) == getattr(usual, name):
                    options[name] = default_of(FitConfig, name)
            moved = FitConfig.with_given({**_values(self), **options}, given)
            options |= _suited(moved)
        changed = replace(self, **options)
        object.__setattr__(changed, "given", given)
        return changed

    @property
    def given_options(self) -> dict[str, Any]:
        """Return the options that were passed, by name."""
        return {name: getattr(self, name) for name in sorted(self.given)}

    def on_device(self, device: str, precision: str) -> "FitConfig":
        """Return a copy on a device, in a precision, which count as given only if they were."""
        options = {**_values(self), "device": device, "precision": precision}
        return FitConfig.with_given(options, self.given)

    # ---- defaults worked out

    def resolved(self, num_tokens: int | None, num_utterances: int | None) -> "FitConfig":
        """Return a copy with every default worked out, given the size of the training data.

        Args:
            num_tokens: Number of target tokens; None if it is not known, as of a stream.
            num_utterances: Number of utterances, likewise.

        Raises:
            UserError: If the warm-up is longer than the fit.
        """
        steps, beta = self.steps, self.beta
        if self.epochs is not None and num_utterances is not None:
            steps = max(1, round(self.epochs * math.ceil(num_utterances / self.batch_size)))
        if isinstance(beta, str) and num_tokens is not None:
            beta = TEMPERATURES[beta] / num_tokens
        warm_up = default_warmup_steps(steps) if self.warmup_steps is None else self.warmup_steps
        scale = self.pooling_scale or POOLING_SCALE
        resolved = replace(
            self,
            backward=self.backward_sets,
            beta=beta,
            alpha=self.alpha or 2.0 * self.rank,
            steps=steps,
            warmup_steps=warm_up,
            pooling_scale=scale if self.pooling == "hierarchical" else None,
            shuffle_buffer=(self.shuffle_buffer or SHUFFLE_BUFFER) if self.streaming else None,
        )
        _check_warm_up(resolved)
        return resolved

    @property
    def backward_sets(self) -> dict[str, Source]:
        """Return the backward sets by name, the default worked out."""
        if self.backward is None:
            return named_sources(POCKET_LANGUAGES if self.base == POCKET else ())
        return named_sources(self.backward)

    def check_base(self) -> None:
        """Refuse own data without a base, which an earlier run may have named.

        Raises:
            UserError: See `check_base_named`.
        """
        others = [one for one in (self.test, self.dev) if one is not None]
        sources = (*self.sources, *others, *self.backward_sets.values())
        check_base_named("base" in self.given or self.prior_from is not None, sources)

    @property
    def taught_languages(self) -> tuple[str, ...]:
        """Return the languages of distillation, the default worked out."""
        if self.distillation_languages is not None:
            return tuple(self.distillation_languages)
        return tuple(language_code(name) for name in self.backward_sets if is_language(name))

    @property
    def sources(self) -> tuple[Source, ...]:
        """Return the sources of training data."""
        return as_sources(self.data)

    @property
    def domains(self) -> dict[str, Source]:
        """Return the sources by name; one without a name is called as it is given."""
        if isinstance(self.data, Mapping):
            return dict(self.data)
        return named_sources([describe_source(source) for source in self.sources])

    @property
    def new_domain(self) -> Source:
        """Return the source of the new domain's test set."""
        return self.sources[0] if self.test is None else self.test

    # ---- as JSON and as a command

    def to_json(self) -> dict[str, Any]:
        """Return the options by name, as JSON has them; objects of `datasets` are described."""
        content = {name: getattr(self, name) for name in declarations(FitConfig)}
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


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where a fit is kept, and how it goes on; these decide nothing of what it finds."""

    PANEL: ClassVar[str] = OUTPUT

    output: Path | None = option(
        "Run folder.", unset="runs/DATA-PRIOR-seedSEED, longer with other options"
    )
    overwrite: bool = option("Write over what is there.", False)
    resume: bool = option("Go on with the fit in --output; no other option need be given.", False)
    checkpoint_every: int | None = option(
        "Steps between checkpoints.", unset="every two seconds or more", **COUNT
    )

    def __post_init__(self) -> None:
        """Parse texts of the command line, and check.

        Raises:
            UserError: Naming the option, what it was given, and what is allowed.
        """
        if self.output is not None:
            object.__setattr__(self, "output", Path(self.output))
        if isinstance(self.checkpoint_every, str):
            every = parse_value(OutputOptions, "checkpoint_every", self.checkpoint_every)
            object.__setattr__(self, "checkpoint_every", every)
        for name in declarations(OutputOptions):
            check_value(OutputOptions, name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """What `blora-pyro fit` takes beside the options of a fit."""

    PANEL: ClassVar[str] = OUTPUT

    config: str | None = option(
        "Options of a TOML file, or of another fit's run.json; those on the command line win.",
        metavar="FILE",
        unset="none",
    )
    dry_run: bool = option("Print the resolved options as TOML, and stop.", False)
    estimate: bool = option(
        "Time two steps and a few transcripts, tell how long the fit will take and how much memory "
        "and disk, and stop.",
        False,
    )
    json: bool = option("Print JSON instead of a table.", False)


@dataclass(frozen=True, kw_only=True)
class Verbosity:
    """How much every command that takes its time tells meanwhile, on stderr."""

    PANEL: ClassVar[str] = OUTPUT

    quiet: bool = option("Tell nothing on the way but notes and errors.", False)
    verbose: bool = option(
        "Tell of every step and batch in a line, with the time since the start, in place of bars.",
        False,
    )

    def __post_init__(self) -> None:
        """Refuse both."""
        if self.quiet and self.verbose:
            raise UserError("quiet and verbose are given; give one of them")


# ---- what is made from the declarations


def default_warmup_steps(steps: int) -> int:
    """Return a tenth of the steps, at least one."""
    return max(1, round(0.1 * steps))


GROUPS = (FitConfig, OutputOptions, CommandOptions, Verbosity)  # of `blora-pyro fit`
REFERENCE = """\
# Options of a fit

Every option of `blora-pyro fit`; all but those from `--output` on are fields of `FitConfig` (with
underscores), too, and of a file of options (`blora-pyro fit --config fit.toml`; a `run.json` is
such a file). `blora-pyro fit --dry-run`
prints them resolved. This page is made from their declarations in
[`blora_pyro/options.py`](../blora_pyro/options.py), by
`python -m blora_pyro.options > docs/options.md`.

"""


# Options whose default depends on the base -> that of a base other than the pocket.
REAL = {name: one.real for name, one in declarations(FitConfig).items() if one.real is not None}


def _suited(config: FitConfig) -> dict[str, Any]:
    """Return the defaults of a base other than the pocket, for the options that are not given."""
    if config.base == POCKET:
        return {}
    others = config.given | _ruled_out(_values(config), config.given)
    return {name: value for name, value in REAL.items() if name not in others}


def _ruled_out(options: Mapping[str, Any], given: Iterable[str]) -> set[str]:
    """Return the options that other options keep from having a real base's default."""
    given, continued = {*given}, options["prior_from"] is not None
    hears_otherwise = any(options[one] for one in ("streaming", "spec_augment", "trim_audio"))
    ruled_out = {
        "epochs": options["streaming"] or "steps" in given,
        "target_modules": continued,
        "cache_encoder": hears_otherwise or continued or "target_modules" in given,
    }
    return {name for name, is_out in ruled_out.items() if is_out}


def _values(config: FitConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in declarations(FitConfig)}


def read_options(file: Path) -> dict[str, Any]:
    """Return the options of a fit that a file holds.

    Args:
        file: TOML, an option a line (`prior-scale = 0.1`), or a `run.json`, whose fit is meant.

    Raises:
        UserError: If it can't be read, or holds something else.
    """
    try:
        if file.suffix == ".json":
            content = read_json(file)
            content = content.get("options") or content["config"]
        else:
            content = tomllib.loads(file.read_text(encoding="utf-8"))
        options = {name.replace("-", "_"): value for name, value in content.items()}
    except RecursionError:
        raise UserError(
            f"config '{file}' is nested too deeply; give a TOML file of options"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(
            f"config '{file}' can't be read ({reason}); give a TOML file of options, or a run.json"
        ) from None
    if "prior_arg" in options:
        options["prior_args"] = options.pop("prior_arg")
    check_names(FitConfig, options, f"config '{file}'")
    return options


def to_toml(options: Mapping[str, Any]) -> str:
    """Return options as TOML, as `read_options` reads it; what is None is left out."""
    lines = [f"{name} = {_toml(value)}" for name, value in options.items() if value is not None]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        items = ", ".join(f"{json.dumps(key)} = {_toml(one)}" for key, one in value.items())
        return f"{{{items}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)


def differing(options: Mapping[str, Any]) -> list[str]:
    """Return the names of the options, as `to_json` has them all, that must be given to be had."""
    usual = FitConfig(base=options["base"]).to_json()
    if options["base"] != POCKET:
        given = [name for name, default in usual.items() if options[name] not in (None, default)]
        usual |= {name: default_of(FitConfig, name) for name in _ruled_out(options, given)}
    instead = {"steps"} if usual["epochs"] is not None and options["epochs"] is None else set()
    return [
        name
        for name, default in usual.items()
        if options[name] is not None
        and (options[name] != default or name in instead or (name == "base" and default != POCKET))
    ]


def fit_command(config: FitConfig) -> str:
    """Return the `blora-pyro fit` that fits like this; what is the default is left out.

    Objects of `datasets` are only described: no command line can name them.
    """
    given, words = config.to_json(), ["blora-pyro", "fit"]
    for name in differing(given):
        for text in texts_of(FitConfig, name, given[name]):
            flag = flag_of(FitConfig, name, given[name])
            words += [flag, *([] if text is None else [shlex.quote(text)])]
    return " ".join(words)


def _normalised(config: FitConfig) -> Iterator[tuple[str, Any]]:
    """Yield options in the form that is kept: texts of the command line parsed, names unified."""
    for name in declarations(FitConfig):
        value = getattr(config, name)
        if isinstance(value, str | float) and is_number(FitConfig, name):
            yield name, parse_value(FitConfig, name, value)
    data = config.data
    yield "data", as_domains(tuple(data) if isinstance(data, list) else data)
    if config.pooling == "complete":  # stored as None, as before there were others
        yield "pooling", None
    if config.backward is not None:
        yield "backward", named_sources(_backward(config.backward))
    if config.track is not None:
        yield "track", tuple(dict.fromkeys(separated(config.track))) or None
    if config.data_weights is not None:
        yield "data_weights", numbers("data_weights", config.data_weights)
    if config.language is not None:
        yield "language", read_language(config.language).tag
    yield "language_map", language_map_of(config.language_map)
    if config.distillation_languages is not None:
        languages = map(str, separated(config.distillation_languages))
        yield "distillation_languages", tuple(map(language_code, languages))
    if config.prior_from is not None:
        yield "prior_from", str(config.prior_from)
    yield "prior_args", key_values("prior-arg", config.prior_args)
    if config.column is not None:
        yield "column", read_columns(config.column) or None
    if config.layers_to_transform is not None:
        yield "layers_to_transform", _layers(config.layers_to_transform)
    if config.keep is not None:
        yield "keep", read_contract(config.keep)
    if config.rank_pattern is not None:
        yield "rank_pattern", _rank_pattern(config.rank_pattern) or None


def _layers(value: Any) -> tuple[int, ...]:
    found = numbers("layers", value)
    if not found or not all(math.isfinite(one) and one >= 0 and one == int(one) for one in found):
        raise UserError(f"layers is '{value}'; give numbers from 0 on, such as 3,4,5")
    return tuple(sorted({int(one) for one in found}))


def _rank_pattern(value: Any) -> dict[str, int]:
    found = key_values("rank-pattern", value)
    for key, one in found.items():
        try:
            found[key] = int(one)
        except (TypeError, ValueError):
            found[key] = 0
        if isinstance(one, bool | float) or found[key] < 1:
            raise UserError(
                f"rank_pattern is '{key}={one}'; give KEY=RANK, such as encoder_attn.q_proj=4, "
                "with a rank of 1 or more"
            )
    return found


def language_map_of(value: Any) -> dict[str, str] | str:
    """Return what prompts which languages, also of texts "qu=mi"; `auto` stays as it is.

    Raises:
        UserError: If it is none, or see `languages.read_language_map`.
    """
    if not isinstance(value, Mapping):
        texts = [value] if isinstance(value, str) else value
        are_texts = isinstance(texts, list | tuple) and all(isinstance(one, str) for one in texts)
        value = [one for text in texts for one in separated(text)] if are_texts else value
        if value in ([AUTO], ["none"]):
            return AUTO if value == [AUTO] else {}
        if not are_texts or not all("=" in one for one in value):
            raise UserError(
                f"language_map is {value!r}; give LANG=TOKEN, such as qu=mi, or auto or none alone"
            )
    return read_language_map(key_values("language_map", value))


def read_columns(value: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    """Return what columns are called, also of texts "text=transcript".

    Raises:
        UserError: If there is no such column, or its name is no text.
    """
    found = key_values("column", value)
    for name, called in found.items():
        if name not in COLUMNS or not isinstance(called, str) or not all(separated(called)):
            raise UserError(
                f"column is '{name}={called}'; give NAME=COLUMN, with a name among "
                f"{', '.join(COLUMNS)}{suggestion(name, COLUMNS)}"
            )
    return found


def read_contract(value: object) -> dict[str, float]:
    """Return the limits of a contract, in points by name, also of a number, or texts "each=2".

    A limit without a name is that of the average.

    Raises:
        UserError: If there is none, one is no number from 0 to 100, or two have one name.
    """
    if isinstance(value, Mapping):
        pairs = list(value.items())
    else:
        parts = value if isinstance(value, list | tuple) else [value]
        texts = [one for part in parts for one in separated(str(part))]
        pairs = [
            (name.strip() if sign else AVERAGE, points)
            for name, sign, points in (one.rpartition("=") for one in texts)
        ]
    found: dict[str, float] = {}
    for name, points in pairs:
        try:
            limit = math.nan if isinstance(points, bool) else float(points)
        except (TypeError, ValueError):
            limit = math.nan
        if not 0 <= limit <= 100 or name in found:
            what = "is given twice" if 0 <= limit <= 100 else f"is '{points}'"
            raise UserError(
                f"the limit {name!r:.40} of keep {what}; give points from 0 to 100 once a name, "
                "such as 1, or average=1,each=2,de=0.5"
            )
        found[name] = limit
    if not found:
        raise UserError("keep has no limit; give points, such as 1, or leave it out")
    return found


def column_names(column: Mapping[str, str] | None) -> dict[str, list[str]]:
    """Return the names that columns may have, first choice first."""
    return {name: separated(called) for name, called in (column or {}).items()}


def _backward(value: Any) -> Any:
    """Return backward sets without "none"; a text may hold several, with commas between.

    "fleurs:de,fr" is one set of google/fleurs for each language.
    """
    if is_table(value) or not isinstance(value, list | tuple):
        return value
    whole = [not isinstance(one, str) or os.path.exists(one) for one in value]
    parts = [
        [one] if is_one else fleurs_sets(one) if one.startswith(FLEURS) else separated(str(one))
        for one, is_one in zip(value, whole, strict=True)
    ]
    return tuple(one for part in parts for one in part if one != "none")


def check_base_named(is_named: bool, sources: Iterable[Source]) -> None:
    """Refuse a user's own data where no base is named: the built-in one is a toy.

    Raises:
        UserError: Naming the first such source.
    """
    own = [name for name in map(describe_source, sources) if name not in BUILT_IN]
    if own and not is_named:
        raise UserError(
            f"no base is given for {own[0]}, which is no built-in corpus; give base: a folder with "
            "a Whisper checkpoint, a Hub id such as openai/whisper-small, or pocket, the built-in "
            "toy"
        )


# ---- options against one another


def _check_data(config: FitConfig) -> None:
    weights, sources = config.data_weights, config.sources
    if weights is not None and not (
        len(weights) == len(sources) and all(0 < one < math.inf for one in weights)
    ):
        raise UserError(
            f"data_weights is {', '.join(map(str, weights))} for {len(sources)} source(s) of data; "
            "give one number above 0 for each"
        )
    for name in ("spec_augment", "trim_audio"):
        if config.cache_encoder and getattr(config, name):
            raise UserError(
                f"cache_encoder and {name} are given, and with {name} the encoder hears an "
                "utterance otherwise in every batch; leave one out"
            )
    for name in ("test", "dev"):
        source = getattr(config, name)
        if source is not None and not is_source(source):
            raise UserError(f"{name} is {source!r}; give a source")
    if config.ewc and not config.backward_sets:
        raise UserError("ewc is given, but no backward set to take Fisher from; give some")
    if config.distillation and not config.taught_languages:
        raise UserError(
            "distillation is given, and no backward set is called by a language; name the "
            "languages in distillation_languages"
        )


def _check_prior(config: FitConfig) -> None:
    """Refuse what is no family or guide, and two priors at once."""
    families = (*FAMILIES, PREVIOUS_POSTERIOR)
    for name, value, known in (("prior", config.prior, families), ("guide", config.guide, GUIDES)):
        if value is not None and value not in known and Path(value).suffix != ".py":
            listed = ", ".join(one for one in known if one != PREVIOUS_POSTERIOR)
            why = suggestion(value, known)
            if name == "guide" and value.startswith("auto"):
                why = "; Pyro's others have no mean to store, or a matrix of all weights"
            raise UserError(
                f"{name} is '{value}'; give one of {listed}, or the path of a .py file{why}"
            )
    if config.prior_scale is not None and "scale" in config.prior_args:
        if config.prior_args["scale"] != config.prior_scale:  # a resolved configuration has both
            raise UserError("scale is given by both prior_scale and prior_args; give it by one")
    if config.prior_args.get("statistics") == "backward" and not config.backward_sets:
        raise UserError("statistics is backward, but no backward set to take them from; give some")
    resolved = config.prior == PREVIOUS_POSTERIOR
    if config.prior_from is None:
        if config.prior_inflation is not None:
            raise UserError(
                f"prior_inflation is {config.prior_inflation}, but no prior_from; give both"
            )
        if resolved:
            raise UserError(f"prior is '{config.prior}', but no prior_from; give that alone")
        return
    others = {
        "prior": config.prior not in ("normal", PREVIOUS_POSTERIOR),
        "prior_scale": config.prior_scale is not None,
        "prior_args": bool(config.prior_args) and not resolved,
        "guide": config.guide not in (None, "normal"),
    }
    for name in (name for name, given in others.items() if given):
        raise UserError(
            f"{name} and prior_from are given, and the earlier run's posterior is prior and "
            f"start of the guide; leave {name} out"
        )


def _check_fit(config: FitConfig) -> None:
    if config.epochs is None:
        _check_warm_up(config)
    if config.gradient_accumulation > config.batch_size:
        raise UserError(
            f"gradient_accumulation is {config.gradient_accumulation}, more than the "
            f"{config.batch_size} utterances of a step; give batch_size or less"
        )
    if config.optimizer == "natural-gradient":
        guide = config.guide or config.prior
        _check_possible(
            config,
            "optimizer natural-gradient",
            "fit with optimizer adam",
            {
                "beta": (config.beta != 0, "give a number above 0, or auto"),
                ("prior" if config.guide is None else "guide"): (
                    guide not in NOT_MEAN_FIELD,
                    "its deviations are not those of a mean-field Normal; give guide normal",
                ),
            },
        )
    if config.guide == AUTO_LOWRANK:  # the estimators take apart Normals of independent elements
        possible = {"estimator": (config.estimator == "shared", "give shared")}
        _check_possible(config, f"guide {AUTO_LOWRANK}", "fit with another guide", possible)
    if config.dev is not None and config.eval_every is None and config.keep is None:
        raise UserError("dev is given, but neither keep nor eval_every; give one of them, too")
    if config.patience is not None and config.eval_every is None:
        raise UserError("patience is given, but no eval_every; give both")
    if config.average_from is not None and config.eval_every is not None:
        raise UserError("average_from and eval_every both choose the posterior; give one")


def _check_keep(config: FitConfig) -> None:
    """Refuse a contract about sets that are none, and a way to keep none."""
    if config.keep is None and config.strength_by is not None:
        raise UserError(f"strength_by is {config.strength_by}, but no keep; give both")
    if config.keep is None:
        return
    if not config.backward_sets:
        raise UserError("keep is given, but no backward set to keep it on; give some")
    known = (AVERAGE, EACH, *config.backward_sets)
    for name in read_contract(config.keep):
        if name not in known:
            raise UserError(
                f"keep has a limit for '{name}', which is no backward set; give "
                f"{alternatives(known)}{suggestion(name, known)}"
            )


def _check_warm_up(config: FitConfig) -> None:
    """Refuse a warm-up that is longer than the fit, whose steps must have been worked out."""
    if config.warmup_steps is not None and config.warmup_steps > config.steps:
        raise UserError(
            f"warmup_steps is {config.warmup_steps}; give a whole number from 0 to the steps "
            f"of the fit, {config.steps}"
        )


def _check_pooling(config: FitConfig) -> None:
    kind = config.pooling or "complete"
    if config.pooling_scale is not None and kind != "hierarchical":
        raise UserError(
            f"pooling_scale is {config.pooling_scale:g}, and pooling is {kind}; give pooling "
            "hierarchical, or leave pooling_scale out"
        )
    if kind == "complete":
        return
    if len(config.sources) < 2:
        raise UserError(f"pooling is {kind}, and data is one domain; give two or more, NAME=SOURCE")
    for name in config.domains:
        check_name(name, "a domain (of data as NAME=SOURCE)")
    by_row = tuple(name for name in FAMILIES if name not in DEPENDENT_ROWS)
    _check_possible(
        config,
        f"pooling {kind}",
        "fit with pooling complete",
        {
            "prior_from": (config.prior_from is None, "leave it out"),
            "ewc": (not config.ewc, "leave it out"),
            "test": (config.test is None, "each domain's test set is that of its data"),
            "dev": (config.dev is None, "leave it out"),
            "eval_every": (config.eval_every is None, "leave it out"),
            "keep": (config.keep is None, "leave it out"),
            "estimator": (config.estimator == "shared", "give shared"),
            "prior": (config.prior in by_row, f"give one of {', '.join(by_row)}"),
            "guide": (
                config.guide in (None, config.prior, "point"),
                "give the prior's own, or point",
            ),
        },
    )


def _check_streaming(config: FitConfig) -> None:
    """Refuse what needs all training data, or their number, before the first step."""
    if not config.streaming:
        if config.shuffle_buffer is not None:
            raise UserError(
                f"shuffle_buffer is {config.shuffle_buffer}, but no streaming; give both"
            )
        return
    if (count := len(config.sources)) > 1:
        raise UserError(f"data is {count} sources, and streaming takes one; give one")
    _check_possible(
        config,
        "streaming",
        "fit without streaming",
        {
            "beta": (not isinstance(config.beta, str), "give a number"),
            "epochs": (config.epochs is None, "give steps"),
            "data_weights": (config.data_weights is None, "leave it out"),
            "max_utterances": (config.max_utterances is None, "leave it out"),
            "distillation": (not config.distillation, "leave it out"),
            "cache_encoder": (not config.cache_encoder, "leave it out"),
        },
    )


def _check_possible(
    config: FitConfig, what: str, otherwise: str, possible: Mapping[str, tuple[bool, str]]
) -> None:
    """Refuse the first option that is not possible with something else.

    Args:
        config: Of the fit.
        what: The other thing.
        otherwise: What else can be done.
        possible: Option -> whether it is possible, and what to do if not.
    """
    for name, (is_possible, instead) in possible.items():
        if not is_possible:
            raise UserError(
                f"{name} is {getattr(config, name)}, which {what} can't take; {instead}, or "
                f"{otherwise}"
            )


if __name__ == "__main__":
    print(REFERENCE + reference(GROUPS), end="")
