"""Data checked before a fit: what they hold, what a fit would refuse, and what is worth knowing."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

from datasets import Dataset
from transformers import WhisperFeatureExtractor, WhisperTokenizer

from blora_pyro.data import (
    MODEL_DIR,
    SAMPLING_RATE,
    AudioHeader,
    BadRow,
    Digests,
    Encoder,
    Suppressed,
    load_split,
    prompt_ids,
    read_audio,
    read_header,
    split_names,
    text_ids,
    usable_cores,
)
from blora_pyro.errors import UserError, reason
from blora_pyro.languages import language_code
from blora_pyro.metrics import check_tags
from blora_pyro.models.folders import adapter_in, check_chain, find_folder
from blora_pyro.models.stored_config import read_config, read_extractor, read_generation
from blora_pyro.options import POCKET
from blora_pyro.sources import Source, as_sources, describe_source

CHUNK = 64  # recordings that are decoded at a time
TOLERANCE = 0.1  # seconds by which a stated duration may be wrong

# Kinds of findings that a fit refuses, and kinds that it takes.
REFUSED = {
    "row": "rows that can't be read",
    "audio": "audio that can't be used",
    "transcript": "text or language that can't be used",
    "word_languages": "words and word_languages differ in number",
}
NOTES = {
    "empty text": "empty text",
    "characters": "characters that the tokenizer can't spell",
    "bytes": "characters that it spells byte by byte",
    "suppressed": "tokens that the base's generation config suppresses, and a fit allows",
    "duration": "a stated duration that is wrong",
    "tags": "words and word_languages differ in number",
    "repeated": "audio that an earlier row has, too",
    "shared audio": "audio that is in another set too",
    "shared text": "text that is in another set too",
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

    Attributes:
        split: "" where the source has no splits.
        rows: Number of rows, the bad ones among them.
        hours: Length of all recordings (of segments, where rows are such) that can be read.
        seconds: The shortest, the median and the longest of them; None without any.
        sampling_rates: Number of rows by rate, in Hz.
        channels: Number of rows by number of channels.
        languages: Number of rows by language code.
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

    @property
    def name(self) -> str:
        """Source and split."""
        return f"{self.source} {self.split}".strip()

    def count(self, kinds: Iterable[str]) -> dict[str, int]:
        """Return the number of findings by kind, in the order of `kinds`, without zeros."""
        counts = Counter(one.kind for one in self.findings)
        return {kind: counts[kind] for kind in kinds if counts[kind]}


@dataclass(frozen=True)
class DataCheck:
    """What was found in all sets, for a base that takes audio of `window` seconds."""

    base: str
    window: float
    sets: list[SetCheck]

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
    base: str = POCKET,
    split: str | None = None,
    language: str | None = None,
    on_progress: Callable[[str, int, int], object] = lambda name, done, total: None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> DataCheck:
    """Read data as a fit would, decode every recording, and return what was found.

    Args:
        sources: See `load_split`.
        base: The base model of the fit; its weights are not loaded.
        split: The only split to check; None is all that a source has.
        language: Language of rows that name none.
        on_progress: Called with a set's name, its number of decoded recordings, and of all.
        revision: Branch, tag or commit of a base on the Hub.
        local_files_only: Look for a base in the Hub's local cache alone.

    Raises:
        UserError: If a source or the base can't be read at all.
    """
    tokenizer, feature_extractor, max_tokens, suppressed = load_processor(
        base, revision, local_files_only
    )
    if language:
        prompt_ids(tokenizer, language_code(language))  # refuses a language without a token
    encoder = Encoder(tokenizer, language, max_tokens=max_tokens, suppressed=suppressed)
    window = feature_extractor.chunk_length
    earlier = _EarlierRows()
    sets = [
        _check_set(source, name, encoder, window, earlier, on_progress)
        for source in as_sources(sources)
        for name in ([split] if split else split_names(source) or [""])
    ]
    return DataCheck(base, window, sets)


def load_processor(
    base: str,
    revision: str | None = None,
    local_files_only: bool = False,
    above: tuple[str, ...] = (),
) -> tuple[WhisperTokenizer, WhisperFeatureExtractor, int, Suppressed]:
    """Return a base's tokenizer, feature extractor, decoder length and what it never says.

    Its weights are not loaded. `above` are the adapters that lead to this base.

    Raises:
        UserError: If they can't be loaded.
    """
    folder = MODEL_DIR
    if base != POCKET:
        folder = find_folder(base, revision, local_files_only, weights=False)
        if adapter := adapter_in(base, folder):
            above = check_chain(base, folder, above)
            return load_processor(*adapter, local_files_only, above)
    extractor, config = read_extractor(base, folder), read_config(base, folder)
    has_settings = (folder / "generation_config.json").is_file()
    settings = read_generation(base, folder) if has_settings else None
    try:
        tokenizer = WhisperTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever transformers raises for damaged files
        raise UserError(
            f"base model '{base}' can't be loaded ({reason(error)}); "
            "give 'pocket', a folder with a Whisper checkpoint, or a Hub id within reach"
        ) from None
    return tokenizer, extractor, config.max_target_positions, Suppressed.of(settings)


@dataclass(frozen=True)
class _Recording:
    """A row's audio: its length and header if the file can be read, else the error."""

    seconds: float | None
    header: AudioHeader | None
    content: str | None
    error: str | None = None


def _check_set(
    source: Source,
    split: str,
    encoder: Encoder,
    window: float,
    earlier: "_EarlierRows",
    on_progress: Callable[[str, int, int], object],
) -> SetCheck:
    described = describe_source(source)
    label = f"{described} {split}".strip()
    bad: list[BadRow] = []
    dataset = load_split(source, split or "train", bad.append)
    findings = [Finding("row", error.origin, error.reason) for error in bad]
    lengths: list[float] = []
    headers: list[AudioHeader] = []
    languages: list[str] = []
    for row, recording in _decode(dataset, window, partial(on_progress, label)):
        lengths += [] if recording.seconds is None else [recording.seconds]
        headers += [recording.header] if recording.header else []
        languages.append(_language_of(row, encoder))
        problems = _row_problems(row, recording, encoder, split)
        problems += earlier.compare(label, row, recording)
        findings += [Finding(kind, row["origin"], message) for kind, message in problems]
    findings += _check_characters(dataset, encoder.tokenizer)
    return SetCheck(
        described,
        split,
        len(dataset) + len(bad),
        sum(lengths) / 3600,
        {"min": min(lengths), "median": median(lengths), "max": max(lengths)} if lengths else None,
        _counts(header.sampling_rate for header in headers),
        _counts(header.channels for header in headers),
        _counts(languages),
        findings,
    )


def _decode(
    dataset: Dataset, window: float, on_progress: Callable[[int, int], object]
) -> Iterator[tuple[dict[str, Any], _Recording]]:
    """Yield every row and its decoded recording."""
    decode = partial(_decode_row, window=window, digests=Digests())
    with ThreadPoolExecutor(usable_cores()) as pool:
        for first in range(0, len(dataset), CHUNK):
            chunk = [dataset[row] for row in range(first, min(first + CHUNK, len(dataset)))]
            yield from zip(chunk, pool.map(decode, chunk), strict=True)
            on_progress(first + len(chunk), len(dataset))


def _decode_row(row: Mapping[str, Any], window: float, digests: Digests) -> _Recording:
    audio, start, end = row["audio"] or {}, row["start"], row["end"]
    digest, header, seconds = digests.of(audio), None, None
    content = None if digest is None else f"{digest} {start} {end}"
    try:
        header = read_header(audio)
        seconds = min(end or header.seconds, header.seconds) - (start or 0.0)
        wave = read_audio(audio, start=start, end=end, max_seconds=window)
        return _Recording(len(wave) / SAMPLING_RATE, header, content)
    except UserError as error:
        seconds = seconds if seconds is not None and seconds > 0 else None
        return _Recording(seconds, header, content, str(error))


def _row_problems(
    row: Mapping[str, Any], recording: _Recording, encoder: Encoder, split: str
) -> list[tuple[str, str]]:
    """Return kind and message of what is wrong with a row taken alone."""
    problems = [("audio", recording.error)] if recording.error else []
    try:
        _, _, target = encoder.encode(row["text"], row["language"])
        if unsaid := encoder.suppressed.of_target(target):
            texts = dict.fromkeys(encoder.tokenizer.decode([token]) for token in unsaid)
            problems.append(("suppressed", ", ".join(map(repr, texts))))
    except UserError as error:
        problems.append(("transcript", str(error)))
    if not row["text"].strip():
        problems.append(("empty text", "the fit will learn that nothing is said"))
    try:
        check_tags(row["text"], row["word_languages"])
    except UserError as error:
        problems.append(("tags" if split == "train" else "word_languages", str(error)))
    stated, found = row["duration"], recording.seconds
    if stated is not None and found is not None and abs(stated - found) > TOLERANCE:
        message = f"duration is {stated:.2f} s, the audio lasts {found:.2f} s"
        problems.append(("duration", message))
    return problems


def _language_of(row: Mapping[str, Any], encoder: Encoder) -> str:
    """Return the code of a row's language, or the language as given if it has none."""
    given = row["language"] or encoder.language or ""
    try:
        return language_code(given)
    except UserError:
        return given


class _EarlierRows:
    """The first row of every set with an audio, or with a text."""

    def __init__(self) -> None:
        self.audio: dict[str, dict[str, str]] = defaultdict(dict)  # content -> set -> origin
        self.texts: dict[str, dict[str, str]] = defaultdict(dict)

    def compare(
        self, label: str, row: Mapping[str, Any], recording: _Recording
    ) -> Iterator[tuple[str, str]]:
        """Yield kind and message of what an earlier row had, too, and add this row."""
        if recording.content:
            origins = self.audio[recording.content]
            if label in origins:
                yield "repeated", f"the same audio as {origins[label]}"
            elif origins:
                yield "shared audio", f"the same audio as {next(iter(origins.values()))}"
            origins.setdefault(label, row["origin"])
        if text := row["text"].strip():
            origins = self.texts[text]
            if origins and label not in origins:
                yield "shared text", f"{text[:40]!r} as {next(iter(origins.values()))}"
            origins.setdefault(label, row["origin"])


def _check_characters(dataset: Dataset, tokenizer: WhisperTokenizer) -> Iterator[Finding]:
    """Yield the characters that the tokenizer has no token for."""
    origins: dict[str, list[str]] = defaultdict(list)
    for text, origin in zip(dataset["text"], dataset["origin"], strict=True):
        for char in sorted({*"".join(text.split())}):
            origins[char].append(origin)
    for char, (origin, *others) in origins.items():
        message = f"{char!r} (U+{ord(char):04X}), rows: {1 + len(others)}"
        if tokenizer.decode(text_ids(tokenizer, char)) != f" {char}":
            yield Finding("characters", origin, message)
            continue
        tokens = tokenizer.encode(char, add_special_tokens=False, split_special_tokens=True)
        if 1 < len(char.encode()) <= len(tokens):
            yield Finding("bytes", origin, message)


def _counts(values: Iterable[Any]) -> dict[Any, int]:
    """Return how often each value comes, the most frequent first."""
    return dict(Counter(values).most_common())
