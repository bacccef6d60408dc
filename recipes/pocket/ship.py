"""Copy the trained model and the corpora into the package, and measure what was made."""

import json
import logging
import platform
import shutil
import subprocess
from pathlib import Path

import corpora
import torch

from blora_pyro.data import DOMAINS, LANGUAGES, POCKET_DIR
from blora_pyro.evaluation import evaluate, rate_summary
from blora_pyro.files import write_json
from blora_pyro.models import load_base
from blora_pyro.runs.loading import load_examples

MONOLINGUAL_TRAIN = (
    200  # of 3,000 utterances a language, enough for replay; the recipe has the rest
)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "pocket.json"

log = logging.getLogger(__name__)


def ship(work: Path) -> None:
    """Fill the package's `data/pocket/` from the scratch folder."""
    shutil.rmtree(POCKET_DIR, ignore_errors=True)
    shutil.copytree(work / "model", POCKET_DIR / "model")
    for corpus in (*corpora.LANGUAGES, *corpora.DOMAINS):
        for split in ("train", "dev", "test"):
            source = work / "corpora" / corpus / f"{split}.jsonl"
            lines = source.read_text(encoding="utf-8").splitlines()
            if split == "train" and corpus in corpora.LANGUAGES:
                lines = lines[:MONOLINGUAL_TRAIN]
            target = POCKET_DIR / corpus / f"{split}.jsonl"
            (target.parent / split).mkdir(parents=True, exist_ok=True)
            target.write_text("\n".join(lines) + "\n", encoding="utf-8")
            for line in lines:
                audio = json.loads(line)["audio"]
                shutil.copy(source.parent / audio, target.parent / audio)


def measure() -> None:
    """Error of the shipped model on every test set, into `benchmarks/results/pocket.json`."""
    base = load_base()
    results = {}
    for corpus in (*LANGUAGES, *DOMAINS):
        results[corpus] = evaluate(base, load_examples(base, corpus, "test"))
        log.info("%s: %s", corpus, results[corpus].summary())
    average = rate_summary([results[code] for code in LANGUAGES])
    log.info("backward error: %s", average)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    describe = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]
    content = {
        "command": "python recipes/pocket/build.py",
        "commit": subprocess.run(describe, capture_output=True, text=True).stdout.strip(),
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "parameters": base.net.num_parameters(),
        "sets": {name: result.summary() for name, result in results.items()},
        "backward_error": average,
    }
    write_json(RESULTS, content)
