"""Which engine transcribes, and the converted model that CTranslate2 has."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import soundfile

from blora_pyro.data import SAMPLING_RATE, load_split, prompt_ids, read_audio
from blora_pyro.errors import UserError
from blora_pyro.models import load_base
from blora_pyro.options import FitConfig
from blora_pyro.runs import engines, finished
from blora_pyro.runs.engines import Which, converted, transcribe
from blora_pyro.runs.fits import fit

pytest.importorskip("faster_whisper", reason="needs blora-pyro[fast]")
ct2 = pytest.importorskip("blora_pyro.transcription.ct2")

POCKET = Which(None, "pocket", None, False, None, "scale", None)


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Two German-English utterances, and a manifest that calls them Kichwa and English."""
    folder, rows = tmp_path_factory.mktemp("speech"), []
    for number, row in enumerate(load_split("de-en", "test").select(range(2))):
        wave = read_audio(row["audio"], start=row["start"], end=row["end"])
        soundfile.write(folder / f"{number}.wav", wave, SAMPLING_RATE, subtype="FLOAT")
        rows.append({"audio": f"{number}.wav", "text": row["text"], "language": "qu-en"})
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def run(speech, tmp_path_factory):
    """A fit whose adapter says something else than the base."""
    own = {"data": str(speech), "backward": [], "language_map": ["qu=tr"]}
    sizes = {"steps": 8, "batch_size": 2, "rank": 2, "lr": 0.02}
    config = FitConfig(base="pocket", **sizes, **own)
    return fit(config, tmp_path_factory.mktemp("runs") / "run", evaluate=False).output


@pytest.fixture(scope="module")
def paths(speech):
    return sorted(speech.glob("*.wav"))


@pytest.fixture
def shared_cache(monkeypatch, tmp_path_factory):
    """A cache of all tests that take it: each model is converted once."""
    monkeypatch.setenv("BLORA_PYRO_CACHE", str(tmp_path_factory.getbasetemp() / "engines"))


def texts(transcripts) -> list[str]:
    return [one.text for one in transcripts]


@pytest.mark.usefixtures("shared_cache")
def test_an_adapted_model_says_what_it_says_in_torch(run, paths):
    found = {
        strength: {
            engine: transcribe(paths, run, strength=strength, engine=engine)
            for engine in ("ctranslate2", "torch")
        }
        for strength in (None, 0.0)
    }
    for both in found.values():
        assert texts(both["ctranslate2"]) == texts(both["torch"])
        assert {one.language for one in both["ctranslate2"]} == {"qu-en"}
        for engine, transcripts in both.items():
            assert {one.to_json()["engine"] for one in transcripts} == {engine}
    assert texts(found[None]["torch"]) != texts(found[0.0]["torch"])


@pytest.mark.usefixtures("shared_cache")
def test_a_converted_model_prompts_as_the_run_does(run, paths, monkeypatch):
    from blora_pyro.transcription import ct2

    seen = []

    def spied(*given):
        seen.append(prompt_ids(*given))
        return seen[-1]

    monkeypatch.setattr(ct2, "prompt_ids", spied)
    transcribe(paths[0], run, engine="ctranslate2")
    tokenizer = load_base("pocket").tokenizer
    assert seen == [prompt_ids(tokenizer, "qu-en", language_map={"qu": "tr"})]
    names = tokenizer.convert_ids_to_tokens(seen[0])
    assert names[1:3] == ["<|tr|>", "<|en|>"]


@pytest.mark.usefixtures("shared_cache")
@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 16), ({"dtype": "int8"}, 1), ({"dtype": "int8", "batch_size": 3}, 3)],
)
def test_in_eight_bits_a_processor_takes_one_after_the_other(paths, options, expected, monkeypatch):
    from blora_pyro.transcription import ct2

    sizes = []

    class Spied(ct2.Decoder):
        def __init__(self, *given):
            sizes.append(given[-1].batch_size)
            super().__init__(*given)

    monkeypatch.setattr(ct2, "Decoder", Spied)
    transcribe(paths[0], base="pocket", language="de-en", engine="ctranslate2", **options)
    assert sizes == [expected]


@pytest.mark.usefixtures("shared_cache")
def test_a_model_is_converted_once(run, paths, monkeypatch):
    first = transcribe(paths, run, engine="ctranslate2")

    def refuse(*_):
        raise AssertionError("converted again")

    monkeypatch.setattr(engines, "_convert", refuse)
    assert transcribe(paths, run, engine="ctranslate2") == first
    with pytest.raises(AssertionError, match="converted again"):
        transcribe(paths, run, strength=0.25, engine="ctranslate2")


def test_the_fingerprint_is_that_of_all_the_model_depends_on(run, tmp_path):
    which = Which(run, None, None, False, None, "scale", None)
    copy, plain, over = tmp_path / "copy", tmp_path / "plain", tmp_path / "over"
    shutil.copytree(run, copy)
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


@pytest.mark.usefixtures("shared_cache")
def test_nothing_of_torch_is_imported_once_a_model_is_converted(run, paths):
    transcribe(paths[0], run, engine="ctranslate2")
    script = (
        "import sys; from blora_pyro.cli import app\n"
        "slow = {'torch', 'transformers', 'datasets', 'rich', 'httpx', 'httpx2'}\n"
        "try: app()\n"
        "finally: print(sorted(slow & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, "transcribe", str(paths[0]), "--adapter", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (text,) = texts(transcribe(paths[0], run, engine="ctranslate2"))
    assert done.stdout.splitlines() == [text, "[]"]


@pytest.mark.usefixtures("shared_cache")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "fast"}, "engine is 'fast'; give one of auto, torch, ctranslate2"),
        ({"engine": "torch", "beam_size": 2}, "beam_size is given, which the engine torch"),
        ({"engine": "torch", "vad_filter": True}, "vad_filter is given"),
        ({"beam_size": 0}, "beam_size is 0"),
        ({"beam_size": 10**12}, "beam_size is 1000000000000; give a whole number from 1 to 100"),
        ({"seed": -1}, "seed is -1; give a whole number from 0"),
        ({"seed": 2**40}, "seed is 1099511627776; give"),
        ({"samples": 2, "engine": "ctranslate2"}, "samples is 2, and the engine ctranslate2 has"),
        ({"samples": 2, "vad_filter": True}, "leave vad_filter out"),
        ({"engine": "ctranslate2", "device": "mps"}, "device is 'mps'"),
        ({"engine": "ctranslate2", "dtype": "bfloat16"}, "dtype is 'bfloat16', and the engine"),
        ({"engine": "ctranslate2", "language": "auto"}, "finds no language"),
        ({"engine": "ctranslate2", "task": "sing"}, "no task is called 'sing'"),
        ({"engine": "ctranslate2", "base": None}, "neither base nor adapter is given"),
    ],
)
def test_what_an_engine_does_not_do_is_refused(paths, options, message):
    with pytest.raises(UserError, match=message):
        transcribe(paths, **{"base": "pocket", "language": "de-en", **options})


@pytest.mark.usefixtures("shared_cache")
def test_auto_says_why_it_takes_torch(paths):
    notes = []
    given = {"base": "pocket", "language": "de-en", "on_note": notes.append}
    transcribe(paths[0], **given)
    assert notes == []
    transcribe(paths[0], **given, samples=0, dtype="bfloat16")
    (note,) = notes
    assert note.startswith("decoded by torch, which takes longer: dtype is 'bfloat16', and the")


@pytest.mark.usefixtures("shared_cache")
def test_auto_takes_what_can_do_it(paths, monkeypatch):
    def engine_of(**options):
        given = {"base": "pocket", "language": "de-en", **options}
        return transcribe(paths[0], **given)[0].engine

    assert engine_of() == "ctranslate2"
    assert engine_of(dtype="int8") == "ctranslate2"
    assert engine_of(language="auto") == engine_of(dtype="bfloat16") == "torch"
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    assert engine_of() == "torch"
    with pytest.raises(UserError, match=r"pip install 'blora-pyro\[fast\]'"):
        engine_of(hotwords="brille")


def test_a_model_for_torch_alone_is_found_out_once(fluent_folder, tones_folder, monkeypatch):
    given = {"base": str(fluent_folder), "language": "en"}
    (one,) = transcribe(tones_folder / "en0.wav", **given)
    assert (one.engine, one.text) == ("torch", "the red")
    monkeypatch.setattr(engines, "_convert", lambda *_: pytest.fail("looked into again"))
    with pytest.raises(UserError, match=r"its tokenizer has no <\|startofprev\|>; give engine"):
        transcribe(tones_folder / "en0.wav", engine="ctranslate2", **given)


def test_without_a_place_for_the_converted_model_there_is_torch(paths, monkeypatch, tmp_path):
    monkeypatch.setenv("BLORA_PYRO_CACHE", "")
    with pytest.raises(UserError, match="the folder BLORA_PYRO_CACHE, which is empty"):
        converted(POCKET)
    (tmp_path / "file").touch()
    monkeypatch.setenv("BLORA_PYRO_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="the converted model can't be written"):
        converted(POCKET)
    assert transcribe(paths[0], base="pocket", language="de-en")[0].engine == "torch"


def test_who_converts_second_takes_what_is_there(monkeypatch):
    write = engines._by_ctranslate2

    def overtaken(*given):
        monkeypatch.setattr(engines, "_by_ctranslate2", write)
        converted(POCKET)
        write(*given)

    monkeypatch.setattr(engines, "_by_ctranslate2", overtaken)
    folder = converted(POCKET)
    assert {one.name for one in folder.parent.iterdir()} == {folder.name}


@pytest.mark.usefixtures("shared_cache")
def test_weights_of_eight_bits_are_stored_so_and_say_the_same(paths):
    whole, eighth = converted(POCKET), converted(POCKET, "int8")
    sizes = [(one / "model.bin").stat().st_size for one in (whole, eighth)]
    assert sizes[1] < 0.4 * sizes[0]
    decoders = (ct2.Decoder(one, "cpu", "int8", ct2.Settings("de-en")) for one in (whole, eighth))
    rounded, stored = (texts(ct2.transcribe_files(one, paths)) for one in decoders)
    assert rounded == stored


@pytest.mark.parametrize("name", ["run.json", "posterior.safetensors"])
def test_a_pipe_in_the_place_of_a_runs_file_is_not_read(run, paths, tmp_path, name):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(UserError):
        transcribe(paths[0], copy)


@pytest.mark.parametrize(
    "config", [["x"], "x", {"base": ["x"]}, {"base": "a/b", "revision": ["x"]}, None]
)
def test_a_run_whose_configuration_cannot_be_is_one_line(run, paths, tmp_path, config):
    copy = shutil.copytree(run, tmp_path / "run")
    about = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**about, "config": config}))
    with pytest.raises(UserError, match=r"run\.json"):
        transcribe(paths[0], copy, local_files_only=True)


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
def test_a_damaged_converted_model_is_converted_again(paths, monkeypatch, tmp_path, damage):
    monkeypatch.setenv("BLORA_PYRO_CACHE", str(tmp_path))
    given = {"base": "pocket", "language": "de-en", "engine": "ctranslate2"}
    first = transcribe(paths[0], **given)
    damage(converted(POCKET))
    assert transcribe(paths[0], **given) == first


def change(file, **content):
    file.write_text(json.dumps({**json.loads(file.read_text()), **content}))


@pytest.mark.usefixtures("shared_cache")
def test_a_blank_text_is_none_and_what_is_no_unicode_is_refused(paths):
    given = {"base": "pocket", "language": "de-en", "engine": "ctranslate2"}
    blank = transcribe(paths[0], **given, initial_prompt="", hotwords=" ")
    assert blank == transcribe(paths[0], **given)
    with pytest.raises(UserError, match=r"hotwords is .*, which is no Unicode text"):
        transcribe(paths[0], **given, hotwords="a\udcff")


def test_every_option_reaches_torch(monkeypatch):
    seen = {}
    monkeypatch.setattr(finished, "transcribe", lambda *given, **options: seen.update(options))
    transcribe("a.wav", base="b", engine="torch", seed=3, prior="p.py", trust_prior_file=True)
    assert (seen["seed"], seen["prior"], seen["trust_prior_file"]) == (3, "p.py", True)
    with pytest.raises(TypeError, match="sample"):
        monkeypatch.undo()
        transcribe("a.wav", base="pocket", engine="torch", sample=3)
