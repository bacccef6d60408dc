"""Which engine transcribes."""

import subprocess
import sys

import pytest

from blora_pyro.errors import UserError
from blora_pyro.runs import engines, finished
from blora_pyro.runs.engines import transcribe

pytest.importorskip("faster_whisper", reason="needs blora-pyro[fast]")
ct2 = pytest.importorskip("blora_pyro.transcription.ct2")


def texts(transcripts) -> list[str]:
    return [one.text for one in transcripts]


@pytest.mark.usefixtures("shared_cache")
def test_an_adapted_model_says_what_it_says_in_torch(mapped_run, speech_paths):
    found = {
        strength: {
            engine: transcribe(speech_paths, mapped_run, strength=strength, engine=engine)
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
@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 16), ({"dtype": "int8"}, 1), ({"dtype": "int8", "batch_size": 3}, 3)],
)
def test_in_eight_bits_a_processor_takes_one_after_the_other(
    speech_paths, options, expected, monkeypatch
):
    from blora_pyro.transcription import ct2

    sizes = []

    class Spied(ct2.Decoder):
        def __init__(self, *given):
            sizes.append(given[-1].batch_size)
            super().__init__(*given)

    monkeypatch.setattr(ct2, "Decoder", Spied)
    transcribe(speech_paths[0], base="pocket", language="de-en", engine="ctranslate2", **options)
    assert sizes == [expected]


@pytest.mark.usefixtures("shared_cache")
def test_nothing_of_torch_is_imported_once_a_model_is_converted(mapped_run, speech_paths):
    transcribe(speech_paths[0], mapped_run, engine="ctranslate2")
    script = (
        "import sys; from blora_pyro.cli import app\n"
        "slow = {'torch', 'transformers', 'datasets', 'rich', 'httpx', 'httpx2'}\n"
        "try: app()\n"
        "finally: print(sorted(slow & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, "transcribe", str(speech_paths[0])]
    command += ["--adapter", str(mapped_run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (text,) = texts(transcribe(speech_paths[0], mapped_run, engine="ctranslate2"))
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
def test_what_an_engine_does_not_do_is_refused(speech_paths, options, message):
    with pytest.raises(UserError, match=message):
        transcribe(speech_paths, **{"base": "pocket", "language": "de-en", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "nowhere/at-all", "local_files_only": True}, "base model 'nowhere/at-all'"),
        ({"base": "pocket", "strength": 0.5}, "there is no adapter"),
        ({"base": "pocket", "beam_size": "x"}, "beam_size is x; give a whole number from 1"),
        ({}, "neither base nor adapter is given"),
    ],
)
def test_what_no_engine_can_read_is_told_at_once(speech_paths, monkeypatch, options, message):
    monkeypatch.setattr(finished, "transcribe", lambda *_, **given: pytest.fail("tried again"))
    with pytest.raises(UserError, match=message):
        transcribe(speech_paths[0], **options, on_note=pytest.fail)


def test_an_option_that_is_none_is_refused(speech_paths):
    with pytest.raises(TypeError, match="beam_sizes"):
        transcribe(speech_paths[0], base="pocket", beam_sizes=5)


@pytest.mark.usefixtures("shared_cache")
def test_auto_says_why_it_takes_torch(speech_paths):
    notes = []
    given = {"base": "pocket", "language": "de-en", "on_note": notes.append}
    transcribe(speech_paths[0], **given)
    assert notes == []
    transcribe(speech_paths[0], **given, samples=0, dtype="bfloat16")
    (note,) = notes
    assert note.startswith("decoded by torch, which takes longer: dtype is 'bfloat16', and the")


@pytest.mark.usefixtures("shared_cache")
def test_auto_takes_what_can_do_it(speech_paths, monkeypatch):
    def engine_of(**options):
        given = {"base": "pocket", "language": "de-en", **options}
        return transcribe(speech_paths[0], **given)[0].engine

    assert engine_of() == "ctranslate2"
    assert engine_of(dtype="int8") == "ctranslate2"
    assert engine_of(language="auto") == engine_of(dtype="bfloat16") == "torch"
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    assert engine_of() == "torch"
    with pytest.raises(UserError, match=r"pip install 'blora-pyro\[fast\]'"):
        engine_of(hotwords="brille")


@pytest.mark.usefixtures("shared_cache")
def test_a_blank_text_is_none_and_what_is_no_unicode_is_refused(speech_paths):
    given = {"base": "pocket", "language": "de-en", "engine": "ctranslate2"}
    blank = transcribe(speech_paths[0], **given, initial_prompt="", hotwords=" ")
    assert blank == transcribe(speech_paths[0], **given)
    with pytest.raises(UserError, match=r"hotwords is .*, which is no Unicode text"):
        transcribe(speech_paths[0], **given, hotwords="a\udcff")


def test_every_option_reaches_torch(monkeypatch):
    seen = {}
    monkeypatch.setattr(finished, "transcribe", lambda *given, **options: seen.update(options))
    transcribe("a.wav", base="b", engine="torch", seed=3, prior="p.py", trust_prior_file=True)
    assert (seen["seed"], seen["prior"], seen["trust_prior_file"]) == (3, "p.py", True)
    with pytest.raises(TypeError, match="sample"):
        monkeypatch.undo()
        transcribe("a.wav", base="pocket", engine="torch", sample=3)
