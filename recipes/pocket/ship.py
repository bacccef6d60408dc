"""Copy the trained model and the corpora into the package, and measure what was made."""

import itertools
import json
import logging
import platform
import shutil
import subprocess
from pathlib import Path

import corpora
import torch
from datasets import Audio, Dataset

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
            limit = MONOLINGUAL_TRAIN if split == "train" and corpus in corpora.LANGUAGES else None
            (POCKET_DIR / corpus).mkdir(exist_ok=True)
            packed = pack(work / "corpora" / corpus / f"{split}.jsonl", limit)
            packed.to_parquet(str(POCKET_DIR / corpus / f"{split}.parquet"))


def pack(manifest: Path, limit: int | None = None) -> Dataset:
    """Return the first rows of a manifest with the bytes of their audio files as they are.

    Args:
        manifest: `corpus/split.jsonl`.
        limit: the number of rows; None is all.
    """
    lines = manifest.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in itertools.islice(lines, limit)]
    for row in rows:
        content = (manifest.parent / row["audio"]).read_bytes()
        row["audio"] = {"bytes": content, "path": f"{manifest.parent.name}/{row['audio']}"}
    return Dataset.from_list(rows).cast_column("audio", Audio(decode=False))


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
