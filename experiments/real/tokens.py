"""Which token is to stand for a language that Whisper does not know?

    python experiments/real/tokens.py --base whisper-base --speech human-speech

One BLoRA fit (200 utterances, 100 steps, the defaults else) for each map of languages, scored on
the dev sets: what `--language-map auto` chooses, Maori's token with and without the second
language's, and Spanish's. `human-speech` holds what `manifests.py` writes. A fit that is there is
not made again. Results go to `experiments/real/tokens.json`; so far only `auto` was seen to its end
(dev, seed 0: new domain 134.7 to 69.5, backward average 16.4 to 20.4).
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from records import ROOT, Notes, origin

from blora_pyro import fit
from blora_pyro.evaluation import rate_summary
from blora_pyro.files import read_json, write_json
from blora_pyro.options import FitConfig
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.scoring import NEW_DOMAIN, Scoring

MAPS: dict[str, Any] = {
    "mi-es": {"qu": "mi"},
    "mi": {"qu-es": "mi"},
    "auto": "auto",
    "es": {"qu": "es"},
}


def main() -> None:
    """Fit, score and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", default="whisper-base")
    parser.add_argument("--speech", type=Path, default=Path("human-speech"))
    parser.add_argument("--runs", type=Path, default=Path("runs/tokens"))
    parser.add_argument("--maps", nargs="*", default=[*MAPS], choices=[*MAPS])
    parser.add_argument("--prior", default="normal", help="base-informed holds what the base does")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    output = ROOT / "experiments" / "real" / "tokens.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        rows = read_json(arguments.output)["rows"]
    except OSError:
        rows = []
    speech = arguments.speech
    backward = {code: str(speech / f"back-{code}.jsonl") for code in ("en", "es", "fr", "de")}
    own = "" if arguments.prior == "normal" else f"-{arguments.prior}"
    for name in arguments.maps:
        config = FitConfig(
            base=arguments.base,
            data=str(speech / "train.jsonl"),
            dev=str(speech / "dev.jsonl"),
            eval_every=1000,  # so that there may be a dev set
            backward=backward,
            language_map=MAPS[name],
            prior=arguments.prior,
            max_utterances=200,
            steps=100,
            max_eval_utterances=40,
            seed=arguments.seed,
        )
        run = fit(
            config,
            arguments.runs / f"{name}{own}-seed{arguments.seed}",
            evaluate=False,
            resume=True,
            progress=Notes(),
        )
        scoring = Scoring.of(run.config, "dev", Listener())
        row = {"map": name, "seed": arguments.seed, "resolved": run.config.language_map}
        row["prior"] = arguments.prior
        for state, posterior in (("base", None), ("adapted", run.posterior)):
            scores = scoring.score(posterior)
            old = [one for key, one in scores.items() if key != NEW_DOMAIN]
            row[state] = {
                "new_domain": rate_summary([scores[NEW_DOMAIN]]),
                "backward": {
                    key: rate_summary([one]) for key, one in scores.items() if key != NEW_DOMAIN
                },
                "backward_error": rate_summary(old),
            }
        names = ("map", "seed", "prior")
        rows = [one for one in rows if any(one[key] != row[key] for key in names)] + [row]
        write_json(arguments.output, {**origin(), "rows": rows})
        told = [
            row[state][what]["rate"]
            for state in ("base", "adapted")
            for what in ("new_domain", "backward_error")
        ]
        print(name, run.config.language_map, *(f"{100 * one:.1f}" for one in told), flush=True)


if __name__ == "__main__":
    main()
