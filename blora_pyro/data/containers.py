"""Encoded audio: what its container declares, its blocks, and whether it holds what it declares.

Two libraries read it: libsndfile wav, flac, ogg, aiff and their kin; FFmpeg, inside the wheel of
PyAV, mp3 (whose length libsndfile estimates), m4a, aac, webm and what else phones and browsers
record. Neither refuses every file that was cut off, so that is checked here, the same for all.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, BinaryIO

import av
import numpy as np
import numpy.typing as npt
import soundfile

BLOCK = 1 << 16  # frames decoded at a time
CUT_OFF = 0.25  # seconds that may lack: encoders' delay and padding, which decoders take away
AUDIO_SUFFIXES = (
    *(".aac", ".aif", ".aiff", ".amr", ".caf", ".flac", ".m4a", ".mka", ".mp3", ".mp4", ".oga"),
    *(".ogg", ".opus", ".wav", ".weba", ".webm"),
)  # of files picked from folders

_PLAIN = (b"RIFF", b"RIFX", b"RF64", b"riff", b"fLaC", b"OggS", b"FORM", b"caff", b".snd")
_PACKED = "mp3,mov,mp4,m4a,3gp,aac,matroska,webm,amr,flac"  # of FFmpeg; none opens other files
_CHAINED = "several recordings, one behind the other"
_STARTS = {  # of a file that may lie behind another, which libsndfile ends with
    "FLAC": (b"fLaC\x00\x00\x00\x22", b"fLaC\x80\x00\x00\x22"),
    "AU": (b".snd\x00\x00",),
    "CAF": (b"caff\x00\x01",),
}
_READ_AHEAD = 1 << 16  # bytes that libraries read beyond the last that they need
_ENDLESS = 0x7FFF0000  # a wav's length in bytes from here on is not known, as of one from a pipe
_FRAMES = 1 << 35  # a flac's number of frames from here on is not known
_NOISE = 64  # bytes that the sizes of a container may be wrong by
_MP3_FRAME, _OGG_PAGE = 1441, 65_307  # bytes of the longest

Block = npt.NDArray[np.float32]  # (frames, channels)
_RIFF = re.compile(r"^Length : (\d+)\nRIFF : (\d+)")
_JUNK = re.compile(r"^Length : (\d+)\n.*Unknown chunk marker .* at position (\d+)", re.S)
_SIZES = re.compile(r"^ *(data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)\)", re.M)


class DamagedAudio(Exception):
    """What a file is, instead of whole: "cut off: ..."."""


class Sound:
    """An open file of audio.

    Attributes:
        rate: Hz.
        channels: number of them.
        frames: what the container declares; None if it does not, or estimates.
        position: the frame behind the last that was decoded.
    """

    rate: int
    channels: int
    frames: int | None = None
    position = 0

    def blocks(self, first: int = 0) -> Iterator[tuple[int, Block]]:
        """Yield blocks and the numbers of their first frames, up to the end.

        They begin with frame `first`, or earlier.

        Raises:
            DamagedAudio: if the file is cut off or damaged.
        """
        raise NotImplementedError

    def _check_length(self) -> None:
        declared, held = (self.frames or 0) / self.rate, self.position / self.rate
        if held < declared - CUT_OFF:
            raise DamagedAudio(f"cut off: it declares {declared:.2f} s, and holds {held:.2f} s")


@contextmanager
def opened(file: BinaryIO) -> Iterator[Sound]:
    """Open a file of audio.

    Raises:
        DamagedAudio: if it is cut off; the libraries' own errors (`RuntimeError`, `OSError`,
            `ValueError`) otherwise.
    """
    magic = file.read(4)
    file.seek(0)
    if magic in _PLAIN:
        with _SoundFile(file) as sound:
            yield _Plain(sound, file)
        return
    nameless = SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)  # no guess by name
    with av.open(nameless, container_options={"format_whitelist": _PACKED}) as container:
        if not container.streams.audio:
            raise DamagedAudio("without sound")
        yield _Packed(container, file)


class _SoundFile(soundfile.SoundFile):
    """An audio file whose blocks are read one behind the other.

    soundfile seeks after every read, which in ogg/vorbis is not exact (libsndfile issue 885):
    blocks would not fit together; and cannot be done in a file of unknown length.
    """

    def seekable(self) -> bool:
        """Tell whether seeking is possible and exact."""
        return self.subtype != "VORBIS" and self.frames < _FRAMES and super().seekable()


class _Plain(Sound):
    """A file that libsndfile reads; what it corrects in silence stands in its log."""

    def __init__(self, sound: soundfile.SoundFile, file: BinaryIO) -> None:
        self._sound, self._file = sound, file
        self.rate, self.channels = sound.samplerate, sound.channels
        self.frames = sound.frames if sound.frames < _FRAMES else None
        log = sound.extra_info
        for declared, held in (map(int, sizes) for _, *sizes in _SIZES.findall(log)):
            if held + _NOISE < declared < _ENDLESS:
                raise DamagedAudio(f"cut off: it declares {declared:,} bytes, and holds {held:,}")
        if sound.format == "OGG" and not _is_whole_ogg(file):
            raise DamagedAudio("cut off: it lacks the end of its stream")
        if sound.format == "OGG" and _is_chain(file):  # of which libsndfile reads the first
            raise DamagedAudio(_CHAINED)
        if sound.format == "SVX":
            raise DamagedAudio("8SVX or 16SV, of which nothing tells whether it is whole")
        for match in filter(None, (_RIFF.search(log), _JUNK.search(log))):
            held, declared = map(int, match.groups())
            if declared + _NOISE < held:
                raise DamagedAudio(
                    f"not closed: it declares {declared:,} bytes, and holds {held:,}"
                )

    def blocks(self, first: int = 0) -> Iterator[tuple[int, Block]]:
        if first and self._sound.seekable():
            self.position = self._sound.seek(first)
        while len(block := self._sound.read(BLOCK, dtype="float32", always_2d=True)):
            self.position += len(block)
            yield self.position - len(block), block
        self._check_length()
        starts = _STARTS.get(self._sound.format, ())
        if starts and _holds(self._file, self._file.tell() - _READ_AHEAD, starts):
            raise DamagedAudio(_CHAINED)


class _Packed(Sound):
    """A file that FFmpeg reads."""

    def __init__(self, container: Any, file: BinaryIO) -> None:
        self._container, self._stream = container, container.streams.audio[0]
        if (tracks := len(container.streams.audio)) > 1:
            raise DamagedAudio(f"{tracks} tracks of sound, of which one would be heard")
        if self._stream.codec_context is None:
            raise DamagedAudio("cut off, or of a codec that FFmpeg does not know here")
        self.rate = self._stream.codec_context.sample_rate
        self.channels = self._stream.codec_context.layout.nb_channels
        self._format = container.format.name.partition(",")[0]
        if self._format in ("mov", "flac") and self._stream.duration:
            self.frames = round(self._stream.duration * self._stream.time_base * self.rate)
        place = file.tell()
        self._packets = _mp3_frames(file) if self._format == "mp3" else 0
        if self._format == "mov" and _count_boxes(file, b"moov") > 1:
            raise DamagedAudio(_CHAINED)
        if self._format == "matroska" and not _is_whole_matroska(file):
            raise DamagedAudio("cut off: it ends within an element")
        file.seek(place)

    def blocks(self, first: int = 0) -> Iterator[tuple[int, Block]]:
        packets, bad, clock, last = 0, 0, None, None
        for packet in self._container.demux(self._stream):
            packets += packet.size > 0
            if packet.is_corrupt:
                raise DamagedAudio(f"cut off or damaged at {self.position / self.rate:.2f} s")
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                bad += packet.size  # behind an mp3 may lie anything
                if self._format != "mp3":
                    raise DamagedAudio(
                        f"cut off or damaged at {self.position / self.rate:.2f} s"
                    ) from None
                continue
            for frame in frames:
                time = frame.time
                jumps = None not in (clock, time) and time - clock > CUT_OFF
                if jumps or bad > _MP3_FRAME or frame.sample_rate != self.rate:
                    raise DamagedAudio(f"damaged at {self.position / self.rate:.2f} s")
                clock = None if time is None else time + frame.samples / self.rate
                last = packet
                self.position += frame.samples
                if self.position > first:
                    yield self.position - frame.samples, _to_floats(frame)
        self._check_length()
        if packets < self._packets - 2:
            raise DamagedAudio(f"cut off: it declares {self._packets} frames, and holds {packets}")
        if self._format == "mp3" and last and last.size < _mp3_frame_size(bytes(last)[:4]):
            raise DamagedAudio("cut off: it ends within a frame")


def _to_floats(frame: Any) -> Block:
    """Return the samples of a frame of FFmpeg, (frames, channels); full scale is [-1, 1]."""
    wave = frame.to_ndarray()
    wave = wave.T if frame.format.is_planar else wave.reshape(frame.samples, -1)
    if wave.dtype.kind == "f":
        return wave.astype(np.float32)
    full = 2.0 ** (8 * wave.dtype.itemsize - 1)
    return ((wave.astype(np.float64) - full * (wave.dtype.kind == "u")) / full).astype(np.float32)


def _mp3_frames(file: BinaryIO) -> int:
    """Return the number of frames that an mp3 declares in its first one; 0 if it does not."""
    file.seek(0)
    head = file.read(10)
    if head[:3] == b"ID3":  # a size of seven bits a byte
        file.seek(10 + sum(byte << 7 * (3 - place) for place, byte in enumerate(head[6:10])))
    else:
        file.seek(0)
    start = file.read(256)
    for tag, frames in ((b"Xing", 8), (b"Info", 8), (b"VBRI", 14)):
        place = start.find(tag)
        if place >= 0 and (tag == b"VBRI" or start[place + 7] & 1):
            return int.from_bytes(start[place + frames : place + frames + 4], "big")
    return 0


def _mp3_frame_size(header: bytes) -> int:
    """Return the bytes of an mp3's frame of layer II or III, padding aside; 0 for another."""
    if len(header) < 4 or (layer := 4 - (header[1] >> 1 & 3)) not in (2, 3):
        return 0
    is_first = header[1] & 8  # MPEG-1; else MPEG-2 or 2.5
    rates = [32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320]
    if is_first and layer == 2:
        rates = [32, *rates[2:], 384]
    if not is_first:
        rates = [8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160]
    rate, hertz = header[2] >> 4, (44_100, 48_000, 32_000, 0)[header[2] >> 2 & 3]
    hertz //= 1 if is_first else 2 if header[1] & 16 else 4
    samples = 144_000 if is_first or layer == 2 else 72_000
    return rates[rate - 1] * samples // hertz if 0 < rate < 15 else 0


def _is_whole_ogg(file: BinaryIO) -> bool:
    """Tell whether the last page of an ogg file is whole, and marked as the last."""
    place = file.tell()
    file.seek(max(0, file.seek(0, 2) - _OGG_PAGE))
    _, _, page = file.read().rpartition(b"OggS")
    file.seek(place)
    count = page[22] if len(page) > 22 else 255  # of the sizes that make up the page
    return len(page) >= 23 + count + sum(page[23 : 23 + count]) and bool(page[1] & 4)


def _is_chain(file: BinaryIO) -> bool:
    """Tell whether a stream begins behind a page of another one in an ogg file."""
    place, started = file.tell(), False
    file.seek(0)
    while (head := file.read(27))[:4] == b"OggS" and len(head) == 27:
        begins = bool(head[5] & 2)
        if begins and started:
            break
        started |= not begins
        file.seek(sum(file.read(head[26])), 1)
    else:
        begins = False
    file.seek(place)
    return begins


def _holds(file: BinaryIO, start: int, marks: tuple[bytes, ...]) -> bool:
    """Tell whether one of some marks is in a file from a place on, its first bytes aside."""
    longest = max(map(len, marks))
    file.seek(max(longest, start))
    kept = b""
    while block := file.read(1 << 20):
        if any(mark in kept + block for mark in marks):
            return True
        kept = block[-longest:]
    return False


def _count_boxes(file: BinaryIO, kind: bytes) -> int:
    """Return how many of its outermost boxes of MPEG-4 are of a kind."""
    file.seek(0)
    count = 0
    while len(head := file.read(8)) == 8:
        size = int.from_bytes(head[:4], "big")
        count += head[4:] == kind
        if size == 1:  # it follows in eight bytes
            size = int.from_bytes(file.read(8), "big") - 8
        if size < 8:  # 0 is up to the end
            break
        file.seek(size - 8, 1)
    return count


def _is_whole_matroska(file: BinaryIO) -> bool:
    """Tell whether a Matroska or webm file ends where one of its elements does."""
    end = file.seek(0, 2)
    place = 0
    while place < end:
        file.seek(place)
        head = file.read(12)
        if not head or not head[0]:
            return False
        width = 9 - head[0].bit_length()  # of the element's id
        if len(head) <= width or not head[width]:
            return False
        length = 9 - head[width].bit_length()  # of its size
        size = int.from_bytes(head[width : width + length], "big") & ~(1 << 7 * length)
        place += width + length
        if head[:width] not in (b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"):  # segment, cluster
            place += size
    return place == end
