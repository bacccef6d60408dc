"""Base models: a Whisper with its tokenizer and feature extractor."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

from blora_pyro.adapters import is_finite
from blora_pyro.data import MODEL_DIR, language_codes
from blora_pyro.data.prompts import NO_TIMESTAMPS
from blora_pyro.errors import UserError, is_out_of_memory, reason
from blora_pyro.models import encoder
from blora_pyro.models.folders import (
    ADAPTER_WEIGHTS,
    TOKENIZER_FILES,
    adapter_in,
    check_chain,
    check_folder,
    find_folder,
    quiet_transformers,
)
from blora_pyro.models.logits import allow
from blora_pyro.models.peft_adapters import lora_config, stored_language_map, stored_unsuppressed
from blora_pyro.models.stored_config import (
    check_sizes,
    read_config,
    read_extractor,
    read_generation,
    read_tokenizer,
)
from blora_pyro.options import AUTO, POCKET, TASKS, BaseOptions, FitConfig

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
BFLOAT16_UNITS = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # of recent torch.cpu
MERGE_ROUNDING = 1e-3  # of the logits' norm; float32 itself is off by 1e-6


@dataclass(frozen=True)
class Base:
    """A pretrained Whisper with its tokenizer and feature extractor.

    Attributes:
        name: The name that the user gave.
        folder: The folder that it was loaded from, or None.
        half_encoder: Whether `decoding.encode` multiplies in bfloat16.
    """

    name: str
    net: WhisperForConditionalGeneration
    tokenizer: WhisperTokenizer
    feature_extractor: WhisperFeatureExtractor
    folder: Path | None = None
    half_encoder: bool = False

    @property
    def language_map(self) -> dict[str, str]:
        """What prompts languages without a token; see `map_languages`."""
        return dict(getattr(self.net.generation_config, "language_map", None) or {})

    @quiet_transformers()
    def save_pretrained(self, folder: Path) -> None:
        """Write a plain checkpoint folder that other programs read.

        The tokenizer's files are copied from `self.folder` where it has them. Of the others
        transformers 5 writes tokenizer.json alone; converters and older versions also read
        vocab.json, merges.txt and added_tokens.json.

        Raises:
            UserError: If `folder` is `self.folder`.
        """
        if self.folder is not None and folder.resolve() == self.folder.resolve():
            raise UserError(f"output '{folder}' is the base model's own folder; give another")
        for part in (self.net, self.tokenizer, self.feature_extractor):
            part.save_pretrained(folder)
        self.tokenizer.save_vocabulary(str(folder))
        words = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        added = sorted(self.tokenizer.get_added_vocab().items(), key=lambda pair: pair[1])
        ids = {word: number for word, number in added if word not in words}
        text = json.dumps(ids, indent=2, ensure_ascii=False) + "\n"
        (folder / "added_tokens.json").write_text(text, encoding="utf-8")
        for name in TOKENIZER_FILES:
            if self.folder is not None and (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)


def resolve_device(device: str) -> str:
    """Return the torch device that `auto` is on this machine: CUDA, else MPS, else the CPU.

    Any other device is returned as it is.
    """
    if device != AUTO:
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def has_bfloat16_units(device: str) -> bool:
    """Tell whether a device multiplies matrices of bfloat16 faster than those of float32."""
    kind = torch.device(device).type
    if kind == "cpu":
        return any(getattr(torch.cpu, name, bool)() for name in BFLOAT16_UNITS)
    return kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def with_fast_encoder(base: Base) -> Base:
    """Return a base whose encoder multiplies in bfloat16, if the device has units for it."""
    is_whole = base.net.dtype == torch.float32
    half = is_whole and has_bfloat16_units(str(base.net.device))
    return replace(base, half_encoder=half)


def on_this_machine(config: FitConfig) -> FitConfig:
    """Return a configuration whose device and precision are what `auto` is on this machine."""
    device, precision = resolve_device(config.device), config.precision
    if precision == AUTO:
        is_half = config.dtype != "float32"  # it computes in its own
        precision = "bf16" if not is_half and has_bfloat16_units(device) else "fp32"
    return config.on_device(device, precision)


def check_device(device: str) -> None:
    """Raise UserError unless tensors can be made on the device, or it is `auto`."""
    device = resolve_device(device)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"device '{device}' can't be used ({reason}); try cpu") from None


def check_dtype(dtype: str) -> None:
    """Raise UserError unless a base can be loaded in the dtype."""
    if dtype not in DTYPES:
        raise UserError(f"dtype is '{dtype}'; give one of {', '.join(DTYPES)}")


@quiet_transformers()
def load_base(
    name: str = POCKET,
    device: str = AUTO,
    dtype: str = "float32",
    revision: str | None = None,
    local_files_only: bool = False,
    *,
    above: tuple[str, ...] = (),
) -> Base:
    """Load a Whisper of any size, multilingual or English-only.

    Weights are read from safetensors, and no code of a checkpoint is run. Settings of `generate`
    that an older checkpoint lacks (languages, tasks, timestamps) are taken from its tokenizer. A
    PEFT adapter of a Whisper, such as a run folder, is merged into the base that it names, which
    may then say what the run's texts hold.

    Args:
        name: `"pocket"`, a folder with a checkpoint or an adapter, or a Hub id of either.
        device: A torch device.
        dtype: Dtype of the loaded weights, `float32`, `bfloat16` or `float16`.
        revision: Branch, tag or commit of a Hub id.
        local_files_only: Look for a Hub id in the local cache alone.
        above: Adapters that lead to this base.

    Raises:
        UserError: If there is no such checkpoint, it is not a Whisper or not complete, has values
            that are not finite, or the device can't be used.
    """
    device = resolve_device(device)
    check_device(device)
    check_dtype(dtype)
    if name == POCKET and revision is not None:
        raise UserError(f"revision '{revision}' is given with the pocket base; leave it out")
    folder = MODEL_DIR if name == POCKET else find_folder(name, revision, local_files_only)
    if adapter := adapter_in(name, folder):
        above = check_chain(name, folder, above)
        below = load_base(adapter[0], "cpu", "float32", adapter[1], local_files_only, above=above)
        net = _merged(name, below.net, folder).to(device, DTYPES[dtype])
        return replace(below, name=name, net=net.eval())
    check_folder(name, folder)
    config = read_config(name, folder)
    check_sizes(name, folder, config)
    settings = read_generation(name, folder, config)
    feature_extractor = read_extractor(name, folder)
    tokenizer = read_tokenizer(name, folder)
    try:
        net, report = WhisperForConditionalGeneration.from_pretrained(
            folder,
            config=config,
            generation_config=settings,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # whatever transformers raises for damaged files
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"base model '{name}' can't be loaded ({reason(error)}); download it again, or give "
            "another"
        ) from None
    base = Base(name, net.to(device).eval(), tokenizer, feature_extractor, folder)
    _check_parts(base, report)
    check_finite(f"base model '{name}'", base.net)
    _complete(base)
    return base


def _merged(
    name: str, net: WhisperForConditionalGeneration, folder: Path
) -> WhisperForConditionalGeneration:
    """Return a float32 net with a PEFT adapter merged into its weights."""
    from peft import PeftModel

    if not (folder / ADAPTER_WEIGHTS).is_file():  # PEFT would look for pickled ones
        raise UserError(
            f"base model '{name}' is an adapter without {ADAPTER_WEIGHTS}; give another"
        )
    try:
        adapted = PeftModel(net, lora_config(name, folder, net))
        # PEFT's own `from_pretrained` only warns of keys that are missing, and passes over others.
        found = adapted.load_adapter(folder, "default", torch_device="cpu")
        _check_keys(name, found.unexpected_keys, found.missing_keys)
        unmerged = probe(net.eval())
        merged = adapted.merge_and_unload().requires_grad_(True)
        map_languages(merged, stored_language_map(folder / ADAPTER_WEIGHTS))
    except UserError:
        raise
    except Exception as error:  # whatever PEFT raises for damaged files
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"base model '{name}' is an adapter that can't be merged ({reason(error)}); give "
            "another"
        ) from None
    check_merge(name, unmerged, probe(merged))
    allow(merged, stored_unsuppressed(folder / ADAPTER_WEIGHTS))
    return merged


def _check_keys(name: str, unused: Sequence[str], missing: Sequence[str]) -> None:
    """Refuse an adapter unless each of its tensors has a layer, and each adapted layer its own."""
    what = "that the base has no layer for" if unused else "missing"
    if keys := unused or missing:
        named = ", ".join(key.replace(".default", "") for key in keys[:2])
        more = ", ..." if len(keys) > 2 else ""
        raise UserError(
            f"base model '{name}' is an adapter with {len(keys)} tensors {what} ({named}{more}); "
            "give one that was trained on this base by PEFT, or what it was merged into"
        )


def map_languages(net: nn.Module, language_map: Mapping[str, str]) -> None:
    """Have a net's generation config keep what prompts languages that have no token.

    So a checkpoint that is saved keeps it. In `lang_to_id` a language then has the id of the token
    that stands for it, so that transformers' `generate(language="qu")` takes it.

    Args:
        net: Of a base.
        language_map: See `languages.prompt_codes`; it is added to what the net keeps.
    """
    settings = getattr(net, "generation_config", None)
    kept = {**(getattr(settings, "language_map", None) or {}), **language_map}
    if settings is None or not kept:
        return
    settings.language_map = kept
    ids = getattr(settings, "lang_to_id", None) or {}
    own = {name: number for name, number in ids.items() if name.startswith("<|")}
    tokens = {name: own.get(f"<|{token}|>") for name, token in kept.items()}
    settings.lang_to_id = own | {name: one for name, one in tokens.items() if one is not None}


def unmapped_settings(net: WhisperForConditionalGeneration) -> dict[str, Any]:
    """Return a net's generation config as it is without what `map_languages` adds."""
    settings: dict[str, Any] = net.generation_config.to_dict()
    if settings.pop("language_map", None):
        ids = settings.get("lang_to_id") or {}
        settings["lang_to_id"] = {name: ids[name] for name in ids if name.startswith("<|")}
    return settings


@torch.inference_mode()
def probe(net: WhisperForConditionalGeneration) -> Tensor:
    """Return the logits, (1, tokens, vocabulary), of one input that is always the same."""
    config, seeds = net.config, torch.Generator().manual_seed(0)
    frames = min(200, 2 * config.max_source_positions)
    features = torch.randn((1, config.num_mel_bins, frames), generator=seeds)
    tokens = torch.randint(config.vocab_size, (1, 8), generator=seeds)
    return net(
        encoder_outputs=(encoder.encode(net, features.to(net.device)),),
        decoder_input_ids=tokens.to(net.device),
        use_cache=False,
    ).logits.float()


def distance(logits: Tensor, others: Tensor) -> float:
    """Return the norm of the difference of two sets of logits, as a share of the first's norm."""
    return float((logits - others).norm() / logits.norm())


def check_merge(name: str, unmerged: Tensor, merged: Tensor) -> None:
    """Refuse a merged net whose logits differ from those of the adapted one by more than rounding.

    So they do where an adapted weight is tied to another, or a number is not finite.
    """
    if not (off := distance(unmerged, merged)) <= MERGE_ROUNDING:
        raise UserError(
            f"'{name}' can't be merged: its logits would change by {off:.1%}, rounding by "
            f"{MERGE_ROUNDING:.1%} at most; adapt no layer that shares its weight, or use it "
            "unmerged"
        )


def check_finite(what: str, net: nn.Module) -> None:
    """Raise UserError, naming the first, if a tensor of a net, `what`, has a NaN or an infinity."""
    for tensor, values in net.state_dict().items():
        if not is_finite(values):
            raise UserError(
                f"{what} has values that are not finite, in {tensor}; download it again, or give "
                "another dtype or base"
            )


def base_of(options: BaseOptions) -> Base:
    """Load the base model of a configuration; see `load_base`.

    Raises:
        UserError: See there, or if `language_map` has a language that the base has a token for,
            whose own data would then be heard under another.
    """
    base = load_base(
        options.base, options.device, options.dtype, options.revision, options.local_files_only
    )
    if isinstance(options.language_map, Mapping):
        known = language_codes(base.tokenizer)
        if has_one := [name for name in options.language_map if name in known]:
            raise UserError(
                f"language_map has {has_one[0]}={options.language_map[has_one[0]]}, but the base "
                f"has a token for {has_one[0]}; give languages that it has none for, or how two "
                f"are prompted, such as {has_one[0]}-en={has_one[0]}"
            )
        map_languages(base.net, options.language_map)
    return base


def _check_parts(base: Base, report: dict[str, Any]) -> None:
    """Refuse parts that do not belong together, of which transformers only warns."""
    config, extractor = base.net.config, base.feature_extractor
    mels, frames, size = config.num_mel_bins, 2 * config.max_source_positions, config.vocab_size
    missing = sorted(report["missing_keys"])
    ids = base.tokenizer.get_vocab().values()
    if missing:
        problem = f"its weights lack {len(missing)} tensors ({missing[0]}, ...)"
    elif (made := extractor.feature_size) != mels:
        problem = f"its preprocessor makes {made} mel bins and its encoder takes {mels}"
    elif (made := extractor.nb_max_frames) != frames:
        problem = f"its preprocessor makes {made} frames and its encoder takes {frames}"
    elif (made := max(len(ids), max(ids) + 1)) > size:
        problem = f"its tokenizer has {made} tokens and its decoder {size}"
    else:
        return
    raise UserError(
        f"base model '{base.name}' is not whole: {problem}; copy all files from the Whisper that "
        "it was made from, but its weights"
    )


def _complete(base: Base) -> None:
    """Set what `generate` needs and checkpoints without generation_config.json lack."""
    settings, ids = base.net.generation_config, base.tokenizer.get_vocab()
    codes = language_codes(base.tokenizer)
    known: dict[str, Any] = {
        "is_multilingual": bool(codes),
        "no_timestamps_token_id": ids[NO_TIMESTAMPS],
    }
    if codes:
        known["lang_to_id"] = {f"<|{code}|>": ids[f"<|{code}|>"] for code in codes}
        tasks = {task: ids.get(f"<|{task}|>") for task in TASKS}
        known["task_to_id"] = {task: number for task, number in tasks.items() if number is not None}
    if settings.max_new_tokens is None:
        known["max_length"] = base.net.config.max_target_positions  # else it stops after 20 tokens
    settings._from_model_config = False  # saved as True it makes readers ignore the settings
    for name, value in known.items():
        if getattr(settings, name, None) is None:
            setattr(settings, name, value)
