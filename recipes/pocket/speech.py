"""Speech from espeak-ng: one voice a sentence, whatever languages it holds."""

import random
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000
MAX_SECONDS = 2.95
# `cmn` of espeak-ng 1.51 reads its own pinyin out as English; the pinyin voice speaks Mandarin.
VOICES = {"en": "en", "de": "de", "es": "es", "fr": "fr", "tr": "tr", "zh": "cmn-latn-pinyin"}
TRAIN_VARIANTS = ("m1", "m2", "m3", "m5", "m6", "m7", "f1", "f2", "f3", "f5", "Alex", "linda")
UNSEEN_VARIANTS = ("m4", "m8", "f4")


@dataclass(frozen=True)
class Voice:
    """Speaker settings of espeak-ng and the noise laid over them."""

    variant: str
    speed: int  # words per minute
    pitch: int  # 0..99
    snr: float  # dB

    @classmethod
    def draw(cls, variants: tuple[str, ...], rng: random.Random) -> "Voice":
        """A random voice of the given variants."""
        return cls(
            variant=rng.choice(variants),
            speed=rng.randint(150, 200),
            pitch=rng.randint(30, 70),
            snr=round(rng.uniform(20, 40), 1),
        )

    def as_dict(self) -> dict[str, str | int | float]:
        """For the manifest."""
        return asdict(self)


def speak(text: str, language: str, voice: Voice) -> np.ndarray:
    """One phrase, (samples,) at 16 kHz, silence at both ends trimmed."""
    command = ["espeak-ng", "-v", f"{VOICES[language]}+{voice.variant}", "--stdout"]
    command += ["-s", str(voice.speed), "-p", str(voice.pitch), text]
    raw = subprocess.run(command, check=True, capture_output=True).stdout
    rate = int.from_bytes(raw[24:28], "little")
    wave = np.frombuffer(raw[44 : 44 + (len(raw) - 44) // 2 * 2], dtype=np.int16) / 32768.0
    wave = soxr.resample(wave, rate, SAMPLE_RATE)
    loud = np.flatnonzero(np.abs(wave) > 0.01)
    return wave[loud[0] : loud[-1] + 1] if len(loud) else wave[:0]


def utter(phrases: list[tuple[str, str]], voice: Voice, seed: int) -> np.ndarray | None:
    """A sentence of (text, language) phrases in one voice; None if longer than the window."""
    noise = np.random.default_rng(seed)
    gap = np.zeros(int(0.03 * SAMPLE_RATE))
    pieces = [np.zeros(int(noise.uniform(0.02, 0.12) * SAMPLE_RATE))]
    for text, language in phrases:
        pieces += [speak(text, language, voice), gap]
    wave = np.concatenate([*pieces, np.zeros(int(noise.uniform(0.02, 0.1) * SAMPLE_RATE))])
    if len(wave) > MAX_SECONDS * SAMPLE_RATE:
        return None
    wave *= 0.1 * noise.uniform(0.6, 1.4) / np.sqrt(np.mean(wave**2))
    hiss = np.cumsum(noise.standard_normal(len(wave)))
    hiss = hiss - np.convolve(hiss, np.ones(64) / 64, "same")  # brown noise without its rumble
    hiss = hiss / hiss.std() + noise.standard_normal(len(wave))
    level = np.sqrt(np.mean(wave**2)) * 10 ** (-voice.snr / 20)
    return np.clip(wave + hiss / hiss.std() * level, -1, 1)


def write(path: Path, wave: np.ndarray) -> None:
    """Ogg Opus at the codec's lowest rate, about 9 kbit/s."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=1.0)
