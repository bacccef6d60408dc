"""From nothing to the shipped pocket Whisper and corpora: `python recipes/pocket/build.py`.

Needs espeak-ng (Debian: `apt-get install espeak-ng`) and an installed blora-pyro. About an hour on
two cores; a stopped run continues where it was when started again.
"""

import argparse
import logging
from pathlib import Path

import corpora
import ship
import torch
import train

HERE = Path(__file__).parent


def main() -> None:
    """Parse the command line and run every stage that is not yet done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=HERE / "build", help="scratch folder")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        handlers=[logging.StreamHandler(), logging.FileHandler(options.work / "build.log")],
    )
    torch.set_num_threads(options.threads)
    corpora.build(options.work / "corpora")
    train.train(options.work / "corpora", options.work)
    ship.ship(options.work)
    ship.measure()


if __name__ == "__main__":
    main()
