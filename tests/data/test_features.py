import os
import time

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from transformers import WhisperFeatureExtractor

from blora_pyro.data import features as module
from blora_pyro.data.audio import read_audio
from blora_pyro.data.features import (
    MARGIN,
    Features,
    decode_row,
    feature_settings,
    featurise,
    load_features,
    log_mels,
    trim,
    usable_cores,
)
from blora_pyro.data.manifest import read_manifest
from blora_pyro.data.rows import BadRow
from blora_pyro.errors import UserError

from ..forks import start


@pytest.fixture(scope="session")
def window() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=8, chunk_length=1)


@pytest.fixture
def noises(tmp_path, manifest):
    """A manifest of n different recordings."""

    def write(n, seed=0):
        rng = np.random.default_rng(seed)
        for row in range(n):
            wave = 0.1 * rng.standard_normal(int(rng.integers(1_000, 12_000)))
            soundfile.write(tmp_path / f"{row}.wav", wave, 16_000)
        rows = [{"audio": f"{row}.wav", "text": "x"} for row in range(n)]
        return read_manifest(manifest(*rows))

    return write


@pytest.fixture
def computed(monkeypatch):
    """The lengths of what was featurised, not found."""
    lengths = []

    def watched(wave, feature_extractor):
        lengths.append(len(wave))
        return log_mels(wave, feature_extractor)

    monkeypatch.setattr(module, "log_mels", watched)
    return lengths


# ---- as good as a tensor


def test_indexing_is_that_of_a_tensor():
    blocks = torch.randn(3, 2, 4).half(), torch.randn(2, 2, 4).half()
    places = [(blocks[0], 2), (blocks[1], 0), (blocks[0], 0), (blocks[1], 1)]
    whole = torch.stack([block[row] for block, row in places])
    features = Features(places, (2, 4))
    assert features.shape == whole.shape and len(features) == 4
    slices = slice(None), slice(1, 9), slice(0)
    for chosen in (0, -1, np.int64(2), [3, 0, 0], [-1], (1, 2), range(1, 3), *slices):
        expected = whole[list(chosen) if isinstance(chosen, range | tuple) else chosen]
        assert torch.equal(features[chosen], expected)
    assert features[[]].shape == (0, 2, 4) and features[[]].dtype == torch.float16
    with pytest.raises(IndexError):
        features[4]


def test_utterances_alone_are_as_in_a_batch(window):
    waves = [np.sin(np.arange(n) / 9).astype(np.float32) for n in (500, 16_000, 9_000)]
    batch = window(waves, sampling_rate=16_000, return_tensors="pt")["input_features"].half()
    assert torch.equal(featurise([("", wave) for wave in waves], window), batch)
    with pytest.raises(UserError, match=r"a lasts 1\.00 s, but the model hears 1 s"):
        featurise([("a", np.zeros(16_001, np.float32))], window)


# ---- the cache


def test_each_utterance_is_computed_once_and_the_same(noises, window, computed, monkeypatch):
    monkeypatch.setattr(module, "SHARD", 4)
    dataset, seen = noises(11), []
    plain, contents = load_features(dataset, window, cache=False)
    assert len(computed) == 11
    for cores in (3, 1):
        monkeypatch.setattr(module, "usable_cores", lambda cores=cores: cores)
        cached, same = load_features(dataset, window, on_progress=lambda *now: seen.append(now))
        assert torch.equal(cached[:], plain[:]) and same == contents
    assert len(computed) == 22
    assert seen == [(4, 11), (8, 11), (11, 11)] * 2
    part, _ = load_features(dataset.select([7, 2]), window)
    assert torch.equal(part[:], plain[[7, 2]])
    assert len(computed) == 22
    wave = read_audio(dataset[3]["audio"])
    assert torch.equal(plain[3], log_mels(wave, window))


def test_one_recording_in_many_rows_is_computed_once_and_its_segments_told_apart(
    noises, window, computed, monkeypatch
):
    monkeypatch.setattr(module, "SHARD", 2)
    dataset = noises(3).select([0, 0, 1, 0, 2, 1])
    features, contents = load_features(dataset, window, cache=False)
    assert len(computed) == 3
    assert torch.equal(features[[0, 2]], features[[3, 5]])
    assert len(set(contents.values())) == 3
    parts = [(None, None), (0.01, None), (0.0, 0.05)]
    rows = [{**dataset[0], "start": start, "end": end} for start, end in parts]
    features, contents = load_features(Dataset.from_list(rows), window, cache=False)
    assert len(computed) == 6 and len(set(contents.values())) == 3
    assert not torch.equal(features[0], features[1])


def test_a_changed_file_is_computed_anew_though_its_time_and_size_are_the_same(
    noises, window, tmp_path
):
    dataset = noises(2)
    before, contents = load_features(dataset, window)
    about = (tmp_path / "1.wav").stat()
    wave, rate = soundfile.read(tmp_path / "1.wav")
    soundfile.write(tmp_path / "1.wav", wave[::-1], rate)
    os.utime(tmp_path / "1.wav", ns=(about.st_atime_ns, about.st_mtime_ns))
    changed = (tmp_path / "1.wav").stat()
    assert (changed.st_size, changed.st_mtime_ns) == (about.st_size, about.st_mtime_ns)
    after, others = load_features(dataset, window)
    assert torch.equal(after[:], load_features(dataset, window, cache=False)[0][:])
    assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])
    assert others[0] == contents[0] and others[1] != contents[1]


def test_a_moved_file_and_its_bytes_are_the_same(noises, window, tmp_path, computed):
    dataset = noises(1)
    before, _ = load_features(dataset, window)
    row = {**dataset[0], "audio": {"path": "x", "bytes": (tmp_path / "0.wav").read_bytes()}}
    after, _ = load_features(Dataset.from_list([row]), window)
    assert len(computed) == 1 and torch.equal(before[:], after[:])


@pytest.mark.parametrize("change", [{"feature_size": 10}, {"hop_length": 80}, {"n_fft": 200}])
def test_other_settings_are_computed_anew(noises, window, change):
    other = WhisperFeatureExtractor(**{"feature_size": 8, "chunk_length": 1, **change})
    assert feature_settings(other) != feature_settings(window)
    dataset = noises(1)
    load_features(dataset, window)
    plain, _ = load_features(dataset, other, cache=False)
    assert torch.equal(load_features(dataset, other)[0][:], plain[:])


def test_other_filters_code_and_libraries_change_the_settings(window, monkeypatch, tmp_path):
    known = {feature_settings(window)}
    other = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    assert feature_settings(other) in known
    other.mel_filters = other.mel_filters * 2
    known.add(feature_settings(other))
    for library in (
        module.av,
        module.np,
        module.soundfile,
        module.soxr,
        module.torch,
        module.transformers,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(library, "__version__", "0")
            known.add(feature_settings(window))
    (tmp_path / "code.py").write_text("another")
    monkeypatch.setattr(module, "_CODE", (tmp_path / "code.py",))
    known.add(feature_settings(window))
    assert len(known) == 9


def test_what_depends_on_chance_or_unknown_code_is_not_cached(noises, window, cache_dir):
    class Own(WhisperFeatureExtractor):
        pass

    dataset = noises(1).select([0, 0])
    for extractor in (
        WhisperFeatureExtractor(feature_size=8, chunk_length=1, dither=0.1),
        Own(feature_size=8, chunk_length=1),
    ):
        assert feature_settings(extractor) is None
        features, _ = load_features(dataset, extractor)
        assert torch.equal(features[0], features[1]) == (extractor.dither == 0)
    assert not cache_dir.exists()


def test_nothing_is_unpickled_and_nothing_written_but_to_the_cache(
    noises, window, watch, cache_dir
):
    dataset = noises(2)
    with watch() as seen:
        for _ in range(2):
            load_features(dataset, window)
    assert seen and all(one.startswith(f"writes {cache_dir}/features/") for one in seen)


# ---- bad rows


def test_bad_audio_is_reported_in_order_or_left_out(noises, window, tmp_path, monkeypatch):
    dataset = noises(5)
    (tmp_path / "1.wav").write_bytes(b"noise")
    (tmp_path / "3.wav").unlink()
    monkeypatch.setattr(module, "SHARD", 2)
    with pytest.raises(BadRow, match=r"train.jsonl, line 2: cannot read .*1\.wav"):
        load_features(dataset, window)
    for _ in range(2):
        bad: list[BadRow] = []
        features, contents = load_features(dataset, window, on_bad=bad.append)
        assert [error.origin[-6:] for error in bad] == ["line 2", "line 4"]
        assert list(contents) == [0, 2, 4]
        good, _ = load_features(dataset.select([0, 2, 4]), window, cache=False)
        assert torch.equal(features[:], good[:])


def test_a_file_that_changes_while_it_is_read_is_refused(noises, window, monkeypatch, cache_dir):
    dataset = noises(1)

    def late(row, window):
        heard = decode_row(row, window)
        os.utime(row["audio"]["path"], (0, 0))
        return heard

    monkeypatch.setattr(module, "decode_row", late)
    with pytest.raises(BadRow, match=r"0\.wav was changed while it was read; start again"):
        load_features(dataset, window)
    assert not cache_dir.exists()


# ---- threads


def test_torch_keeps_its_number_of_threads(noises, window):
    torch.set_num_threads(2)
    try:
        load_features(noises(2), window)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert usable_cores() >= 1


# ---- real processes, killed


def load_in_shards(manifest, mark):
    """What a process does; the mark is there once two are done."""
    module.SHARD = 2
    window = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    load_features(read_manifest(manifest), window, on_progress=lambda *now: mark.touch())


def test_killed_processes_leave_nothing_that_is_wrong(
    noises, window, tmp_path, computed, monkeypatch
):
    dataset = noises(40)
    plain, _ = load_features(dataset, window, cache=False)
    computed.clear()
    for number in range(4):  # each a little later than the one before
        mark = tmp_path / f"mark{number}"
        process = start(load_in_shards, tmp_path / "train.jsonl", mark)
        while not mark.exists() and process.is_alive():
            time.sleep(0.001)
        time.sleep(0.003 * number)
        process.kill()
        process.join()
    monkeypatch.setattr(module, "SHARD", 2)
    features, _ = load_features(dataset, window)
    assert torch.equal(features[:], plain[:])
    assert len(computed) <= 38
    computed.clear()
    assert torch.equal(load_features(dataset, window)[0][:], plain[:])
    assert not computed


# ---- trimming


def noise_then_zeros(seconds, rest=0.0):
    """Noise, and zeros after it."""
    rng = np.random.default_rng(0)
    sound = 0.1 * rng.standard_normal(round(seconds * 16_000))
    return np.concatenate([sound, np.zeros(round(rest * 16_000))]).astype(np.float32)


def log_mels_of(extractor, *waves):
    return featurise((("", one) for one in waves), extractor)


@pytest.mark.parametrize("seconds", [0.31, 1.0, 1.777])
@pytest.mark.parametrize("rest", [0.0, 0.5])
def test_trimming_leaves_the_audio_and_half_a_second(extractor, seconds, rest):
    whole = log_mels_of(extractor, noise_then_zeros(seconds, rest))
    left = trim(whole)
    # a frame looks 12.5 ms to each side
    assert 100 * seconds <= left.shape[-1] - MARGIN <= 100 * seconds + 3
    assert left.shape[-1] % 2 == 0
    assert torch.equal(left, whole[..., : left.shape[-1]])
    cut = whole[..., left.shape[-1] :]
    assert (cut == whole.min()).all()


def test_trimming_a_batch_keeps_its_longest_utterance(extractor):
    short, long = noise_then_zeros(0.5), noise_then_zeros(1.5)
    both = trim(log_mels_of(extractor, short, long))
    assert both.shape[:2] == (2, 80)
    assert both.shape[-1] == trim(log_mels_of(extractor, long)).shape[-1]
    assert both.shape[-1] > trim(log_mels_of(extractor, short)).shape[-1]
    assert torch.equal(trim(both), both)


def test_a_full_window_stays_whole_and_silence_is_half_a_second(extractor):
    assert trim(log_mels_of(extractor, noise_then_zeros(2.9))).shape[-1] == 300
    assert trim(log_mels_of(extractor, noise_then_zeros(0, 1.0))).shape[-1] == MARGIN
