import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.utils import logging

from blora_pyro.data import prompt_ids
from blora_pyro.errors import UserError
from blora_pyro.models import Base, load_base, map_languages, on_this_machine, resolve_device
from blora_pyro.models import base as bases
from blora_pyro.models.base import unmapped_settings
from blora_pyro.options import BaseOptions, FitConfig
from blora_pyro.transcription import Transcriber, transcribe_files

UNITS = bases.has_bfloat16_units  # of which tests see a stand-in
SLOW_FILES = ("vocab.json", "merges.txt", "added_tokens.json")


@pytest.fixture
def checkpoint(fluent_folder, tmp_path) -> Path:
    return shutil.copytree(fluent_folder, tmp_path / "checkpoint")


def change(file: Path, **content) -> None:
    """Change a JSON file's content; None takes a name out."""
    stored = json.loads(file.read_text(encoding="utf-8")) | content
    stored = {name: value for name, value in stored.items() if value is not None}
    file.write_text(json.dumps(stored), encoding="utf-8")


@pytest.fixture
def hears(tones_folder):
    """Whether a base transcribes as it was taught to: in languages given, and in those detected."""

    def hears(base: Base) -> bool:
        files = [tones_folder / "en1.wav", tones_folder / "de3.wav"]
        known = [
            transcribe_files(Transcriber(base, language=code), [file])[0].text
            for code, file in zip(("en", "de"), files, strict=True)
        ]
        detected = [one.text for one in transcribe_files(Transcriber(base), files)]
        return known == detected == ["a bicycle", "ein rad"]

    return hears


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_that_which_is_asked_for(checkpoint, hears, stored, dtype):
    WhisperForConditionalGeneration.from_pretrained(checkpoint, dtype=stored).save_pretrained(
        checkpoint
    )
    base = load_base(str(checkpoint), dtype=dtype)
    assert {value.dtype for value in base.net.parameters()} == {getattr(torch, dtype)}
    assert load_base(str(checkpoint)).net.dtype == torch.float32
    assert hears(base)


def test_what_is_asked_for_wrongly_is_refused():
    with pytest.raises(UserError, match="dtype is 'int8'; give one of float32, bfloat16, float16"):
        load_base(dtype="int8")
    with pytest.raises(UserError, match="revision 'v1' is given with the pocket base"):
        load_base(revision="v1")


# ---- the files of a checkpoint


@pytest.mark.parametrize("lacking", [("tokenizer.json",), SLOW_FILES])
def test_either_form_of_the_tokenizer_is_enough(checkpoint, hears, lacking):
    before = load_base(str(checkpoint)).tokenizer
    for name in lacking:
        (checkpoint / name).unlink()
    base = load_base(str(checkpoint))
    assert base.tokenizer.get_vocab() == before.get_vocab()
    for text in (" the red bicycle", " ein Rad,  <|de|> & mehr"):
        assert base.tokenizer.encode(text) == before.encode(text)
    assert hears(base)


def test_shards_are_put_together(checkpoint, hears):
    net = load_base(str(checkpoint)).net
    (checkpoint / "model.safetensors").unlink()
    net.save_pretrained(checkpoint, max_shard_size="20KB")
    assert len(list(checkpoint.glob("model-*.safetensors"))) > 1
    assert hears(load_base(str(checkpoint)))


def test_a_processor_config_is_a_preprocessor_config(checkpoint, hears):
    base = load_base(str(checkpoint))
    (checkpoint / "preprocessor_config.json").unlink()
    WhisperProcessor(base.feature_extractor, base.tokenizer).save_pretrained(checkpoint)
    assert not (checkpoint / "preprocessor_config.json").exists()
    assert hears(load_base(str(checkpoint)))


def test_code_of_a_checkpoint_is_never_run(checkpoint, hears):
    code = "import pathlib; pathlib.Path(__file__).with_name('was_run').touch()\n"
    (checkpoint / "theirs.py").write_text(code)
    names = ("AutoConfig", "AutoModelForSpeechSeq2Seq", "AutoTokenizer", "AutoFeatureExtractor")
    auto_map = {name: "theirs.Theirs" for name in names}
    files = ("config.json", "tokenizer_config.json", "preprocessor_config.json")
    for name in files:
        change(checkpoint / name, auto_map=auto_map)
    (checkpoint / "custom_generate").mkdir()
    (checkpoint / "custom_generate" / "generate.py").write_text(code)
    base = load_base(str(checkpoint))
    assert type(base.net) is WhisperForConditionalGeneration
    assert type(base.tokenizer) is WhisperTokenizer
    assert hears(base)
    assert not list(checkpoint.rglob("was_run"))


def edit_weights(folder: Path, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(edit(weights), folder / "model.safetensors", metadata={"format": "pt"})


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def lose_a_layer(folder: Path) -> None:
    edit_weights(folder, lambda w: {n: v for n, v in w.items() if "decoder.layers.1" not in n})


def widen(folder: Path) -> None:
    edit_weights(folder, lambda w: {n: torch.cat([v, v]) for n, v in w.items()})


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (cut, "can't be loaded"),
        (lose_a_layer, "asks for decoder_layers 2, and its weights have 1"),
        (widen, "asks for vocab_size .*, and its weights have"),
        (
            lambda folder: change(folder / "preprocessor_config.json", feature_size=12),
            "makes 12 mel bins and its encoder takes 8",
        ),
        (
            lambda folder: change(folder / "preprocessor_config.json", chunk_length=2),
            "makes 200 frames and its encoder takes 100",
        ),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(checkpoint, harm, words):
    harm(checkpoint)
    with pytest.raises(UserError, match=words) as caught:
        load_base(str(checkpoint))
    assert "\n" not in str(caught.value)
    assert str(checkpoint) in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(checkpoint):
    tokenizer = WhisperTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens(["<|more|>"])
    for name in SLOW_FILES:
        (checkpoint / name).unlink()
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(UserError, match=r"has \d+ tokens and its decoder \d+; copy all files"):
        load_base(str(checkpoint))
    WhisperTokenizer(vocab={"a": 0, "<|endoftext|>": 1}, merges=[]).save_pretrained(checkpoint)
    with pytest.raises(UserError, match=r"no <\|notimestamps\|> and no <\|startoftranscript\|>"):
        load_base(str(checkpoint))


# ---- what older checkpoints do not say, or say otherwise


def test_without_a_generation_config_the_tokenizer_says_what_generate_needs(
    checkpoint, hears, tmp_path
):
    before = load_base(str(checkpoint)).net.generation_config
    (checkpoint / "generation_config.json").unlink()
    change(
        checkpoint / "config.json", begin_suppress_tokens=[]
    )  # the default is of another tokenizer
    base = load_base(str(checkpoint))
    after = base.net.generation_config
    for name in ("is_multilingual", "lang_to_id", "no_timestamps_token_id", "max_length"):
        assert getattr(after, name) == getattr(before, name)
    assert set(after.task_to_id) == {"transcribe", "translate"}
    assert hears(base)
    base.save_pretrained(tmp_path / "out")  # others read it from there
    plain = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert plain.generation_config.lang_to_id == before.lang_to_id


def test_a_language_map_is_kept_in_a_checkpoint_and_transformers_takes_it(fluent_base, tmp_path):
    assert fluent_base.language_map == {}
    before = unmapped_settings(fluent_base.net)
    map_languages(fluent_base.net, {"qu": "en"})
    map_languages(fluent_base.net, {"qu": "de", "qu-en": "de", "ay-en": "de-en"})
    expected = {"qu": "de", "qu-en": "de", "ay-en": "de-en"}
    assert fluent_base.language_map == expected
    assert unmapped_settings(fluent_base.net) == before
    fluent_base.save_pretrained(tmp_path)
    assert load_base(str(tmp_path)).language_map == expected
    net = WhisperForConditionalGeneration.from_pretrained(tmp_path)
    ids = net.generation_config.lang_to_id
    assert ids["qu"] == ids["qu-en"] == ids["<|de|>"] and "ay-en" not in ids
    features = torch.zeros(1, 8, 100)
    said, same = (net.generate(features, language=one) for one in ("qu", "de"))
    assert said.equal(same)


@pytest.mark.parametrize("has_generation_config", [True, False])
@pytest.mark.parametrize("suppressed", [[], ["<|translate|>"]])
def test_forced_tokens_of_older_checkpoints_change_no_prompt(
    checkpoint, hears, has_generation_config, suppressed
):
    ids = load_base(str(checkpoint)).tokenizer.convert_tokens_to_ids
    forced = [ids(f"<|{name}|>") for name in ("de", "translate", "notimestamps")]
    legacy = {
        "forced_decoder_ids": [[place, token] for place, token in enumerate(forced, 1)],
        "suppress_tokens": [ids(name) for name in suppressed],
        "begin_suppress_tokens": [ids("<|endoftext|>")],
        "max_length": 24,
    }
    change(checkpoint / "config.json", **legacy)
    if has_generation_config:
        change(checkpoint / "generation_config.json", **legacy, return_timestamps=True)
    else:
        (checkpoint / "generation_config.json").unlink()
    assert hears(load_base(str(checkpoint)))


# ---- what is written


def test_what_is_saved_has_all_that_other_programs_read(fluent_base, hears, tmp_path):
    fluent_base.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
        *("tokenizer_config.json", "preprocessor_config.json", *SLOW_FILES),
    }
    assert hears(load_base(str(tmp_path)))
    assert WhisperFeatureExtractor.from_pretrained(tmp_path).feature_size == 8
    vocabulary = fluent_base.tokenizer.get_vocab()
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == vocabulary
    words, added = (
        json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in SLOW_FILES[::2]
    )
    assert words | added == vocabulary
    assert not words.keys() & added.keys()
    assert [*added.values()] == sorted(added.values())


def test_the_tokenizer_files_of_a_base_are_passed_on_as_they_are(checkpoint, tmp_path):
    change(checkpoint / "tokenizer_config.json", said_by="the first owner")
    (checkpoint / "normalizer.json").write_text('{"colour": "color"}')
    (checkpoint / "tokenizer.json").unlink()
    load_base(str(checkpoint)).save_pretrained(tmp_path / "out")
    for name in ("tokenizer_config.json", "normalizer.json", *SLOW_FILES):
        assert (tmp_path / "out" / name).read_bytes() == (checkpoint / name).read_bytes()
    prompts = [prompt_ids(load_base(str(tmp_path / "out")).tokenizer, code) for code in ("de-en",)]
    assert prompts == [prompt_ids(load_base(str(checkpoint)).tokenizer, "de-en")]


def test_a_base_is_never_written_over(fluent_folder):
    base = load_base(str(fluent_folder))
    before = (fluent_folder / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="the base model's own folder; give another"):
        base.save_pretrained(fluent_folder / ".." / fluent_folder.name)
    assert (fluent_folder / "model.safetensors").read_bytes() == before


def test_loading_and_saving_leave_the_terminal_and_the_logging_of_transformers_alone(
    fluent_folder, tmp_path, capfd, caplog
):
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_base(str(fluent_folder)).save_pretrained(tmp_path / "copy")
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, has_bars)


@pytest.mark.parametrize(
    ("cuda", "mps", "device"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_is_cuda_else_mps_else_the_cpu(monkeypatch, cuda, mps, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device("auto") == device
    assert resolve_device("cuda:1") == "cuda:1"
    assert FitConfig().device == BaseOptions().device == "auto"


@pytest.mark.parametrize(
    ("units", "options", "expected"),
    [
        (True, {}, "bf16"),
        (False, {}, "fp32"),
        (True, {"dtype": "bfloat16"}, "fp32"),  # the base computes in its own
        (True, {"precision": "fp32"}, "fp32"),
        (False, {"precision": "bf16"}, "bf16"),
        (True, {"base": "pocket"}, "fp32"),
    ],
)
def test_the_precision_of_a_real_base_is_what_the_device_has_units_for(
    units, options, expected, monkeypatch
):
    monkeypatch.setattr(bases, "has_bfloat16_units", lambda device: units)
    config = FitConfig(**{"base": "whisper", "device": "cpu", **options})
    found = on_this_machine(config)
    assert (found.device, found.precision, found.given) == ("cpu", expected, config.given)


def test_units_are_asked_of_the_device(monkeypatch):
    for some in itertools.product([False, True], repeat=len(bases.BFLOAT16_UNITS)):
        for name, has in zip(bases.BFLOAT16_UNITS, some, strict=True):
            monkeypatch.setattr(torch.cpu, name, lambda has=has: has, raising=False)
        assert UNITS("cpu") is any(some)
    assert not UNITS("mps")


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_encoder_is_halved_where_there_are_units_and_weights_are_whole(
    fluent_folder, units, dtype, monkeypatch
):
    monkeypatch.setattr(bases, "has_bfloat16_units", lambda device: units and device == "cpu")
    base = bases.load_base(str(fluent_folder), "cpu", dtype)
    assert not base.half_encoder
    assert bases.with_fast_encoder(base).half_encoder == (units and dtype == "float32")
