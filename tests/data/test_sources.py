import pytest

from blora_pyro.data import pocket
from blora_pyro.data.sources import load_split
from blora_pyro.errors import UserError


@pytest.fixture
def row(speak):
    return {"audio": str(speak("a.wav")), "text": "x"}


@pytest.fixture
def built_in(monkeypatch, tmp_path, manifest, row):
    monkeypatch.setattr(pocket, "POCKET_DIR", tmp_path / "pocket")
    manifest({**row, "text": "built in"}, name="pocket/de-en/test.jsonl")


def test_manifest_serves_every_split(manifest, row):
    path = manifest(row)
    assert load_split(path, "train")["text"][:] == load_split(str(path), "dev")["text"][:] == ["x"]


def test_folder_has_a_manifest_a_split(manifest, row):
    folder = manifest(row, name="mine/train.jsonl").parent
    manifest({**row, "text": "y"}, name="mine/dev.jsonl")
    assert load_split(folder, "dev")["text"][:] == ["y"]
    with pytest.raises(UserError, match=r"no test.jsonl; its splits are: dev, train"):
        load_split(folder, "test")


def test_built_in_name(built_in):
    assert load_split("de-en", "test")["text"][:] == ["built in"]
    with pytest.raises(UserError, match=r"no train.jsonl; its splits are: test"):
        load_split("de-en", "train")


def test_a_path_that_exists_wins_over_a_built_in_name(
    built_in, manifest, row, monkeypatch, tmp_path
):
    manifest(row, name="de-en/test.jsonl")
    monkeypatch.chdir(tmp_path)
    assert load_split("de-en", "test")["text"][:] == ["x"]


def test_anything_else_lists_what_is_allowed(tmp_path):
    with pytest.raises(UserError) as caught:
        load_split(tmp_path / "gone", "dev")
    message = str(caught.value)
    assert all(part in message for part in ("gone", "manifest", "dev.jsonl", "zh-en, en, de"))
