"""What an adapter may break beside the words: languages, translation, times, spelling, silence.

All of it is measured against the base, on the backward sets and on silence and noise that are made
here; nothing needs a transcript. `measure_beyond` says what.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import regex

from blora_pyro.data import SAMPLING_RATE, Examples, featurise, language_codes, prompt_ids
from blora_pyro.errors import UserError
from blora_pyro.languages import ENGLISH
from blora_pyro.metrics import Counts
from blora_pyro.metrics.bootstrap import (
    macro_bootstrap_interval,
    macro_rate,
    paired_macro_bootstrap,
)
from blora_pyro.models import Base
from blora_pyro.models.decoding import (
    alike_in_length,
    detect_languages,
    encode,
    timestamp_begin,
)
from blora_pyro.models.encoder_states import last_states
from blora_pyro.posterior import Posterior
from blora_pyro.runs.listeners import Listener, heard_by
from blora_pyro.transcription import transcribe_features
from blora_pyro.transcription.safeguards import decode_safely, hearings

MOST_UTTERANCES = 50  # of a backward set
NEAR = 0.2  # seconds between two timestamps that are alike
SECONDS = 10  # of silence or noise
LEVELS = (None, -60.0, -50.0, -40.0, -30.0, -20.0)  # dB below full scale, twice each; None is zeros
BATCH_SIZE = 16

Encoder = Callable[[Sequence[int]], Any]  # indices of utterances -> encoder states


@dataclass(frozen=True)
class _Heard:
    """What a net makes of one set; a value for each utterance, where it was asked.

    Attributes:
        languages: The language that it detects.
        texts: Its transcripts.
        ends: Its last timestamps, seconds; NaN where there is none.
        translations: Its translations to English.
    """

    languages: list[str]
    texts: list[str]
    ends: list[float]
    translations: list[str]


def measure_beyond(
    base: Base,
    sets: Mapping[str, Examples],
    posterior: Posterior,
    progress: Listener | None = None,
) -> dict[str, Any]:
    """Measure what a posterior's mean changes beside the words.

    Of every backward set up to 50 utterances, evenly spaced, are heard by the base and by the
    adapted base. Shares are fractions with 95% bootstrap intervals, averaged over the sets.

    Args:
        base: The base model.
        sets: Backward sets by name.
        posterior: Of one domain.
        progress: Listener to the stages; None is bars in a notebook.

    Returns:
        `language`: share of utterances whose language is detected wrongly (of rows in one
        language); `capital` and `punctuation`: share of transcripts that do not begin with a
        capital, or end without a punctuation mark (of scripts that have capitals); `silence`:
        share of windows of silence and noise in which words are found, each with `base`,
        `adapted` and `change`. `timestamps`: share of utterances whose last timestamp is more
        than 0.2 s from the base's, `adapted` alone. `translation`: chrF (Popović 2015, 0 to 100)
        of the adapted base's translations to English against the base's own, by set. What a base
        does not have (languages, tasks, timestamps) is left out.

    Raises:
        UserError: If there are no backward sets, or sacrebleu is not installed.
    """
    progress, score = heard_by(progress), _chrf()
    if not sets:
        raise UserError("beyond is given, and the run has no backward sets; give a run with some")
    chosen = {name: _evenly(len(one), MOST_UTTERANCES) for name, one in sets.items()}
    frozen = posterior.leaves_encoder(base.net)
    heard: list[dict[str, _Heard]] = []
    spoken: list[Counts] = []
    for what in ("base", "adapted"):
        shares = frozen or what == "base"
        found = {}
        with posterior.applied(base.net) if what == "adapted" else nullcontext():
            for name, examples in sets.items():
                progress.stage(f"beyond the words: {what} on {name}")
                found[name] = _hear(base, examples, chosen[name], shares)
            progress.stage(f"beyond the words: {what} on silence and noise")
            spoken.append(_silence(base))
        heard.append(found)
    before, after = heard
    report: dict[str, Any] = {"utterances": {name: len(rows) for name, rows in chosen.items()}}
    codes = {name: [one.languages[row] for row in chosen[name]] for name, one in sets.items()}
    questions = {
        "language": lambda name, one: [
            (found != code, True)
            for found, code in zip(one.languages, codes[name], strict=bool(one.languages))
            if "-" not in code and code not in base.language_map
        ],
        "capital": lambda name, one: [
            (not _begins_with_capital(text), bool(regex.search(r"\p{Lu}|\p{Ll}", text)))
            for text in one.texts
        ],
        "punctuation": lambda name, one: [
            (not regex.search(r"\p{P}\s*$", text), bool(text.strip())) for text in one.texts
        ],
    }
    for key, ask in questions.items():
        sides = [[_counts(ask(name, found[name])) for name in sets] for found in heard]
        report |= _compared(key, *sides)
    report |= _compared("silence", *([one] for one in spoken))
    moved = [
        _counts([(not abs(a - b) <= NEAR, True) for a, b in zip(one.ends, other.ends, strict=True)])
        for one, other in zip(before.values(), after.values(), strict=True)
    ]
    if any(len(one.edits) for one in moved):
        report["timestamps"] = {"adapted": _summary([one for one in moved if len(one.edits)])}
    translated = {
        name: score(after[name].translations, before[name].translations)
        for name in sets
        if before[name].translations
    }
    if translated:
        report["translation"] = translated
    return report


def _evenly(count: int, most: int) -> list[int]:
    return [*range(0, count, math.ceil(count / most))] if count else []


def _hear(base: Base, examples: Examples, rows: list[int], shares_encoder: bool) -> _Heard:
    def encoder(indices: Sequence[int]) -> Any:
        own = [rows[index] for index in indices]
        if shares_encoder:
            return last_states(base.net, examples.fingerprint, examples.features, own)
        return encode(base, examples.features[own])

    features = examples.features[rows]
    prompts = [examples.prompts[row] for row in rows]
    languages: list[str] = []
    knows_languages = bool(getattr(base.net.generation_config, "lang_to_id", None))
    for first in range(0, len(rows) if knows_languages else 0, BATCH_SIZE):
        indices = range(first, min(first + BATCH_SIZE, len(rows)))
        languages += detect_languages(base, encoder(indices))
    texts = transcribe_features(base, features, prompts, BATCH_SIZE, encoder)
    ends = _ends(base, features, prompts, encoder) if timestamp_begin(base) else []
    translations: list[str] = []
    if "translate" in (getattr(base.net.generation_config, "task_to_id", None) or {}):
        foreign = [i for i, row in enumerate(rows) if examples.languages[row] != ENGLISH.code]
        asked = [
            prompt_ids(base.tokenizer, examples.languages[rows[i]], "translate", base.language_map)
            for i in foreign
        ]
        translations = transcribe_features(
            base,
            features[foreign],
            asked,
            BATCH_SIZE,
            lambda indices: encoder([foreign[index] for index in indices]),
        )
    return _Heard(languages, texts, ends, translations)


def _ends(
    base: Base, features: Any, prompts: Sequence[Sequence[int]], encoder: Encoder
) -> list[float]:
    """Return the last timestamp of every utterance."""
    ends = [math.nan] * len(prompts)
    window = float(base.feature_extractor.chunk_length)
    for indices in alike_in_length(prompts, BATCH_SIZE):
        timed = [list(prompts[index])[:-1] for index in indices]  # without <|notimestamps|>
        known = hearings(base, features[indices])
        pieces = decode_safely(base, encoder(indices), timed, known, [window] * len(indices))
        for index, found in zip(indices, pieces, strict=True):
            ends[index] = found[-1].end if found else math.nan
    return ends


def _silence(base: Base) -> Counts:
    """Return in which of some windows of silence and noise a net finds words."""
    rng = np.random.default_rng(0)
    samples = min(SECONDS * SAMPLING_RATE, base.feature_extractor.n_samples)
    waves = []
    for level in LEVELS:
        for smooth in (1, 8):  # white noise, and some with less treble
            noise = rng.standard_normal(samples + smooth - 1)
            noise = np.convolve(noise, np.ones(smooth) / math.sqrt(smooth), "valid")
            gain = 0.0 if level is None else 10 ** (level / 20)
            waves.append((f"noise at {level} dB", (gain * noise).clip(-1, 1).astype(np.float32)))
    features = featurise(waves, base.feature_extractor)
    known = language_codes(base.tokenizer) or [ENGLISH.code]
    prompt = prompt_ids(base.tokenizer, ENGLISH.code if ENGLISH.code in known else known[0])
    texts = transcribe_features(base, features, [prompt] * len(waves), BATCH_SIZE)
    return _counts([(bool(text.strip()), True) for text in texts])


def _begins_with_capital(text: str) -> bool:
    letter = regex.search(r"\p{L}", text)
    return letter is not None and letter[0] != letter[0].lower()


def _counts(answers: Sequence[tuple[bool, bool]]) -> Counts:
    """Return (is so, counts) of every utterance as edits and lengths."""
    table = np.array([(so and counts, counts) for so, counts in answers], dtype=np.int64)
    return Counts(*table.reshape(-1, 2).T)


def _compared(key: str, before: Sequence[Counts], after: Sequence[Counts]) -> dict[str, Any]:
    """Return the share before and after, and the change; nothing if nothing counts."""
    both = zip(before, after, strict=True)
    pairs = [pair for pair in both if all(one.lengths.any() for one in pair)]
    if not pairs:
        return {}
    one, other = ([pair[side] for pair in pairs] for side in (0, 1))
    difference, low, high = paired_macro_bootstrap(one, other)
    change = {"difference": difference, "interval": [low, high]}
    return {key: {"base": _summary(one), "adapted": _summary(other), "change": change}}


def _summary(sets: Sequence[Counts]) -> dict[str, Any]:
    return {"rate": macro_rate(sets), "interval": [*macro_bootstrap_interval(sets)]}


def _chrf() -> Callable[[Sequence[str], Sequence[str]], float]:
    try:
        from sacrebleu.metrics import CHRF
    except ImportError:
        raise UserError(
            "beyond needs sacrebleu, which is not installed; pip install 'blora-pyro[beyond]'"
        ) from None
    return lambda texts, references: CHRF().corpus_score([*texts], [[*references]]).score
