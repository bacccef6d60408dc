"""Results of every utterance, as JSON lines: reference, hypothesis, and how they differ."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from blora_pyro.data import Examples
from blora_pyro.errors import UserError, check_positive
from blora_pyro.evaluation import Evaluation
from blora_pyro.files import read_file, replace_file
from blora_pyro.metrics import Counts, align
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.storage import POSTERIOR_FILE
from blora_pyro.runs.folders import UTTERANCES, read_run
from blora_pyro.runs.measurements import check_measured
from blora_pyro.runs.record import RunRecord

PIER = "pier"


def utterance_rows(
    sets: Mapping[str, Examples],
    states: Mapping[str, Mapping[str, Evaluation]],
    posterior: Posterior | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each utterance of each set in each state of the model.

    A row's `alignment` has a list for each step: the operation (`=`, `S`, `D` or `I`), the tokens
    of reference and hypothesis, and "pier" where the step counts in PIER, so that the row's figures
    can be counted from it.

    Args:
        sets: Examples by name of the set.
        states: Results by name of the set, by name of the state, such as "base" and "adapted".
        posterior: Of the adapted state; the rows carry its fingerprint, and that of the set.
    """
    adapter = None if posterior is None else posterior.fingerprint
    for name, examples in sets.items():
        for state, results in states.items():
            for index, (start, end) in enumerate(examples.segments):
                yield {
                    "set": name,
                    "set_fingerprint": examples.fingerprint,
                    "state": state,
                    "adapter": None if state == "base" else adapter,
                    "utterance": index,
                    "origin": examples.origins[index],
                    "audio": examples.audio_paths[index],
                    "start": start,
                    "end": end,
                    "language": examples.languages[index],
                    **_row(results[name], index),
                }


def _row(result: Evaluation, index: int) -> dict[str, Any]:
    reference, hypothesis = result.references[index], result.hypotheses[index]
    steps = align(result.metric, reference, hypothesis)
    points = result.points[index]
    row: dict[str, Any] = {"metric": result.metric, **_figures(result, index)}
    if points:
        edits = sum(step.operation != "=" and points[step.position] for step in steps)
        row["pier"] = {"edits": edits, "length": sum(points)}
    row["alignment"] = [
        [step.operation, step.reference, step.hypothesis]
        + (["pier"] if points and points[step.position] else [])
        for step in steps
    ]
    if result.raw is not None:
        row["raw"] = _figures(result.raw, index)
    return row


def _figures(result: Evaluation, index: int) -> dict[str, Any]:
    edits, length = int(result.main.edits[index]), int(result.main.lengths[index])
    return {
        "reference": result.references[index],
        "hypothesis": result.hypotheses[index],
        "edits": edits,
        "length": length,
        "rate": edits / length if length else None,
    }


def write_utterances(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows; a reader sees the old file or the new one, never a part.

    Raises:
        OSError: If it can't be written.
    """
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    replace_file(path, "".join(lines).encode())


def read_utterances(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a file, or of a run folder.

    Raises:
        UserError: If there is no such file, it is damaged, or a run has an adapter that the rows in
            its folder were not measured with.
    """
    path = Path(path)
    file = path / UTTERANCES if path.is_dir() else path
    rows: list[dict[str, Any]] = []
    try:
        # Not splitlines: JSON may hold U+2028 and other line ends of Unicode as they are.
        for line in filter(None, read_file(file).decode().split("\n")):
            row = json.loads(line)
            if not _is_row(row):
                raise ValueError(f"line {len(rows) + 1} is no result of an utterance")
            rows.append(row)
    except OSError as error:
        raise UserError(
            f"{file} can't be read ({error.strerror}); give the folder of a fit that was measured, "
            "or what 'blora-pyro evaluate --output' wrote"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file} is damaged ({error}); write it again with 'blora-pyro evaluate RUN --output "
            "FILE'"
        ) from None
    if path.is_dir() and not rows:
        others = sorted(map(str, path.glob("utterances-*.jsonl")))
        raise UserError(
            f"{file} holds no utterance, the run was not scored; "
            + (f"give {others[0]}, or " if others else "")
            + "write one with 'blora-pyro evaluate RUN --output FILE'"
        )
    if path.is_dir() and (path / POSTERIOR_FILE).is_file():
        check_rows(file, rows, *read_run(path, pooled=True))
    return rows


def check_rows(
    file: Path, rows: Iterable[Mapping[str, Any]], posterior: Posterior, record: RunRecord
) -> None:
    """Refuse rows of a file that were measured with another adapter than the run's.

    Raises:
        UserError: If they were; see `check_measured`.
    """
    for adapter in {row.get("adapter") for row in rows}:
        check_measured(file, adapter, posterior, record)


def _is_row(row: Any) -> bool:
    """Return whether a row has all that `report.error_view` shows."""
    return (
        isinstance(row, dict)
        and all(isinstance(row.get(name), str) for name in ("set", "state", "metric", "origin"))
        and isinstance(row.get("audio", 0), str | None)
        and isinstance(row.get("adapter"), str | None)
        and isinstance(row.get("utterance", 0), int)
        and all(_is_time(row.get(name)) for name in ("start", "end"))
        and all(_is_figures(figures) for figures in (row, row.get("pier", row)))
        and isinstance(row.get("alignment"), list)
        and all(_is_step(step) for step in row["alignment"])
    )


def _is_time(value: Any) -> bool:
    return value is None or (isinstance(value, float | int) and abs(value) < 1e9)


def _is_figures(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    counts = [value.get(name) for name in ("edits", "length")]
    return all(isinstance(one, int) and 0 <= one < 2**31 for one in counts)


def _is_step(value: Any) -> bool:
    texts = isinstance(value, list) and all(isinstance(part, str) for part in value)
    return texts and len(value) in (3, 4) and value[0] in ("=", "S", "D", "I")


def choose(
    rows: Iterable[dict[str, Any]], test_set: str | None = None, state: str = "adapted"
) -> list[dict[str, Any]]:
    """Return the rows of one set (None: of all) in one state of the model.

    Raises:
        UserError: If there are none.
    """
    rows = list(rows)
    for name, wanted in {"set": test_set, "state": state}.items():
        known = sorted({row[name] for row in rows})
        if wanted is not None and wanted not in known:
            raise UserError(f"no {name} '{wanted}'; there are: {', '.join(known) or 'none'}")
        rows = [row for row in rows if wanted in (None, row[name])]
    return rows


def worst(rows: Iterable[dict[str, Any]], top: int) -> list[dict[str, Any]]:
    """Return the `top` rows with the most edits; among equals the higher rate comes first."""
    check_positive(top=top)
    wrong = [row for row in rows if row["edits"]]
    return sorted(wrong, key=lambda row: (-row["edits"], row["length"]))[:top]


def counts_of_utterances(
    rows: Iterable[Mapping[str, Any]], state: str = "adapted"
) -> tuple[dict[str, str], dict[str, dict[str, Counts]]]:
    """Return main measures and counts by set, of the rows of a state in `utterances.jsonl`."""
    metrics: dict[str, str] = {}
    counts: dict[str, dict[str, Counts]] = {}
    by_set: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["state"] == state:
            by_set.setdefault(row["set"], []).append(row)
    for name, own in by_set.items():
        metrics[name] = own[0]["metric"]
        tagged = [row["pier"] for row in own if "pier" in row]
        counts[name] = {
            measure: Counts(*(np.array([one[key] for one in some]) for key in ("edits", "length")))
            for measure, some in ((metrics[name], own), (PIER, tagged))
            if some
        }
    return metrics, counts


def unlike(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> str:
    """Return why two runs' rows of a set can't be paired, "" if they can.

    They can if they are of as many recordings in the same order, which are called alike, and have
    the same references, in the same measure.

    Args:
        one: Rows of one state of a run.
        other: Likewise, of another run.
    """
    if len(one) != len(other):
        return f"{len(one):,} and {len(other):,} utterances"
    if any(row.get("reference") is None for row in (*one, *other)):
        return "an old version kept no references"
    for place, (row, another) in enumerate(zip(one, other, strict=True)):
        for what, key in _ALIKE.items():
            if key(row) != key(another):
                return f"utterance {place:,} has another {what}"
    return ""


_ALIKE: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "measure": lambda row: row["metric"],
    "reference": lambda row: (row["reference"], row["length"]),
    "recording": lambda row: PurePath(row.get("audio") or row["origin"]).name,
    "segment": lambda row: (row.get("start"), row.get("end")),
}
BROKEN, FIXED = "broken", "fixed"


def changed(
    rows: Iterable[dict[str, Any]], test_set: str | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Return the utterances that adaptation `broken` and those it `fixed`, the most changed first.

    Each is the adapted row, with `base`, the base's own; `change`, see `paired`; and `words`, those
    of the reference that only one of the two has right. Utterances that are as wrong as before are
    in neither.

    Raises:
        UserError: See `paired`.
    """
    found: dict[str, list[dict[str, Any]]] = {BROKEN: [], FIXED: []}
    for before, after, change in paired(rows, test_set):
        if change:
            old, new = _right(before), _right(after)
            words = list(((old - new) if change > 0 else (new - old)).elements())
            about = {**after, "base": before, "change": change, "words": words}
            found[BROKEN if change > 0 else FIXED].append(about)
    for some in found.values():
        some.sort(key=lambda row: (-abs(row["change"]), row["length"]))
    return found


def paired(
    rows: Iterable[dict[str, Any]], test_set: str | None = None
) -> Iterator[tuple[dict[str, Any], dict[str, Any], int]]:
    """Yield every utterance's rows of the base and of the adapted model, and its change.

    That is how many words (or characters) more are wrong than in the base, of both no more than the
    reference has, so that one that loops is no worse than one that is all wrong.

    Raises:
        UserError: If there are no rows of the set, of the base, or of the adapted model.
    """
    rows = list(rows)
    sides = {
        state: {(row["set"], row.get("utterance", 0)): row for row in choose(rows, test_set, state)}
        for state in ("base", "adapted")
    }
    for key, after in sides["adapted"].items():
        if (before := sides["base"].get(key)) is not None:
            wrong = [min(row["edits"], row["length"]) for row in (before, after)]
            yield before, after, wrong[1] - wrong[0]


def _right(row: Mapping[str, Any]) -> Counter[str]:
    return Counter(step[1] for step in row["alignment"] if step[0] == "=")
