"""Reading the sets of a fit: language and task of every row, and the bad rows left out."""

import copy
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from datasets import Dataset
from transformers import WhisperTokenizer

from blora_pyro.data import (
    BadRow,
    EncodedRow,
    Encoder,
    Examples,
    Heard,
    OnBadRow,
    OnNote,
    Stream,
    Suppressed,
    all_bad,
    load_mixture,
    prompt_ids,
    stream_split,
)
from blora_pyro.data.rows import good_rows, to_dataset
from blora_pyro.diagnostics.row_notes import Characters, RowNotes, Told, suppressed_notes
from blora_pyro.errors import UserError
from blora_pyro.languages import language_code
from blora_pyro.metrics import check_tags
from blora_pyro.models import Base, map_languages
from blora_pyro.options import AUTO, BUILT_IN, SHUFFLE_BUFFER, FitConfig, column_names
from blora_pyro.runs.language_maps import (
    choose_token,
    languages_of,
    missing_languages,
    used_tokens,
)
from blora_pyro.sources import Source, as_sources, describe_source

LOOKED_AT = 64  # rows of a stream, for their languages
EVAL_SEED = 0  # of the utterances that are scored, if not all are

OnSetProgress = Callable[[str, int, int], object]  # a set's name, utterances done, of how many


@dataclass(frozen=True)
class SkippedRow:
    """A bad row that was left out.

    Attributes:
        source: Its source, as `FitConfig` names it.
        split: Split of the source.
        origin: Where in the split it is, such as "train.csv, line 3".
        reason: What is wrong with it.
    """

    source: str
    split: str
    origin: str
    reason: str


class Loader:
    """Reads the sets of one fit for its base, and collects the rows that it leaves out.

    Attributes:
        skipped: The rows that were left out so far.
    """

    def __init__(
        self,
        base: Base,
        config: FitConfig,
        on_progress: OnSetProgress = lambda name, done, total: None,
        on_note: OnNote = lambda note: None,
    ) -> None:
        """Check the language; nothing is read yet.

        Args:
            base: Model whose tokenizer and feature extractor are used.
            config: Options with language, task and what to do at a bad row.
            on_progress: Called as utterances are featurised.
            on_note: Called with notes, in one line each.

        Raises:
            UserError: If the base does not know the configuration's language.
        """
        code = language_code(config.language or "")
        if code and not (config.language_map == AUTO and missing_languages(base, [code])):
            prompt_ids(base.tokenizer, code, config.task, base.language_map)
        self.base, self.config, self.columns = base, config, column_names(config.column)
        self.on_progress = on_progress
        self.on_note = functools.cache(on_note)  # every set says the same of the cache
        self.skipped: list[SkippedRow] = []
        self._suppressed = Suppressed.of(base.net.generation_config)
        self._notes, self._told, self._looked_at = RowNotes(), Told(), set[str]()
        self._streamed: tuple[str, Characters] | None = None  # those since they were told
        self._reported = 0

    def load(
        self,
        source: Source | Sequence[Source],
        split: str,
        language: str | None = None,
        limit: int | None = None,
    ) -> Examples:
        """Return a split of one or more sources, featurised and tokenised.

        Args:
            source: One or more, mixed.
            split: Split of all of them.
            language: Language of rows that name none; None is that of the configuration.
            limit: Number of rows of the first source; None is all. Training data are drawn by the
                configuration's seed, what is scored by one that is always the same.

        Raises:
            UserError: See `load_mixture` and `Examples`.
        """
        sources = [describe_source(one) for one in as_sources(source)]
        on_bad = self._on_bad(sources, split)
        seed = self.config.seed if split == "train" else EVAL_SEED
        dataset = load_mixture(source, split, on_bad, limit, seed, self.columns)
        if split != "train":  # which is not scored
            dataset = without_bad_tags(dataset, on_bad)
        self._map_languages(dataset, language or self.config.language)
        self._check_languages(dataset, language or self.config.language)
        examples = Examples(
            dataset,
            self.base.feature_extractor,
            self.base.tokenizer,
            self.config.task,
            self.base.net.config.max_target_positions,
            language=language or self.config.language,
            suppressed=Suppressed.of(self.base.net.generation_config),
            language_map=self.base.language_map,
            trim=self.config.trim_audio,
            on_bad=on_bad,
            on_progress=functools.partial(self.on_progress, f"{', '.join(sources)} {split}"),
            on_note=self.on_note,
        )
        self._look_at(sources, split, examples)
        return examples

    def count(self, source: Source | Sequence[Source], split: str, limit: int | None = None) -> int:
        """Return the number of rows that `load` reads; it may leave out some whose audio is bad.

        Raises:
            UserError: See `load_mixture`.
        """
        on_bad = self._on_bad([describe_source(one) for one in as_sources(source)], split)
        return len(load_mixture(source, split, on_bad, limit, columns=self.columns))

    def _check_languages(self, dataset: Dataset, default: str | None) -> None:
        """Refuse a language that can't be prompted once for all its rows, if none is to be skipped.

        Raises:
            BadRow: Naming the first.
        """
        if self.config.on_bad_row != "stop":
            return
        tokenizer, spoken = self.base.tokenizer, dataset["language"][:]
        known = self.base.language_map
        encoder = Encoder(tokenizer, default, self.config.task, language_map=known)
        for text, count in Counter(spoken).items():
            try:
                encoder.encode("", text)
            except UserError as error:
                first = dataset[spoken.index(text)]["origin"]
                more = f" and {count - 1:,} more rows" if count > 1 else ""
                raise BadRow(f"{first}{more}", str(error)) from None

    def _map_languages(
        self, dataset: Dataset, default: str | None, rows: Dataset | None = None
    ) -> None:
        """Have the base prompt what it has no token for as the training data say.

        Args:
            dataset: Rows that are to be prompted.
            default: Language of rows that name none.
            rows: Training data; None reads them, all, so that seed and limit change no choice.
        """
        config = self.config
        if config.language_map != AUTO:
            return
        if not (missing := missing_languages(self.base, languages_of(dataset, default))):
            return
        if rows is None:
            rows = dataset
            with suppress(UserError):  # nothing to train with
                rows = load_mixture(
                    config.sources, "train", lambda error: None, columns=self.columns
                )
        spoken = {code for one in languages_of(rows, default) for code in one.split("-")}
        used = used_tokens(self.base, config, rows, default)
        for code in missing:
            if code in spoken:
                choice = choose_token(self.base, code, rows, used, config.task, default)
                map_languages(self.base.net, {code: choice.token})
                used.add(choice.token)
                self.on_note(str(choice))

    def _look_at(self, sources: Sequence[str], split: str, examples: Examples) -> None:
        """Keep what is worth knowing of a user's set, unless it has been looked at before."""
        label = f"{', '.join(sources)} {split}"
        if label in self._looked_at or {*sources} <= BUILT_IN:
            return
        self._looked_at.add(label)
        characters, is_train = Characters(), split == "train"
        columns = (examples.origins, examples.texts, examples.word_languages, examples.heard or [])
        rows = zip(*columns, examples.targets, strict=True)
        for origin, text, tags, heard, target in rows:
            characters.add(text, origin)
            self._told.add(label, self._notes.of(label, origin, text, tags, heard, not is_train))
            if not is_train:  # of which a fit tells more
                about = self.base.tokenizer, self._suppressed, origin, target
                self._told.add(label, suppressed_notes(*about))
        self._told.add(label, characters.notes(self.base.tokenizer))

    def _look_at_streamed(
        self, label: str, tokenizer: WhisperTokenizer, row: EncodedRow, heard: Heard
    ) -> None:
        """Keep what is worth knowing of a row, in another thread; nothing grows by it."""
        if self._streamed is None:
            self._streamed = label, Characters()
        self._streamed[1].add(row.text, row.origin)
        about = row.origin, row.text, row.word_languages, heard
        self._told.add(label, self._notes.of(label, *about, scored=False, remembered=False))
        notes = suppressed_notes(tokenizer, self._suppressed, row.origin, row.target)
        self._told.add(label, notes)

    def stream(self, source: Source, on_skipped: Callable[[SkippedRow], object]) -> Stream:
        """Return the train split of a source, read, featurised and tokenised as it is drawn.

        Args:
            source: See `data.splits.stream_split`.
            on_skipped: Called once with every row that is left out, from another thread.

        Raises:
            UserError: See `stream_split` and `Stream`.
        """
        if self.config.language_map == AUTO:
            rows = stream_split(source, "train", self.columns)
            first = good_rows(
                ((rows.name, one) for one in islice(rows.records, LOOKED_AT)),
                rows.parse,
                lambda error: None,
            )
            sample = to_dataset(first)
            self._map_languages(sample, self.config.language, sample)
        label = f"{describe_source(source)} train"
        tokenizer = copy.deepcopy(self.base.tokenizer)  # can't be used by two threads at once
        return Stream(
            stream_split(source, "train", self.columns),
            self.base.feature_extractor,
            self.base.tokenizer,
            self.config.task,
            self.base.net.config.max_target_positions,
            language=self.config.language,
            suppressed=Suppressed.of(self.base.net.generation_config),
            language_map=self.base.language_map,
            buffer=self.config.shuffle_buffer or SHUFFLE_BUFFER,
            seed=self.config.seed,
            trim=self.config.trim_audio,
            on_bad=self._on_bad([describe_source(source)], "train", on_skipped),
            on_row=functools.partial(self._look_at_streamed, label, tokenizer),
        )

    def _on_bad(
        self,
        sources: Sequence[str],
        split: str,
        on_skipped: Callable[[SkippedRow], object] = lambda row: None,
    ) -> OnBadRow:
        known: set[SkippedRow] = set()

        def on_bad(error: BadRow) -> None:
            if self.config.on_bad_row == "stop":
                raise error
            row = SkippedRow(sources[error.source], split, error.origin, error.reason)
            if row not in known:  # a stream has it again in every epoch
                known.add(row)
                self.skipped.append(row)
                on_skipped(row)

        return on_bad

    def report_skipped(self, where: str = "") -> None:
        """Note in one line which rows were left out, if there are new ones, listed in `where`.

        In another, what is worth knowing of the others that were read since the last time.
        """
        if len(self.skipped) > self._reported:
            self._report_skipped(where)
        if self._streamed is not None:
            label, characters = self._streamed
            self._told.add(label, characters.notes(self.base.tokenizer))
            self._streamed = None
        if line := self._told.line():
            self.on_note(line)

    def _report_skipped(self, where: str) -> None:
        self._reported = len(self.skipped)
        counts = Counter(f"{row.source} {row.split}" for row in self.skipped)
        sets = ", ".join(f"{count} of {name}" for name, count in counts.items())
        first = self.skipped[0]
        listed = f", listed in {where}" if where else ""
        self.on_note(
            f"bad rows left out: {sets}{listed}; the first: {first.origin}: {first.reason}"
        )


def without_bad_tags(dataset: Dataset, on_bad: OnBadRow) -> Dataset:
    """Return the rows whose words match their languages in number, as their scoring needs.

    Raises:
        UserError: By `on_bad`, or if none is left.
    """
    rows = dataset.select_columns(["text", "word_languages", "origin", "source"])
    good, bad = [], []
    for number, row in enumerate(rows):
        try:
            check_tags(row["text"], row["word_languages"])
        except UserError as error:
            bad.append(BadRow(row["origin"], str(error), row["source"]))
            on_bad(bad[-1])
        else:
            good.append(number)
    if bad and not good:
        raise UserError(all_bad(bad))
    return dataset if len(good) == len(dataset) else dataset.select(good)


def load_examples(
    base: Base,
    source: Source | Sequence[Source],
    split: str,
    *,
    language: str | None = None,
    task: str = "transcribe",
    on_bad_row: Literal["stop", "skip"] = "stop",
) -> Examples:
    """Return a split of one or more sources, featurised and tokenised for `base`.

    Args:
        base: Model whose tokenizer and feature extractor are used.
        source: One or more, mixed.
        split: Split of all of them.
        language: See `FitConfig`.
        task: See `FitConfig`.
        on_bad_row: See `FitConfig`.

    Raises:
        UserError: See `Loader.load` and `FitConfig`.
    """
    config = FitConfig(base=base.name, language=language, task=task, on_bad_row=on_bad_row)
    return Loader(base, config).load(source, split)
