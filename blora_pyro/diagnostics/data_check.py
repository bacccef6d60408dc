"""Data checked before a fit: what they hold, what a fit would refuse, and what is worth knowing."""

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any

from transformers import WhisperFeatureExtractor, WhisperTokenizer

from blora_pyro.data import (
    MODEL_DIR,
    BadRow,
    Columns,
    Digests,
    Encoder,
    Heard,
    Suppressed,
    check_text,
    decode_row,
    heard_of,
    language_codes,
    prompt_ids,
    row_batches,
    split_names,
    unmapped_codes,
    usable_cores,
)
from blora_pyro.declarations import check_value
from blora_pyro.diagnostics.row_notes import NOTES, Characters, RowNotes, suppressed_notes
from blora_pyro.errors import UserError
from blora_pyro.languages import language_code, read_language
from blora_pyro.metrics import check_tags
from blora_pyro.models.folders import (
    ADAPTER_WEIGHTS,
    adapter_in,
    check_chain,
    find_folder,
    quiet_transformers,
)
from blora_pyro.models.peft_adapters import stored_language_map, stored_unsuppressed
from blora_pyro.models.stored_config import (
    read_config,
    read_extractor,
    read_generation,
    read_tokenizer,
)
from blora_pyro.options import AUTO, BUILT_IN, POCKET, FitConfig
from blora_pyro.sources import Source, as_sources, describe_source

CHUNK = 256  # rows that are read, and decoded, at a time
KEPT = 1000  # findings of a kind and a set that are kept; the others are counted

# Kinds of findings that a fit refuses; those that it takes are `NOTES`.
REFUSED = {
    "row": "rows that can't be read",
    "audio": "audio that can't be used",
    "transcript": "text or language that can't be used",
    "word_languages": "words and word_languages differ in number",
}


@dataclass(frozen=True)
class Finding:
    """Something about a row, or about a character.

    `kind` is one of `REFUSED` or `NOTES`; `origin` is the row, such as "train.csv, line 3", or the
    first row with the character.
    """

    kind: str
    origin: str
    message: str

    @property
    def refused(self) -> bool:
        """Whether a fit would stop there."""
        return self.kind in REFUSED


@dataclass(frozen=True)
class SetCheck:
    """What was found in a split of a source; findings are in the order of the rows.

    Of each kind the first `KEPT` findings are there, and `counts` has the number of all.

    Attributes:
        split: "" where the source has no splits.
        rows: Number of rows, the bad ones among them.
        hours: Length of all recordings (of segments, where rows are such) that can be read.
        seconds: The shortest, the median and the longest of them; None without any.
        sampling_rates: Number of rows by rate, in Hz.
        channels: Number of rows by number of channels.
        languages: Number of rows by language code.
        refused_rows: Number of rows that a fit would refuse.
    """

    source: str
    split: str
    rows: int
    hours: float
    seconds: dict[str, float] | None
    sampling_rates: dict[int, int]
    channels: dict[int, int]
    languages: dict[str, int]
    findings: list[Finding]
    counts: dict[str, int]
    refused_rows: int

    @property
    def name(self) -> str:
        """Source and split."""
        return f"{self.source} {self.split}".strip()

    def count(self, kinds: Iterable[str]) -> dict[str, int]:
        """Return the number of findings by kind, in the order of `kinds`, without zeros."""
        return {kind: self.counts[kind] for kind in kinds if self.counts.get(kind)}


@dataclass(frozen=True)
class DataCheck:
    """What was found in all sets, for a base that takes audio of `window` seconds.

    Without a base both are None, and what only a base can say is left out. `fast`: No audio was
    opened.
    """

    base: str | None
    window: float | None
    sets: list[SetCheck]
    fast: bool = False

    @property
    def refused(self) -> bool:
        """Whether a fit would stop at a row of any set."""
        return any(one.count(REFUSED) for one in self.sets)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON has it."""
        sets = [
            {**asdict(one), "refused": one.count(REFUSED), "notes": one.count(NOTES)}
            for one in self.sets
        ]
        return {"refused": self.refused, "base": self.base, "window": self.window, "sets": sets}


def check_data(
    sources: Source | Sequence[Source],
    base: str | None = None,
    split: str | None = None,
    language: str | None = None,
    on_progress: Callable[[str, int, int], object] = lambda name, done, total: None,
    revision: str | None = None,
    local_files_only: bool = False,
    fast: bool = False,
    columns: Columns | None = None,
    task: str = "transcribe",
    language_map: Mapping[str, str] | str = AUTO,
) -> DataCheck:
    """Read data as a fit would, decode every recording, and return what was found.

    No more than a chunk of a manifest's rows is in memory.

    Args:
        sources: See `load_split`.
        base: The base model of the fit; its weights are not loaded. None is the pocket Whisper for
            the built-in corpora; for other data what only a base can say is left out then.
        split: The only split to check; None is all that a source has.
        language: Language of rows that name none.
        on_progress: Called with a set's name, its number of rows looked at, and of all, about.
        revision: Branch, tag or commit of a base on the Hub.
        local_files_only: Look for a base in the Hub's local cache alone.
        fast: Look at rows, texts and whether files exist; open no audio.
        columns: Names of columns, see `load_split`.
        task: Of the fit; an English-only base can't translate.
        language_map: See `FitConfig`.

    Raises:
        UserError: If a source or the base can't be read at all.
    """
    check_value(FitConfig, "task", task)
    if base is None and {*map(describe_source, as_sources(sources))} <= BUILT_IN:
        base = POCKET
    spoken = read_language(language or "")  # refuses what may be two things
    encoder = window = None
    is_auto = language_map == AUTO
    given: dict[str, str] = {}
    tokens: dict[str, str] = {}
    if base is not None:
        tokenizer, feature_extractor, max_tokens, suppressed, known = load_processor(
            base, revision, local_files_only
        )
        given = known | (dict(language_map) if isinstance(language_map, Mapping) else {})
        if language and not (is_auto and unmapped_codes(tokenizer, spoken.code, given)):
            prompt_ids(tokenizer, spoken.code, task, given)  # refuses what has no token
        tokens = dict(given)
        encoder = Encoder(tokenizer, language, task, max_tokens, suppressed, tokens)
        window = feature_extractor.chunk_length
    checks = _Checks(encoder, window, language or "", fast, given, tokens, is_auto)
    notes = RowNotes()
    sets = [
        _SetChecker(source, name, checks, notes).check(columns, on_progress)
        for source in as_sources(sources)
        for name in ([split] if split else split_names(source) or [""])
    ]
    return DataCheck(base, window, sets, fast)


@quiet_transformers()
def load_processor(
    base: str,
    revision: str | None = None,
    local_files_only: bool = False,
    above: tuple[str, ...] = (),
) -> tuple[WhisperTokenizer, WhisperFeatureExtractor, int, Suppressed, dict[str, str]]:
    """Return a base's tokenizer, feature extractor, decoder length, what it never says, its map.

    Its weights are not loaded. `above` are the adapters that lead to this base.

    Raises:
        UserError: If they can't be loaded.
    """
    folder = MODEL_DIR
    if base != POCKET:
        folder = find_folder(base, revision, local_files_only, weights=False)
        if adapter := adapter_in(base, folder):
            above = check_chain(base, folder, above)
            *rest, below, known = load_processor(*adapter, local_files_only, above)
            weights = find_folder(base, revision, local_files_only) / ADAPTER_WEIGHTS
            lifted, own = stored_unsuppressed(weights), stored_language_map(weights)
            return (*rest, below.without(lifted), {**known, **own})
    extractor, config = read_extractor(base, folder), read_config(base, folder)
    has_settings = (folder / "generation_config.json").is_file()
    settings = read_generation(base, folder, config) if has_settings else None
    tokenizer = read_tokenizer(base, folder)
    known = dict(getattr(settings, "language_map", None) or {})
    return tokenizer, extractor, config.max_target_positions, Suppressed.of(settings), known


@dataclass(frozen=True)
class _Recording:
    """A row's audio: its rate, channels and the rest if it can be used, else the error."""

    rate: int = 0
    channels: int = 0
    heard: Heard | None = None
    error: str = ""


@dataclass(frozen=True)
class _Checks:
    """What rows are checked against; no encoder and no window, of seconds, without a base."""

    encoder: Encoder | None
    window: float | None
    language: str  # of rows that name none
    fast: bool  # no audio is opened
    given: Mapping[str, str]  # what prompts languages that the base has no token for
    tokens: dict[str, str]  # likewise, and any token for those that a fit chooses one for
    is_auto: bool  # it does choose
    missing: dict[str, list[str]] = field(default_factory=dict)  # languages -> codes without token


class _SetChecker:
    """Checks the rows of a split."""

    def __init__(self, source: Source, split: str, checks: _Checks, notes: RowNotes) -> None:
        self.source, self.split, self.checks, self.notes = source, split, checks, notes
        self.described = describe_source(source)
        self.label = f"{self.described} {split}".strip()
        self.findings: list[Finding] = []
        self.kinds: Counter[str] = Counter()
        self.rows = self.refused = 0
        self.lengths, self.characters = array("d"), Characters()
        self.rates, self.channels, self.languages = Counter[int](), Counter[int](), Counter[str]()

    def check(
        self, columns: Columns | None, on_progress: Callable[[str, int, int], object]
    ) -> SetCheck:
        """Read and check all rows."""
        batches = row_batches(self.source, self.split or "train", self._bad, columns, CHUNK)
        with ThreadPoolExecutor(usable_cores()) as pool:
            for batch, about in batches:
                for row, recording in zip(batch, self._decoded(batch, pool), strict=True):
                    self._add(row, recording)
                on_progress(self.label, self.rows, max(about, self.rows))
        on_progress(self.label, self.rows, self.rows)
        if self.checks.encoder is not None:
            for note in self.characters.notes(self.checks.encoder.tokenizer):
                self._find(*note)
        known = self.lengths
        extremes = (
            {"min": min(known), "median": median(known), "max": max(known)} if known else None
        )
        return SetCheck(
            self.described,
            self.split,
            self.rows,
            math.fsum(known) / 3600,
            extremes,
            dict(self.rates.most_common()),
            dict(self.channels.most_common()),
            dict(self.languages.most_common()),
            self.findings,
            dict(self.kinds),
            self.refused,
        )

    def _find(self, kind: str, origin: str, message: str) -> None:
        self.kinds[kind] += 1
        if self.kinds[kind] <= KEPT:
            self.findings.append(Finding(kind, origin, message))

    def _bad(self, error: BadRow) -> None:
        self.rows += 1
        self.refused += 1
        self._find("row", error.origin, error.reason)

    def _decoded(
        self, batch: Sequence[Mapping[str, Any]], pool: ThreadPoolExecutor
    ) -> Iterable[_Recording]:
        if self.checks.fast:
            return [_Recording()] * len(batch)
        return pool.map(partial(_decode, window=self.checks.window, digests=Digests()), batch)

    def _add(self, row: Mapping[str, Any], recording: _Recording) -> None:
        self.rows += 1
        origin, text, heard = row["origin"], row["text"], recording.heard
        if heard is not None:
            self.lengths.append(heard.seconds)
            self.rates[recording.rate] += 1
            self.channels[recording.channels] += 1
        self.characters.add(text, origin)
        problems = [("audio", origin, recording.error)] if recording.error else []
        problems += self._problems(row)
        self.refused += any(kind in REFUSED for kind, *_ in problems)
        scored = self.split != "train"
        problems += self.notes.of(self.label, origin, text, row["word_languages"], heard, scored)
        for problem in problems:
            self._find(*problem)

    def _problems(self, row: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
        """Yield kind, origin and message of what the base can't take of texts and languages."""
        encoder, code = self.checks.encoder, row["language"] or self.checks.language
        try:
            code, target = read_language(code).code, list[int]()
            if encoder is None:
                check_text(row["text"])
            else:
                yield from self._without_token(encoder, code, row["origin"])
                spoken, _, target = encoder.encode(row["text"], row["language"])
                code = spoken.code
            for tag in row["word_languages"]:
                language_code(tag)
            if encoder is not None:
                about = encoder.tokenizer, encoder.suppressed, row["origin"], target
                yield from suppressed_notes(*about)
        except UserError as error:
            yield "transcript", row["origin"], str(error)
        self.languages[code] += 1
        if self.split != "train":
            try:
                check_tags(row["text"], row["word_languages"])
            except UserError as error:
                yield "word_languages", row["origin"], str(error)

    def _without_token(
        self, encoder: Encoder, code: str, origin: str
    ) -> Iterator[tuple[str, str, str]]:
        """Yield what has no token, and have it prompted as any that has: a fit chooses which."""
        checks, tokenizer = self.checks, encoder.tokenizer
        if checks.is_auto and code not in checks.missing:
            checks.missing[code] = unmapped_codes(tokenizer, code, checks.given)
            if checks.missing[code]:
                any_token, *_ = language_codes(tokenizer)
                checks.tokens.update(dict.fromkeys(checks.missing[code], any_token))
        for one in checks.missing.get(code, ()):
            yield "no token", origin, f"{one}; or give one by --language-map {one}=TOKEN"


def _decode(row: Mapping[str, Any], window: float | None, digests: Digests) -> _Recording:
    try:
        audio = decode_row(row, window)
    except UserError as error:
        return _Recording(error=str(error))
    return _Recording(audio.rate, audio.channels, heard_of(row, audio, digests))
