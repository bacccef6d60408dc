"""Runs as what one can list: what `run.json` and `metrics.json` say of each, the newest first.

Nothing else is read and torch is not imported, so that a thousand runs take two seconds.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any, TypedDict, cast

from blora_pyro.errors import UserError, reason
from blora_pyro.files import is_locked, read_json
from blora_pyro.runs.measurements import Change, check_metrics
from blora_pyro.runs.record import EVALUATING, FINISHED, FITTING, METRICS, RUN, conforms
from blora_pyro.tables import Part, Percent, Table, figure_columns, percent, text_columns

UNKNOWN = datetime.fromtimestamp(0).astimezone()  # where a run's time can't be read
RUNNING, INTERRUPTED, UNFINISHED, BROKEN = "running", "interrupted", "unfinished", "broken"


class Learned(TypedDict):
    """An error rate on a new domain's test set, before and after; fractions."""

    measure: str
    before: float | None
    after: float | None


class Options(TypedDict):
    """Options of a fit that a list shows."""

    base: str
    data: list[str] | dict[str, str]
    prior: str
    beta: float | str


@dataclass(frozen=True)
class ListedRun:
    """A run folder in a list.

    Attributes:
        folder: Its path.
        when: When `run.json` was last written, in local time; a fit ends with that.
        state: `finished`, `running`, `interrupted`, `unfinished` where a system without locks can't
            tell the two, or `broken`.
        problem: What is wrong with its files, "" if nothing is.
        options: Base, data, prior and beta; None of a broken one.
        made: `pruned` or `combined`, "" of a fit.
        before: What errors before are those of: `base`, or `full adapter` of a pruned run.
        new_domain: Errors by the name of the set, one but for domains with adapters of their own.
        forgetting: Change of the backward average against the base; None if it was not measured.
    """

    folder: str
    when: datetime
    state: str
    problem: str = ""
    options: Options | None = None
    made: str = ""
    before: str = "base"
    new_domain: dict[str, Learned] = field(default_factory=dict)
    forgetting: Change | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name, the time as ISO 8601."""
        return {**asdict(self), "when": self.when.isoformat(timespec="seconds")}


def list_runs(folder: str | Path) -> list[ListedRun]:
    """Return the runs in a folder and the folders in it, at any depth, the newest first.

    Raises:
        UserError: If it is no folder, or can't be read.
    """
    top = Path(folder)
    if not top.is_dir():
        raise UserError(f"'{top}' is no folder; give one with run folders in it, such as runs")
    found = [listed for one in _run_folders(top) if (listed := _listed(one)) is not None]
    return sorted(found, key=lambda one: one.when, reverse=True)


def _run_folders(top: Path) -> Iterator[Path]:
    """Yield the folders that have a `run.json`, links to folders followed once."""

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == top:
            raise UserError(f"'{top}' can't be read ({error.strerror}); give another") from None

    seen: set[str] = set()
    for path, names, files in os.walk(top, onerror=unreadable, followlinks=True):
        if (real := os.path.realpath(path)) in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = [name for name in names if not name.startswith(".")]  # half-written ones, too
        if RUN in files:
            yield Path(path)


def _listed(folder: Path) -> ListedRun | None:
    """Return a run as it is listed, None if it is gone."""
    try:
        when = datetime.fromtimestamp((folder / RUN).stat().st_mtime).astimezone()
    except FileNotFoundError:
        return None
    except (OSError, OverflowError, ValueError) as error:  # a year that no calendar has
        return ListedRun(str(folder), UNKNOWN, BROKEN, f"{RUN}: {_why(error)}")
    try:
        about = read_json(folder / RUN)
        options, state = _options_of(about), shown_state(about.get("state", FINISHED), folder)
    except (OSError, ValueError) as error:
        return ListedRun(str(folder), when, BROKEN, f"{RUN}: {_why(error)}")
    made = next((how for how in ("pruned", "combined") if about.get(how)), "")
    run = ListedRun(str(folder), when, state, options=options, made=made)
    if not (folder / METRICS).exists():
        return run
    try:
        metrics = read_json(folder / METRICS)
        check_metrics(metrics)
    except (OSError, ValueError) as error:
        return ListedRun(**{**vars(run), "problem": f"{METRICS}: {_why(error)}"})
    return ListedRun(**{**vars(run), **_errors_of(metrics)})


def _why(error: OSError | OverflowError | ValueError) -> str:
    return getattr(error, "strerror", None) or reason(error)


def _options_of(about: Mapping[str, Any]) -> Options:
    """Return what a list shows of the options, as resolved, or as given where it is not that far.

    Raises:
        ValueError: If they are not there, or of another type.
    """
    for name in ("config", "options"):
        if about.get(name) is None:
            continue
        stored = about[name]
        if not isinstance(stored, dict):
            raise ValueError(f"'{name}' is no object")
        for key, kind in Options.__annotations__.items():
            if not conforms(stored.get(key), kind):
                raise ValueError(
                    f"'{name}' has the {key} {reason(ValueError(stored.get(key)), 60)}"
                )
        return cast(Options, {key: stored[key] for key in Options.__annotations__})
    raise ValueError("it has no options of a fit")


def shown_state(state: object, folder: Path) -> str:
    """Return the state of a run, see `ListedRun`, of that in its `run.json`.

    Raises:
        ValueError: If it is none.
    """
    if state == FINISHED:
        return FINISHED
    if state not in (FITTING, EVALUATING):
        raise ValueError(f"'state' is {reason(ValueError(state), 60)}")
    return {True: RUNNING, False: INTERRUPTED, None: UNFINISHED}[is_locked(folder)]


def _errors_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return `before`, `new_domain` and `forgetting` of what was measured."""
    sets = dict(metrics.get("domains", {}))
    if domain := metrics.get("new_domain"):
        sets = {domain["name"]: domain}
    learned: dict[str, Learned] = {}
    for name, both in sets.items():
        measure = both["base"]["metric"]
        before, after = (both[state][measure]["rate"] for state in ("base", "adapted"))
        learned[name] = {"measure": measure, "before": before, "after": after}
    if "size" in metrics:  # of a pruned adapter against the full one
        return {"before": "full adapter", "new_domain": learned}
    change = metrics.get("backward_error", {}).get("change")
    kept = None if change is None else {key: change[key] for key in ("difference", "interval")}
    return {"new_domain": learned, "forgetting": kept}


# ---- shown


def run_tables(folder: str | Path, runs: Sequence[ListedRun]) -> list[Part]:
    """Return a table of runs, a row each, and a line on what is wrong with some."""
    if not runs:
        return [f"no run folder (one with a {RUN}) is in {folder}"]
    heads = text_columns("folder", "when", wrap=False)
    heads += [*text_columns("base", "data", "prior, beta"), *text_columns("new domain")]
    heads += figure_columns("forgetting")
    captions = [
        "new domain: error in %, base → adapted, on its test set; forgetting: points on the "
        "backward average [95% interval]"
    ]
    title = f"runs in {folder}: {len(runs)}, the newest first"
    table = Table(heads, title, captions, stack_intervals=True)
    for run in runs:
        forgetting = None if run.forgetting is None else Percent.of(run.forgetting)
        table.add_row(
            os.path.relpath(run.folder, folder),
            f"{run.when:%Y-%m-%d %H:%M}",
            *_option_cells(run),
            _learned_cell(run),
            forgetting,
            emphasis="" if run.state == FINISHED else "dim",
        )
    return [table, *(f"{run.folder}: {run.problem}" for run in runs if run.problem)]


def _option_cells(run: ListedRun) -> tuple[str | None, str | None, str | None]:
    """Return base, data, and prior with beta; of paths the last part."""
    options = run.options
    if options is None:
        return None, None, None
    beta = options["beta"]
    prior = [_last_part(options["prior"]), beta if isinstance(beta, str) else f"{beta:g}"]
    prior += [run.made] if run.made else []
    return (
        _last_part(options["base"]),
        ", ".join(map(_last_part, options["data"])),
        ", ".join(prior),
    )


def _last_part(name: str) -> str:
    return PurePath(name).name if os.path.isabs(name) else name


def _learned_cell(run: ListedRun) -> str:
    """Return the errors before and after, or why there are none."""
    if run.state != FINISHED:
        return run.state
    if not run.new_domain:
        return "metrics broken" if run.problem else "not measured"
    several = len(run.new_domain) > 1
    full, pruned = ("", "") if run.before == "base" else ("full ", "pruned ")
    return "; ".join(
        (f"{name}: " if several else "")
        + f"{one['measure'].upper()} {full}{percent(one['before'])} → "
        + f"{pruned}{percent(one['after'])}"
        for name, one in run.new_domain.items()
    )
