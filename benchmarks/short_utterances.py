"""Short utterances in long windows: what `--cache-encoder` and `--trim-audio` save, and cost.

    python benchmarks/short_utterances.py

Time: a step of ours, its batch made anew, on random weights in the shape of whisper-tiny and noise
of 3 to 5 s in windows of 30 s; `cached` is a step of every pass over the data but the first. The
error is that of the pocket Whisper, whose window of 3 s leaves little to cut: so utterances are
heard one by one, too, and without the half second of silence that `trim` leaves. `fit` has small
batches for the same reason.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from common import Results, compared, interleaved, parse, parser, print_table, shown
from contestants import Ours, geometry, random_batch, random_net

from blora_pyro import fit, load_base
from blora_pyro.data import DOMAINS, LANGUAGES, Batch, Examples, features, trim
from blora_pyro.evaluation import (
    Evaluation,
    change_summary,
    normalizer_for,
    rate_summary,
    score,
)
from blora_pyro.fitting.encoder_cache import EncoderCache
from blora_pyro.models import Base
from blora_pyro.options import FitConfig
from blora_pyro.runs.loading import Loader
from blora_pyro.transcription import transcribe_features

RANK, BATCH_SIZE, ROUNDS, SECONDS = 8, 4, 10, (3, 5)
TARGETS = {
    "all-linear": "all-linear",
    "last layer of the encoder, decoder": r".*(encoder\.layers\.3|decoder)\..*",
    "decoder": r".*decoder\..*",
}
FULL, TRIMMED, CACHED = "full windows", "trimmed", "cached"
# Frames that are left after an utterance, None for all; utterances that are heard together.
WAYS: dict[str, tuple[int | None, int]] = {
    FULL: (None, 64),
    "batches of 64": (features.MARGIN, 64),
    "one by one": (features.MARGIN, 1),
    "one by one, no margin": (0, 1),
}
FIT = {"data": "de-en", "steps": 400, "batch_size": 4}


def main() -> None:
    """Three tables."""
    found = parser(__doc__)
    found.add_argument("--parts", default="time,base,fit")
    arguments = parse(found)
    settings = {"rank": RANK, "batch_size": BATCH_SIZE, "rounds": ROUNDS, "fit": FIT}
    results = Results(arguments, **settings, ways=WAYS)
    tables = {"time": time_table, "base": base_table, "fit": fit_table}
    for part in arguments.parts.split(","):
        tables[part](results, arguments.quick)


def time_table(results: Results, quick: bool) -> None:
    """Seconds of a step, by the layers that are adapted."""
    rows = []
    for name, targets in list(TARGETS.items())[-1 if quick else 0 :]:
        measure = partial(steps, targets, 2 if quick else ROUNDS)
        case = results.case(f"time, {name}", measure)
        ratios = [shown(case[one]["ratio"]) if one in case else "" for one in (CACHED, TRIMMED)]
        rows.append((name, shown(case[FULL]["seconds"]), *ratios))
    print_table(("adapted", f"{FULL}, s", f"{CACHED} / that", f"{TRIMMED} / that"), rows)


def steps(targets: str, rounds: int) -> dict[str, Any]:
    """Seconds and ratios, with the making of the batch."""
    net = random_net(geometry("tiny"))
    batch = random_batch(net.config, BATCH_SIZE)
    features = batch.input_features.half()
    for row, length in enumerate(torch.linspace(*SECONDS, BATCH_SIZE).tolist()):
        features[row, :, round(100 * length) :] = features.min()
    heard: dict[str, Callable[[], Batch]] = {
        FULL: lambda: replace(batch, input_features=features.float()),
        TRIMMED: lambda: replace(batch, input_features=trim(features).float()),
    }
    torch.manual_seed(1)
    those = {name: Ours(net, RANK, targets, False) for name in (*heard, CACHED)}
    if those[CACHED].model.likelihood.first_adapted:
        cache = EncoderCache(those[CACHED].model, BATCH_SIZE)
        heard[CACHED] = lambda: cache(heard[FULL](), range(BATCH_SIZE), 0)
    calls = {name: lambda n=name: those[n].step(heard[n]()) for name in heard}
    around = lambda name: those[name].store_in_place()  # noqa: E731
    return compared(interleaved(calls, rounds, warm_up=1, around=around), FULL)


def base_table(results: Results, quick: bool) -> None:
    """Error of the pocket Whisper on its test sets."""
    base, rows = load_base("pocket"), []
    for name in ("de",) if quick else (*LANGUAGES, *DOMAINS):
        case = results.case(f"base, {name}", partial(base_errors, base, name, quick))
        cells = [percent(case["ways"][way]) for way in WAYS]
        rows.append((name, f"{100 * case['frames_left']:.0f}%", *cells))
    print_table(("pocket, test set", "frames left, one by one", *WAYS), rows)


def base_errors(base: Base, name: str, quick: bool) -> dict[str, Any]:
    """Rates and paired changes of one set, and the share of frames that is left of it."""
    examples = load(base, name, quick)
    heard = {way: errors(base, examples, way) for way in WAYS}
    ways = {
        way: {**rate_summary([one]), "change": change_summary([heard[FULL]], [one])}
        for way, one in heard.items()
    }
    rows = (examples.features[[i]] for i in range(len(examples)))
    left = sum(trim(one).shape[-1] for one in rows) / len(examples)
    return {"ways": ways, "frames_left": left / examples.features.shape[-1]}


def load(base: Base, name: str, quick: bool) -> Examples:
    """A test set, or a little of it."""
    return Loader(base, FitConfig()).load(name, "test", limit=8 if quick else None)


def errors(base: Base, examples: Examples, way: str) -> Evaluation:
    """What is heard of a set in one of `WAYS`, scored."""
    margin, together = WAYS[way]
    with margin_of(margin or 0):
        heard = replace(base, trim_audio=margin is not None)
        texts = transcribe_features(heard, examples.features, examples.prompts, together)
    return score(examples, texts, normalizer_for(base, "whisper"))


@contextmanager
def margin_of(frames: int) -> Iterator[None]:
    """`trim` leaves so many frames in here."""
    before = features.MARGIN
    try:
        features.MARGIN = frames
        yield
    finally:
        features.MARGIN = before


def fit_table(results: Results, quick: bool) -> None:
    """Fits to full windows and to trimmed ones, each heard in both."""
    rows = []
    for name, is_trimmed in ((FULL, False), (TRIMMED, True)):
        case = results.case(f"fit, {name}", partial(fit_errors, is_trimmed, quick))
        for way, found in case.items():
            rows.append((name, way, percent(found["new_domain"]), percent(found["backward"])))
    print_table(("fitted to", "heard in", "de-en", "backward average"), rows)


def fit_errors(is_trimmed: bool, quick: bool) -> dict[str, Any]:
    """Rates of the new domain and of the backward sets, heard in two ways."""
    options: dict[str, Any] = {**FIT, "steps": 2} if quick else FIT
    posterior = fit(FitConfig(**options, trim_audio=is_trimmed), evaluate=False).posterior
    base = load_base("pocket")
    names = ("de-en", *(LANGUAGES[:1] if quick else LANGUAGES))
    sets = [load(base, name, quick) for name in names]
    found = {}
    with posterior.applied(base.net):
        for way in (FULL, "one by one"):
            new, *backward = (errors(base, examples, way) for examples in sets)
            found[way] = {"new_domain": rate_summary([new]), "backward": rate_summary(backward)}
    return found


def percent(found: dict[str, Any]) -> str:
    """`rate [interval]`, and the change if there is one."""
    rate, (low, high) = found["rate"], found["interval"]
    text = f"{100 * rate:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    change = found.get("change", {"difference": 0})
    return f"{text}, {100 * change['difference']:+.1f}" if change["difference"] else text


if __name__ == "__main__":
    main()
