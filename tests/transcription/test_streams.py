import numpy as np
import pytest
import soundfile

from blora_pyro.data import read_audio, stream_audio
from blora_pyro.errors import UserError
from blora_pyro.transcription.streams import StreamedWave


@pytest.fixture
def counted():
    """Blocks of 0, 1, 2, ..., and how often they were begun."""
    begun = []

    def blocks():
        begun.append(True)
        yield from np.arange(100, dtype=np.float32).reshape(10, 10)

    return blocks, begun


def test_slices_are_those_of_the_array_and_read_once_from_front_to_back(counted):
    blocks, begun = counted
    wave = StreamedWave("a.wav", blocks)
    assert (len(wave), len(begun)) == (100, 1)
    for first, end in ((0, 25), (20, 50), (50, 50), (73, 81), (95, 200)):
        assert wave[first:end].tolist() == list(range(first, min(end, 100)))
        assert len(wave._held) <= 40
    assert len(begun) == 2
    assert wave[3:5].tolist() == [3, 4]  # back again
    assert len(begun) == 3


def test_a_file_that_becomes_shorter_is_refused(counted):
    blocks, _ = counted
    wave = StreamedWave("a.wav", blocks)
    wave._blocks = lambda: iter([np.zeros(10, np.float32)])
    wave._restart()
    with pytest.raises(UserError, match=r"a\.wav was changed while it was read"):
        wave[0:20]


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_a_file_in_blocks_is_the_file(tmp_path, rate):
    wave = 0.3 * np.sin(2 * np.pi * 300 * np.arange(5 * rate) / rate)
    soundfile.write(tmp_path / "a.flac", np.stack([wave, 0 * wave], axis=1), rate)
    audio = {"path": str(tmp_path / "a.flac")}
    blocks = list(stream_audio(audio))
    assert len(blocks) > 1
    np.testing.assert_allclose(np.concatenate(blocks), read_audio(audio), atol=1e-3)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "a.wav").write_text("no audio")
    with pytest.raises(UserError, match=r"a\.wav"):
        StreamedWave("a.wav", lambda: stream_audio({"path": str(tmp_path / "a.wav")}))
