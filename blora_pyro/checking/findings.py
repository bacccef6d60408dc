"""What is found in data: of what kinds, in which rows, and whether a fit would refuse it."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

# What a fit refuses, then what it does not.
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
    "duration": "another duration than is said",
    "tags": "words and word_languages differ in number",
    "repeated": "audio that was there already",
    "shared audio": "audio that is in another set too",
    "shared text": "text that is in another set too",
}


@dataclass(frozen=True)
class Finding:
    """Something about a row, or about a character.

    Attributes:
        kind: One of `REFUSED` or `NOTES`.
        origin: Where, such as "train.csv, line 3"; of a character, where it is met first.
        message: What.
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
    """What was found in a split of a source.

    Attributes:
        source: As it was given.
        split: "" where the source has no splits.
        rows: How many, the bad ones among them.
        hours: Length of all recordings whose file can be read; of segments, where rows are such.
        seconds: The shortest, the median and the longest of them; None without any.
        sampling_rates: Number of rows by rate, in Hz.
        channels: Number of rows by number of channels.
        languages: Number of rows by language, as a prompt has it.
        findings: In the order of the rows.
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
        """Number of findings by kind, in the order of the kinds, those without any left out."""
        counts = Counter(one.kind for one in self.findings)
        return {kind: counts[kind] for kind in kinds if counts[kind]}


@dataclass(frozen=True)
class DataCheck:
    """What was found in all sets.

    Attributes:
        base: Whose tokenizer and window they were held against.
        window: The longest audio that it hears, in seconds.
        sets: In the order of the sources.
    """

    base: str
    window: float
    sets: list[SetCheck]

    @property
    def refused(self) -> bool:
        """Whether a fit would stop at a row of them."""
        return any(one.count(REFUSED) for one in self.sets)

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        sets = [
            {**asdict(one), "refused": one.count(REFUSED), "notes": one.count(NOTES)}
            for one in self.sets
        ]
        return {"refused": self.refused, "base": self.base, "window": self.window, "sets": sets}
