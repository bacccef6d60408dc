"""What pruning costs, three seeds: rows of pruned fits against rows of the same fits whole.

    python benchmarks/pruning_cost.py

Reads the test rows that `blora-pyro compare` left in `results/compare/rows`, and fits nothing.
Differences of new-domain and backward error in points, with 95% paired-bootstrap intervals over
utterances, of every pruned candidate that has the domains and seeds of its parent.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from common import RESULTS

from blora_pyro.comparison.candidates import Candidate, read_candidate
from blora_pyro.comparison.measures import BACKWARD, Place, Scores
from blora_pyro.comparison.methods import SPARSITY
from blora_pyro.comparison.rows import TEST, Row, read_row
from blora_pyro.runs.outcomes import NEW_DOMAIN


def main() -> None:
    """Print a line a candidate."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=Path, default=RESULTS / "compare" / "rows")
    parser.add_argument("--setting", default="150x200")
    arguments = parser.parse_args()
    rows = [*test_rows(arguments.rows, arguments.setting)]
    scores = Scores(rows)
    for one in {candidate.text: candidate for candidate, _, _ in rows}.values():
        if one.method.knob == SPARSITY and one.parent is not None:
            places = scores.places(one.parent)
            cells = [f"{len(places)} fits"]
            for figure in (NEW_DOMAIN, BACKWARD):
                found = scores.estimate(rise, [(one, figure), (one.parent, figure)], places)
                if found is not None and found.value is not None and found.interval is not None:
                    low, high = found.interval
                    cells.append(f"{figure} {found.value:+.2f} [{low:+.2f}, {high:+.2f}]")
            print(f"{one.text}: {', '.join(cells)}")


def test_rows(folder: Path, setting: str) -> Iterator[tuple[Candidate, Place, Row]]:
    """Every row of a setting that is of the test sets."""
    for path in sorted(folder.glob("*.json")):
        row = read_row(json.loads(path.read_text(encoding="utf-8")))
        about = row.about
        if (about["setting"], about["split"]) == (setting, TEST):
            yield read_candidate(about["candidate"]), (about["domain"], about["seed"]), row


def rise(pruned: float, whole: float) -> float:
    """In points."""
    return 100 * (pruned - whole)


if __name__ == "__main__":
    main()
