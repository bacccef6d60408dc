import json
from pathlib import Path

import pytest

from blora_pyro.errors import UserError
from blora_pyro.transcription import outputs
from blora_pyro.transcription.outputs import AudioFile, Output, check_format, find_audio, render
from blora_pyro.transcription.transcripts import Segment, Transcript, Word

WORDS = (Word("das", 1.0, -0.25),)
DAS = Transcript("a.wav", "de", 1.23456, (Segment(0.0, 1.23456, "das", WORDS),))


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "audio" / "deep").mkdir(parents=True)
    for name in ("b.wav", "a.FLAC", "deep/a.opus", "notes.txt", "deep/c.json"):
        (tmp_path / "audio" / name).touch()
    (tmp_path / "audio" / "d.wav").mkdir()  # a folder, whatever its name
    return tmp_path / "audio"


def test_folders_give_their_audio_files_and_files_themselves(folder):
    found = find_audio([folder / "notes.txt", folder, "nowhere.wav"])
    names = ["notes.txt", "a.FLAC", "b.wav", "deep/a.opus", "nowhere.wav"]
    assert [str(file.name) for file in found] == names
    assert [file.path for file in found[1:4]] == [folder / name for name in names[1:4]]


def test_files_of_a_folder_that_are_left_out_are_told(folder):
    told = []
    find_audio([folder, folder / "notes.txt"], told.append)
    assert len(told) == 1
    assert "2 not named as audio" in told[0] and told[0].endswith("deep/c.json, notes.txt")


def test_a_folder_without_audio_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no audio file \(\.aac, .*\.flac"):
        find_audio([tmp_path])


def test_files_keep_their_place_below_the_folder(folder, tmp_path):
    plan = Output.plan(find_audio([folder]), tmp_path / "out", "srt")
    names = ["a.srt", "b.srt", "deep/a.srt"]
    assert plan.paths == [tmp_path / "out" / name for name in names]
    plan.write(2, DAS)
    assert (tmp_path / "out" / "deep" / "a.srt").read_text().startswith("1\n00:00:00,000 -->")


def test_two_files_for_one_place_are_refused_but_not_one_file_given_twice(folder, tmp_path):
    with pytest.raises(UserError, match=r"a\.FLAC' and .*a\.opus' would both"):
        Output.plan(find_audio([folder / "a.FLAC", folder / "deep" / "a.opus"]), tmp_path, "json")
    plan = Output.plan(find_audio([folder / "b.wav", folder]), tmp_path, "json")
    assert len(plan.files) == 3


def test_existing_transcripts_are_refused_skipped_or_overwritten(folder, tmp_path):
    files = find_audio([folder])
    (tmp_path / "b.txt").write_text("mine")
    with pytest.raises(UserError, match=r"b\.txt' is there already; --resume"):
        Output.plan(files, tmp_path, "text")
    left = Output.plan(files, tmp_path, "text", resume=True)
    assert [path.name for path in left.paths] == ["a.txt", "a.txt"]
    assert [file.path.name for file in left.files] == ["a.FLAC", "a.opus"]
    assert len(Output.plan(files, tmp_path, "text", overwrite=True).files) == 3
    with pytest.raises(UserError, match="--overwrite and --resume are given"):
        Output.plan(files, tmp_path, "text", overwrite=True, resume=True)


def test_a_folder_that_cannot_be_made_is_refused(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't be made"):
        Output.plan(find_audio([folder]), tmp_path / "file", "text")


def test_a_failed_write_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    plan = Output.plan([AudioFile(Path("a.wav"), Path("a.wav"))], tmp_path, "text")
    monkeypatch.setattr(outputs, "replace_file", full)
    with pytest.raises(UserError, match=r"a\.txt' can't be written \(No space .*--resume"):
        plan.write(0, DAS)
    assert list(tmp_path.iterdir()) == []


def test_formats():
    assert render(DAS, "text") == "das\n"
    assert json.loads(render(DAS, "json")) == {
        "audio": "a.wav",
        "language": "de",
        "duration": 1.235,
        "engine": "torch",
        "text": "das",
        "segments": [
            {
                "start": 0.0,
                "end": 1.235,
                "text": "das",
                "words": [
                    {"text": "das", "agreement": 1.0, "log_prob": -0.25, "confidence": 0.8894}
                ],
            }
        ],
    }
    assert render(DAS, "vtt").startswith("WEBVTT")
    with pytest.raises(UserError, match="'doc'; choose from text, json, srt, vtt"):
        check_format("doc")
