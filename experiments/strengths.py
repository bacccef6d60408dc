"""What every strength of a real fit gains and forgets, on dev and on test.

    python experiments/strengths.py --base whisper-base --speech human-speech

Fits with nothing but defaults (BLoRA on all Kichwa utterances), for some language maps and seeds,
each scaled after the fit. What is counted of every utterance goes to `strengths.json`, of which
`contracts.py` asks how sure one must be on dev that a contract holds on test. A fit or score that
is there is not made again.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from records import ROOT, Notes, origin

from blora_pyro import fit
from blora_pyro.files import read_json, write_json
from blora_pyro.options import FitConfig
from blora_pyro.posterior.strength import at_strength
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.scoring import NEW_DOMAIN, Scoring

STRENGTHS = (0.0, 0.5, 0.7, 1.0, 0.6, 0.4, 0.3, 0.85)
FIRST = "auto-0"
FITS: dict[str, dict[str, Any]] = {
    FIRST: {},
    "tl-0": {"language_map": {"qu-es": "tl"}},
    "informed-0": {"language_map": {"qu-es": "tl"}, "prior": "base-informed"},
    "mi-0": {"language_map": {"qu-es": "mi"}},
    "auto-1": {"seed": 1},
    "es-0": {"language_map": {"qu": "es"}},
    "mi-1": {"language_map": {"qu-es": "mi"}, "seed": 1},
}


def main() -> None:
    """Fit, score and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", default="whisper-base")
    parser.add_argument("--speech", type=Path, default=Path("human-speech"))
    parser.add_argument("--runs", type=Path, default=Path("runs/strengths"))
    parser.add_argument("--fits", nargs="*", default=[*FITS], choices=[*FITS])
    output = ROOT / "experiments" / "real" / "strengths.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        fits = read_json(arguments.output)["fits"]
    except OSError:
        fits = {}
    speech = arguments.speech
    for name in arguments.fits:
        config = FitConfig(
            base=arguments.base,
            data=str(speech),
            backward={
                code: str(speech / f"back-{code}.jsonl") for code in ("en", "es", "fr", "de")
            },
            **FITS[name],
        )
        run = fit(config, arguments.runs / name, evaluate=False, resume=True, progress=Notes())
        its = fits.setdefault(name, {"language_map": run.config.language_map, "scores": {}})
        scorings = {split: Scoring.of(run.config, split, Listener()) for split in ("dev", "test")}
        for strength in STRENGTHS:
            for split, scoring in scorings.items():
                if f"{split}-{strength:g}" in its["scores"]:
                    continue
                sets = scoring.sets
                if not strength:
                    if name != FIRST:  # what the base says of the old languages is the same
                        continue
                    sets = {key: one for key, one in sets.items() if key != NEW_DOMAIN}
                adapted = at_strength(run.posterior, strength) if strength else None
                scores = replace(scoring, sets=sets).score(adapted)
                its["scores"][f"{split}-{strength:g}"] = {
                    key: {
                        "edits": one.main.edits.tolist(),
                        "lengths": one.main.lengths.tolist(),
                        "loops": one.loops,
                    }
                    for key, one in scores.items()
                }
                write_json(arguments.output, {**origin(), "fits": fits})
                rates = (f"{key} {100 * one.main.rate:.1f}" for key, one in scores.items())
                print(name, split, strength, *rates, flush=True)


if __name__ == "__main__":
    main()
