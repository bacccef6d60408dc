"""What every strength of finished fits gains and forgets, on dev and on test.

    python experiments/strengths.py lora-0=RUN lora-1=RUN

Counts of every utterance go to `strengths.json` under the name that is given to the fit, a split
and strength after another. `contracts.py` asks of them how sure one must be on dev that a contract
holds on test. With `--by base` the update is turned down where old languages hear it. A score that
is there is not made again, and the encoder hears each set once for all fits.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from records import ROOT, Notes, origin

from blora_pyro.evaluation import Evaluation
from blora_pyro.files import read_json, replace_file
from blora_pyro.posterior.strength import BASE, SCALE, at_strength
from blora_pyro.runs.folders import read_run
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.scoring import Scoring, scoring_config
from blora_pyro.runs.strength_curves import used_directions


def main() -> None:
    """Score and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--splits", nargs="*", default=["dev", "test"])
    parser.add_argument("--strengths", nargs="*", type=float, default=[0, 1, 0.7, 0.5, 0.85])
    parser.add_argument("--by", default=SCALE, choices=[SCALE, BASE])
    output = ROOT / "experiments" / "real" / "strengths.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    content = read_json(arguments.output) if arguments.output.is_file() else {"fits": {}}
    directions: dict[str, Any] = {}
    for split in arguments.splits:
        for strength in arguments.strengths:
            for name, _, folder in (one.partition("=") for one in arguments.runs):
                own = content["fits"].setdefault(name, {"by": arguments.by, "scores": {}})
                place = f"{split}-{strength:g}"
                if place in own["scores"]:
                    continue
                posterior, record = read_run(folder)
                scoring = Scoring.of(scoring_config(record.resolved, None, None), split, Listener())
                if arguments.by == BASE and name not in directions:
                    known = scoring.base, record.resolved, posterior, Notes()
                    directions[name] = used_directions(*known)
                turned = None
                if strength:
                    turned = at_strength(posterior, strength, arguments.by, directions.get(name))
                scores = scoring.score(turned)
                own["scores"][place] = {key: counts(one) for key, one in scores.items()}
                own |= origin()
                text = json.dumps(content, separators=(",", ":"))  # not a line a number
                replace_file(arguments.output, f"{text}\n".encode())
                rates = (f"{key} {100 * one.main.rate:.1f}" for key, one in scores.items())
                print(name, place, *rates, flush=True)


def counts(one: Evaluation) -> dict[str, Any]:
    """Return the errors of every utterance."""
    edits, lengths = one.main.edits.tolist(), one.main.lengths.tolist()
    return {"edits": edits, "lengths": lengths, "loops": one.loops}


if __name__ == "__main__":
    main()
