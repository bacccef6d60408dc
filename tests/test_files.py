import json
import os

import pytest

from blora_pyro.files import cache_dir, replace_file, write_json


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "a.txt"
    for content in (b"old", b"new"):
        replace_file(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        replace_file(path, b"new")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_json_is_readable_with_its_letters_as_they_are(tmp_path):
    write_json(tmp_path / "a.json", {"word": "你好", "ß": [1]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"word": "你好", "ß": [1]}
    assert "你好" in text and text.endswith("}\n")


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("BLORA_PYRO_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.setenv("BLORA_PYRO_CACHE", "")
    assert cache_dir() is None
    monkeypatch.delenv("BLORA_PYRO_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "blora-pyro"
