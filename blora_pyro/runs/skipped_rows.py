"""Bad rows of a data set that were left out, and the list of them in a run folder."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from blora_pyro.files import replace_file

SKIPPED = "skipped_rows.jsonl"


@dataclass(frozen=True)
class SkippedRow:
    """A bad row that was left out.

    Attributes:
        source: What it was read from, as `FitConfig` names it.
        split: Of the source.
        origin: Where in it, such as "train.csv, line 3".
        reason: What is wrong with it.
    """

    source: str
    split: str
    origin: str
    reason: str


class SkippedRows:
    """Their list, a JSON object a line; a row is in it once, also if a fit is killed and goes on.

    Attributes:
        path: Of the file.
    """

    def __init__(self, folder: Path) -> None:
        """Nothing is read or written yet."""
        self.path = folder / SKIPPED
        self._listed: dict[str, None] | None = None

    def add(self, rows: Iterable[SkippedRow]) -> None:
        """Add those that are not there."""
        if self._listed is None:
            self._listed = _whole_lines(self.path)
            replace_file(self.path, "".join(self._listed).encode())
        lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows]
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(line for line in lines if line not in self._listed)
        self._listed |= dict.fromkeys(lines)


def _whole_lines(path: Path) -> dict[str, None]:
    """Those of a file, but half a line of a process that was killed; none if it is not there."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return {}
    return dict.fromkeys(f"{line}\n" for line in lines[:-1])
