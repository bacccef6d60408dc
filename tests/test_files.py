import json
import os
import sys
from pathlib import Path

import pytest

from blora_pyro import files
from blora_pyro.errors import UserError
from blora_pyro.files import (
    cache_dir,
    check_name,
    is_locked,
    locked,
    new_folder,
    parse_json,
    read_json,
    replace_file,
    write_json,
)


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "a.txt"
    for content in (b"old", b"new"):
        replace_file(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_processes_that_write_a_shared_file_at_once_do_not_meet(tmp_path, monkeypatch):
    path, replace = tmp_path / "a.csv", os.replace

    def overtaken(fresh, there):
        monkeypatch.setattr(os, "replace", replace)
        replace_file(path, b"second", shared=True)
        replace(fresh, there)

    monkeypatch.setattr(os, "replace", overtaken)
    replace_file(path, b"first", shared=True)
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


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


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"a":' * 100_000, b"1" * 5000])
def test_what_is_no_json_object_is_a_value_error(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError):
        read_json(tmp_path / "a.json")
    with pytest.raises(OSError):
        read_json(tmp_path / "none.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_or_a_device_in_the_place_of_a_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "zero.json"):
        with pytest.raises(ValueError, match="a pipe or a device"):
            read_json(tmp_path / name)


# ---- folders

OLD, NEW = {"key": "old", "result": "old", "mine": "mine"}, {"key": "new", "mine": "mine"}
OWN = ("key", "result*")


def content_of(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def fill(folder, content):
    folder.mkdir(exist_ok=True)
    for name, text in content.items():
        (folder / name).write_text(text)


def replace(path):
    with new_folder(path, OWN) as folder:
        fill(folder, {"key": "new"})


def test_a_new_folder_is_there_at_the_end_with_what_is_nobodys_of_the_old(tmp_path):
    path = tmp_path / "below" / "out"
    replace(path)
    assert content_of(path) == {"key": "new"}
    fill(path, OLD)
    (path / "folder").mkdir()
    (path / "folder" / "note").write_text("mine")
    (path / "folder" / "link").symlink_to("nowhere")
    replace(path)
    assert content_of(path) == {**NEW, "folder/note": "mine"}
    assert (path / "folder" / "link").is_symlink()
    assert [*path.parent.iterdir()] == [path]


def test_an_error_leaves_the_old_folder_and_nothing_beside_it(tmp_path):
    fill(tmp_path / "out", OLD)
    for path in (tmp_path / "out", tmp_path / "none"):
        with pytest.raises(OSError, match="full"), new_folder(path, OWN) as folder:
            (folder / "key").write_text("n")
            raise OSError("full")
    assert content_of(tmp_path / "out") == OLD and [*tmp_path.iterdir()] == [tmp_path / "out"]


@pytest.mark.parametrize("step", ["fsync", "link", "rename"])
def test_an_error_at_the_end_leaves_the_old_folder(tmp_path, monkeypatch, step):
    path = tmp_path / "out"
    fill(path, OLD)
    monkeypatch.setattr("ctypes.CDLL", lambda name: None)  # no exchange in one step

    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fails)
    if step == "link":  # which only spares a copy
        replace(path)
        assert content_of(path) == NEW
        return
    with pytest.raises(OSError, match="No space left"):
        replace(path)
    monkeypatch.undo()
    assert content_of(path) == OLD and [*tmp_path.iterdir()] == [path]


def test_without_an_exchange_a_failed_second_rename_brings_the_old_folder_back(
    tmp_path, monkeypatch
):
    path = tmp_path / "out"
    fill(path, OLD)
    monkeypatch.setattr("ctypes.CDLL", lambda name: None)
    rename, calls = os.rename, []

    def second_fails(*names):
        calls.append(names)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(*names)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="Input/output"):
        replace(path)
    assert len(calls) == 3 and content_of(path) == OLD
    replace(path)
    assert content_of(path) == NEW


def killed_at(event: int, work) -> bool:
    """Whether a copy of this process dies at its n-th call of the system, at work."""
    if (child := os.fork()) == 0:
        left = [event]

        def hook(name, _):
            if name == "open" or name.startswith(("os.", "shutil.", "ctypes.")):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)

        sys.addaudithook(hook)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new_and_the_next_call_works(tmp_path):
    seen, event = [], 0
    while True:
        path = tmp_path / str(event) / "out"
        path.parent.mkdir()
        fill(path, OLD)
        if not killed_at(event, lambda path=path: replace(path)):
            break
        seen.append(content_of(path))
        replace(path)
        assert content_of(path) == NEW and [*path.parent.iterdir()] == [path]
        event += 1
    assert OLD in seen and NEW in seen and all(one in (OLD, NEW) for one in seen)


def test_a_folder_that_cannot_be_renamed_gets_its_key_last(tmp_path, monkeypatch):
    fill(tmp_path / "out", OLD)
    monkeypatch.chdir(tmp_path / "out")
    moved, move = [], os.replace

    def listed(old, new):
        assert not Path("key").exists()
        moved.append(Path(new).name)
        move(old, new)

    monkeypatch.setattr(os, "replace", listed)
    with new_folder(Path("."), OWN) as folder:
        fill(folder, {"key": "new", "result-2": "new"})
    assert content_of(Path(".")) == {**NEW, "result-2": "new"} and moved[-1] == "key"
    assert [*tmp_path.iterdir()] == [tmp_path / "out"]


def test_two_do_not_write_to_one_folder_and_a_dead_ones_lock_is_free(tmp_path):
    path = tmp_path / "out"
    with locked(path):
        for other in (locked(path), new_folder(path)):
            with pytest.raises(UserError, match="is being written by another process"), other:
                pass
        with locked(tmp_path / "other"):
            pass
    (tmp_path / ".out.lock").touch()  # of a process that was killed
    with locked(path):
        pass
    assert not [*tmp_path.iterdir()]


def test_who_only_looks_sees_whether_a_folder_is_being_written(tmp_path, monkeypatch):
    path = tmp_path / "out"
    assert is_locked(path) is False
    with locked(path):
        assert is_locked(path) is True
    (tmp_path / ".out.lock").touch()  # of a process that was killed
    assert is_locked(path) is False
    with locked(path):
        assert is_locked(path) is True
    monkeypatch.setattr(files, "fcntl", None)
    assert is_locked(path) is None


def test_without_locks_and_without_a_way_to_sync_files_are_written(tmp_path, monkeypatch):
    def refuse(*_, **options):
        raise NotImplementedError if options else OSError(13, "Permission denied")

    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "_WINDOWS", True)
    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("stays")
    with locked(tmp_path / "out"), new_folder(tmp_path / "out", OWN) as folder:
        write_json(folder / "key", {"a": 1})
    assert read_json(tmp_path / "out" / "key") == {"a": 1}
    assert (tmp_path / "out" / "mine").read_text() == "stays"
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "../x",
        "/x",
        ".x",
        "",
        "a/b",
        "a\\b",
        "a b",
        "a\n",
        "a\0",
        "a:b",
        "x" * 201,
        "é" * 101,
        3,
        None,
    ],
)
def test_a_name_that_could_lead_elsewhere_is_refused(name):
    with pytest.raises(UserError, match=r"a set is called .*give a name of letters") as caught:
        check_name(name, "a set")
    assert "\n" not in str(caught.value)


def test_a_plain_name_is_returned():
    for name in ("de-en", "a.b_c", "-x", "中文", "x" * 200):
        assert check_name(name, "a set") == name


def test_a_text_that_is_half_a_surrogate_pair_could_not_be_written_again(tmp_path):
    file = tmp_path / "a.json"
    for text in (r'{"a": ["\ud800"]}', r'{"\uDC00": 1}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="a text in it is not valid Unicode"):
            read_json(file)
    file.write_text(r'{"a": "\ud83d\ude00", "b": "\\ud800"}')
    assert read_json(file) == {"a": "\U0001f600", "b": r"\ud800"}


def test_json_that_is_nested_too_deeply_is_an_error_of_values(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(tmp_path / "deep.json")
    assert parse_json(b'{"a": 1}') == {"a": 1}
