"""What is worth knowing of rows that a fit takes: what `data check` shows, and a fit tells."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from transformers import WhisperTokenizer

from blora_pyro.data import Heard, Suppressed, text_ids
from blora_pyro.errors import UserError
from blora_pyro.metrics import check_tags

NOTES = {  # the gravest first
    "empty text": "empty text",
    "missing": "text that may stand for a missing value",
    "characters": "characters that the tokenizer can't spell",
    "suppressed": "tokens that the base suppresses; a fit allows those of its training texts",
    "no token": "languages that the base has no token for, and that a fit chooses one for",
    "clipped": "audio that is clipped",
    "silent": "audio that is silent",
    "duration": "a stated duration that is wrong",
    "tags": "words and word_languages differ in number",
    "repeated": "audio that an earlier row has, too",
    "shared audio": "audio that is in another set too",
    "shared text": "text that is in another set too",
    "bytes": "characters that the tokenizer spells byte by byte",
}

# What other programs write where there is no value; some are words, too.
MISSING = {"nan", "NaN", "None", "null", "NULL", "N/A", "n/a", "#N/A", "<NA>"}

Note = tuple[str, str, str]  # a kind of `NOTES`, the row's origin, and a message


class RowNotes:
    """Looks at rows, set by set, and remembers them in 200 bytes each."""

    def __init__(self) -> None:
        """Start without rows."""
        self._audio: dict[int, tuple[int, int]] = {}  # place of the first row by hash
        self._texts: dict[int, tuple[int, int]] = {}
        self._files: dict[tuple[str, str], int] = {}  # sets and origins without their numbers

    def of(
        self,
        label: str,
        origin: str,
        text: str,
        word_languages: Sequence[str],
        heard: Heard | None,
        scored: bool,
        remembered: bool = True,
    ) -> Iterator[Note]:
        """Yield what is worth knowing of a row.

        Args:
            label: the set's name.
            origin: the row's.
            text: its transcript.
            word_languages: languages of its words.
            heard: what is known of its audio; None is nothing.
            scored: whether the set is scored, so that other checks refuse bad `word_languages`.
            remembered: whether later rows are compared with this one.
        """
        if not (stripped := text.strip()):
            yield "empty text", origin, "the fit will learn that nothing is said"
        if stripped in MISSING:
            yield "missing", origin, f"the text is {stripped!r}"
        if word_languages and not scored:
            try:
                check_tags(text, word_languages)
            except UserError as error:
                yield "tags", origin, str(error)
        if heard is not None:
            yield from ((kind, origin, message) for kind, message in heard.notes)
            same, earlier = self._earlier(self._audio, heard.content, label, origin, remembered)
            if earlier:
                yield (
                    ("repeated" if same else "shared audio"),
                    origin,
                    f"the same audio as {earlier}",
                )
        if stripped:
            same, earlier = self._earlier(self._texts, stripped, label, origin, remembered)
            if earlier and not same:
                yield "shared text", origin, f"{stripped[:40]!r} as {earlier}"

    def _earlier(
        self,
        seen: dict[int, tuple[int, int]],
        what: str,
        label: str,
        origin: str,
        remembered: bool,
    ) -> tuple[bool, str]:
        """Return whether the first row that had it is of this set, and its origin; "" is none."""
        if not remembered and hash(what) not in seen:
            return True, ""
        start, _, number = origin.rpartition(" ")
        if not number.isdecimal():
            start, number = origin, "-1"
        place = self._files.setdefault((label, start), len(self._files)), int(number)
        first = seen.setdefault(hash(what), place)
        if first is place:
            return True, ""
        its_label, its_start = [*self._files][first[0]]
        return its_label == label, its_start if first[1] < 0 else f"{its_start} {first[1]}"


class Characters:
    """The characters of texts, each with its number of rows and the first of them."""

    def __init__(self) -> None:
        """Start without texts."""
        self._rows: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, text: str, origin: str) -> None:
        """Add a row's text."""
        chars = {*"".join(text.split())}
        self._rows.update(chars)
        for char in chars - self._first.keys():
            self._first[char] = origin

    def notes(self, tokenizer: WhisperTokenizer) -> Iterator[Note]:
        """Yield the characters that the tokenizer has no token for."""
        for char in sorted(self._first):
            origin, message = self._first[char], f"{char!r} (U+{ord(char):04X}), "
            message += f"rows: {self._rows[char]:,}"
            if tokenizer.decode(text_ids(tokenizer, char)) != f" {char}":
                yield "characters", origin, message
                continue
            tokens = tokenizer.encode(char, add_special_tokens=False, split_special_tokens=True)
            if 1 < len(char.encode()) <= len(tokens):
                yield "bytes", origin, message


def suppressed_notes(
    tokenizer: WhisperTokenizer, suppressed: Suppressed, origin: str, target: Sequence[int]
) -> Iterator[Note]:
    """Yield a note if a row's target holds tokens that its base's `generate` never says."""
    if tokens := suppressed.of_target(target):
        texts = dict.fromkeys(tokenizer.decode([token]) for token in tokens)
        yield "suppressed", origin, ", ".join(map(repr, texts))


class Told:
    """Notes on sets that are to be told in one line: their numbers, and the first of them."""

    def __init__(self) -> None:
        """Start without notes."""
        self._counts: Counter[tuple[str, str]] = Counter()
        self._first: dict[str, Note] = {}  # by kind

    def add(self, label: str, notes: Iterable[Note]) -> None:
        """Add notes on the set of this name."""
        for note in notes:
            self._counts[label, note[0]] += 1
            self._first.setdefault(note[0], note)

    def line(self) -> str:
        """Return what has been added since the last line; "" if there is nothing."""
        counts, first = self._counts, self._first
        if not first:
            return ""
        self._counts, self._first = Counter(), {}
        kinds = sorted(first, key=[*NOTES].index)
        parts = [
            f"{NOTES[kind]}: "
            + ", ".join(
                f"{count:,} of {name}" for (name, one), count in counts.items() if one == kind
            )
            for kind in kinds
        ]
        _, origin, message = first[kinds[0]]
        return (
            f"rows worth a look: {'; '.join(parts)}; the first: {origin}: {message} "
            "(blora-pyro data check shows more)"
        )
