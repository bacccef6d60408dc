"""The fits of `domains.py`: alone, one after the other, together, and put together afterwards."""

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from domain_figures import DOMAINS

from blora_pyro import FitConfig, Posterior, fit
from blora_pyro.data import load_split
from blora_pyro.posterior.combining import combine

UTTERANCES, STEPS = 150, 200  # of each domain
BAYES = {"beta": "auto", "lr": 5e-3}
LORA = {"guide": "point", "beta": 0.0, "lr": 2e-3}
OPTIONS: dict[str, dict[str, Any]] = {"lora": LORA, "blora": BAYES}
NOWHERE: dict[str, str] = {}  # no backward sets: nothing is measured during a fit


class Fits:
    """The fits of one seed, made when they are asked for; methods are named as in `METHODS`.

    Args:
        root: Their folder.
        seed: Of all of them, and of the utterances.
        steps: A domain.
    """

    def __init__(self, root: Path, seed: int, steps: int = STEPS) -> None:
        """Nothing is made yet."""
        self.root, self.seed, self.steps = root / f"seed{seed}", seed, steps

    def data(self, domain: str) -> str:
        """A folder with the train split: the same utterances for every method."""
        folder = self.root / "data" / domain
        with locked(folder):
            folder.mkdir(exist_ok=True)
            if not (folder / "train.parquet").is_file():
                rows = load_split(domain, "train").shuffle(seed=self.seed).select(range(UTTERANCES))
                rows.to_parquet(str(folder / "train.parquet"))
        return str(folder)

    def fitted(self, name: str, **options: Any) -> Path:
        """A run folder."""
        folder = self.root / name
        with locked(folder):
            shared = {"seed": self.seed, "steps": self.steps, "backward": NOWHERE}
            fit(FitConfig(**{**shared, **options}), folder, evaluate=False, resume=True)
        return folder

    def alone(self, method: str, domain: str) -> Path:
        """`lora` or `blora` of one domain."""
        return self.fitted(f"{method}_{domain}", data=self.data(domain), **OPTIONS[method])

    def chain(self, order: Sequence[str], lr: float, inflation: float) -> Path:
        """`chain`: every posterior is the prior of the next fit.

        Its knobs are the learning rate after the first domain, and the inflation of priors.
        """
        if len(order) == 1:
            return self.alone("blora", order[0])
        before = self.chain(order[:-1], lr, inflation)
        name = f"chain-{lr:g}-{inflation:g}_{'+'.join(order)}"
        options = {"prior_from": str(before), "prior_inflation": inflation, **BAYES, "lr": lr}
        return self.fitted(name, data=self.data(order[-1]), **options)

    def sequence(self, order: Sequence[str], first: str, lr: float, ewc: float = 0.0) -> Path:
        """Every adapter is merged into the net, on which the next one is fitted.

        `sequential-lora`, `sequential-blora`: the knob is the learning rate after the first domain.
        `ewc-lora`: what is merged is held by elastic weight consolidation, with the Fisher
        information of the earlier domains' training data, which it so has to keep; its strength is
        a second knob.

        Args:
            order: Of domains.
            first: `lora` or `blora`.
            lr: After the first domain.
            ewc: Strength.
        """
        if len(order) == 1:
            return self.alone(first, order[0])
        before = self.sequence(order[:-1], first, lr, ewc)
        kept = {domain: self.data(domain) for domain in order[:-1]} if ewc else NOWHERE
        options = {**OPTIONS[first], "lr": lr, "ewc": ewc, "backward": kept, "base": str(before)}
        kind = "sequence" if first == "lora" else f"sequence-{first}"
        name = f"{kind}-{lr:g}-{ewc:g}_{'+'.join(order)}"
        return self.fitted(name, data=self.data(order[-1]), **options)

    def together(self, method: str, **options: Any) -> Path:
        """`union-lora`, `union-blora`: one adapter for all; `hierarchical`: partial pooling."""
        data = {domain: self.data(domain) for domain in DOMAINS}
        return self.fitted(method, data=data, **{"steps": len(DOMAINS) * self.steps, **options})

    def combined(self, method: str) -> Posterior:
        """`averaged-lora`, `combined-mean`, `combined-product`: one adapter of those apart.

        The knob is the strength of what comes of it.
        """
        kind = "lora" if method == "averaged-lora" else "blora"
        how = "product" if method == "combined-product" else "mean"
        parts = [Posterior.load(self.alone(kind, domain)) for domain in DOMAINS]
        return combine(parts, how)[0]


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Whether this process alone is in the `with`; the kernel releases those that die."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
