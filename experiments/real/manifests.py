"""Manifests of the human speech that the real Whisper is measured on, from the public sources.

    python experiments/real/manifests.py --killkan KILLKAN --asterisk /usr/share --kerstin KERSTIN \
        --output human-speech

- KILLKAN: a copy of the data set ctaguchi/killkan (its Parquet files): Kichwa with Spanish
  code-switching, radio drama, CC-BY 4.0 (Taguchi et al., arXiv 2404.15501). Chapters 1 to 12 become
  `train.jsonl`, 13 and 14 `dev.jsonl`, 15 and 16 `test.jsonl`, each in the order of a hash.
- the Debian packages asterisk-core-sounds-{en,es,fr} and -{en,es,fr}-wav: telephone prompts, one
  professional voice a language, CC-BY-SA 3.0; `--asterisk` is the folder that holds `share`'s
  `asterisk` and `doc`.
- KERSTIN: a copy of rhasspy/dataset-voice-kerstin: German read sentences, CC0; `metadata.csv` with
  `id|text`, and audio files named by id anywhere below.

The rows are chosen by length and hash, so they are not to the row those of the published figures,
which also took only sentences with Spanish in them, by the corpus's annotation of words; PIER needs
that annotation as `word_languages`.
"""

import argparse
import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import soundfile
from datasets import Audio, load_dataset

VOICES = {"en": "en_US_f_Allison", "es": "es_MX_f_Allison", "fr": "fr_CA_f_June"}
CHAPTERS = {"train": range(1, 13), "dev": range(13, 15), "test": range(15, 17)}
MOST = {"train": 540, "dev": 80, "test": 100}  # of Kichwa
BACKWARD = {"test": 60, "dev": 60, "train": 100}  # of each backward language, in this order
SECONDS = 1.5, 10.0
FEWEST_WORDS = 3

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the manifests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("killkan", "asterisk", "kerstin", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    rows = [*killkan(options.killkan, options.output / "clips")]
    for split, chapters in CHAPTERS.items():
        some = [row for row in rows if int(re.findall(r"\d+", row["source"])[0]) in chapters]
        write(options.output / f"{split}.jsonl", shuffled(some)[: MOST[split]])
    for code, voice in VOICES.items():
        found = asterisk(options.asterisk, code, voice)
        write(options.output / f"back-{code}.jsonl", split_up(found))
    write(options.output / "back-de.jsonl", split_up(kerstin(options.kerstin)))


def killkan(folder: Path, clips: Path) -> Iterator[Row]:
    """Yield the rows of the corpus; their audio is written into a folder."""
    files = {path.stem: str(path) for path in sorted(folder.rglob("*.parquet"))}
    clips.mkdir(exist_ok=True)
    for one in files.values():
        data = load_dataset("parquet", data_files=one, split="train")
        for row in data.cast_column("audio", Audio(decode=False)):
            clip = clips / Path(row["audio"]["path"]).name
            clip.write_bytes(row["audio"]["bytes"])
            yield from usable(clip, f"killkan/{clip.name}", row["sentence"], "qu-es", words=1)


def asterisk(folder: Path, code: str, voice: str) -> Iterator[Row]:
    """Yield the prompts of a language that are speech."""
    listing = folder / "doc" / f"asterisk-core-sounds-{code}" / f"core-sounds-{code}.txt.gz"
    with gzip.open(listing, "rt", encoding="utf-8") as lines:
        for line in lines:
            name, colon, text = line.strip().partition(":")
            audio = folder / "asterisk" / "sounds" / voice / f"{name.strip()}.wav"
            if colon and not name.startswith(";") and "[" not in text and audio.is_file():
                yield from usable(audio, f"asterisk-core-sounds/{voice}/{audio.name}", text, code)


def kerstin(folder: Path) -> Iterator[Row]:
    """Yield the sentences."""
    files = {path.stem: path for path in folder.rglob("*") if path.suffix in (".flac", ".wav")}
    for line in (folder / "metadata.csv").read_text(encoding="utf-8").splitlines():
        name, _, text = line.partition("|")
        if audio := files.get(Path(name).stem):
            yield from usable(audio, f"kerstin/{audio.name}", text, "de")


def usable(
    audio: Path, source: str, text: str, language: str, words: int = FEWEST_WORDS
) -> Iterator[Row]:
    """Yield the row of a recording that is neither too short nor too long."""
    about, text = soundfile.info(audio), " ".join(text.split())
    if SECONDS[0] <= about.duration <= SECONDS[1] and len(text.split()) >= words:
        yield {
            "audio": str(audio.resolve()),
            "source": source,
            "text": text,
            "language": language,
            "duration": round(about.duration, 2),
        }


def shuffled(rows: Iterable[Row]) -> list[Row]:
    """Return rows in the order of a hash of their sources."""
    return sorted(rows, key=lambda row: hashlib.sha256(row["source"].encode()).hexdigest())


def split_up(rows: Iterable[Row]) -> list[Row]:
    """Return rows with a split each: test, then dev, then train."""
    rest = iter(shuffled(rows))
    return [
        {**row, "split": split}
        for split, count in BACKWARD.items()
        for _, row in zip(range(count), rest, strict=False)
    ]


def write(file: Path, rows: Sequence[Row]) -> None:
    """Write a manifest, and say how many rows it has."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text(text, encoding="utf-8")
    print(f"{file}: {len(rows)} rows")


if __name__ == "__main__":
    main()
