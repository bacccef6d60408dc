import json
import os
import random
import zlib
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from blora_pyro.errors import UserError
from blora_pyro.fitting import checkpoints
from blora_pyro.fitting.checkpoints import (
    FILE,
    SECONDS,
    Checkpoint,
    Checkpoints,
    RandomState,
    read_checkpoint,
    stored_step,
    write_checkpoint,
)

TENSORS = {
    "guide.mean": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
    "guide.count": torch.tensor(7),
    "guide.half": torch.tensor([0.5, -2.0], dtype=torch.bfloat16),
    "guide.none": torch.empty(0, 3),
    "random.cpu": torch.arange(9, dtype=torch.uint8),
}
ABOUT = {"history": [{"loss": 0.1 + 0.2, "kl": None}], "fit": {"lr": 1e-3}}


@pytest.fixture
def path(tmp_path) -> Path:
    write_checkpoint(tmp_path / FILE, Checkpoint.copy(12, TENSORS, ABOUT))
    return tmp_path / FILE


def assert_whole(checkpoint: Checkpoint) -> None:
    assert checkpoint.step == 12
    assert {name: checkpoint.about[name] for name in ABOUT} == ABOUT
    assert checkpoint.tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert checkpoint.tensors[name].dtype == value.dtype
        assert torch.equal(checkpoint.tensors[name], value)


def refused(path: Path) -> str:
    """The one line that a damaged checkpoint is refused with."""
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message and "delete it" in message
    return message


# ---- the file


def test_what_is_written_is_read(path):
    assert_whole(read_checkpoint(path))
    assert stored_step(path) == 12
    assert [one.name for one in path.parent.iterdir()] == [FILE]


def test_the_next_one_takes_its_place(path):
    write_checkpoint(path, Checkpoint(13, {"a": torch.zeros(1)}, {}))
    assert read_checkpoint(path).step == 13
    assert [one.name for one in path.parent.iterdir()] == [FILE]


def test_what_a_killed_process_left_half_written_is_in_nobodys_way(path):
    (path.parent / f"{FILE}.new").write_bytes(b"half")
    assert_whole(read_checkpoint(path))
    write_checkpoint(path, Checkpoint(13, {}, {}))
    assert [one.name for one in path.parent.iterdir()] == [FILE]


def test_a_copy_shares_its_memory_with_nothing(tmp_path):
    one = torch.ones(3)
    checkpoint = Checkpoint.copy(1, {"a": one, "b": one, "c": one[1:]}, {})
    one.zero_()
    write_checkpoint(tmp_path / FILE, checkpoint)
    assert read_checkpoint(tmp_path / FILE).tensors["c"].tolist() == [1, 1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_leaves_the_one_before(path):
    (path.parent / f"{FILE}.new").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_checkpoint(path, Checkpoint.copy(13, TENSORS, {}))
    assert caught.value.filename == str(path)
    assert_whole(read_checkpoint(path))
    assert [one.name for one in path.parent.iterdir()] == [FILE]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_at_the_last_moment_leaves_the_one_before(path, monkeypatch, call):
    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space left on device"):
            write_checkpoint(path, Checkpoint.copy(13, TENSORS, {}))
    assert_whole(read_checkpoint(path))
    assert [one.name for one in path.parent.iterdir()] == [FILE]


def test_what_is_not_finite_is_no_history(path):
    with pytest.raises(ValueError, match="JSON"):
        write_checkpoint(path, Checkpoint(13, {}, {"loss": float("nan")}))
    assert_whole(read_checkpoint(path))


def test_json_nested_too_deeply_is_refused(path):
    text = "[" * 100_000
    metadata = {"blora_pyro": text, "crc32": str(zlib.crc32(text.encode()))}
    save_file({}, path, metadata=metadata)
    assert "nested too deeply" in refused(path)
    assert stored_step(path) is None


fuzz = settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("read", [read_checkpoint, stored_step])
def test_a_pipe_is_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / FILE)
    try:
        assert read(tmp_path / FILE) is None
    except UserError as error:
        assert "a pipe or a device" in str(error)


@fuzz
@given(st.data())
def test_a_damaged_file_is_refused_or_as_it_was(path, data):
    whole = path.read_bytes()
    content = bytearray(whole)
    kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
    place = data.draw(st.integers(0, len(content) - 1))
    if kind == "flip":
        content[place] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del content[place : place + data.draw(st.integers(1, len(content)))]
    else:
        content[place:place] = data.draw(st.binary(min_size=1, max_size=20))
    try:
        path.write_bytes(content)
        try:
            found = read_checkpoint(path)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert_whole(found)
        stored_step(path)  # must not fail either
    finally:
        path.write_bytes(whole)


@fuzz
@given(st.binary(max_size=200))
def test_any_other_bytes_are_refused(path, content):
    path.write_bytes(content)
    refused(path)
    assert stored_step(path) is None


def test_a_pickle_is_refused(path):
    torch.save({"step": 1}, path)
    refused(path)


def test_a_file_of_another_program_is_refused(path):
    save_file({"a": torch.zeros(1)}, path)
    refused(path)
    save_file({"a": torch.zeros(1)}, path, metadata={"blora_pyro": "[]", "crc32": "0"})
    assert "check sum" in refused(path)


def test_another_version_is_refused(path, monkeypatch):
    monkeypatch.setattr(checkpoints, "VERSION", 2)
    assert "format 1, not 2" in refused(path)


def test_a_folder_in_its_place_is_refused(tmp_path):
    (tmp_path / FILE).mkdir()
    refused(tmp_path / FILE)


# ---- when it is written


def test_by_steps():
    kept = Checkpoints(Path("nowhere"), every=5)
    assert [step for step in range(21) if kept.due(step)] == [5, 10, 15, 20]


def test_by_time_and_no_more_than_a_fiftieth_of_it(tmp_path):
    now = [0.0]
    kept = Checkpoints(tmp_path, clock=lambda: now[0])
    now[0] = SECONDS - 1
    assert not kept.due(1)
    now[0] = SECONDS
    assert kept.due(1)
    assert not kept.due(0)  # there is nothing yet to keep

    def slow(path, checkpoint):
        now[0] += 2.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "write_checkpoint", slow)
        kept.write(Checkpoint(1, {}, {}))
    now[0] += 99
    assert not kept.due(2)
    now[0] += 1
    assert kept.due(2)


def test_the_same_step_is_not_written_twice(tmp_path):
    kept = Checkpoints(tmp_path, every=2)
    kept.write(Checkpoint(2, {}, {}))
    assert not kept.due(2)
    again = Checkpoints(tmp_path, every=2)
    assert again.read().step == again.stored_step() == 2
    assert not again.due(2)
    assert again.due(4)


def test_without_a_folder_nothing_is_kept():
    kept = Checkpoints(None, every=1)
    assert not kept.due(1)
    kept.write(Checkpoint(1, {}, {}))
    assert kept.read() is kept.stored_step() is None


# ---- whose it is


def test_none_is_there_at_first(tmp_path):
    assert Checkpoints(tmp_path).read() is None


def test_that_of_another_fit_is_refused(tmp_path):
    fit = {"lr": 0.1, "backward": ("de", "en"), "tokens": 5}
    Checkpoints(tmp_path, fit).write(Checkpoint(3, {}, {}))
    assert Checkpoints(tmp_path, fit).read().step == 3
    with pytest.raises(UserError, match=r"another fit: tokens was 5, now it is 6; .*--overwrite"):
        Checkpoints(tmp_path, {**fit, "tokens": 6}).read()
    write_checkpoint(tmp_path / FILE, Checkpoint(3, {}, {}))  # nobody's
    with pytest.raises(UserError, match="another fit: lr was None"):
        Checkpoints(tmp_path, fit).read()


# ---- random states


def numbers() -> list[float]:
    legacy = np.random.standard_normal(3).tolist()  # noqa: NPY002
    return [*torch.randn(3).tolist(), random.random(), random.gauss(0, 1), *legacy]


def test_all_generators_go_on_where_they_were(tmp_path):
    pyro.set_rng_seed(3)
    numbers()  # an odd number of normal draws: one is in store
    state = RandomState.now(torch.device("cpu"))
    write_checkpoint(tmp_path / FILE, Checkpoint(1, state.tensors, {"random": state.about}))
    expected = numbers()
    pyro.set_rng_seed(4)
    RandomState.of(read_checkpoint(tmp_path / FILE)).restore(torch.device("cpu"))
    assert numbers() == expected


def test_what_is_drawn_aside_changes_nothing():
    pyro.set_rng_seed(3)
    expected = numbers()
    pyro.set_rng_seed(3)
    with pytest.raises(ZeroDivisionError), RandomState.kept(torch.device("cpu")):
        assert numbers() == expected
        raise ZeroDivisionError
    assert numbers() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_generator_of_the_gpu_does_too():
    device = torch.device("cuda")
    state = RandomState.now(device)
    expected = torch.randn(5, device=device)
    about = {"random": json.loads(json.dumps(state.about))}
    RandomState.of(Checkpoint(1, state.tensors, about)).restore(device)
    assert torch.equal(torch.randn(5, device=device), expected)


def test_the_file_is_plain_safetensors(path):
    assert load_file(path).keys() == TENSORS.keys()
