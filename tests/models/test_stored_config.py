"""A checkpoint's JSON files are read as anyone's."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import WhisperForConditionalGeneration

from blora_pyro.errors import UserError
from blora_pyro.models import load_base
from blora_pyro.models.stored_config import (
    check_sizes,
    read_config,
    read_extractor,
    read_generation,
    read_tokenizer,
)


@pytest.fixture
def checkpoint(fluent_folder, tmp_path) -> Path:
    return shutil.copytree(fluent_folder, tmp_path / "checkpoint")


def change(file: Path, **content) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | content))


def read_all(folder: Path) -> None:
    config = read_config("x", folder)
    check_sizes("x", folder, config)
    read_generation("x", folder, config)
    read_extractor("x", folder)


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_all(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


def test_what_is_no_whispers_reaches_no_loader(checkpoint, monkeypatch):
    foreign = {
        "attn_implementation": "someone/kernel",
        "_attn_implementation": "someone/kernel",
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "auto_map": {"AutoModelForSpeechSeq2Seq": "theirs.Theirs"},
        "trust_remote_code": True,
        "cache_implementation": "quantized",
        "custom_generate": "someone/generate",
        "torch_dtype": "float16",
    }
    for name in ("config.json", "generation_config.json", "preprocessor_config.json"):
        change(checkpoint / name, **foreign)
    seen = {}
    load = WhisperForConditionalGeneration.from_pretrained
    monkeypatch.setattr(
        WhisperForConditionalGeneration,
        "from_pretrained",
        lambda *args, **given: seen.update(given) or load(*args, **given),
    )
    base = load_base(str(checkpoint))
    assert seen["trust_remote_code"] is False and seen["use_safetensors"] is True
    assert not {"quantization_config", "attn_implementation"} & seen.keys()
    for part in (seen["config"], seen["generation_config"], base.net.config):
        kept = {name: getattr(part, name, None) for name in foreign}
        assert "someone" not in str(kept) and "theirs" not in str(kept)
        assert not kept["quantization_config"]
    assert base.net.config._attn_implementation == "sdpa" and base.net.dtype == torch.float32


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"encoder_layers": 1_000_000}, "asks for encoder_layers 1000000, and its weights have 2"),
        ({"decoder_layers": 1}, "asks for decoder_layers 1, and its weights have 2"),
        ({"d_model": 10**9}, "asks for d_model 1000000000, and its weights have 16"),
        ({"vocab_size": 10**9}, "asks for vocab_size"),
        ({"max_source_positions": 10**9}, "asks for max_source_positions"),
        ({"max_target_positions": 10**8}, "asks for max_target_positions"),
        ({"num_mel_bins": 10**6}, "asks for num_mel_bins"),
        ({"decoder_ffn_dim": 10**9}, r"asks for fc1 of decoder layer 0 as \(1000000000, 16\)"),
        ({"encoder_attention_heads": 0}, "encoder_attention_heads is 0"),
        ({"decoder_attention_heads": 3}, "d_model is 16 and decoder_attention_heads 3"),
        ({"encoder_layers": -1}, "encoder_layers is -1"),
        ({"encoder_layers": "2"}, "encoder_layers is '2'"),
        ({"d_model": True}, "d_model is True"),
        ({"dropout": [1]}, "damaged config.json"),
        ({"activation_function": {"a": 1}}, "damaged config.json"),
    ],
)
def test_a_config_that_asks_for_what_its_weights_have_not_is_refused_unbuilt(
    checkpoint, monkeypatch, content, words
):
    change(checkpoint / "config.json", **content)
    monkeypatch.setattr(WhisperForConditionalGeneration, "from_pretrained", None)  # nothing is made
    with pytest.raises(UserError, match=words):
        load_base(str(checkpoint))
    refusal(checkpoint)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("preprocessor_config.json", {"hop_length": 0}, "hop_length is 0"),
        ("preprocessor_config.json", {"n_fft": 10**9}, "n_fft is 1000000000"),
        ("preprocessor_config.json", {"chunk_length": 1e9}, "chunk_length is"),
        ("preprocessor_config.json", {"feature_size": "8"}, "feature_size is '8'"),
        ("preprocessor_config.json", {"sampling_rate": None}, "sampling_rate is None"),
        ("preprocessor_config.json", {"padding_value": float("nan")}, "padding_value is nan"),
        ("generation_config.json", {"lang_to_id": 3}, "lang_to_id is 3"),
        ("generation_config.json", {"lang_to_id": {"<|en|>": "x"}}, "lang_to_id is"),
        ("generation_config.json", {"suppress_tokens": "all"}, "suppress_tokens is 'all'"),
        ("generation_config.json", {"suppress_tokens": [-1, 2**29]}, "suppress_tokens is"),
        ("generation_config.json", {"begin_suppress_tokens": [2**31 - 1]}, "begin_suppress_tok"),
        ("generation_config.json", {"eos_token_id": 10**6}, "eos_token_id is 1000000"),
        ("generation_config.json", {"lang_to_id": {"<|en|>": 10**6}}, "lang_to_id is"),
        ("generation_config.json", {"alignment_heads": [[1000, 0]]}, "alignment_heads is"),
        ("generation_config.json", {"alignment_heads": [[0, 1000]]}, "alignment_heads is"),
        ("generation_config.json", {"alignment_heads": [[0]]}, "alignment_heads is"),
        ("generation_config.json", {"forced_decoder_ids": [[1, 10**6]]}, "forced_decoder_ids is"),
        ("generation_config.json", {"max_length": 10**12}, "max_length is 1000000000000"),
        ("generation_config.json", {"num_beams": 10**9}, "num_beams is"),
        ("generation_config.json", {"temperature": float("inf")}, "temperature is inf"),
        ("generation_config.json", {"is_multilingual": "yes"}, "is_multilingual is 'yes'"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(checkpoint, file, content, words):
    change(checkpoint / file, **content)
    assert words in (message := refusal(checkpoint)) and file in message


@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "preprocessor_config.json"]
)
@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "3", "", "\\xff", '"', "1" * 5000])
def test_a_file_that_is_no_json_object_is_refused(checkpoint, file, text):
    (checkpoint / file).write_text(text)
    assert f"damaged {file}" in refusal(checkpoint)


@pytest.mark.parametrize(
    "stored",
    [
        *(None, [], 3, {}, {"a": 3}, {"a": ["x"]}, {"a": "../model.safetensors"}),
        *(
            {"a": "/etc/x.safetensors"},
            {"a": "x.safetensors/../y.safetensors"},
            {"a": ".safetensors"},
        ),
    ],
)
def test_an_index_names_files_of_its_own_folder(checkpoint, stored):
    (checkpoint / "model.safetensors").rename(checkpoint / "../model.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": stored}))
    assert "damaged model.safetensors.index.json" in refusal(checkpoint)


def edit(folder: Path, tensor: str, change) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[tensor] = change(weights[tensor])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_are_no_floats_are_refused(checkpoint):
    edit(checkpoint, "model.encoder.conv1.weight", lambda values: values.to(torch.int8))
    assert "weights of type I8 (model.encoder.conv1.weight)" in refusal(checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_base_with_a_value_that_is_not_finite_is_refused_by_the_tensor(checkpoint, value):
    name = "model.decoder.layers.1.fc2.weight"

    def spoil(values):
        values[3, 5] = value
        return values

    edit(checkpoint, name, spoil)
    with pytest.raises(UserError, match=f"values that are not finite, in {name}; download"):
        load_base(str(checkpoint))


def test_an_overflow_of_a_shorter_dtype_is_told(checkpoint):
    edit(checkpoint, "model.decoder.layers.1.fc2.weight", lambda values: 1e6 * values)
    load_base(str(checkpoint))
    with pytest.raises(UserError, match=r"not finite, in .*fc2.weight; .* another dtype"):
        load_base(str(checkpoint), dtype="float16")


# ---- the tokenizer


def test_a_text_is_decoded_as_its_tokens_spell_it(checkpoint):
    change(checkpoint / "tokenizer_config.json", clean_up_tokenization_spaces=True)
    tokenizer = read_tokenizer("x", checkpoint)
    for text in ("ça va ? oui !", "I 'm"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.clean_up_tokenization_spaces is False  # else transformers warns, or does it


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_tokenizer_reads_no_file_that_it_names(checkpoint, tmp_path, file):
    before = read_tokenizer("x", checkpoint)
    elsewhere = tmp_path / "tokenizer.4.0.json"
    elsewhere.write_text("whoever reads this as JSON, or as weights, fails")
    keys = ("tokenizer_file", "vocab_file", "merges_file", "normalizer_file", "gguf_file", "vocab")
    named = dict.fromkeys((*keys, "merges", "tokenizer_object"), str(elsewhere))
    (checkpoint / "special_tokens_map.json").write_text("{}")
    if file == "special_tokens_map.json":  # which tells nothing beside the other
        (checkpoint / "tokenizer_config.json").unlink()
    change(checkpoint / file, **named, fast_tokenizer_files=["../tokenizer.4.0.json"])
    tokenizer = read_tokenizer("x", checkpoint)
    assert tokenizer.get_vocab() == before.get_vocab()
    assert tokenizer.english_spelling_normalizer is None


def test_named_tokens_of_older_transformers_are_tokens(checkpoint):
    stored = json.loads((checkpoint / "tokenizer_config.json").read_text())
    tokens = stored["extra_special_tokens"]
    change(checkpoint / "tokenizer_config.json", extra_special_tokens={"en_token": tokens[0]})
    assert tokens[0] in read_tokenizer("x", checkpoint).all_special_tokens


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer_config.json", {"pad_token": 3}, "tokenizer_config.json (pad_token is 3)"),
        ("special_tokens_map.json", {"language": ["en"]}, "(language is ['en'])"),
        ("normalizer.json", {"colour": ["color"]}, "it maps words to something else than words"),
        ("tokenizer.json", {"model": None}, "has a damaged tokenizer ("),
        ("added_tokens.json", {"<|x|>": "y"}, "has a damaged tokenizer ("),
    ],
)
def test_a_tokenizer_of_wrong_values_is_refused_by_the_file(checkpoint, file, content, words):
    if not (checkpoint / file).exists():
        (checkpoint / file).write_text("{}")
    change(checkpoint / file, **content)
    with pytest.raises(UserError) as caught:
        read_tokenizer("x", checkpoint)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_pipe_in_the_place_of_a_tokenizers_file_is_not_read(checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    os.mkfifo(checkpoint / "tokenizer.json")
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        read_tokenizer("x", checkpoint)


def test_a_tokenizer_without_the_tokens_of_every_prompt_is_refused(checkpoint):
    for file in checkpoint.glob("*token*.json"):
        file.write_text(file.read_text().replace("startoftranscript", "begin"))
    with pytest.raises(UserError, match=r"its tokenizer has no <\|startoftranscript\|>;"):
        read_tokenizer("x", checkpoint)


def test_a_token_beyond_the_decoders_is_refused(checkpoint):
    stored = json.loads((checkpoint / "tokenizer.json").read_text())
    words = stored["model"]["vocab"]
    words[max(words, key=words.get)] = 10**9
    (checkpoint / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match="has 1000000001 tokens and its decoder "):
        load_base(str(checkpoint))
