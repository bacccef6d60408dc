"""The token sequences of Whisper's decoder: prompts and targets."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blora_pyro.data.rows import located
from blora_pyro.errors import UserError
from blora_pyro.languages import language_code
from blora_pyro.options import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START, END, NO_TIMESTAMPS = "<|startoftranscript|>", "<|endoftext|>", "<|notimestamps|>"

_LANGUAGE = re.compile(r"<\|([a-z]{2,3})\|>")
_ENGLISH_ONLY_END = 50256
_MAX_CHARACTERS = 100  # a token; longer texts are not worth tokenising


def language_codes(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return the languages that the decoder has a token for, sorted; none if it is English-only."""
    vocabulary = tokenizer.get_vocab()
    # OpenAI's English-only vocabularies do hold all language tokens, untrained; they have
    # GPT-2's vocabulary, whose end token is 50256 (50257 in the multilingual ones).
    if vocabulary[END] == _ENGLISH_ONLY_END:
        return []
    return sorted(match[1] for match in map(_LANGUAGE.fullmatch, vocabulary) if match)


def prompt_ids(
    tokenizer: "PreTrainedTokenizerBase", language: str, task: str = "transcribe"
) -> list[int]:
    """Return the decoder's prompt: start, language or languages, task, no timestamps.

    Code-switched speech ("de-en") gets the tokens of both languages, the matrix language's first.
    English-only checkpoints have neither language nor task in their prompt, whatever is given.

    Raises:
        UserError: if the tokenizer lacks a language, none is given, or the task is not Whisper's.
    """
    vocabulary = tokenizer.get_vocab()  # convert_tokens_to_ids would turn unknown tokens into END
    if task not in TASKS:
        raise UserError(f"no task is called {task!r}; choose from {', '.join(TASKS)}")
    if not (known := language_codes(tokenizer)):
        return [vocabulary[START], vocabulary[NO_TIMESTAMPS]]
    if not language:
        raise UserError(f"no language given; choose from {', '.join(known)}, or join two: de-en")
    codes = language.split("-")
    if unknown := [code for code in codes if code not in known]:
        raise UserError(
            f"the tokenizer does not know the language {unknown[0]!r} of {language!r}; "
            f"it knows {', '.join(known)}"
        )
    names = [START, *(f"<|{code}|>" for code in codes), f"<|{task}|>", NO_TIMESTAMPS]
    return [vocabulary[name] for name in names]


def text_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Return the tokens of a transcript, which Whisper begins with a space; [] if it is blank.

    Special tokens spelled out in the text are read as text, so that no transcript can end early.
    """
    if not (text := text.strip()):
        return []
    return tokenizer.encode(" " + text, add_special_tokens=False, split_special_tokens=True)


@dataclass(frozen=True)
class EncodedRow:
    """A row of `collation.Examples`, all but its features."""

    text: str
    language: str
    word_languages: list[str]
    origin: str
    audio_path: str | None
    segment: tuple[float | None, float | None]
    source: int
    prompt: list[int]
    target: list[int]


class Encoder:
    """Encodes transcripts as the decoder's tokens: prompt and target."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        language: str | None = None,
        task: str = "transcribe",
        max_tokens: int = 448,
    ) -> None:
        """Keep what all rows have in common; `language` is that of rows that name none."""
        self.tokenizer, self.language, self.task = tokenizer, language, task
        self.max_tokens = max_tokens
        self.end = tokenizer.get_vocab()[END]
        self._prompts: dict[str, list[int]] = {}

    def encode(self, text: str, language: str = "") -> tuple[str, list[int], list[int]]:
        """Return a row's language by its code, its prompt, and its target: text and end token.

        Raises:
            UserError: if the language is unknown, or the text too long.
        """
        code = language_code(language or self.language or "")
        if code not in self._prompts:
            self._prompts[code] = prompt_ids(self.tokenizer, code, self.task)
        prompt = self._prompts[code]
        room = self.max_tokens - len(prompt)
        size = f"{len(text):,} characters"
        if len(text) <= _MAX_CHARACTERS * max(room, 1):
            target = [*text_ids(self.tokenizer, text), self.end]
            if len(target) - 1 <= room:  # the end is never an input
                return code, prompt, target
            size = f"{len(target) - 1} tokens"
        raise UserError(
            f"the text ({text[:30]!r}...) has {size}, but behind its prompt the decoder has room "
            f"for {room} tokens; shorten the text or split the audio"
        )

    def encode_row(self, row: Mapping[str, Any], path: str | None) -> EncodedRow:
        """Return a row with the columns of `read_manifest`, tokenised; `path` is its audio's.

        Raises:
            BadRow: if the language is unknown, or the text too long.
        """
        origin, text, source = row["origin"], row["text"], row.get("source", 0)
        with located(origin, source):
            language, prompt, target = self.encode(text, row["language"])
            tags = [language_code(tag) for tag in row["word_languages"]]
        segment = row["start"], row["end"]
        return EncodedRow(text, language, tags, origin, path, segment, source, prompt, target)
