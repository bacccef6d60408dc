"""What the processes of `test_processes.py` do; not a test itself."""

import json
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyro
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from torch import Tensor

from blora_pyro.cli import app
from blora_pyro.data import read_manifest
from blora_pyro.data.collation import Examples
from blora_pyro.errors import Interrupted
from blora_pyro.fitting.history import Step
from blora_pyro.fitting.interrupts import Interrupts
from blora_pyro.fitting.objective import Objective
from blora_pyro.fitting.processes import Processes
from blora_pyro.guides import with_prior_arguments
from blora_pyro.models import load_base
from blora_pyro.models.estimators import build_estimator
from blora_pyro.options import FitConfig
from blora_pyro.runs.fits import fit
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.parts import build

SEED = 5
INDICES = [0, 1, 1, 1, 0]  # of unequal parts


def main(base_folder: str, manifest: str, output: str) -> None:
    together = Processes.join("cpu")
    base = load_base(base_folder)
    examples = Examples(read_manifest(Path(manifest)), base.feature_extractor, base.tokenizer)
    found: dict[str, Any] = {"rank": together.rank, "count": together.count}

    def objective(processes: Processes) -> Objective:
        """Of a guide made from one seed."""
        pyro.set_rng_seed(SEED)
        config = FitConfig(base=base_folder, data=manifest, beta=1e-3, rank=2)
        model, guide = build(base, with_prior_arguments(config).resolved(100, 5))
        estimator = build_estimator("shared")
        return Objective(model, guide, beta=1e-3, estimator=estimator, processes=processes)

    def gradient(of: Objective, noise: int, indices: list[int]) -> tuple[Tensor, list[float]]:
        """Of the joint batch of `indices`, with what is drawn after `noise`."""
        own = of.processes.share(indices)
        batch = examples.batch(own) if own else None
        pyro.set_rng_seed(noise)
        with of.processes.noise(of.model.device):
            loss, nll = of.gradients(batch)
        of.model.adapters.clear()  # the programs share one net
        flat = torch.cat([one.grad.flatten() for one in of.guide.parameters()])
        return flat, [loss, nll, of.tokens]

    def distance(indices: list[int]) -> float:
        """Relative, of the gradient of all processes to that of one with the joint batch."""
        both, one = gradient(shared, 1, indices)[0], gradient(alone, 1, indices)[0]
        return float((both - one).norm() / one.norm())

    alone, own = objective(Forked()), objective(together)
    shared = objective(Processes(together.rank, together.count, shared_noise=True))
    found["figures"] = [gradient(one, 1, INDICES)[1] for one in (shared, alone)]
    found["distances"] = {"joint": distance(INDICES), "lone": distance([1])}
    found["spread"] = {
        name: float(torch.stack([gradient(of, n, [0, 0, 1, 1])[0] for n in range(16)]).var(0).sum())
        for name, of in (("shared", shared), ("own", own))
    }
    # messages
    found["told"] = together.from_main(lambda: {"text": "ä", "rank": together.rank})
    found["empty"] = len(together.broadcast(b"" if together.is_main else None))
    found["all"] = together.gather({"rank": together.rank})
    interrupts = Interrupts(active=False)
    interrupts.caught = 2 if together.rank == 1 else None
    values = [torch.tensor([1.0, 2.0])]
    together.wants_checkpoint = together.is_main
    found["sums"] = [together.sum_over_all(values, [together.rank], interrupts), values[0].tolist()]
    found["stops"] = [together.stops(interrupts), interrupts.caught]
    found["wanted"] = together.wants_checkpoint
    Path(output).joinpath(f"{together.rank}.json").write_text(json.dumps(found))
    together.leave()
    fit_one(base_folder, manifest, Path(output))
    fit_streams(base_folder, manifest, Path(output))
    fit_pooled(base_folder, Path(manifest), Path(output))
    fit_kept(base_folder, Path(manifest).parent, Path(output))


def fit_one(base_folder: str, manifest: str, output: Path) -> None:
    """A fit from end to end, with distillation, a dev set and a tracker."""
    together_again(output / "one.next")
    rank = Processes.join().rank
    LOGGER_TYPE_TO_CLASS["ranks"] = Ranks
    options = {"base": base_folder, "data": str(Path(manifest).parent), "batch_size": 3, "rank": 2}
    backward = {"de": str(Path(manifest).parent / "de.jsonl")}
    more = {"steps": 5, "lr": 0.03, "distillation": 0.1, "backward": backward, "beta": 1e-5}
    dev = {"dev": str(Path(manifest).parent / "test.jsonl"), "eval_every": 2, "track": "ranks"}
    run = fit(FitConfig(**options, **more, **dev), output / "run")
    total = sum(float(value.double().sum()) for value in run.posterior.mean.values())
    steps = [[step.nll, step.tokens] for step in run.history]
    about = {"sum": total, "steps": steps, "metrics": sorted(run.metrics), "dev": run.dev}
    (output / f"fit{rank}.json").write_text(json.dumps(about))


class Ranks(GeneralTracker):
    """Leaves a file for every process that tells it of steps."""

    name = "ranks"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str) -> None:
        self.tracker = Path(logging_dir) / f"rank{os.environ['RANK']}"
        super().__init__()

    def log(self, values: dict, step: int | None = None, **_: Any) -> None:
        with self.tracker.open("a") as file:
            print(*([step] if "loss" in values else []), file=file)


def fit_streams(base_folder: str, manifest: str, output: Path) -> None:
    """A fit on a stream, and the same stopped and resumed."""
    rank = int(os.environ["RANK"])
    more = {"streaming": True, "steps": 6, "beta": 1e-5, "batch_size": 3, "rank": 2}
    options = {"base": base_folder, "data": manifest, "backward": (), **more}
    config = FitConfig(**options)
    stops: Any = {"progress": Stops(3), "checkpoint_every": 1}
    found = []
    for number, (name, given) in enumerate(
        [("straight", {}), ("stopped", stops), ("stopped", {"resume": True})]
    ):
        together_again(output / f"next{number}")
        with suppress(Interrupted):
            run = fit(config, output / name, evaluate=False, **given)
            found.append([[step.loss, step.tokens] for step in run.history])
    (output / f"streams{rank}.json").write_text(json.dumps(found))


def fit_pooled(base_folder: str, manifest: Path, output: Path) -> None:
    """A fit to two domains that have something in common."""
    together_again(output / "pooled.next")
    data = {"mixed": str(manifest), "german": str(manifest.parent / "de.jsonl")}
    options = {"base": base_folder, "steps": 3, "beta": 1e-5, "batch_size": 3, "rank": 2}
    run = fit(
        FitConfig(data=data, pooling="hierarchical", backward=(), **options), output / "pooled"
    )
    sums = {name: float(mean.double().sum()) for name, mean in run.posterior.mean.items()}
    (output / f"pooled{os.environ['RANK']}.json").write_text(json.dumps(sums))


def fit_kept(base_folder: str, data: Path, output: Path) -> None:
    """A fit that keeps a contract, by its strength and by its step."""
    old = output / "old"  # with splits
    if os.environ["RANK"] == "0":
        shutil.copytree(data, old)
        for split in ("dev", "test"):
            shutil.copy(data / "de.jsonl", old / f"{split}.jsonl")
    together_again(output / "kept.next")
    options = {
        "base": base_folder,
        "batch_size": 3,
        "rank": 2,
        "lr": 0.01,
        "beta": 1e-5,
        "steps": 4,
    }
    dev = {"dev": str(data / "test.jsonl"), "eval_every": 2, "keep": 100}
    config = FitConfig(data=str(data), backward={"de": str(old)}, **options, **dev)
    run = fit(config, output / "kept")
    total = sum(float(value.double().sum()) for value in run.posterior.mean.values())
    about = {"sum": total, "strength": run.posterior.strength, "dev": run.dev}
    (output / f"kept{os.environ['RANK']}.json").write_text(json.dumps(about))


def together_again(mark: Path) -> None:
    """Wait for the main process, which is where all are to meet, to have left the fit before."""
    if os.environ["RANK"] == "0":
        mark.touch()
    while not mark.exists():
        time.sleep(0.01)


class Stops(Listener):
    """Has the fit stopped by a signal after a step."""

    def __init__(self, last: int) -> None:
        self.last = last

    def step(self, step: Step) -> None:
        if step.step == self.last:
            os.kill(os.getpid(), signal.SIGTERM)


class Forked(Processes):
    """One process that draws its noise as one of several does."""

    def noise(self, device: torch.device) -> Any:
        return Processes(0, 2, shared_noise=True).noise(device)


def become(rank: int, port: int, command: list[str]) -> None:
    """Be one of two as `torchrun` starts them, without one to watch over them."""
    signal.alarm(240)
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(here, RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    app(command) if command[0] == "fit" else main(*command)
