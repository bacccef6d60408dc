import functools
import io
import os
import socket
import tracemalloc

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from blora_pyro.data.audio import decode_audio, read_audio, stream_audio
from blora_pyro.data.containers import BLOCK
from blora_pyro.errors import UserError


def frequency(wave, rate=16_000):
    return np.abs(np.fft.rfft(wave)).argmax() * rate / len(wave)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
def test_a_file_is_read_from_its_path_and_from_its_bytes(speak, name):
    path = speak(name, seconds=1.0)
    wave = read_audio({"path": str(path), "bytes": None})
    assert wave.dtype == np.float32 and wave.ndim == 1
    assert len(wave) == pytest.approx(16_000, rel=0.1)
    assert frequency(wave) == pytest.approx(440, abs=2)
    same = read_audio({"path": "elsewhere", "bytes": path.read_bytes()})
    np.testing.assert_array_equal(wave, same)


@pytest.mark.parametrize("rate", [8_000, 22_050, 48_000])
def test_resampling_keeps_length_frequency_and_level(speak, rate):
    wave = read_audio({"path": str(speak("a.wav", seconds=1.0, rate=rate))})
    assert len(wave) == pytest.approx(16_000, abs=2)
    assert frequency(wave) == pytest.approx(440, abs=1)
    assert np.abs(wave[2000:-2000]).max() == pytest.approx(0.5, abs=0.01)
    assert len(read_audio({"path": str(speak("b.wav", 1.0))}, sampling_rate=rate)) == rate


FORMATS = {
    "wav": {"format": "WAV", "subtype": "PCM_24"},
    "flac": {"format": "FLAC"},
    "vorbis": {"format": "OGG", "subtype": "VORBIS"},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "mp3": {"format": "MP3"},
    "vbr mp3": {"format": "MP3", "bitrate_mode": "VARIABLE", "compression_level": 0.5},
}


def encoded(kind, seconds=6.0, channels=2):
    """A rising tone, of another loudness in each channel, as a file's bytes and its rate."""
    rate = 48_000 if kind == "opus" else 44_100  # opus knows no 44.1 kHz
    t = np.arange(int(seconds * rate)) / rate
    wave = 0.4 * np.sin(2 * np.pi * (300 + 100 * t) * t)
    noise = 0.02 * np.random.default_rng(0).standard_normal(len(t))
    wave = np.stack([wave + noise, *[0.5 * wave] * (channels - 1)], axis=1)
    file = io.BytesIO()
    soundfile.write(file, wave, rate, **FORMATS[kind])
    return file.getvalue(), rate


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_format_at_its_own_rate(kind, channels):
    data, _ = encoded(kind, seconds=1.0, channels=channels)
    wave = read_audio({"bytes": data, "path": None})
    assert len(wave) == pytest.approx(16_000, abs=2)
    t = np.arange(len(wave)) / 16_000
    expected = 0.4 / channels * (1 + 0.5 * (channels - 1)) * np.sin(2 * np.pi * (300 + 100 * t) * t)
    assert np.corrcoef(wave, expected)[0, 1] > 0.98
    assert wave.std() == pytest.approx(expected.std(), rel=0.05)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_segment_is_that_part_of_the_whole(kind):
    data, rate = encoded(kind)
    audio = {"bytes": data}
    whole = read_audio(audio, rate)
    assert len(whole) == 6 * rate
    for start, end in [
        (None, None),
        (0.0, 0.25),
        (1.3, 2.0),
        (3.1, None),
        (None, 4.0),
        (5.9, 6.005),
    ]:
        part = read_audio(audio, rate, start, end)
        first, last = round((start or 0) * rate), round(min(end or 6.0, 6.0) * rate)
        np.testing.assert_allclose(part, whole[first:last], atol=1e-4)


@pytest.mark.parametrize("kind", FORMATS)
def test_blocks_fit_together(kind):
    rng, count = np.random.default_rng(1), 3 * BLOCK
    bursts = np.repeat(rng.uniform(0, 1, count // 2048), 2048) ** 4  # frames of very unlike size
    file = io.BytesIO()
    soundfile.write(file, 0.3 * bursts * rng.standard_normal(count), 16_000, **FORMATS[kind])
    file.seek(0)
    whole, rate = soundfile.read(file, dtype="float32")
    np.testing.assert_allclose(read_audio({"bytes": file.getvalue()}, rate), whole, atol=1e-5)


def test_an_array_has_segments_too():
    audio = {"array": np.arange(100.0) / 128, "sampling_rate": 100}
    expected = np.arange(25.0, 50.0) / 128
    np.testing.assert_array_equal(read_audio(audio, 100, 0.25, 0.5), expected)


@pytest.mark.parametrize(
    ("start", "end"), [(6.0, None), (7.0, 8.0), (1.0, 6.1), (-1.0, 1.0), (2.0, 1)]
)
def test_a_segment_beyond_the_file_is_refused(start, end):
    with pytest.raises(UserError, match=r"x\.wav lasts 6\.00 s, so it has no segment from"):
        read_audio({"bytes": encoded("wav")[0], "path": "x.wav"}, start=start, end=end)
    with pytest.raises(UserError, match=r"lasts 6\.00 s, so it has no segment"):
        read_audio({"array": np.zeros(600), "sampling_rate": 100}, start=start, end=end)


def test_ten_hours_are_refused_unread_and_their_segments_read(tmp_path):
    path = tmp_path / "long.wav"
    soundfile.write(path, np.zeros(0), 8_000, subtype="PCM_16")
    size = 36_000 * 8_000 * 2
    with open(path, "r+b") as file:  # a sparse file, its two sizes corrected
        for place, value in ((4, size + 36), (40, size)):
            file.seek(place)
            file.write(value.to_bytes(4, "little"))
        file.truncate(size + 44)
    tracemalloc.start()
    with pytest.raises(
        UserError, match=r"lasts 36000\.00 s, but the model hears 30 s at a time; spl"
    ):
        read_audio({"path": path}, max_seconds=30)
    assert len(read_audio({"path": path}, start=35_990, end=36_000, max_seconds=30)) == 160_000
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    with pytest.raises(UserError, match=r"long\.wav lasts 40\.00 s, but .*; shorten the segment"):
        read_audio({"path": path}, start=10, end=50, max_seconds=30)


def test_channels_are_averaged(tmp_path):
    left, right = np.full(800, 0.5), np.full(800, -0.25)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 16_000, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio({"path": tmp_path / "a.wav"}), np.full(800, 0.125))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_an_array_is_returned_as_float32(dtype):
    array = np.linspace(-1, 1, 480).astype(dtype)
    wave = read_audio({"array": array, "sampling_rate": 16_000})
    np.testing.assert_array_equal(wave, array.astype(np.float32))
    assert wave.dtype == read_audio({"array": array, "sampling_rate": 48_000}).dtype == np.float32


@pytest.mark.parametrize("rate", [None, 0, 1.5, True, 10**9])
def test_what_is_no_sampling_rate_is_refused(rate):
    with pytest.raises(
        UserError, match=r"audio without a path has the sampling_rate .*; give it in"
    ):
        read_audio({"array": np.zeros(4), "sampling_rate": rate})


def test_a_list_is_an_array_and_a_ragged_one_is_refused():
    assert len(read_audio({"array": [0.5, 0.25], "sampling_rate": 16_000})) == 2
    with pytest.raises(UserError, match="is empty"):
        read_audio({"array": [], "sampling_rate": 16_000})
    with pytest.raises(UserError, match="is no array of numbers"):
        read_audio({"array": [[0.5], [0.5, 0.25]], "sampling_rate": 16_000})


@pytest.mark.parametrize("array", [np.zeros(4, np.int16), np.zeros((2, 4)), ["a"]])
def test_an_array_that_is_no_wave_is_refused(array):
    with pytest.raises(UserError, match=r"audio without a path is an array of .* give"):
        read_audio({"array": array, "sampling_rate": 16_000})


@pytest.mark.parametrize("name", ["a.wav", "a.raw", "a.mp3"])
def test_a_file_that_is_no_audio_is_refused(tmp_path, name):
    (tmp_path / name).write_text("no audio")
    for path in (tmp_path / name, tmp_path / "gone" / name, tmp_path):
        with pytest.raises(UserError, match=f"cannot read {path} as wav|'{path}' (does not|is no)"):
            read_audio({"path": str(path), "bytes": None})
    for nothing in ({}, {"path": None, "bytes": None}, {"path": "a\0", "bytes": None}):
        with pytest.raises(UserError, match=r"cannot (read|be read)"):
            read_audio(nothing)


def test_empty_and_non_finite_audio_is_refused(tmp_path):
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    with pytest.raises(UserError, match=r"empty\.wav is empty"):
        read_audio({"path": tmp_path / "empty.wav"})
    for value in (np.nan, np.inf, [np.inf, -np.inf]):
        wave = np.array([np.zeros_like(value), value])
        soundfile.write(tmp_path / "nan.wav", wave, 8_000, subtype="FLOAT")
        with pytest.raises(UserError, match=r"nan\.wav has samples that are not finite"):
            read_audio({"path": tmp_path / "nan.wav"})


def test_messages_stay_on_one_line():
    with pytest.raises(UserError, match=r"'a\\nb\.wav' does not exist") as caught:
        read_audio({"path": "a\nb.wav"})
    assert str(caught.value).isprintable()


anything = settings(deadline=None, max_examples=50, derandomize=True)


def read_or_refuse(data):
    try:
        wave = read_audio({"bytes": data, "path": None}, max_seconds=30)
        assert wave.ndim == 1 and len(wave) and np.isfinite(wave).all()
    except UserError as error:
        assert str(error).isprintable()


@anything
@given(data=st.binary(max_size=300))
def test_any_bytes_are_audio_or_an_error_of_one_line(data):
    read_or_refuse(data)


@functools.cache
def short(kind):
    return encoded(kind, seconds=0.2)[0]


@anything
@given(kind=st.sampled_from(list(FORMATS)), edits=st.data())
def test_a_damaged_file_is_audio_or_an_error_of_one_line(kind, edits):
    data = bytearray(short(kind))
    for _ in range(edits.draw(st.integers(1, 5))):
        place = edits.draw(st.integers(0, 120) | st.integers(0, len(data) - 1))
        data[min(place, len(data) - 1)] = edits.draw(st.integers(0, 255))
    read_or_refuse(bytes(data))


# ---- what the samples say


@pytest.mark.parametrize("scale", [3e38, 2**31, 32_768, 128])
def test_samples_beyond_all_scale_are_refused(tmp_path, scale):
    wave = scale * np.sin(np.arange(800)) * 0.9
    soundfile.write(tmp_path / "a.wav", wave, 16_000, subtype="FLOAT")
    for audio in ({"path": tmp_path / "a.wav"}, {"array": wave, "sampling_rate": 16_000}):
        with pytest.raises(UserError, match=r"has samples up to [\d,]+, but full scale is 1; div"):
            read_audio(audio)


@pytest.mark.parametrize(
    ("gain", "kinds"), [(0.9, []), (1.5, ["clipped"]), (4.0, ["clipped"]), (5e-4, ["silent"])]
)
def test_clipped_and_silent_audio_is_noted(gain, kinds):
    wave = gain * np.sin(np.arange(8_000) * 0.05)
    for one in (wave, wave.clip(-1, 1)):
        assert [*decode_audio({"array": one, "sampling_rate": 8_000}).notes] == kinds
    few = np.zeros(8_000)
    few[:4] = 1
    assert decode_audio({"array": few, "sampling_rate": 8_000}).notes == {}


@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_a_constant_is_silent(noise):
    wave = 0.5 + noise * np.random.default_rng(0).standard_normal(800)
    heard = decode_audio({"array": wave, "sampling_rate": 16_000})
    assert [*heard.notes] == ["silent"]


@pytest.mark.parametrize("kind", ["wav", "ogg"])
def test_channels_that_cancel_each_other_are_refused(kind):
    """What a lossy codec leaves of them is no silence, but no speech either."""
    wave = 0.5 * np.sin(np.arange(8_000) / 20)
    quiet = 0.0005 * np.random.default_rng(0).standard_normal(8_000)
    file = io.BytesIO()
    soundfile.write(file, np.stack([wave + quiet, -wave], axis=1), 16_000, format=kind)
    with pytest.raises(UserError, match="x has channels that cancel each other"):
        read_audio({"bytes": file.getvalue(), "path": "x"})
    with pytest.raises(UserError, match="x has channels that cancel each other"):
        [*stream_audio({"bytes": file.getvalue(), "path": "x"})]
    for others in ([0 * wave], [-0.5 * wave], [0 * wave] * 7, [wave[::-1]]):
        file = io.BytesIO()
        soundfile.write(file, np.stack([wave, *others], axis=1), 16_000, format="wav")
        loud = read_audio({"bytes": file.getvalue(), "path": "x"})
        assert np.abs(loud).max() > 0.06


def test_what_is_no_file_is_refused_unopened(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.wav"))
        for path in (tmp_path / "pipe.wav", tmp_path / "socket.wav", "/dev/zero", tmp_path):
            with pytest.raises(UserError, match=f"'{path}' is no file, but a folder or a device"):
                read_audio({"path": str(path)})
