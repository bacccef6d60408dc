import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile

from blora_pyro.runs import engines

from .conftest import complaint, parsed, run, well

CALLED = ("on_transcript", "on_error", "on_progress", "on_stage")


def test_transcribe_prints_a_line_a_file(finished_run, tones_folder):
    one, two = tones_folder / "test4.wav", tones_folder / "test5.wav"
    adapter = ["--adapter", finished_run.output]
    assert well("transcribe", one, *adapter) == "das red\n"
    assert well("transcribe", one, two, *adapter) == f"{one}: das red\n{two}: ein bicycle\n"
    rows = parsed(well("transcribe", one, two, *adapter, "--json"))
    assert rows == parsed(well("transcribe", one, two, *adapter, "--format", "json"))
    assert [row["audio"] for row in rows] == [str(one), str(two)]
    assert rows[0] == {
        "audio": str(one),
        "language": "de-en",
        "duration": 0.5,
        "engine": "torch",
        "text": "das red",
        "segments": [{"start": 0.0, "end": 0.5, "text": "das red"}],
    }


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_says_what_is_whole(monkeypatch, tmp_path, signum, code):
    monkeypatch.setattr(engines, "transcribe", lambda *_, **given: os.kill(os.getpid(), signum))
    before = signal.getsignal(signal.SIGTERM)
    out = complaint(run("transcribe", "a.wav", "--output", tmp_path), exit_code=code)
    assert f"interrupted; what was written to {tmp_path} is whole, --resume goes on" in out
    assert complaint(run("transcribe", "a.wav"), exit_code=code) == "blora-pyro: interrupted"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_line_end_in_a_name_does_not_end_the_line(finished_run, tones_folder, tmp_path):
    named = [shutil.copy(tones_folder / "test4.wav", tmp_path / name) for name in ("a\nb", "c")]
    out = well("transcribe", *named, "--adapter", finished_run.output)
    assert out.splitlines() == [f"{tmp_path}/a\\nb: das red", f"{tmp_path}/c: das red"]


def test_transcribe_writes_word_confidences(finished_run, tones_folder):
    audio, adapter = tones_folder / "test4.wav", ["--adapter", finished_run.output]
    draws = ["--json", "--samples", 2, "--seed", 3]
    (row,) = parsed(well("transcribe", audio, *adapter, *draws))
    words = row["segments"][0]["words"]
    assert [word["text"] for word in words] == ["das", "red"]
    assert all(set(word) == {"text", "agreement", "log_prob", "confidence"} for word in words)
    assert all(0 <= word["confidence"] <= 1 for word in words)


def test_transcribe_prints_subtitles_of_one_file(finished_run, tones_folder):
    audio, adapter = tones_folder / "test4.wav", ["--adapter", finished_run.output]
    out = well("transcribe", audio, *adapter, "--format", "srt")
    assert out == "1\n00:00:00,000 --> 00:00:00,500\ndas red\n\n"
    assert well("transcribe", audio, *adapter, "--format", "vtt").startswith("WEBVTT\n\n00:00")
    two = run("transcribe", audio, audio, *adapter, "--format", "srt")
    assert "srt is a file an input, and there are 2; give --output" in complaint(two)


@pytest.mark.parametrize(
    ("form", "suffix"), [("text", "txt"), ("json", "json"), ("srt", "srt"), ("vtt", "vtt")]
)
def test_transcribe_writes_a_file_an_input(
    fluent_folder, tones_folder, tmp_path, monkeypatch, form, suffix
):
    (tmp_path / "audio" / "deep").mkdir(parents=True)
    shutil.copy(tones_folder / "en0.wav", tmp_path / "audio" / "one.wav")
    shutil.copy(tones_folder / "de2.wav", tmp_path / "audio" / "deep" / "two.wav")
    base = ["--base", fluent_folder, "--format", form, "--output", tmp_path / "out"]
    out = well("transcribe", tmp_path / "audio", *base)
    assert out == f"2 written to {tmp_path / 'out'}\n"
    one, two = tmp_path / "out" / f"one.{suffix}", tmp_path / "out" / "deep" / f"two.{suffix}"
    assert "the red" in one.read_text() and "das rote" in two.read_text()
    if form == "json":
        assert parsed(one.read_text())["text"] == "the red"
    assert "there already" in complaint(run("transcribe", tmp_path / "audio", *base))
    one.write_text("mine")
    two.unlink()
    assert well("transcribe", tmp_path / "audio", *base, "--resume").startswith("1 written")
    assert one.read_text() == "mine" and two.exists()
    assert well("transcribe", tmp_path / "audio", *base, "--overwrite").startswith("2 written")
    assert "the red" in one.read_text()


@pytest.mark.parametrize("form", ["text", "json"])
def test_transcribe_tells_of_a_bad_file_and_transcribes_the_others(
    fluent_folder, tones_folder, tmp_path, form
):
    (tmp_path / "bad.wav").write_text("no audio")
    files = [tones_folder / "en0.wav", tmp_path / "bad.wav", tones_folder / "de2.wav"]
    options = ["--base", fluent_folder, "--format", form]
    result = run("transcribe", *files, *options)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("blora-pyro: cannot read") and "bad.wav" in line
    if form == "text":
        assert result.stdout == f"{files[0]}: the red\n{files[2]}: das rote\n"
    else:
        assert [row["text"] for row in parsed(result.stdout)] == ["the red", "das rote"]
    result = run("transcribe", *files, *options, "--output", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, f"2 written to {tmp_path / 'out'}\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "doc"], "format is 'doc'; choose from text, json, srt, vtt"),
        (["--format", "srt", "--json"], "--json and --format srt"),
        (["--samples", "4"], "text has no room for it; add --json"),
        (["--samples", "4", "--json"], "no adapter"),
        (["--samples", "-4"], "samples is -4"),
        (["--dtype", "int4"], "dtype is 'int4'; give float32 or float16, or bfloat16 with the"),
        (["--dtype", "int8", "--engine", "torch"], "dtype int8 is given, which the engine torch"),
        (["--strength-by", "base"], "strength_by is 'base', and no adapter is given"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--task", "sing"], "'sing'"),
        (["--engine", "fast"], "engine is 'fast'; give one of auto, torch, ctranslate2"),
        (["--engine", "torch", "--hotwords", "red"], "hotwords is given"),
        (["--vad-filter"], "its tokenizer has no <|startofprev|>; give engine torch"),
        (["--resume"], "give --output"),
        (["--overwrite"], "give --output"),
    ],
)
def test_transcribe_refuses_in_one_line(fluent_folder, tones_folder, options, message):
    audio = tones_folder / "en0.wav"
    assert message in complaint(run("transcribe", audio, "--base", fluent_folder, *options))


def test_transcribe_tells_of_files_in_a_folder_that_it_leaves_out(
    fluent_folder, tones_folder, tmp_path
):
    shutil.copy(tones_folder / "en0.wav", tmp_path / "one.wav")
    (tmp_path / "notes.txt").touch()
    result = run("transcribe", tmp_path, "--base", fluent_folder)
    assert (result.exit_code, result.stdout) == (0, "the red\n")
    assert "1 not named as audio" in result.stderr and "notes.txt" in result.stderr


@pytest.mark.parametrize("form", ["text", "json", "srt", "vtt"])
def test_every_format_renders_the_same_segments(fluent_folder, tones_folder, tmp_path, form):
    soundfile.write(tmp_path / "silent.wav", np.zeros(8000, np.float32), 16_000)
    options = ["--base", fluent_folder, "--format", form]
    empty = {"text": "\n", "srt": "", "vtt": "WEBVTT\n\n"}
    out = well("transcribe", tmp_path / "silent.wav", *options)
    assert (parsed(out)[0]["segments"] if form == "json" else out) == empty.get(form, [])


def test_transcribe_refuses_a_folder_without_audio(tmp_path):
    assert "no audio file" in complaint(run("transcribe", tmp_path))
    assert "a path is empty" in complaint(run("transcribe", "a.wav", ""))


def test_transcribe_hands_every_option_on(monkeypatch, tmp_path):
    seen, calls = {}, {}

    def transcribe(audio, *given, on_note, **options):
        calls.update({name: options.pop(name) for name in CALLED})
        seen.update(options, audio=audio, given=given)
        return []

    monkeypatch.setattr(engines, "transcribe", transcribe)
    flags = ["--adapter", "run", "--base", "b", "--language", "de-en", "--device", "cuda:1"]
    flags += ["--task", "translate", "--samples", 4, "--batch-size", 5, "--seed", 6, "--json"]
    flags += ["--dtype", "bfloat16", "--revision", "v1", "--local-files-only"]
    flags += ["--strength", 0.5, "--strength-by", "signal-to-noise", "--domain", "court"]
    flags += ["--engine", "ctranslate2", "--beam-size", 4, "--word-timestamps", "--vad-filter"]
    flags += ["--initial-prompt", "Once.", "--hotwords", "wombat"]
    assert well("transcribe", "a.wav", *flags, "--prior", "mine.py") == ""
    assert seen == {
        "audio": [Path("a.wav")],
        "given": (Path("run"), "b", "de-en", "cuda:1"),
        "dtype": "bfloat16",
        "revision": "v1",
        "local_files_only": True,
        "prior": "mine.py",
        "task": "translate",
        "strength": 0.5,
        "strength_by": "signal-to-noise",
        "domain": "court",
        "samples": 4,
        "batch_size": 5,
        "seed": 6,
        "engine": "ctranslate2",
        "beam_size": 4,
        "word_timestamps": True,
        "vad_filter": True,
        "initial_prompt": "Once.",
        "hotwords": "wombat",
    }


def test_one_file_is_counted_in_percent_and_several_as_files(monkeypatch):
    def transcribe(audio, *_, on_stage, on_progress, **options):
        on_stage("loading the base")
        for files in (0.1, 0.5 * len(audio), len(audio) - 1e-9):
            on_progress(files)
        return []

    monkeypatch.setattr(engines, "transcribe", transcribe)
    monkeypatch.setattr("blora_pyro.cli.transcribe.PATIENCE", 0)
    one = run("transcribe", "a.wav", "--verbose").stderr
    assert "loading the base ..." in one
    counts = [f"transcribing: {number}%\n" for number in (10, 50, 100)]
    assert all(count in one for count in counts)
    four = run("transcribe", *"abcd", "--verbose").stderr
    assert [f"transcribing: {number} of 4\n" in four for number in (0.1, 2.0, 4.0)] == [True] * 3
    assert run("transcribe", "a.wav", "--quiet").stderr == ""


def test_verbose_says_why_torch_decodes(fluent_folder, tones_folder):
    options = ["--base", fluent_folder, "--verbose"]
    result = run("transcribe", tones_folder / "en0.wav", *options)
    assert result.stdout == "the red\n"
    assert "note: decoded by torch, which takes longer: the engine ctranslate2" in result.stderr


def test_word_times_have_no_room_in_a_text():
    result = run("transcribe", "a.wav", "--word-timestamps")
    assert "text has no room for it; give json, srt or vtt" in complaint(result)


def test_transcribe_with_the_base_alone(fluent_folder, tones_folder):
    base = ["--base", fluent_folder]
    assert well("transcribe", tones_folder / "en0.wav", *base) == "the red\n"
    options = ["--dtype", "bfloat16", "--local-files-only"]
    assert well("transcribe", tones_folder / "en0.wav", *base, *options) == "the red\n"
    revised = run("transcribe", tones_folder / "en0.wav", *base, "--revision", "v1")
    assert "revision 'v1' is given with a local folder" in complaint(revised)
    spanish = run("transcribe", tones_folder / "en0.wav", *base, "--language", "es")
    assert "'es'" in complaint(spanish)


def test_merge_and_transcribe_take_a_strength(finished_run, tones_folder, tmp_path):
    audio, adapter = tones_folder / "test4.wav", ("--adapter", finished_run.output)
    whole = well("transcribe", audio, *adapter)
    base = well("transcribe", audio, *adapter, "--strength", 0)
    assert whole != base
    well("merge", finished_run.output, tmp_path / "out", "--strength", 0)
    merged = ("--base", tmp_path / "out", "--language", "de-en")
    assert well("transcribe", audio, *merged) == base
    assert "there is no adapter" in complaint(run("transcribe", audio, "--strength", 0.5))
    other = ("--strength-by", "magic")
    gone = tmp_path / "none"
    assert "strength_by is 'magic'" in complaint(run("merge", finished_run.output, gone, *other))
    assert not gone.exists()


def test_a_missing_audio_file_is_refused_in_one_line(fluent_folder, finished_run):
    base = run("transcribe", "/nowhere.wav", "--base", fluent_folder)
    assert "/nowhere.wav" in complaint(base)
    adapted = run("transcribe", "/nowhere.wav", "--adapter", finished_run.output)
    assert "/nowhere.wav" in complaint(adapted)
