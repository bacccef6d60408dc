"""What hearing short windows costs in error, and a fit with `--trim-audio`, on the pocket Whisper.

    python experiments/trimmed_audio.py

Its window of 3 s leaves little to cut: so utterances are transcribed one by one, too, and without
the half second of silence that `trim` leaves. `fit` has small batches for the same reason.
"""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from records import ROOT, origin

from blora_pyro import FitConfig, fit, load_base
from blora_pyro.data import DOMAINS, LANGUAGES, Examples, features, trim
from blora_pyro.evaluation import Evaluation, change_summary, normalizer_for, rate_summary, score
from blora_pyro.files import write_json
from blora_pyro.models import Base
from blora_pyro.runs.loading import Loader
from blora_pyro.tables import Percent, Table, figure_columns, text_columns
from blora_pyro.transcription import transcribe_features

FULL = "full windows"
# Frames that are left after an utterance, None for all; utterances that are transcribed together.
WAYS: dict[str, tuple[int | None, int]] = {
    FULL: (None, 64),
    "batches of 64": (features.MARGIN, 64),
    "one by one": (features.MARGIN, 1),
    "one by one, no margin": (0, 1),
}


def main() -> None:
    """Score the base in every way, and fits to full and to trimmed windows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few utterances, two steps")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    folder = ROOT / "experiments" / "trimmed_audio"
    parser.add_argument("--output", type=Path, default=folder / "errors.json", help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base, limit = load_base("pocket"), 8 if arguments.quick else None
    names = ("de",) if arguments.quick else (*LANGUAGES, *DOMAINS)
    sets = {name: Loader(base, FitConfig()).load(name, "test", limit=limit) for name in names}
    scores = {name: base_errors(base, examples) for name, examples in sets.items()}
    table = Table([*text_columns("pocket, test set"), *figure_columns("frames left", *WAYS)])
    for name, one in scores.items():
        left = f"{100 * one['frames_left']:.0f}%"
        table.add_row(name, left, *(Percent.of(one["ways"][way]) for way in WAYS))
    print(table.to_markdown())
    fits = {}
    for name, is_trimmed in ((FULL, False), ("trimmed", True)):
        config = FitConfig(steps=2 if limit else 400, batch_size=4, trim_audio=is_trimmed)
        posterior = fit(config, evaluate=False).posterior
        with posterior.applied(base.net):
            fits[name] = adapted_errors(base, sets)
        for way, found in fits[name].items():
            cells = [f"{part} {Percent.of(rate)}" for part, rate in found.items()]
            print(f"fitted to {name}, scored in {way}: {', '.join(cells)}")
    write_json(arguments.output, {**origin(), "base": scores, "fits": fits})


def base_errors(base: Base, examples: Examples) -> dict[str, Any]:
    """Return rates and paired changes of one set, and the share of frames that is left of it."""
    found = {way: errors(base, examples, way) for way in WAYS}
    ways = {
        way: {**rate_summary([one]), "change": change_summary([found[FULL]], [one])}
        for way, one in found.items()
    }
    rows = (examples.features[[i]] for i in range(len(examples)))
    left = sum(trim(one).shape[-1] for one in rows) / len(examples)
    return {"ways": ways, "frames_left": left / examples.features.shape[-1]}


def adapted_errors(base: Base, sets: Mapping[str, Examples]) -> dict[str, Any]:
    """Return the rates of de-en, if it is there, and of the monolingual sets, in two ways."""
    found: dict[str, Any] = {}
    for way in (FULL, "one by one"):
        scored = {name: errors(base, one, way) for name, one in sets.items()}
        backward = [one for name, one in scored.items() if name in LANGUAGES]
        found[way] = {"backward": rate_summary(backward)}
        if "de-en" in scored:
            found[way]["de-en"] = rate_summary([scored["de-en"]])
    return found


def errors(base: Base, examples: Examples, way: str) -> Evaluation:
    """Return the scores of a set, transcribed in one of `WAYS`."""
    margin, together = WAYS[way]
    with margin_of(margin or 0):
        texts: list[str] = []
        for start in range(0, len(examples), together):
            rows = slice(start, start + together)
            heard = examples.features[rows]
            heard = heard if margin is None else trim(heard)
            texts += transcribe_features(base, heard, examples.prompts[rows])
    return score(examples, texts, normalizer_for(base, "whisper"))


@contextmanager
def margin_of(frames: int) -> Iterator[None]:
    """Let `trim` leave so many frames in the `with`."""
    before = features.MARGIN
    try:
        features.MARGIN = frames
        yield
    finally:
        features.MARGIN = before


if __name__ == "__main__":
    main()
