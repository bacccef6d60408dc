"""What a checkpoint's JSON files say of the model, as far as it is ours to read.

Of every file only the keys of a Whisper are taken, with values that a Whisper can have. The rest
(`auto_map`, `quantization_config`, `attn_implementation`, ...) may name code or ask a loader for
something else, and reaches none. Sizes are compared with the weights before memory is taken.
"""

import inspect
import json
import math
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperTokenizer,
)

from blora_pyro.data.prompts import END, NO_TIMESTAMPS, START
from blora_pyro.errors import UserError, is_out_of_memory, printable, reason
from blora_pyro.files import read_file
from blora_pyro.models.folders import (
    TOKENIZER_FILES,
    check_tokenizer_files,
    read_json_of,
    weight_files,
)

Check = Callable[[Any], bool]


def _whole(low: int, high: int) -> Check:
    return lambda value: type(value) is int and low <= value <= high


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_switch(value: Any) -> bool:
    return type(value) is bool


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _ids_by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_id, value.values()))


def _texts_by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_token(value: Any) -> bool:
    return _is_text(value) or isinstance(value, dict)


_MANY = 2**31
_is_id = _whole(0, _MANY)
_is_count = _whole(1, 10**6)
_PAIRS = _list_of(_list_of(lambda value: value is None or _is_id(value)))

_TOKENS = (  # settings that are tokens, or hold some
    *("bos_token_id", "pad_token_id", "decoder_start_token_id", "no_timestamps_token_id"),
    *("prev_sot_token_id", "eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
    *("lang_to_id", "task_to_id"),
)
GENERATION: dict[str, Check] = {  # what Whisper's `generate`, and ours, may be told by a checkpoint
    **dict.fromkeys(("bos_token_id", "pad_token_id", "decoder_start_token_id"), _is_id),
    **dict.fromkeys(("no_timestamps_token_id", "prev_sot_token_id"), _is_id),
    "eos_token_id": lambda value: _is_id(value) or _list_of(_is_id)(value),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), _list_of(_whole(-1, _MANY))),
    **dict.fromkeys(("lang_to_id", "task_to_id"), _ids_by_name),
    "language_map": _texts_by_name,  # our own, see `models.base.map_languages`
    **dict.fromkeys(("alignment_heads", "forced_decoder_ids"), _PAIRS),
    **dict.fromkeys(("max_length", "max_new_tokens", "median_filter_width"), _is_count),
    **dict.fromkeys(("num_beams", "no_repeat_ngram_size"), _whole(0, 100)),
    "max_initial_timestamp_index": _whole(0, _MANY),
    **dict.fromkeys(("is_multilingual", "return_timestamps", "do_sample"), _is_switch),
    "condition_on_prev_tokens": _is_switch,
    **dict.fromkeys(("language", "task"), _is_text),
    **dict.fromkeys(("length_penalty", "repetition_penalty", "temperature"), _is_number),
    **dict.fromkeys(("compression_ratio_threshold", "logprob_threshold"), _is_number),
    "no_speech_threshold": _is_number,
}
EXTRACTOR: dict[str, Check] = {
    "feature_size": _whole(1, 1024),
    "sampling_rate": _whole(1000, 192_000),
    "hop_length": _whole(1, 16_384),
    "chunk_length": _whole(1, 3600),
    "n_fft": _whole(2, 16_384),
    "padding_value": _is_number,
    "dither": _is_number,
    "return_attention_mask": _is_switch,
}
TOKENIZER: dict[str, Check] = {  # the others name files, which may be anywhere, or code
    **dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"), _is_token),
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens"), _list_of(_is_token)),
    "added_tokens_decoder": lambda value: isinstance(value, dict),
    "add_prefix_space": _is_switch,
    "predict_timestamps": _is_switch,
    **dict.fromkeys(("language", "task"), _is_text),
    "model_max_length": _is_number,
}
# Size -> the tensor that has it, in which dimension; of layers those of every one.
SIZES: dict[str, tuple[str, int]] = {
    "d_model": ("decoder.embed_tokens.weight", 1),
    "vocab_size": ("decoder.embed_tokens.weight", 0),
    "num_mel_bins": ("encoder.conv1.weight", 1),
    "max_source_positions": ("encoder.embed_positions.weight", 0),
    "max_target_positions": ("decoder.embed_positions.weight", 0),
}
FLOATS = ("F64", "F32", "F16", "BF16")


def read_config(name: str, folder: Path) -> WhisperConfig:
    """Return the configuration of a checkpoint, the keys of a Whisper alone.

    Raises:
        UserError: If it is none, or a value can't be.
    """
    stored = read_json_of(name, folder, "config.json")
    # Older transformers have no dataclass, but an `__init__` that names the keys.
    known = inspect.get_annotations(WhisperConfig) or inspect.signature(WhisperConfig).parameters
    layers = ("encoder_layers", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim")
    heads = ("encoder_attention_heads", "decoder_attention_heads")
    counts = dict.fromkeys((*SIZES, *layers, *heads), _whole(1, _MANY))
    own = {key: value for key, value in stored.items() if key in known}
    own["is_encoder_decoder"] = True
    _check(name, "config.json", own, counts)
    try:
        config = WhisperConfig(**own)
    except Exception as error:  # whatever transformers raises for a value of a wrong type
        raise _damaged(name, "config.json", reason(error)) from None
    for head in heads:
        if config.d_model % getattr(config, head):
            why = f"d_model is {config.d_model} and {head} {getattr(config, head)}"
            raise _damaged(name, "config.json", why)
    return config


def read_generation(name: str, folder: Path, config: WhisperConfig) -> GenerationConfig:
    """Return what a checkpoint says to `generate`; an older one says it in its config.json.

    Raises:
        UserError: If a value can't be, or names a token or an attention head that the net has not.
    """
    file = "generation_config.json"
    file = file if (folder / file).is_file() else "config.json"
    stored = read_json_of(name, folder, file)
    own = {key: one for key, one in stored.items() if key in GENERATION and one is not None}
    _check(name, file, own, GENERATION)
    _check(name, file, own, _within(config))
    return GenerationConfig(**own)


def _within(config: WhisperConfig) -> dict[str, Check]:
    """Return checks that tokens are of the vocabulary, and heads of the decoder."""
    vocabulary = int(config.vocab_size)
    layers, heads = int(config.decoder_layers), int(config.decoder_attention_heads)

    def is_known(value: Any) -> bool:
        if isinstance(value, dict | list):
            return all(map(is_known, value.values() if isinstance(value, dict) else value))
        return bool(value < vocabulary)

    def are_heads(value: Any) -> bool:
        pairs = all(len(one) == 2 and None not in one for one in value)
        return pairs and all(layer < layers and head < heads for layer, head in value)

    def are_forced(value: Any) -> bool:
        return all(len(one) == 2 and (one[1] is None or one[1] < vocabulary) for one in value)

    return {
        **dict.fromkeys(_TOKENS, is_known),
        "alignment_heads": are_heads,
        "forced_decoder_ids": are_forced,
    }


def read_extractor(name: str, folder: Path) -> WhisperFeatureExtractor:
    """Return the feature extractor of a checkpoint.

    Raises:
        UserError: If a value can't be.
    """
    file, stored = "processor_config.json", None
    if (folder / file).is_file():
        stored = read_json_of(name, folder, file).get("feature_extractor")
    if stored is None:
        file = "preprocessor_config.json"
        stored = read_json_of(name, folder, file)
    if not isinstance(stored, Mapping):
        raise _damaged(name, file, "no feature extractor")
    own = {key: stored[key] for key in EXTRACTOR if key in stored}
    _check(name, file, own, EXTRACTOR)
    return WhisperFeatureExtractor(**own)


def read_tokenizer(name: str, folder: Path) -> WhisperTokenizer:
    """Return the tokenizer of a checkpoint, of files in its folder alone.

    transformers opens whatever file a `tokenizer_config.json` or `special_tokens_map.json` names,
    so that it reads copies that name none.

    Raises:
        UserError: If it can't be read, or a value can't be.
    """
    check_tokenizer_files(name, folder)
    with tempfile.TemporaryDirectory(prefix="blora-pyro-") as copies:
        for file in TOKENIZER_FILES:
            if (folder / file).exists():
                (Path(copies) / file).write_bytes(_tokenizer_file(name, folder, file))
        try:
            tokenizer = WhisperTokenizer.from_pretrained(copies)
        except Exception as error:  # whatever transformers raises for damaged files
            if is_out_of_memory(error):
                raise
            why = reason(error).replace(copies, str(folder))
            raise _damaged(name, "tokenizer", why) from None
    # OpenAI's ask for it: "ça va ?" would lose its space, or transformers warns of that.
    tokenizer.clean_up_tokenization_spaces = False
    if absent := {START, END, NO_TIMESTAMPS} - tokenizer.get_vocab().keys():
        raise UserError(
            f"base model '{name}' is not whole: its tokenizer has no "
            f"{' and no '.join(sorted(absent))}; copy its files from the Whisper that it was made "
            "from"
        )
    tokenizer.name_or_path = str(folder)
    return tokenizer


def _tokenizer_file(name: str, folder: Path, file: str) -> bytes:
    """Return the content of a tokenizer's file, without what a tokenizer may not be told."""
    if file == "merges.txt":
        try:
            return read_file(folder / file)
        except (OSError, ValueError) as error:
            raise _damaged(name, file, str(error)) from None
    stored = read_json_of(name, folder, file)
    if file == "normalizer.json" and not all(map(_is_text, stored.values())):
        raise _damaged(name, file, "it maps words to something else than words")
    if file in ("tokenizer_config.json", "special_tokens_map.json"):
        if isinstance(named := stored.get("extra_special_tokens"), dict):  # older transformers'
            stored["extra_special_tokens"] = [*named.values()]
        stored = {key: stored[key] for key in TOKENIZER if stored.get(key) is not None}
        _check(name, file, stored, TOKENIZER)
    return json.dumps(stored).encode()


def check_sizes(name: str, folder: Path, config: WhisperConfig) -> None:
    """Refuse a configuration that asks for other sizes than the weights have.

    Only the headers of the files are read. So a checkpoint takes no more memory than its weights.

    Raises:
        UserError: Naming the first size, or a tensor whose numbers are no floats.
    """
    shapes = _shapes(name, folder)
    for key, (tensor, dimension) in SIZES.items():
        shape = shapes.get(tensor)
        found = shape[dimension] if shape and len(shape) > dimension else 0
        _compare(name, key, getattr(config, key), found)
    for part in ("encoder", "decoder"):
        found_layers = {
            int(match[1])
            for match in (re.match(rf"{part}\.layers\.(\d{{1,6}})\.", key) for key in shapes)
            if match
        }
        wanted = getattr(config, f"{part}_layers")
        _compare(name, f"{part}_layers", wanted, len(found_layers & {*range(len(found_layers))}))
        width = getattr(config, f"{part}_ffn_dim")
        for layer in range(wanted):
            shape = shapes.get(f"{part}.layers.{layer}.fc1.weight", (0, 0))
            if shape != (width, config.d_model):
                asked = f"fc1 of {part} layer {layer} as {(width, config.d_model)}"
                raise _not_its_weights(name, asked, shape)


def _shapes(name: str, folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a checkpoint, its name without the first `model.`."""
    shapes = {}
    for file in weight_files(name, folder):
        try:
            with safe_open(file, framework="pt") as weights:
                for key in weights.keys():
                    part = weights.get_slice(key)
                    if part.get_dtype() not in FLOATS:
                        raise UserError(
                            f"base model '{name}' has weights of type {part.get_dtype()} "
                            f"({printable(key)}); give one that is not quantized"
                        )
                    shapes[key.removeprefix("model.")] = tuple(part.get_shape())
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"base model '{name}' can't be loaded ({file.name}: {reason(error)}); download it "
                "again, or give another"
            ) from None
    return shapes


def _check(name: str, file: str, stored: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    for key, value in stored.items():
        if key in checks and not checks[key](value):
            raise _damaged(name, file, f"{key} is {value!r:.60}")


def _compare(name: str, key: str, asked: int, found: int) -> None:
    if asked != found:
        raise _not_its_weights(name, f"{key} {asked}", found)


def _not_its_weights(name: str, asked: str, found: object) -> UserError:
    return UserError(
        f"base model '{name}' is not whole: its config.json asks for {asked}, and its weights have "
        f"{found}; copy all files from the Whisper that it was made from"
    )


def _damaged(name: str, file: str, why: str) -> UserError:
    return UserError(f"base model '{name}' has a damaged {file} ({why}); download it again")
