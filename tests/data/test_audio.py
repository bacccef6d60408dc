import numpy as np
import pytest
import soundfile

from blora_pyro.data.audio import read_audio
from blora_pyro.errors import UserError


def frequency(wave, rate=16_000):
    return np.abs(np.fft.rfft(wave)).argmax() * rate / len(wave)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
def test_formats_as_path_and_as_bytes(speak, name):
    path = speak(name, seconds=1.0)
    wave = read_audio({"path": str(path), "bytes": None})
    assert wave.dtype == np.float32 and wave.ndim == 1
    assert len(wave) == pytest.approx(16_000, rel=0.1)
    assert frequency(wave) == pytest.approx(440, abs=2)
    same = read_audio({"path": "elsewhere", "bytes": path.read_bytes()})
    np.testing.assert_array_equal(wave, same)


def test_opus(tmp_path):
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    soundfile.write(tmp_path / "a.ogg", wave, 16_000, format="OGG", subtype="OPUS")
    assert frequency(read_audio({"path": tmp_path / "a.ogg"})) == pytest.approx(440, abs=2)


@pytest.mark.parametrize("rate", [8_000, 22_050, 48_000])
def test_resampling_keeps_length_frequency_and_level(speak, rate):
    wave = read_audio({"path": str(speak("a.wav", seconds=1.0, rate=rate))})
    assert len(wave) == pytest.approx(16_000, abs=2)
    assert frequency(wave) == pytest.approx(440, abs=1)
    assert np.abs(wave[2000:-2000]).max() == pytest.approx(0.5, abs=0.01)
    assert len(read_audio({"path": str(speak("b.wav", 1.0))}, sampling_rate=rate)) == rate


def test_channels_are_averaged(tmp_path):
    left, right = np.full(800, 0.5), np.full(800, -0.25)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 16_000, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio({"path": tmp_path / "a.wav"}), np.full(800, 0.125))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_array(dtype):
    array = np.linspace(-1, 1, 480).astype(dtype)
    wave = read_audio({"array": array, "sampling_rate": 16_000})
    np.testing.assert_array_equal(wave, array.astype(np.float32))
    assert wave.dtype == read_audio({"array": array, "sampling_rate": 48_000}).dtype == np.float32


@pytest.mark.parametrize("array", [np.zeros(4, np.int16), np.zeros((2, 4)), ["a"]])
def test_other_arrays(array):
    with pytest.raises(UserError, match=r"audio without a path is an array of .* give"):
        read_audio({"array": array, "sampling_rate": 16_000})


@pytest.mark.parametrize("name", ["a.wav", "a.raw", "a.mp3"])
def test_unreadable(tmp_path, name):
    (tmp_path / name).write_text("no audio")
    for path in (tmp_path / name, tmp_path / "gone" / name, tmp_path):
        with pytest.raises(UserError, match=f"cannot read {path} as wav, flac, ogg or mp3"):
            read_audio({"path": str(path), "bytes": None})
    for nothing in ({}, {"path": None, "bytes": None}, {"path": "a\0", "bytes": None}):
        with pytest.raises(UserError, match="cannot read"):
            read_audio(nothing)


def test_empty_and_non_finite(tmp_path):
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    with pytest.raises(UserError, match=r"empty\.wav is empty"):
        read_audio({"path": tmp_path / "empty.wav"})
    for value in (np.nan, np.inf):
        soundfile.write(tmp_path / "nan.wav", np.array([0.0, value]), 8_000, subtype="FLOAT")
        with pytest.raises(UserError, match=r"nan\.wav has samples that are not finite"):
            read_audio({"path": tmp_path / "nan.wav"})
