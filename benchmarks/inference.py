"""Transcribing: merged against the base, ours against transformers' pipeline, and posterior draws.

    python benchmarks/inference.py

The pocket Whisper, one monolingual test set, greedy. The posterior is so near the base that the
transcripts are the same, so that all have the same number of tokens; that they are is checked, and
kept. The pipeline and `transcribe` are given samples, `evaluate` (as in `fit`) has the features
already. Draws: `transcribe --samples K`, and what it takes beyond `transcribe`, by a posterior of
all layers and by one of the decoder's, whose draws share the encoder's states.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from common import Results, compared, interleaved, parse, parser, print_table, shown
from transformers import pipeline

from blora_pyro import FitConfig, Posterior, load_base
from blora_pyro.adapters import ALL_LINEAR
from blora_pyro.data import SAMPLING_RATE, load_split, read_audio
from blora_pyro.guides import with_prior_arguments
from blora_pyro.models import Base
from blora_pyro.options import DECODER
from blora_pyro.posterior import Family
from blora_pyro.runs.loading import load_examples
from blora_pyro.runs.parts import build
from blora_pyro.transcription import Transcriber, transcribe_features
from blora_pyro.transcription.windows import Recording

LANGUAGE = "de"
NEAR = 1e-6  # standard deviation of B's mean
ROUNDS, BATCH_SIZE, DRAWS = 20, 16, (0, 1, 4, 16)
PIPELINE = "transformers' pipeline"

Contestants = dict[str, Callable[[], list[Any]]]


def main() -> None:
    """Print three tables."""
    found = parser(__doc__)
    found.add_argument("--utterances", type=int, default=96)
    arguments = parse(found)
    quick, count = arguments.quick, 16 if arguments.quick else arguments.utterances
    settings = {"utterances": count, "batch_size": BATCH_SIZE, "rounds": ROUNDS}
    results = Results(arguments, language=LANGUAGE, **settings)
    base = load_base("pocket")
    torch.manual_seed(0)
    posterior, rounds = near(base), 3 if quick else ROUNDS
    audio = load_split(LANGUAGE, "test").select(range(count))["audio"]
    recordings = [Recording(str(place), read_audio(one)) for place, one in enumerate(audio)]
    other = replace(base, net=copy.deepcopy(base.net))
    posterior.merge(other.net)
    inputs = features_of(base, count)
    cases = {
        "merged": (merged(base, other, posterior, inputs), "base"),
        "pipeline": (pipelines(other, recordings, inputs), PIPELINE),
    }
    for case, (contestants, peer) in cases.items():
        figures = results.case(case, partial(timed, contestants, peer, rounds))
        rows = [
            (name, shown(one["seconds"], ".3f"), shown(one["ratio"]))
            for name, one in figures["contestants"].items()
        ]
        print_table((f"{case}: seconds for {count} utterances", "", f"{peer} = 1"), rows)
        print(f"transcripts equal: {figures['transcripts_equal']}")
    numbers = DRAWS[:3] if quick else DRAWS
    options: dict[str, Any] = {"language": LANGUAGE, "batch_size": BATCH_SIZE}
    frozen = near(base, DECODER)
    for case, one in {"draws": posterior, "draws, the encoder as it is": frozen}.items():
        drawing: Contestants = {
            str(k): partial(Transcriber(base, one, samples=k, **options).transcribe, recordings)
            for k in numbers
        }
        figures = results.case(case, partial(timed_draws, drawing, 2 if quick else ROUNDS // 4))
        heads = (case, "seconds", "against K times one", "each draw / transcribing once")
        lines = [(f"{k} draws", *map(shown, each.values())) for k, each in figures.items()]
        print_table(heads, lines)


def near(base: Base, targets: str = ALL_LINEAR) -> Posterior:
    """Return a posterior at the start of a fit, but with a B that is nearly zero."""
    config = with_prior_arguments(FitConfig(target_modules=targets)).resolved(1, 1)
    model, guide = build(base, config)
    posterior = Posterior.from_guide(base.name, model, guide, Family())
    model.adapters.remove()
    mean = {
        name: NEAR * torch.randn_like(one) if name.startswith("B") else one
        for name, one in posterior.mean.items()
    }
    return replace(posterior, mean=mean)


def features_of(base: Base, count: int) -> tuple[Any, Any, int]:
    """Return features and prompts of the test set, and the batch size."""
    examples = load_examples(base, LANGUAGE, "test")
    return examples.features[:count], examples.prompts[:count], BATCH_SIZE


def timed(contestants: Contestants, peer: str, rounds: int) -> dict[str, Any]:
    """Return seconds and ratios, and whether all transcripts are the same."""
    texts = [one() for one in contestants.values()]
    seconds = interleaved(contestants, rounds, warm_up=1)
    equal = all(one == texts[0] for one in texts) and any(texts[0])
    return {"transcripts_equal": equal, "contestants": compared(seconds, peer)}


def timed_draws(contestants: Contestants, rounds: int) -> dict[str, Any]:
    """Return seconds, those against K times one draw, and those of a draw against no draw."""
    seconds = interleaved(contestants, rounds, warm_up=1)
    against_none, against_one = compared(seconds, "0"), compared(seconds, "1")
    found: dict[str, Any] = {"0": {"seconds": against_none["0"]["seconds"]}}
    for name in contestants.keys() - {"0"}:
        k, none, one = int(name), against_none[name]["ratio"], against_one[name]["ratio"]
        found[name] = {
            "seconds": against_none[name]["seconds"],
            "against_k_times_one": {part: value / k for part, value in one.items()},
            "a_draw_against_transcribing": {p: (value - 1) / k for p, value in none.items()},
        }
    return {name: found[name] for name in contestants}


def merged(base: Base, other: Base, posterior: Posterior, inputs: tuple) -> Contestants:
    """Return the base, the same with ΔW merged, and with hooks that add it, as in `evaluate`."""

    def hooked() -> list[str]:
        with posterior.applied(base.net):
            return transcribe_features(base, *inputs)

    return {
        "base": partial(transcribe_features, base, *inputs),
        "merged": partial(transcribe_features, other, *inputs),
        "not merged": hooked,
    }


def pipelines(other: Base, recordings: list[Recording], inputs: tuple) -> Contestants:
    """Return the merged model in transformers' pipeline, in `transcribe` and in `evaluate`."""
    listen = pipeline(
        "automatic-speech-recognition",
        model=other.net,
        tokenizer=other.tokenizer,
        feature_extractor=other.feature_extractor,
        batch_size=BATCH_SIZE,
    )
    options = {"language": LANGUAGE, "task": "transcribe", "num_beams": 1, "do_sample": False}

    def theirs() -> list[str]:
        waves = [{"raw": one.wave, "sampling_rate": SAMPLING_RATE} for one in recordings]
        return [one["text"].strip() for one in listen(waves, generate_kwargs=dict(options))]

    def ours() -> list[str]:
        transcriber = Transcriber(other, language=LANGUAGE, batch_size=BATCH_SIZE)
        return [one.text for one in transcriber.transcribe(recordings)]

    features = partial(transcribe_features, other, *inputs)
    return {PIPELINE: theirs, "transcribe": ours, "evaluate, from features": features}


if __name__ == "__main__":
    main()
