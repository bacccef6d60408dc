import io
import re
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile

from blora_pyro.data.audio import read_audio
from blora_pyro.data.containers import opened
from blora_pyro.errors import UserError

RATE, SECONDS = 48_000, 3.0
TIMES = np.arange(int(RATE * SECONDS)) / RATE
WAVE = 0.4 * np.sin(2 * np.pi * (300 + 100 * TIMES) * TIMES)
WAVE += 0.02 * np.random.default_rng(0).standard_normal(len(WAVE))

FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "frag_duration": "500000"}
PACKED = {
    "m4a": ("ipod", "aac", {"movflags": "faststart"}),
    "m4a of a phone": ("mp4", "aac", FRAGMENTS),
    "aac": ("adts", "aac", {}),
    "webm": ("webm", "libopus", {}),
    "webm of a browser": ("webm", "libopus", {"live": "1"}),
    "mp3": ("mp3", "libmp3lame", {}),
    "mp3 without Xing": ("mp3", "libmp3lame", {"write_xing": "0"}),
}
BARE = {"mp2": ("mp2", "mp2", {})}  # nothing tells of a cut between two frames
PLAIN = {
    "wav": ("WAV", "PCM_16"),
    "float wav": ("WAVEX", "FLOAT"),
    "rf64": ("RF64", "PCM_24"),
    "w64": ("W64", "PCM_16"),
    "aiff": ("AIFF", "PCM_16"),
    "au": ("AU", "PCM_16"),
    "caf": ("CAF", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "opus": ("OGG", "OPUS"),
    "vorbis": ("OGG", "VORBIS"),
}


def packed(kind, path):
    form, codec, options = (PACKED | BARE)[kind]
    with av.open(str(path), "w", format=form, options=options) as container:
        stream = container.add_stream(codec, rate=RATE, layout="mono")
        for place in range(0, len(WAVE), 960):
            block = WAVE[None, place : place + 960].astype(np.float32)
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, place, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.read_bytes()


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """The same three seconds in every kind of file."""
    path = tmp_path_factory.mktemp("encoded") / "file"
    made = {kind: packed(kind, path) for kind in (*PACKED, *BARE)}
    for kind, (form, subtype) in PLAIN.items():
        file = io.BytesIO()
        soundfile.write(file, WAVE, RATE, format=form, subtype=subtype)
        made[kind] = file.getvalue()
    return made


def refused(data, gist="x is (cut off|not closed|damaged)|cannot read x as"):
    with pytest.raises(UserError, match=gist) as caught:
        read_audio({"bytes": data, "path": "x"})
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", [*PACKED, *PLAIN])
def test_all_that_a_file_holds_is_read(encoded, kind):
    wave = read_audio({"bytes": encoded[kind], "path": None}, RATE)
    assert len(wave) == pytest.approx(len(WAVE), abs=0.07 * RATE)  # frames of AAC, delay of mp3
    delay = np.correlate(wave[:12_000], WAVE[:9_000], "valid").argmax()
    count = min(len(wave) - delay, len(WAVE))
    assert delay < 3_000 and np.corrcoef(wave[delay:][:count], WAVE[:count])[0, 1] > 0.98


@pytest.mark.parametrize("share", [0.97, 0.4])
@pytest.mark.parametrize("kind", [*PACKED, *PLAIN])
def test_a_file_that_is_cut_off_is_refused(encoded, kind, share):
    data = encoded[kind]
    refused(data[: int(share * len(data)) + 1])


def test_an_mp3_of_changing_bit_rate_without_a_header_is_read_to_its_end(encoded):
    """Its length, estimated by the rate of its first frames, is far from the true one."""
    quiet = io.BytesIO()
    options = {"format": "MP3", "bitrate_mode": "VARIABLE", "compression_level": 0.9}
    soundfile.write(quiet, np.zeros(3 * RATE), RATE, **options)
    frames = [data[data.find(b"\xff\xfb", 500) :] for data in (quiet.getvalue(), encoded["mp3"])]
    wave = read_audio({"bytes": b"".join(frames), "path": None}, RATE)
    assert len(wave) / RATE == pytest.approx(6, abs=0.15)
    assert np.abs(wave[4 * RATE : 5 * RATE]).max() > 0.3
    refused(b"".join(frames)[:-500])


@pytest.mark.parametrize("kind", [*PACKED, *BARE, *PLAIN])
def test_files_one_behind_the_other_are_read_whole_or_refused(encoded, kind):
    twice = 2 * encoded[kind]
    if kind in ("aac", "webm", "webm of a browser", "mp3", "mp3 without Xing", "mp2"):
        read = read_audio({"bytes": twice, "path": None}, RATE)
        assert len(read) == pytest.approx(2 * len(WAVE), abs=0.1 * RATE)
    elif kind in ("wav", "float wav", "rf64", "w64", "aiff"):
        refused(twice)
    else:
        refused(twice, "x is several recordings, one behind the other; write it anew")


def test_a_file_of_several_tracks_is_refused(tmp_path):
    with av.open(str(tmp_path / "x"), "w", format="mp4") as container:
        for stream in [container.add_stream("aac", rate=RATE, layout="mono") for _ in range(2)]:
            block = WAVE[None, :1024].astype(np.float32)
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
            frame.sample_rate = RATE
            container.mux([*stream.encode(frame), *stream.encode(None)])
    refused((tmp_path / "x").read_bytes(), "x is 2 tracks of sound, of which one would be heard")


def test_an_mp2_that_ends_within_a_frame_is_refused(encoded):
    assert len(read_audio({"bytes": encoded["mp2"], "path": None}, RATE)) >= len(WAVE)
    for cut in (1, 100, 5_000):
        refused(encoded["mp2"][:-cut])


def test_an_m4a_that_ends_anywhere_in_its_header_is_refused(encoded):
    start = encoded["m4a"].find(b"moov")
    for length in range(start, start + 900, 25):
        refused(encoded["m4a"][:length], "x is (cut off|without sound)|cannot read x as")


def test_what_lies_behind_an_mp3_is_no_sound_and_not_its_end(encoded):
    for tail in (b"TAG" + bytes(125), bytes(5_000), b"text " * 600):
        wave = read_audio({"bytes": encoded["mp3"] + tail, "path": None}, RATE)
        assert len(wave) == pytest.approx(len(WAVE), abs=0.05 * RATE)
    data = bytearray(encoded["mp3"])
    data[20_000:24_000] = np.random.default_rng(0).bytes(4_000)
    refused(bytes(data))


def wav_with(riff, data):
    file = io.BytesIO()
    soundfile.write(file, WAVE[: 2 * RATE], RATE, format="WAV", subtype="PCM_16")
    content = bytearray(file.getvalue())
    content[4:8], content[40:44] = riff.to_bytes(4, "little"), data.to_bytes(4, "little")
    return bytes(content)


TRUE = 2 * 2 * RATE  # bytes of samples


@pytest.mark.parametrize(
    ("riff", "data", "gist"),
    [
        (TRUE + 36, 4 * TRUE, "cut off: it declares 768,000 bytes, and holds 192,000"),
        (0, 0, "not closed: it declares 0 bytes, and holds 192,044"),
        (36, 0, "not closed: it declares 36 bytes"),
        (TRUE + 36, 0, "not closed: it declares 44 bytes"),
        (36 + TRUE // 2, TRUE // 2, "not closed: it declares 96,036 bytes"),
        (TRUE + 36, TRUE // 2, "not closed: it declares 96,044 bytes"),
    ],
)
def test_a_wav_that_holds_less_or_more_than_it_declares_is_refused(riff, data, gist):
    refused(wav_with(riff, data), f"x is {gist}")


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF])
def test_a_wav_from_a_pipe_is_read_to_its_end(size):
    data = wav_with(size, size - 36 if size < 2**31 else size)
    assert len(read_audio({"bytes": data, "path": None}, RATE)) == 2 * RATE


def test_a_flac_from_a_pipe_is_read_to_its_end(encoded):
    data = bytearray(encoded["flac"])
    place = data.find(b"fLaC") + 8 + 10  # of eight bytes, whose last 36 bits are the length
    kept = int.from_bytes(data[place : place + 8], "big") >> 36 << 36
    data[place : place + 8] = kept.to_bytes(8, "big")
    for start in (None, 1.0):
        wave = read_audio({"bytes": bytes(data), "path": None}, RATE, start)
        assert len(wave) == len(WAVE) - round((start or 0) * RATE)
    with pytest.raises(UserError, match="lasts more than 1 s, but the model hears 1 s"):
        read_audio({"bytes": bytes(data), "path": None}, max_seconds=1)
    with pytest.raises(UserError, match=r"lasts 3\.00 s, so it has no segment from 2 s to 4 s"):
        read_audio({"bytes": bytes(data), "path": None}, start=2, end=4)


@pytest.mark.parametrize("kind", PACKED)
def test_a_segment_is_that_part_of_the_whole(encoded, kind):
    audio = {"bytes": encoded[kind], "path": None}
    whole = read_audio(audio, RATE)
    for start, end in ((0.5, 1.25), (2.0, None), (None, 0.7)):
        part = read_audio(audio, RATE, start, end)
        first, last = round((start or 0) * RATE), None if end is None else round(end * RATE)
        np.testing.assert_array_equal(part, whole[first:last])


def test_no_more_is_decoded_than_is_asked_for(encoded):
    for kind in ("m4a", "webm of a browser", "opus"):
        with pytest.raises(UserError, match=r"but the model hears 0\.5 s at a time"):
            read_audio({"bytes": encoded[kind], "path": None}, max_seconds=0.5)
    with opened(io.BytesIO(encoded["webm of a browser"])) as sound:
        next(sound.blocks())
        assert 0 < sound.position < RATE // 4


def test_a_playlist_opens_no_other_file(tmp_path, encoded):
    (tmp_path / "a.mp3").write_bytes(encoded["mp3"])
    lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:3", "#EXTINF:3,", str(tmp_path / "a.mp3"), ""]
    refused("\n".join(lines).encode())
    refused(f"ffconcat version 1.0\nfile {tmp_path / 'a.mp3'}\n".encode())


def test_a_video_without_sound_is_refused():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    refused(file.getvalue(), re.escape("x is without sound"))
