"""Models converted for CTranslate2, and that each is converted once."""

import json
import os
import shutil
from dataclasses import replace

import pytest

from blora_pyro.data import prompt_ids
from blora_pyro.errors import UserError
from blora_pyro.models import load_base
from blora_pyro.runs import conversion
from blora_pyro.runs.conversion import Which, converted
from blora_pyro.runs.engines import transcribe

pytest.importorskip("faster_whisper", reason="needs blora-pyro[fast]")
ct2 = pytest.importorskip("blora_pyro.transcription.ct2")

POCKET = Which(None, "pocket", None, False, None, "scale", None)


@pytest.mark.usefixtures("shared_cache")
def test_a_converted_model_prompts_as_the_run_does(mapped_run, speech_paths, monkeypatch):
    from blora_pyro.transcription import ct2

    seen = []

    def spied(*given):
        seen.append(prompt_ids(*given))
        return seen[-1]

    monkeypatch.setattr(ct2, "prompt_ids", spied)
    transcribe(speech_paths[0], mapped_run, engine="ctranslate2")
    tokenizer = load_base("pocket").tokenizer
    assert seen == [prompt_ids(tokenizer, "qu-en", language_map={"qu": "tr"})]
    names = tokenizer.convert_ids_to_tokens(seen[0])
    assert names[1:3] == ["<|tr|>", "<|en|>"]


@pytest.mark.usefixtures("shared_cache")
def test_a_model_is_converted_once(mapped_run, speech_paths, monkeypatch):
    first = transcribe(speech_paths, mapped_run, engine="ctranslate2")

    def refuse(*_):
        raise AssertionError("converted again")

    monkeypatch.setattr(conversion, "_convert", refuse)
    assert transcribe(speech_paths, mapped_run, engine="ctranslate2") == first
    with pytest.raises(AssertionError, match="converted again"):
        transcribe(speech_paths, mapped_run, strength=0.25, engine="ctranslate2")


def test_the_fingerprint_is_that_of_all_the_model_depends_on(mapped_run, tmp_path):
    which = Which(mapped_run, None, None, False, None, "scale", None)
    copy, plain, over = tmp_path / "copy", tmp_path / "plain", tmp_path / "over"
    shutil.copytree(mapped_run, copy)
    load_base("pocket").save_pretrained(plain)
    over.mkdir()
    below = {"base_model_name_or_path": str(plain)}
    (over / "adapter_config.json").write_text(json.dumps(below))
    assert replace(which, adapter=copy).fingerprint == which.fingerprint

    def fingerprints():
        changes = ({}, {"strength": 0.5}, {"domain": "court"}, {"strength_by": "signal-to-noise"})
        changes += ({"adapter": copy}, {"base": str(plain)}, {"base": str(over)})
        return [replace(which, **change).fingerprint for change in changes]

    before = fingerprints()
    (copy / "posterior.safetensors").write_bytes(b"another")
    (plain / "model.safetensors").write_bytes(b"another")
    after = fingerprints()
    assert before[:4] == after[:4]
    assert len({*before, *after}) == 6 + 3  # a copy of the run was the run


def test_a_model_for_torch_alone_is_found_out_once(fluent_folder, tones_folder, monkeypatch):
    given = {"base": str(fluent_folder), "language": "en"}
    (one,) = transcribe(tones_folder / "en0.wav", **given)
    assert (one.engine, one.text) == ("torch", "the red")
    monkeypatch.setattr(conversion, "_convert", lambda *_: pytest.fail("looked into again"))
    with pytest.raises(UserError, match=r"its tokenizer has no <\|startofprev\|>; give engine"):
        transcribe(tones_folder / "en0.wav", engine="ctranslate2", **given)


def test_who_converts_second_takes_what_is_there(monkeypatch):
    write = conversion._by_ctranslate2

    def overtaken(*given):
        monkeypatch.setattr(conversion, "_by_ctranslate2", write)
        converted(POCKET)
        write(*given)

    monkeypatch.setattr(conversion, "_by_ctranslate2", overtaken)
    folder = converted(POCKET)
    assert {one.name for one in folder.parent.iterdir()} == {folder.name}


@pytest.mark.usefixtures("shared_cache")
def test_weights_of_eight_bits_are_stored_so_and_say_the_same(speech_paths):
    whole, eighth = converted(POCKET), converted(POCKET, "int8")
    sizes = [(one / "model.bin").stat().st_size for one in (whole, eighth)]
    assert sizes[1] < 0.4 * sizes[0]
    decoders = (ct2.Decoder(one, "cpu", "int8", ct2.Settings("de-en")) for one in (whole, eighth))
    rounded, stored = (
        [one.text for one in ct2.transcribe_files(decoder, speech_paths)] for decoder in decoders
    )
    assert rounded == stored


@pytest.mark.parametrize("name", ["run.json", "posterior.safetensors"])
def test_a_pipe_in_the_place_of_a_runs_file_is_not_read(mapped_run, speech_paths, tmp_path, name):
    copy = shutil.copytree(mapped_run, tmp_path / "run")
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(UserError):
        transcribe(speech_paths[0], copy)


@pytest.mark.parametrize(
    "config", [["x"], "x", {"base": ["x"]}, {"base": "a/b", "revision": ["x"]}, None]
)
def test_a_run_whose_configuration_cannot_be_is_one_line(
    mapped_run, speech_paths, tmp_path, config
):
    copy = shutil.copytree(mapped_run, tmp_path / "run")
    about = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**about, "config": config}))
    with pytest.raises(UserError, match=r"run\.json|a/b"):
        transcribe(speech_paths[0], copy, local_files_only=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.bin").write_bytes(b""),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        lambda folder: (shutil.rmtree(folder), folder.write_text("a file")),
        lambda folder: (folder / "blora-pyro.json").write_text('{"x": 1}'),
        lambda folder: (folder / "blora-pyro.json").write_text("["),
        lambda folder: change(folder / "blora-pyro.json", suppressed=5),
        lambda folder: change(folder / "blora-pyro.json", suppressed=[2.5]),
        lambda folder: change(folder / "blora-pyro.json", sizes={}),
        lambda folder: change(folder / "blora-pyro.json", sizes={"model.bin": "x"}),
    ],
)
def test_a_damaged_converted_model_is_converted_again(speech_paths, monkeypatch, tmp_path, damage):
    monkeypatch.setenv("BLORA_PYRO_CACHE", str(tmp_path))
    given = {"base": "pocket", "language": "de-en", "engine": "ctranslate2"}
    first = transcribe(speech_paths[0], **given)
    damage(converted(POCKET))
    assert transcribe(speech_paths[0], **given) == first


def change(file, **content):
    file.write_text(json.dumps({**json.loads(file.read_text()), **content}))


def test_without_a_place_for_the_converted_model_there_is_torch(
    speech_paths, monkeypatch, tmp_path
):
    monkeypatch.setenv("BLORA_PYRO_CACHE", "")
    with pytest.raises(UserError, match="the folder BLORA_PYRO_CACHE, which is empty"):
        converted(POCKET)
    (tmp_path / "file").touch()
    monkeypatch.setenv("BLORA_PYRO_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="the converted model can't be written"):
        converted(POCKET)
    assert transcribe(speech_paths[0], base="pocket", language="de-en")[0].engine == "torch"
