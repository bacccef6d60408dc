import os
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blora_pyro.data import feature_cache
from blora_pyro.data.feature_cache import FeatureCache

MELS = {f"{name}": torch.randn(4, 6).half() for name in ("c", "a", "b")}
ABOUT = {name: [0.5, [["silent", name]]] for name in MELS}


@pytest.fixture
def shard(cache_dir):
    """A cache with one shard: its only file."""
    FeatureCache("settings").store(MELS, ABOUT)
    (file,) = cache_dir.rglob("*.*")
    return file


def found(settings="settings"):
    return {key: block[row] for key, (block, row) in FeatureCache(settings).find(MELS).items()}


def assert_all(mels):
    assert mels.keys() == MELS.keys()
    assert all(torch.equal(mels[key], MELS[key]) for key in MELS)


def test_what_is_stored_is_found_by_the_next_process(cache_dir):
    cache = FeatureCache("settings")
    assert cache.find(MELS) == {}
    assert_all({key: block[row] for key, (block, row) in cache.store(MELS, ABOUT).items()})
    assert_all(found())
    later = FeatureCache("settings")
    assert cache.about == later.about == ABOUT
    assert found("other settings") == {}
    assert FeatureCache("settings").find(["d"]) == {}


def test_the_same_features_are_the_same_file(shard):
    before = shard.read_bytes()
    FeatureCache("settings").store(dict(reversed(MELS.items())), ABOUT)
    assert [file.read_bytes() for file in shard.parent.iterdir()] == [before]


def test_a_shard_stays_mapped_when_the_cache_is_deleted(shard):
    mels = found()
    shard.unlink()
    assert_all(mels)
    assert found() == {}


def test_a_shard_that_goes_between_look_up_and_reading_is_forgotten(shard):
    cache = FeatureCache("settings")
    shard.unlink()
    assert cache.find(MELS) == {}


fuzz = settings(
    deadline=None,
    max_examples=100,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@fuzz
@given(st.data())
def test_damaged_features_are_never_returned(shard, data):
    whole = shard.read_bytes()
    content = bytearray(whole)
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= data.draw(st.integers(1, 255))
    else:
        del content[place : place + data.draw(st.integers(1, len(content)))]
    try:
        shard.write_bytes(content)
        for key, mels in found().items():
            assert torch.equal(mels, MELS[key])
        FeatureCache("settings").store(MELS, ABOUT)
        assert_all(found())
    finally:
        shard.write_bytes(whole)


@pytest.mark.parametrize("content", [b"", b"\x02\0\0\0\0\0\0\0{}", b"\xff" * 20, b"(lp0\n."])
def test_any_other_file_is_removed(shard, content):
    shard.write_bytes(content)
    assert found() == {}
    assert not shard.exists()


def test_a_flipped_bit_costs_its_shard(shard):
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert "c" not in found()
    assert not shard.exists()


def test_half_written_files_are_no_shards_and_are_removed_in_time(shard):
    fresh, old = (shard.with_name(f"{name}.safetensors.1-2.new") for name in ("fresh", "old"))
    for file in (fresh, old):
        file.write_bytes(shard.read_bytes())
    os.utime(old, (time.time() - 7200,) * 2)
    shard.unlink()
    assert found() == {}
    assert list(shard.parent.iterdir()) == [fresh]


def full(*args, **options):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["mkdir", "write_bytes", "replace"])
def test_a_cache_that_cannot_be_written_is_noted_once(cache_dir, monkeypatch, call):
    notes = []
    where = os if call == "replace" else feature_cache.Path
    monkeypatch.setattr(where, call, full)
    cache = FeatureCache("settings", notes.append)
    for mels in (MELS, MELS):
        assert_all({key: block[row] for key, (block, row) in cache.store(mels, ABOUT).items()})
    assert len(notes) == 1
    assert notes[0].endswith(
        "can't be written ([Errno 28] No space left on device); going on without it"
    )
    assert not [file for file in cache_dir.rglob("*") if file.is_file()]


def test_a_file_in_place_of_the_folder_costs_the_cache_alone(cache_dir):
    cache_dir.parent.mkdir(parents=True, exist_ok=True)
    cache_dir.write_text("a file")
    notes = []
    FeatureCache("settings", notes.append).store(MELS, ABOUT)
    assert len(notes) == 1 and cache_dir.read_text() == "a file"


def test_without_a_folder_or_settings_nothing_is_kept(monkeypatch, cache_dir):
    FeatureCache(None).store(MELS, ABOUT)
    monkeypatch.setenv("BLORA_PYRO_CACHE", "")
    assert_all(
        {k: block[row] for k, (block, row) in FeatureCache("settings").store(MELS, ABOUT).items()}
    )
    assert found() == {}
    assert not cache_dir.exists()
