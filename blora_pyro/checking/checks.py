"""Data looked through before a fit: what they hold, what a fit would refuse, what to know."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from datasets import Dataset
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperTokenizer

from blora_pyro.checking.findings import DataCheck, Finding, SetCheck
from blora_pyro.data import (
    MODEL_DIR,
    SAMPLING_RATE,
    AudioHeader,
    BadRow,
    Digests,
    Encoder,
    Source,
    as_sources,
    describe_source,
    language_code,
    load_split,
    prompt_ids,
    read_audio,
    read_header,
    split_names,
    text_ids,
    usable_cores,
)
from blora_pyro.errors import UserError
from blora_pyro.metrics import check_tags
from blora_pyro.models import POCKET, adapter_in, find_folder

CHUNK = 64  # recordings heard at a time
TOLERANCE = 0.1  # seconds by which a duration may be another than is said


def check_data(
    sources: Source | Sequence[Source],
    base: str = POCKET,
    split: str | None = None,
    language: str | None = None,
    on_progress: Callable[[str, int, int], object] = lambda name, done, total: None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> DataCheck:
    """Look through data, every recording decoded, as a fit would read them.

    Args:
        sources: One or more, see `load_split`.
        base: The base model for which; its weights are not loaded.
        split: Look through that alone; None is all that a source has.
        language: Of rows that name none.
        on_progress: Told a set's name, how many of its recordings are heard, and of how many.
        revision: Branch, tag or commit of a base on the Hub.
        local_files_only: Look for a base in the Hub's local cache alone.

    Raises:
        UserError: If a source or the base can't be read at all.
    """
    tokenizer, feature_extractor, max_tokens = load_processor(base, revision, local_files_only)
    if language:
        prompt_ids(tokenizer, language_code(language))  # refuses what no row could be told in
    encoder = Encoder(tokenizer, language, max_tokens=max_tokens)
    window = feature_extractor.chunk_length
    known = _Known()
    sets = [
        _check_set(source, name, encoder, window, known, on_progress)
        for source in as_sources(sources)
        for name in ([split] if split else split_names(source) or [""])
    ]
    return DataCheck(base, window, sets)


def load_processor(
    base: str, revision: str | None = None, local_files_only: bool = False
) -> tuple[WhisperTokenizer, WhisperFeatureExtractor, int]:
    """A base's tokenizer, feature extractor and decoder length, without its weights.

    Raises:
        UserError: If they can't be loaded.
    """
    folder = MODEL_DIR
    if base != POCKET:
        folder = find_folder(base, revision, local_files_only, weights=False)
        if adapter := adapter_in(base, folder):
            return load_processor(*adapter, local_files_only)
    try:
        tokenizer = WhisperTokenizer.from_pretrained(folder)
        extractor = WhisperFeatureExtractor.from_pretrained(folder)
        return tokenizer, extractor, WhisperConfig.from_pretrained(folder).max_target_positions
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"base model '{base}' can't be loaded ({reason}); "
            "give 'pocket', a folder with a Whisper checkpoint, or a Hub id within reach"
        ) from None


@dataclass(frozen=True)
class _Recording:
    """What was heard in a row: seconds of it and its header if its file can be read."""

    seconds: float | None
    header: AudioHeader | None
    content: str | None
    error: str | None


def _check_set(
    source: Source,
    split: str,
    encoder: Encoder,
    window: float,
    known: "_Known",
    on_progress: Callable[[str, int, int], object],
) -> SetCheck:
    described = describe_source(source)
    label = f"{described} {split}".strip()
    bad: list[BadRow] = []
    dataset = load_split(source, split or "train", bad.append)
    findings = [Finding("row", error.origin, error.reason) for error in bad]
    recordings: list[_Recording] = []
    languages: Counter[str] = Counter()
    for row, recording in _hear(dataset, window, partial(on_progress, label)):
        recordings.append(recording)
        languages[_language(row, encoder)] += 1
        problems = [*_look(row, recording, encoder, split), *known.look(label, row, recording)]
        findings += [Finding(kind, row["origin"], message) for kind, message in problems]
    findings += _spell(dataset, encoder.tokenizer)
    lengths = [one.seconds for one in recordings if one.seconds is not None]
    headers = [one.header for one in recordings if one.header]
    return SetCheck(
        described,
        split,
        len(dataset) + len(bad),
        sum(lengths) / 3600,
        {"min": min(lengths), "median": median(lengths), "max": max(lengths)} if lengths else None,
        _counts(header.sampling_rate for header in headers),
        _counts(header.channels for header in headers),
        _counts(languages.elements()),
        findings,
    )


def _hear(
    dataset: Dataset, window: float, on_progress: Callable[[int, int], object]
) -> Iterator[tuple[dict[str, Any], _Recording]]:
    """Yield every row and what is heard in it."""
    listen = partial(_listen, window=window, digests=Digests())
    with ThreadPoolExecutor(usable_cores()) as pool:
        for first in range(0, len(dataset), CHUNK):
            chunk = [dataset[row] for row in range(first, min(first + CHUNK, len(dataset)))]
            yield from zip(chunk, pool.map(listen, chunk), strict=True)
            on_progress(first + len(chunk), len(dataset))


def _listen(row: Mapping[str, Any], window: float, digests: Digests) -> _Recording:
    audio, start, end = row["audio"] or {}, row["start"], row["end"]
    digest, header, seconds = digests.of(audio), None, None
    content = None if digest is None else f"{digest} {start} {end}"
    try:
        header = read_header(audio)
        seconds = min(end or header.seconds, header.seconds) - (start or 0.0)
        wave = read_audio(audio, start=start, end=end, max_seconds=window)
        return _Recording(len(wave) / SAMPLING_RATE, header, content, None)
    except UserError as error:
        seconds = seconds if seconds is not None and seconds > 0 else None
        return _Recording(seconds, header, content, str(error))


def _look(
    row: Mapping[str, Any], recording: _Recording, encoder: Encoder, split: str
) -> Iterator[tuple[str, str]]:
    """Yield the kinds of what is wrong with a row for itself, and the messages."""
    if recording.error:
        yield "audio", recording.error
    try:
        encoder.encode(row["text"], row["language"])
    except UserError as error:
        yield "transcript", str(error)
    if not row["text"].strip():
        yield "empty text", "it will be learned that nothing is said"
    try:
        check_tags(row["text"], row["word_languages"])
    except UserError as error:
        yield ("tags" if split == "train" else "word_languages"), str(error)
    said, found = row["duration"], recording.seconds
    if said is not None and found is not None and abs(said - found) > TOLERANCE:
        yield "duration", f"duration is {said:.2f} s, the audio lasts {found:.2f} s"


def _language(row: Mapping[str, Any], encoder: Encoder) -> str:
    """The language of a row by its code; as it is given, if that can't be said."""
    given = row["language"] or encoder.language or ""
    try:
        return language_code(given)
    except UserError:
        return given


class _Known:
    """The audio and the texts of all rows so far: the first row with each in every set."""

    def __init__(self) -> None:
        self.audio: dict[str, dict[str, str]] = {}  # origin by set
        self.texts: dict[str, dict[str, str]] = {}

    def look(
        self, label: str, row: Mapping[str, Any], recording: _Recording
    ) -> Iterator[tuple[str, str]]:
        """Yield what there was before, as `_look` does; know this row from now on."""
        if recording.content:
            places = self.audio.setdefault(recording.content, {})
            if label in places:
                yield "repeated", f"the same audio as {places[label]}"
            elif places:
                yield "shared audio", f"the same audio as {next(iter(places.values()))}"
            places.setdefault(label, row["origin"])
        if text := row["text"].strip():
            places = self.texts.setdefault(text, {})
            if places and label not in places:
                yield "shared text", f"{text[:40]!r} as {next(iter(places.values()))}"
            places.setdefault(label, row["origin"])


def _spell(dataset: Dataset, tokenizer: WhisperTokenizer) -> Iterator[Finding]:
    """Yield the characters that the tokenizer has no token for."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for text, origin in zip(dataset["text"], dataset["origin"], strict=True):
        chars = {char for char in text if not char.isspace()}
        counts.update(chars)
        for char in sorted(chars - first.keys()):
            first[char] = origin
    for char, origin in first.items():
        message = f"{char!r} (U+{ord(char):04X}), rows: {counts[char]}"
        if tokenizer.decode(text_ids(tokenizer, char)) != f" {char}":
            yield Finding("characters", origin, message)
            continue
        tokens = tokenizer.encode(char, add_special_tokens=False, split_special_tokens=True)
        if 1 < len(char.encode()) <= len(tokens):
            yield Finding("bytes", origin, message)


def _counts(values: Iterable[Any]) -> dict[Any, int]:
    """How often each comes, the most frequent first."""
    return dict(Counter(values).most_common())
