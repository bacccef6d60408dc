"""The token sequences of Whisper's decoder: what it is told, and what it should say."""

import re
from typing import TYPE_CHECKING

from blora_pyro.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START, END, NO_TIMESTAMPS = "<|startoftranscript|>", "<|endoftext|>", "<|notimestamps|>"
TASKS = ("transcribe", "translate")
_LANGUAGE = re.compile(r"<\|([a-z]{2,3})\|>")
_ENGLISH_ONLY_END = 50256


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
    known = sorted(match[1] for match in map(_LANGUAGE.fullmatch, vocabulary) if match)
    # OpenAI's English-only vocabularies do hold all language tokens, untrained; what tells them is
    # GPT-2's vocabulary, whose end token is 50256 (50257 in the multilingual ones).
    if not known or vocabulary[END] == _ENGLISH_ONLY_END:
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


def end_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the end token's id."""
    return tokenizer.get_vocab()[END]
