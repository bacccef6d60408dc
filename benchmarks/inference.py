"""Transcribing: merged against the base, ours against transformers' pipeline, and posterior draws.

    python benchmarks/inference.py

The pocket Whisper, one monolingual test set, greedy. The posterior is one so near the base that the
transcripts are the same, so that all have the same number of tokens; that they are is
checked, and kept. The pipeline and `transcribe` are given samples, `evaluate` (as in `fit`) has the
features already. Draws: `transcribe --samples K`, and what it takes beyond `transcribe`, against K
times that of one.
"""

import argparse
import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from common import Results, compared, interleaved, parse, parser, print_table, shown, spread
from transformers import pipeline

from blora_pyro import Posterior, load_base
from blora_pyro.data import SAMPLING_RATE, load_split, read_audio
from blora_pyro.guides import with_prior_arguments
from blora_pyro.models import Base
from blora_pyro.options import FitConfig
from blora_pyro.posterior import Family
from blora_pyro.runs.loading import load_examples
from blora_pyro.runs.parts import build
from blora_pyro.transcription import Transcriber, transcribe_features
from blora_pyro.transcription.windows import Recording

LANGUAGE = "de"
NEAR = 1e-6  # standard deviation of B's mean
ROUNDS, BATCH_SIZE, DRAWS = 20, 16, (0, 1, 4, 16)

Texts = Callable[[], list[str]]


def main() -> None:
    """Print three tables."""
    found = parser(__doc__)
    found.add_argument("--utterances", type=int, default=96)
    arguments = parse(found)
    count = 16 if arguments.quick else arguments.utterances
    settings = {"utterances": count, "batch_size": BATCH_SIZE, "rounds": ROUNDS}
    results = Results(arguments, language=LANGUAGE, **settings)
    base = load_base("pocket")
    torch.manual_seed(0)
    posterior = near(base)
    rounds = 3 if arguments.quick else ROUNDS
    for case, peer in (("merged", "base"), ("pipeline", "transformers' pipeline")):
        contestants = {"merged": merged, "pipeline": pipelines}[case](base, posterior, count)
        figures = results.case(case, partial(timed, contestants, peer, rounds))
        rows = [
            (name, shown(one["seconds"], ".3f"), shown(one["ratio"]))
            for name, one in figures["contestants"].items()
        ]
        print_table((f"{case}: seconds for {count} utterances", "", f"{peer} = 1"), rows)
        print(f"transcripts equal: {figures['transcripts_equal']}")
    draws(arguments, results, base, posterior, count)


def near(base: Base) -> Posterior:
    """Return a posterior at the start of a fit, but with a B that is nearly zero."""
    config = with_prior_arguments(FitConfig()).resolved(1, 1)
    model, guide = build(base, config)
    posterior = Posterior.from_guide(base.name, model, guide, Family())
    model.adapters.remove()
    mean = {
        name: NEAR * torch.randn_like(one) if name.startswith("B") else one
        for name, one in posterior.mean.items()
    }
    return replace(posterior, mean=mean)


def timed(contestants: Mapping[str, Texts], peer: str, rounds: int) -> dict[str, Any]:
    """Return seconds and ratios, and whether all transcripts are the same."""
    said = [one() for one in contestants.values()]
    seconds = interleaved(contestants, rounds, warm_up=1)
    equal = all(one == said[0] for one in said) and any(said[0])
    return {"transcripts_equal": equal, "contestants": compared(seconds, peer)}


def merged(base: Base, posterior: Posterior, count: int) -> dict[str, Texts]:
    """Return the base, the same with ΔW merged, and with hooks that add it, as in `evaluate`."""
    examples = load_examples(base, LANGUAGE, "test")
    other = replace(base, net=copy.deepcopy(base.net))
    posterior.merge(other.net)
    features, prompts = examples.features[:count], examples.prompts[:count]

    def hooked() -> list[str]:
        with posterior.applied(base.net):
            return transcribe_features(base, features, prompts, BATCH_SIZE)

    return {
        "base": partial(transcribe_features, base, features, prompts, BATCH_SIZE),
        "merged": partial(transcribe_features, other, features, prompts, BATCH_SIZE),
        "not merged": hooked,
    }


def pipelines(base: Base, posterior: Posterior, count: int) -> dict[str, Texts]:
    """Return the merged model in transformers' pipeline, in `transcribe` and `evaluate`."""
    other = replace(base, net=copy.deepcopy(base.net))
    posterior.merge(other.net)
    recordings = recordings_of(count)
    listen = pipeline(
        "automatic-speech-recognition",
        model=other.net,
        tokenizer=base.tokenizer,
        feature_extractor=base.feature_extractor,
        batch_size=BATCH_SIZE,
    )
    options = {"language": LANGUAGE, "task": "transcribe", "num_beams": 1, "do_sample": False}

    def theirs() -> list[str]:
        waves = [{"raw": one.wave, "sampling_rate": SAMPLING_RATE} for one in recordings]
        return [one["text"].strip() for one in listen(waves, generate_kwargs=dict(options))]

    def ours() -> list[str]:
        transcriber = Transcriber(other, language=LANGUAGE, batch_size=BATCH_SIZE)
        return [one.text for one in transcriber.transcribe(recordings)]

    examples = load_examples(base, LANGUAGE, "test")
    features, prompts = examples.features[:count], examples.prompts[:count]
    return {
        "transformers' pipeline": theirs,
        "transcribe": ours,
        "evaluate, from features": partial(
            transcribe_features, other, features, prompts, BATCH_SIZE
        ),
    }


def recordings_of(count: int) -> list[Recording]:
    """Return the first recordings of the test set."""
    audio = load_split(LANGUAGE, "test").select(range(count))["audio"]
    return [Recording(str(place), read_audio(one)) for place, one in enumerate(audio)]


def draws(
    arguments: argparse.Namespace,
    results: Results,
    base: Base,
    posterior: Posterior,
    count: int,
) -> None:
    """Print what K draws take."""
    numbers = DRAWS[:3] if arguments.quick else DRAWS
    rounds = 2 if arguments.quick else ROUNDS // 4
    recordings = recordings_of(count)
    contestants = {
        str(number): partial(
            Transcriber(
                base, posterior, LANGUAGE, batch_size=BATCH_SIZE, samples=number
            ).transcribe,
            recordings,
        )
        for number in numbers
    }

    def measure() -> dict[str, Any]:
        seconds = interleaved(contestants, rounds, warm_up=1)
        plain, single = seconds["0"], seconds["1"]
        return {
            number: {
                "seconds": spread(own),
                "against_k_times_one": spread(
                    [t / (int(number) * one) for t, one in zip(own, single, strict=True)]
                ),
                "a_draw_against_transcribing": spread(
                    [(t - p) / (int(number) * p) for t, p in zip(own, plain, strict=True)]
                ),
            }
            for number, own in seconds.items()
            if int(number)
        } | {"0": {"seconds": spread(plain)}}

    figures = results.case("draws", measure)
    rows = [
        (
            f"{number} draws",
            shown(figures[str(number)]["seconds"]),
            shown(figures[str(number)]["against_k_times_one"]) if number else "",
            shown(figures[str(number)]["a_draw_against_transcribing"]) if number else "",
        )
        for number in numbers
    ]
    heads = ("transcribe", "seconds", "against K times one", "each draw / transcribing once")
    print_table(heads, rows)


if __name__ == "__main__":
    main()
