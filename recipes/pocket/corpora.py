"""The corpora: sentences, voices and splits, written as Ogg Opus with a manifest per split."""

import json
import logging
import random
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

from sentences import Grammar, Word, render, runs, word_languages
from speech import SAMPLE_RATE, TRAIN_VARIANTS, UNSEEN_VARIANTS, Voice, utter, write

LANGUAGES = ("en", "de", "es", "fr", "tr", "zh")
DOMAINS = ("de-en", "es-en", "zh-en")  # matrix language first
SIZES = {
    "monolingual": {"test": 100, "dev": 100, "train": 3000},
    "code-switched": {"test": 200, "dev": 100, "train": 400},
}
MAX_WORDS = 8
SPARE = 1.1  # sentences drawn per sentence kept: those longer than the window fall out

log = logging.getLogger(__name__)


@lru_cache
def grammar(language: str) -> Grammar:
    """A language's grammar, read once."""
    return Grammar.load(language)


def draw(corpus: str, rng: random.Random) -> list[Word]:
    """A sentence of a language ("de") or a code-switched domain ("de-en")."""
    matrix, *embedded = (grammar(language) for language in corpus.split("-"))
    while True:
        words = matrix.code_switched(embedded[0], rng) if embedded else matrix.sentence(rng)
        if len(words) <= MAX_WORDS:
            return words


def distinct(corpus: str, count: int, taken: set[str], rng: random.Random) -> list[list[Word]]:
    """`count` sentences whose transcripts are not in `taken`, which grows by them."""
    sentences: list[list[Word]] = []
    while len(sentences) < count:
        words = draw(corpus, rng)
        if (text := render(words)) not in taken:
            taken.add(text)
            sentences.append(words)
    return sentences


def say(task: tuple[Path, list[Word], Voice, int]) -> float | None:
    """Speak one sentence into its file; its duration in seconds, None if too long."""
    path, words, voice, seed = task
    wave = utter(runs(words), voice, seed)
    if wave is None:
        return None
    write(path, wave)
    return len(wave) / SAMPLE_RATE


def build_split(
    corpus: str, split: str, size: int, sentences: list[list[Word]], root: Path
) -> None:
    """Write `root/corpus/split/*.ogg` and `root/corpus/split.jsonl`."""
    manifest = root / corpus / f"{split}.jsonl"
    rng = random.Random(f"voices {corpus} {split}")
    variants = TRAIN_VARIANTS if split == "train" else TRAIN_VARIANTS[:3] + UNSEEN_VARIANTS
    tasks = [
        (root / corpus / split / f"{index:04d}.ogg", words, Voice.draw(variants, rng), index)
        for index, words in enumerate(sentences)
    ]
    with ProcessPoolExecutor() as pool:
        durations = list(pool.map(say, tasks, chunksize=32))
    spoken = [pair for pair in zip(tasks, durations, strict=True) if pair[1] is not None]
    if len(spoken) < size:
        raise RuntimeError(f"{corpus} {split}: {len(spoken)} of {size} sentences fit the window")
    for (path, *_), _ in spoken[size:]:
        path.unlink()
    lines = [
        json.dumps(
            {
                "audio": f"{split}/{path.name}",
                "text": render(words),
                "language": corpus,
                "word_languages": word_languages(words),
                "duration": round(duration, 3),
                "voice": voice.as_dict(),
            },
            ensure_ascii=False,
        )
        for (path, words, voice, _), duration in spoken[:size]
        if duration is not None
    ]
    manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")
    log.info("%s %s: %d utterances", corpus, split, len(lines))


def build(root: Path) -> None:
    """All corpora; a split whose manifest exists is kept."""
    for corpus in (*LANGUAGES, *DOMAINS):
        sizes = SIZES["code-switched" if "-" in corpus else "monolingual"]
        rng = random.Random(f"sentences {corpus}")
        taken: set[str] = set()
        for split, size in sizes.items():
            sentences = distinct(corpus, int(size * SPARE), taken, rng)
            if not (root / corpus / f"{split}.jsonl").exists():
                build_split(corpus, split, size, sentences, root)


def read(manifest: Path) -> list[dict]:
    """Rows of a manifest, `audio` made absolute."""
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    return [{**row, "audio": str(manifest.parent / row["audio"])} for row in rows]
