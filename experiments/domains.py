"""Several domains in one adapter: one after the other, together, or combined afterwards.

    python experiments/domains.py             # choose every knob on dev, score it on test
    python experiments/domains.py --report    # the table of docs/domains.md, from the results alone
    python experiments/domains.py --report --difference hierarchical blora

`experiments/domains/study.toml` has the methods and the values of their knobs. A knob is chosen on
the dev sets, with the first seed, by the mean of the domains' average error and the backward error,
in one order and, of what is good there, in its reverse. Fits are kept in `runs/domains`, one row an
adapter in `experiments/domains/results.csv`; stopped at any moment, the same command goes on.
"""

import argparse
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from domain_results import (
    BACKWARD,
    BASE,
    NEW,
    Figures,
    Knobs,
    Row,
    read_rows,
    results_table,
    shown,
    write_rows,
)
from records import ROOT, origin

from blora_pyro import FitConfig, Posterior, fit, load_base
from blora_pyro.data import Examples, load_split
from blora_pyro.evaluation import Evaluation
from blora_pyro.models import Base
from blora_pyro.posterior.combining import combine
from blora_pyro.posterior.strength import at_strength
from blora_pyro.runs.loading import Loader
from blora_pyro.runs.scoring import NEW_DOMAIN, evaluation_sets, measure

FOLDER = ROOT / "experiments" / "domains"
NEAR = 0.01  # what is a point worse than the best in one order is not tried in its reverse
IN_ORDER = ("sequence", "chain")  # kinds of methods
NO_SETS: dict[str, str] = {}  # no backward sets: nothing is measured during a fit

Results = dict[str, Evaluation]


class Fits:
    """The fits of one seed, each made when it is asked for."""

    def __init__(self, study: Mapping[str, Any], root: Path, seed: int) -> None:
        """Make nothing yet.

        Args:
            study: Content of the study file.
            root: Folder of all fits.
            seed: Of the fits, and of the choice of utterances.
        """
        self.study, self.domains = study, study["domains"]
        self.root, self.seed = root / f"seed{seed}", seed

    def data(self, domain: str) -> str:
        """Return a folder with the train split: the same utterances for every method."""
        folder = self.root / "data" / domain
        if not (folder / "train.parquet").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            rows = load_split(domain, "train").shuffle(seed=self.seed)
            rows.select(range(self.study["utterances"])).to_parquet(str(folder / "train.parquet"))
        return str(folder)

    def fitted(self, name: str, **options: Any) -> Path:
        """Return the folder of a run, fitted or gone on with unless it is finished."""
        shared = {"seed": self.seed, "steps": self.study["steps"], "backward": NO_SETS}
        config = FitConfig(**{"base": self.study["base"], **shared, **options})
        fit(config, self.root / name, evaluate=False, resume=True)
        return self.root / name

    def alone(self, method: str, domain: str) -> Path:
        """Return the adapter of one domain; `method` is one of the study's options."""
        options = self.study["options"][method]
        return self.fitted(f"{method}_{domain}", data=self.data(domain), **options)

    def together(self, method: str, knobs: Knobs) -> Path:
        """Return one adapter for all domains; with a scale, they are partially pooled."""
        data = {domain: self.data(domain) for domain in self.domains}
        options = {**self.study["options"][self.study["methods"][method]["options"]], **knobs}
        if knobs:
            options["pooling"] = "hierarchical"
        name = "-".join([method, *(f"{value:g}" for value in knobs.values())])
        steps = len(self.domains) * self.study["steps"]
        return self.fitted(name, data=data, steps=steps, **options)

    def in_order(self, method: str, order: Sequence[str], knobs: Knobs) -> Path:
        """Return the adapter after the last domain.

        In a `chain` every posterior is the prior of the next fit; in a `sequence` every adapter is
        merged into the base of the next fit. The learning rate is that after the first domain. EWC
        holds what is merged, by the Fisher information of the earlier domains' training data.
        """
        about = self.study["methods"][method]
        if len(order) == 1:
            return self.alone(about["options"], order[0])
        before = self.in_order(method, order[:-1], knobs)
        options = {**self.study["options"][about["options"]], **knobs}
        if about["kind"] == "chain":
            options["prior_from"] = str(before)
        else:
            options["base"] = str(before)
        if "ewc" in knobs:
            options["backward"] = {domain: self.data(domain) for domain in order[:-1]}
        values = "-".join(f"{value:g}" for value in knobs.values())
        name = f"{method}-{values}_{'+'.join(order)}"
        return self.fitted(name, data=self.data(order[-1]), **options)

    def combined(self, method: str) -> Posterior:
        """Return one adapter of those that were fitted apart."""
        about = self.study["methods"][method]
        parts = [Posterior.load(self.alone(about["options"], domain)) for domain in self.domains]
        return combine(parts, about["combine"])[0]


class Scorer:
    """Errors of adapters on the sets of all domains and on the backward sets."""

    def __init__(self, study: Mapping[str, Any], backward: Sequence[str] | None) -> None:
        """Load the base; `backward` names its backward sets, None all of them."""
        self.study, self.backward = study, backward
        self.base = load_base(study["base"])

    @cache  # noqa: B019 - one lives as long as the program
    def sets(self, split: str) -> dict[str, Examples]:
        """Return the domains' sets and, by their languages, the backward sets."""
        found: dict[str, Examples] = {}
        for domain in self.study["domains"]:
            config = FitConfig(base=self.study["base"], data=domain, backward=self.backward)
            chosen = evaluation_sets(self.base, config, Loader(self.base, config), split)
            found |= {domain: chosen.pop(NEW_DOMAIN), **chosen}
        return found

    def score(self, row: Row, knobs: Knobs, fits: Fits) -> Results:
        """Return the results on every set; `row` says what is scored."""
        sets, kind = self.sets(row.split), self.study["methods"][row.method]["kind"]
        if kind == "base":
            return measured(self.base, sets)
        if kind == "combine":
            return self._adapted(at_strength(fits.combined(row.method), knobs["strength"]), sets)
        if kind == "alone":
            return self._adapted(Posterior.load(fits.alone(row.method, *row.order)), sets)
        if kind == "together":
            return self._pooled(Posterior.load(fits.together(row.method, knobs)), sets)
        folder = fits.in_order(row.method, row.order, knobs)
        if kind == "chain":
            return self._adapted(Posterior.load(folder), sets)
        before = fits.in_order(row.method, row.order[:-1], knobs)  # merged: the base of the last
        base = load_base(str(before))
        with Posterior.load(folder).applied(base.net):
            return measured(base, sets)

    def _pooled(self, posterior: Posterior, sets: Mapping[str, Examples]) -> Results:
        if posterior.pooling is None:
            return self._adapted(posterior, sets)
        results = self._adapted(posterior.for_domain(None), sets)
        domains = self.study["domains"]
        shared = {f"{domain} (shared)": results.pop(domain) for domain in domains}
        for domain in domains:
            results |= self._adapted(posterior.for_domain(domain), {domain: sets[domain]})
        return results | shared

    def _adapted(self, posterior: Posterior, sets: Mapping[str, Examples]) -> Results:
        with posterior.applied(self.base.net):
            return measured(self.base, sets)


def measured(base: Base, sets: Mapping[str, Examples]) -> Results:
    """Return the results of a net as it is."""
    return measure(base, dict(sets), lambda name: None)


class Study:
    """The rows of the table, and how one is made."""

    def __init__(self, scorer: Scorer, results: Path, runs: Path) -> None:
        """Read the rows that are there."""
        self.study, self.score = scorer.study, scorer.score
        self.results, self.runs = results, runs
        self.rows = {row.key: row for row in read_rows(results, self.study["domains"])}

    def row(self, method: str, knobs: Knobs, order: Sequence[str], seed: int, split: str) -> Row:
        """Return a row, made unless it is there."""
        domains = tuple(self.study["domains"])
        row = Row(method, shown(knobs), tuple(order), seed, split, domains, {}, {}, origin())
        if row.key not in self.rows:
            print(*row.key, flush=True)
            results = self.score(row, knobs, Fits(self.study, self.runs, seed))
            row.counts.update({name: one.main for name, one in results.items()})
            row.measures.update({name: one.metric for name, one in results.items()})
            self.rows[row.key] = row
            write_rows(self.results, self.rows.values())
        return self.rows[row.key]

    def choose(self, method: str) -> Knobs:
        """Return the knobs of lowest balanced error on dev, over two orders if it has orders."""
        about, seed = self.study["methods"][method], self.study["seeds"][0]
        tried: list[Knobs] = about.get("knobs", [{}])
        if len(tried) == 1:
            return tried[0]
        errors = {shown(knobs): list[float]() for knobs in tried}
        domains = self.study["domains"]
        for order in (domains, domains[::-1]) if about["kind"] in IN_ORDER else ((),):
            if any(errors.values()):
                bound = min(map(sum, errors.values())) + NEAR
                tried = [knobs for knobs in tried if sum(errors[shown(knobs)]) < bound]
            for knobs in tried:
                found = self.row(method, knobs, order, seed, "dev")
                errors[shown(knobs)].append(found.balanced_error)
        return min(tried, key=lambda knobs: sum(errors[shown(knobs)]))

    def score_chosen(self, method: str, knobs: Knobs, seed: int) -> None:
        """Make all rows of a method and seed on the test sets."""
        kind, domains = self.study["methods"][method]["kind"], self.study["domains"]
        orders: list[Sequence[str]] = [()]
        if kind == "alone":
            orders = [(domain,) for domain in domains]
        elif kind in IN_ORDER:
            orders = list(permutations(domains))
        for order in orders if kind != BASE or seed == self.study["seeds"][0] else ():
            self.row(method, knobs, order, seed, "test")


def main() -> None:
    """Make the rows that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", nargs="+", help="of the study file (default: all)")
    parser.add_argument("--runs", type=Path, default=Path("runs/domains"), help="folder for fits")
    parser.add_argument("--results", type=Path, default=FOLDER / "results.csv", help="the table")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--quick", action="store_true", help="a small trial of everything")
    parser.add_argument("--report", action="store_true", help="fit nothing; show what is there")
    parser.add_argument(
        "--difference", nargs=2, metavar="METHOD", help="how far the first is above the second"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    study = tomllib.loads((FOLDER / "study.toml").read_text(encoding="utf-8"))
    if arguments.quick:
        study |= {"seeds": [0], "steps": 2}
        for about in study["methods"].values():
            about["knobs"] = about.get("knobs", [{}])[:1]
        arguments.results = arguments.runs / "quick.csv"
    if not arguments.report:
        backward = ["de"] if arguments.quick else None
        work = Study(Scorer(study, backward), arguments.results, arguments.runs)
        chosen = {name: work.choose(name) for name in arguments.methods or study["methods"]}
        for seed in study["seeds"]:
            for name, knobs in chosen.items():
                work.score_chosen(name, knobs, seed)
    rows = read_rows(arguments.results, study["domains"])
    if arguments.difference:
        (first, second), figures = arguments.difference, Figures(rows, study["methods"])
        for name in (NEW, BACKWARD):
            print(f"{name}: {figures.difference(first, second, name)}")
    else:
        print(results_table(rows, study["methods"]).to_markdown())


if __name__ == "__main__":
    main()
