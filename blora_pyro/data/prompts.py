"""The token sequences of Whisper's decoder: prompts and targets."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blora_pyro.errors import UserError
from blora_pyro.languages import (
    ENGLISH,
    Language,
    begins_unspaced,
    is_iso_code,
    language_code,
    near_languages,
    prompt_codes,
    read_language,
)
from blora_pyro.languages import LANGUAGES as WHISPER_LANGUAGES
from blora_pyro.options import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START, END, NO_TIMESTAMPS = "<|startoftranscript|>", "<|endoftext|>", "<|notimestamps|>"

_LANGUAGE = re.compile(r"<\|([a-z]{2,3})\|>")
_SPELLED = re.compile(r"<\|[\w.]+\|>")  # a special token or a timestamp
_LATE = {"yue"}  # languages that older bases have no token for
NO_MAP: Mapping[str, str] = {}  # every language is prompted as itself
_MAX_LISTED = 12  # languages in a message
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
    tokenizer: "PreTrainedTokenizerBase",
    language: str,
    task: str = "transcribe",
    language_map: Mapping[str, str] = NO_MAP,
) -> list[int]:
    """Return the decoder's prompt: start, language or languages, task, no timestamps.

    Code-switched speech ("de-en") gets the tokens of both languages, the matrix language's first,
    unless `language_map` says what else stands for them, see `languages.prompt_codes`.
    English-only checkpoints have neither language nor task in their prompt.

    Raises:
        UserError: if the base lacks a language or the task, or no language is given.
    """
    vocabulary = tokenizer.get_vocab()  # convert_tokens_to_ids would turn unknown tokens into END
    if task not in TASKS:
        raise UserError(f"no task is called {task!r}; choose from {', '.join(TASKS)}")
    if not (known := language_codes(tokenizer)):
        if language not in ("", ENGLISH.code):
            raise UserError(f"the base is English-only, and the language is {language!r}")
        if task != "transcribe":
            raise UserError(f"the base is English-only, and the task is {task!r}")
        return [vocabulary[START], vocabulary[NO_TIMESTAMPS]]
    if not language:
        some = known if len(known) <= _MAX_LISTED else ["en", "de", "zh", "..."]
        raise UserError(f"no language given; choose from {', '.join(some)}, or join two: de-en")
    codes = prompt_codes(language, language_map)
    if unknown := [code for code in codes if code not in known]:
        it_knows = ", ".join(known)
        if len(known) > _MAX_LISTED:
            it_knows = f"{len(known)} others, {near_languages(unknown[0], known)}"
        raise UserError(
            f"the tokenizer does not know the language {unknown[0]!r} of {language!r}; "
            f"it knows {it_knows}{_way_out(unknown[0])}"
        )
    names = [START, *(f"<|{code}|>" for code in codes), f"<|{task}|>", NO_TIMESTAMPS]
    return [vocabulary[name] for name in names]


def _way_out(code: str) -> str:
    if not is_iso_code(code):
        return ""
    return f"; if it is no misspelling, fit with language_map {code}=TOKEN, one of those"


def unmapped_codes(
    tokenizer: "PreTrainedTokenizerBase", language: str, language_map: Mapping[str, str] = NO_MAP
) -> list[str]:
    """Return the codes in a language's prompt that another token can stand for; [] if all have one.

    They are codes of ISO 639 that Whisper has no token for, or only the latest (Cantonese). Where
    anything else has none, such as a misspelling, there is no prompt either, see `prompt_ids`: [].
    """
    known = language_codes(tokenizer)
    codes = prompt_codes(language, language_map) if known and language else ()
    unknown = [code for code in codes if code not in known]
    usual = WHISPER_LANGUAGES.keys() - _LATE
    return unknown if all(is_iso_code(one) and one not in usual for one in unknown) else []


@dataclass(frozen=True)
class Suppressed:
    """Tokens that a base's `generate` never says: anywhere, and in the first place."""

    anywhere: frozenset[int] = frozenset()
    first: frozenset[int] = frozenset()

    @classmethod
    def of(cls, settings: object) -> "Suppressed":
        """Return those of a base's generation config."""
        anywhere = getattr(settings, "suppress_tokens", None) or ()
        return cls(
            frozenset(anywhere), frozenset(getattr(settings, "begin_suppress_tokens", None) or ())
        )

    def without(self, tokens: Collection[int]) -> "Suppressed":
        """Return the others."""
        return Suppressed(self.anywhere.difference(tokens), self.first.difference(tokens))

    def of_target(self, target: Sequence[int]) -> list[int]:
        """Return the tokens of a target, text and end token, that can't be decoded."""
        found = [token for token in target if token in self.anywhere]
        return [*target[:1], *found] if target[0] in self.first else found


NOTHING = Suppressed()


def text_ids(
    tokenizer: "PreTrainedTokenizerBase", text: str, suppressed: Suppressed = NOTHING
) -> list[int]:
    """Return the tokens of a transcript, which Whisper begins with a space; [] if it is blank.

    White space inside, line ends too, is single spaces, as Whisper writes it. Where `generate` may
    not begin with a lone space there is none before a script without spaces, nor where the space
    would be a token of its own. Special tokens spelled out in the text are read as text, so that no
    transcript can end early.
    """
    if not (text := " ".join(text.split())):
        return []

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    tokens = encode(f" {text}")
    if suppressed.first and encode(" ")[0] in suppressed.first:
        if begins_unspaced(text) or tokens[0] in suppressed.first:
            return encode(text)
    return tokens


def check_text(text: str) -> None:
    """Refuse a transcript that spells a special token or a timestamp, such as `<|0.00|>`.

    Raises:
        UserError: if it does.
    """
    if spelled := _SPELLED.search(text):
        raise UserError(
            f"the text ({text[:30]!r}...) spells the token {spelled[0]}; give the words alone"
        )


@dataclass(frozen=True)
class EncodedRow:
    """A row of `collation.Examples`, all but its features."""

    text: str
    language: Language
    written: Language
    word_languages: list[str]
    origin: str
    audio_path: str | None
    segment: tuple[float | None, float | None]
    source: int
    prompt: list[int]
    target: list[int]
    prompted_as: str  # the codes of the prompt's languages, joined


class Encoder:
    """Encodes transcripts as the decoder's tokens: prompt and target."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        language: str | None = None,
        task: str = "transcribe",
        max_tokens: int = 448,
        suppressed: Suppressed = NOTHING,
        language_map: Mapping[str, str] = NO_MAP,
    ) -> None:
        """Keep what all rows have in common; `language` is that of rows that name none."""
        self.language_map = language_map
        self.tokenizer, self.language, self.task = tokenizer, language, task
        self.max_tokens, self.suppressed = max_tokens, suppressed
        self._default = read_language(language or "")
        if not language and not language_codes(tokenizer):
            self._default = ENGLISH
        self.end = tokenizer.get_vocab()[END]
        self._prompts: dict[str, list[int]] = {}

    def encode(self, text: str, language: str = "") -> tuple[Language, list[int], list[int]]:
        """Return a row's language, its prompt, and its target: text and end token.

        Raises:
            UserError: if the language is unknown, or the text too long, or spells a special token.
        """
        spoken = read_language(language) if language else self._default
        if spoken.code not in self._prompts:
            self._prompts[spoken.code] = prompt_ids(
                self.tokenizer, spoken.code, self.task, self.language_map
            )
        prompt = self._prompts[spoken.code]
        check_text(text)
        room = self.max_tokens - len(prompt)
        size = f"{len(text):,} characters"
        if len(text) <= _MAX_CHARACTERS * max(room, 1):
            target = [*text_ids(self.tokenizer, text, self.suppressed), self.end]
            if len(target) - 1 <= room:  # the end is never an input
                return spoken, prompt, target
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
        from blora_pyro.data.rows import located  # which takes seconds to load

        origin, text, source = row["origin"], row["text"], row.get("source", 0)
        with located(origin, source):
            spoken, prompt, target = self.encode(text, row["language"])
            tags = [language_code(tag) for tag in row["word_languages"]]
        segment = row["start"], row["end"]
        written = spoken.written(self.task)
        prompted_as = "-".join(prompt_codes(spoken.code, self.language_map))
        return EncodedRow(
            text, spoken, written, tags, origin, path, segment, source, prompt, target, prompted_as
        )
