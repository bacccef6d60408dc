"""Many domains in one adapter: one after the other, together, or put together afterwards.

    python benchmarks/domains.py

The three pocket domains in all orders, 150 utterances and 200 steps a domain, three seeds. Every
method's knobs are chosen on the dev sets, with one seed, by the mean of the domains' average error
and the backward error, in one order and, of what is good there, in its reverse; what is chosen is
scored on the test sets. Started in a second terminal meanwhile, the two share the work; stopped at
any moment, the same command goes on. Fits are kept in `runs/domains`, edits of every utterance in
`results/domains/`, what comes of them in `results/domains.json`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import permutations
from pathlib import Path

import common
import torch
from domain_figures import APART, BASE, DOMAINS, IN_SEQUENCE, Knobs, Row, show, summarise, told
from domain_fits import BAYES, LORA, STEPS, Fits, locked

from blora_pyro import Posterior, load_base
from blora_pyro.comparison.rows import counts_to_json
from blora_pyro.data import Examples
from blora_pyro.evaluation import Evaluation
from blora_pyro.models import Base
from blora_pyro.options import FitConfig
from blora_pyro.posterior.strength import at_strength
from blora_pyro.runs.loading import Loader
from blora_pyro.runs.outcomes import NEW_DOMAIN, evaluation_sets, measure

# Method -> what is tried for its knobs on the dev sets. What they are is said at `Fits`.
METHODS: dict[str, list[Knobs]] = {
    BASE: [{}],
    "lora": [{}],
    "blora": [{}],
    "sequential-lora": [{"lr": lr} for lr in (2.5e-4, 5e-4, 1e-3, 2e-3)],
    "sequential-blora": [{"lr": lr} for lr in (5e-4, 1e-3, 2e-3, 5e-3)],
    "ewc-lora": [
        *({"lr": 2e-3, "strength": strength} for strength in (1.0, 10.0, 100.0, 1e3, 3e3)),
        *({"lr": 1e-3, "strength": strength} for strength in (10.0, 100.0, 1e3)),
    ],
    "chain": [
        *({"lr": 5e-3, "inflation": inflation} for inflation in (1.0, 2.0, 4.0)),
        *({"lr": 2e-3, "inflation": inflation} for inflation in (2.0, 4.0, 8.0)),
        *({"lr": 1e-3, "inflation": inflation} for inflation in (4.0, 8.0)),
    ],
    "averaged-lora": [{"strength": strength} for strength in (1.0, 1.5, 2.0)],
    "combined-mean": [{"strength": strength} for strength in (1.0, 1.5, 2.0)],
    "combined-product": [{"strength": strength} for strength in (1.0, 1.5, 2.0)],
    "union-lora": [{}],
    "union-blora": [{}],
    "hierarchical": [{"scale": scale} for scale in (0.25, 0.5, 1.0)],
}

NEAR = 0.01  # a point

Results = dict[str, Evaluation]


@dataclass(frozen=True)
class Job:
    """What is scored: a method with its knobs, after the domains of `order`."""

    method: str
    knobs: Knobs
    order: tuple[str, ...]
    seed: int
    split: str

    @property
    def name(self) -> str:
        """Of its file."""
        knobs = "".join(f"-{value:g}" for value in self.knobs.values())
        return f"{self.method}{knobs}_{'+'.join(self.order)}_seed{self.seed}_{self.split}"


class Scorer:
    """Errors of adapters on the sets of all domains and on the backward sets."""

    def __init__(self, quick: bool = False) -> None:
        """Nothing is read yet.

        Args:
            quick: On the domains and one backward set only.
        """
        self.base, self.quick = load_base("pocket"), quick

    @cache  # noqa: B019 - one lives as long as the program
    def sets(self, split: str) -> dict[str, Examples]:
        """By name: the domains and, by their languages, the backward sets."""
        found: dict[str, Examples] = {}
        for domain in DOMAINS:
            config = FitConfig(data=domain, backward=["de"] if self.quick else None)
            chosen = evaluation_sets(self.base, config, Loader(self.base, config), split)
            found |= {domain: chosen.pop(NEW_DOMAIN), **chosen}
        return found

    def score(self, job: Job, fits: Fits) -> Results:
        """Of every set."""
        sets, knobs = self.sets(job.split), job.knobs
        if job.method == BASE:
            return self._measured(self.base, sets)
        if job.method == "hierarchical":
            scale = knobs["scale"]
            options = {"pooling": "hierarchical", "pooling_scale": scale, **BAYES}
            pooled = Posterior.load(fits.together(f"hierarchical-{scale:g}", **options))
            results = self._adapted(pooled.for_domain(None), sets)
            shared = {f"{domain} (shared)": results.pop(domain) for domain in DOMAINS}
            for domain in DOMAINS:
                own = pooled.for_domain(domain)
                results |= self._adapted(own, {domain: sets[domain]})
            return results | shared
        if job.method in ("averaged-lora", "combined-mean", "combined-product"):
            whole = fits.combined(job.method)
            return self._adapted(at_strength(whole, knobs["strength"]), sets)
        if job.method in ("union-lora", "union-blora"):
            options = LORA if job.method == "union-lora" else BAYES
            return self._adapted(Posterior.load(fits.together(job.method, **options)), sets)
        if job.method in APART:
            return self._adapted(Posterior.load(fits.alone(job.method, *job.order)), sets)
        if job.method == "chain":
            chain = fits.chain(job.order, knobs["lr"], knobs["inflation"])
            return self._adapted(Posterior.load(chain), sets)
        first = IN_SEQUENCE[job.method]
        folder = fits.sequence(job.order, first, knobs["lr"], knobs.get("strength", 0.0))
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        base = load_base(about["config"]["base"])
        with Posterior.load(folder).applied(base.net):
            return self._measured(base, sets)

    def _adapted(self, posterior: Posterior, sets: Mapping[str, Examples]) -> Results:
        with posterior.applied(self.base.net):
            return self._measured(self.base, sets)

    def _measured(self, base: Base, sets: Mapping[str, Examples]) -> Results:
        return measure(base, dict(sets), lambda name: None)


class Store:
    """Rows in files, that several processes fill."""

    def __init__(self, folder: Path) -> None:
        """Nothing is made yet."""
        self.folder = folder

    def get(self, job: Job) -> Row | None:
        """What was scored; None if it was not."""
        path = self.folder / f"{job.name}.json"
        return self._read(path) if path.is_file() else None

    def all(self) -> list[Row]:
        """Every row."""
        return [self._read(path) for path in sorted(self.folder.glob("*.json"))]

    def put(self, job: Job, results: Results) -> None:
        """Write a row."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {**asdict(job), **common.about(torch.get_num_threads())}
        text = json.dumps({**content, "sets": counts_to_json(results)}, ensure_ascii=False)
        fresh = self.folder / f"{job.name}.new"
        fresh.write_text(text + "\n", encoding="utf-8")
        fresh.replace(self.folder / f"{job.name}.json")

    def _read(self, path: Path) -> Row:
        return Row.read(json.loads(path.read_text(encoding="utf-8")))


class Study:
    """Jobs done, by this process and others.

    Args:
        store: Of rows.
        root: Of fits.
        quick: Two steps a domain, and fewer sets.
    """

    def __init__(self, store: Store, root: Path, quick: bool) -> None:
        """Nothing is done yet."""
        self.store, self.root, self.steps = store, root, 2 if quick else STEPS
        self.scorer = Scorer(quick)

    def done(self, jobs: Sequence[Job]) -> list[Row]:
        """The rows of all jobs; those that are lacking are made here, or waited for."""
        for job in jobs:
            self._do(job, wait=False)
        for job in jobs:  # what others had then
            self._do(job, wait=True)
        return [row for job in jobs if (row := self.store.get(job))]

    def _do(self, job: Job, wait: bool) -> None:
        if self.store.get(job):
            return
        with locked(self.root / "jobs" / job.name, wait) as mine:
            if mine and not self.store.get(job):
                print(job.name, flush=True)
                fits = Fits(self.root, job.seed, self.steps)
                results = self.scorer.score(job, fits)
                self.store.put(job, results)

    def choose(self, method: str, seed: int) -> Knobs:
        """Those with the lowest mean of new-domain and backward error on the dev sets.

        Of methods whose order matters it is averaged over two, one the other's reverse; what is
        more than `NEAR` above the best in the first is not tried in the second.
        """
        tried = METHODS[method]
        if len(tried) == 1:
            return tried[0]
        errors: dict[str, list[float]] = {told(knobs): [] for knobs in tried}
        orders: list[tuple[str, ...]] = [DOMAINS, DOMAINS[::-1]]
        for order in orders if method in IN_SEQUENCE else [()]:
            if order == orders[1]:
                bound = min(map(sum, errors.values())) + NEAR
                tried = [knobs for knobs in tried if sum(errors[told(knobs)]) < bound]
            for row in self.done([Job(method, knobs, order, seed, "dev") for knobs in tried]):
                errors[told(row.knobs)].append(row.balanced_error)
        chosen = min(tried, key=lambda knobs: sum(errors[told(knobs)]))
        shown = (
            f"{name}: {' and '.join(f'{100 * one:.1f}' for one in of_orders)}"
            for name, of_orders in errors.items()
        )
        print(f"{method}: {told(chosen)} of {'; '.join(shown)}", flush=True)
        return chosen


def jobs_of(method: str, knobs: Knobs, seed: int) -> list[Job]:
    """All of a method and seed on the test sets; first what others build on."""
    if method == BASE:
        return [Job(BASE, knobs, (), 0, "test")] if seed == 0 else []
    orders: list[tuple[str, ...]] = [()]
    if method in APART:
        orders = [(domain,) for domain in DOMAINS]
    elif method in IN_SEQUENCE:
        orders = list(permutations(DOMAINS))
    return [Job(method, knobs, order, seed, "test") for order in orders]


def main() -> None:
    """Choose every knob, score what was chosen, write figures and table."""
    parser = common.parser(__doc__)
    parser.set_defaults(output=common.RESULTS / "domains.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--runs", type=Path, default=Path("runs/domains"))
    parser.add_argument("--report", action="store_true", help="fit nothing; of what is there")
    arguments = common.parse(parser)
    rows_in = arguments.output.with_suffix("")
    if arguments.quick:
        rows_in = arguments.runs / "quick-rows"
        arguments.seeds, arguments.runs = arguments.seeds[:1], arguments.runs / "quick"
    study = Study(Store(rows_in), arguments.runs, arguments.quick)
    first = arguments.seeds[0]
    wanted = {BASE, *arguments.methods, *(IN_SEQUENCE.get(one, BASE) for one in arguments.methods)}
    if not arguments.report:
        chosen = {method: study.choose(method, first) for method in METHODS if method in wanted}
        for seed in arguments.seeds:
            study.done([job for one, knobs in chosen.items() for job in jobs_of(one, knobs, seed)])
    found = summarise(study.store.all())
    show(found)
    if not arguments.quick:
        report = {**common.about(arguments.threads), "methods": common.rounded(found)}
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
