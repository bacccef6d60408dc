import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tokenizers import ByteLevelBPETokenizer
from transformers import WhisperFeatureExtractor, WhisperTokenizer

TEXTS = ["das haus ist alt", "the house is old", "das house ist old", "ich sehe the tree im garten"]


def build_tokenizer(languages: tuple[str, ...]) -> WhisperTokenizer:
    """As recipes/pocket/train.py makes it."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator((" " + text for text in TEXTS), vocab_size=300, show_progress=False)
    state = json.loads(bpe.to_str())["model"]
    tokenizer = WhisperTokenizer(
        vocab=state["vocab"], merges=[tuple(merge) for merge in state["merges"]]
    )
    special = ["<|startoftranscript|>", *(f"<|{code}|>" for code in languages)]
    special += ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>"]
    special += ["<|nospeech|>", "<|notimestamps|>"]
    tokenizer.add_special_tokens(
        {"pad_token": "<|endoftext|>", "additional_special_tokens": special}
    )
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> WhisperTokenizer:
    return build_tokenizer(("en", "de", "es"))


@pytest.fixture(scope="session")
def english_only() -> WhisperTokenizer:
    return build_tokenizer(())


@pytest.fixture(scope="session")
def extractor() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(chunk_length=3)


@pytest.fixture
def speak(tmp_path: Path) -> Callable[..., Path]:
    """Write a sine of 440 Hz."""

    def write(name: str, seconds: float = 0.5, rate: int = 16_000) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)
        soundfile.write(path, wave, rate)
        return path

    return write


@pytest.fixture
def manifest(tmp_path: Path) -> Callable[..., Path]:
    """Write rows, or lines as they are, as a manifest."""

    def write(*rows: object, name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write


_seen: list[list[str]] = []  # what `watch` is told; an audit hook cannot be taken off again


def _audit(event: str, args: tuple) -> None:
    if _seen and event == "pickle.find_class":
        _seen[-1].append(f"unpickles {args}")
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    if _seen and event == "open" and isinstance(args[2], int) and args[2] & writes:
        _seen[-1].append(f"writes {args[0]}")


@pytest.fixture(scope="session")
def watch() -> Callable:
    """A context that collects what is unpickled and which files are opened to be written."""
    sys.addaudithook(_audit)

    @contextmanager
    def watching() -> Iterator[list[str]]:
        _seen.append([])
        try:
            yield _seen[-1]
        finally:
            _seen.pop()

    return watching
