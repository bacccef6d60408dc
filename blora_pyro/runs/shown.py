"""A run shown, or two side by side: options that differ, and errors with paired intervals."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from blora_pyro.declarations import declarations, default_of, flag_of
from blora_pyro.evaluation import change_of, rate_of
from blora_pyro.hub import find_run
from blora_pyro.metrics import Counts
from blora_pyro.options import MACHINE_OPTIONS, FitConfig
from blora_pyro.posterior import Posterior
from blora_pyro.runs.folders import UTTERANCES, read_run
from blora_pyro.runs.listing import shown_state
from blora_pyro.runs.measurements import read_metrics
from blora_pyro.runs.record import FITTING, METRICS, RunRecord
from blora_pyro.runs.report import NOTHING_MEASURED, alarm_line, fit_tables, prune_tables
from blora_pyro.runs.scoring import NEW_DOMAIN, domain_set
from blora_pyro.runs.utterances import (
    PIER,
    check_rows,
    counts_of_utterances,
    read_utterances,
    unlike,
)
from blora_pyro.tables import NONE, Part, Percent, Table, figure_columns, text_columns

STATES = ("base", "adapted")


@dataclass(frozen=True)
class ShownRun:
    """A run as `show_run` and `side_by_side` take it.

    Attributes:
        name: Its folder or Hub id, as given.
        state: See `ListedRun`.
        record: The content of `run.json`.
        posterior: None until it is fitted.
        metrics: The content of `metrics.json`; empty if nothing was measured.
        rows: Of `utterances.jsonl`; empty if it is not there.
    """

    name: str
    state: str
    record: RunRecord
    posterior: Posterior | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, name: str | Path) -> "ShownRun":
        """Read a run, which may be unfinished.

        Raises:
            UserError: If there is none, or it is damaged, or results are not those of its adapter.
        """
        folder = find_run(name)
        record = RunRecord.read(folder)
        state = shown_state(record.state, folder)
        if record.state == FITTING or record.awaits_contract:
            return cls(str(name), state, record)
        posterior, _ = read_run(name, pooled=True)
        metrics: dict[str, Any] = {}
        if (folder / METRICS).exists():
            metrics = read_metrics(folder, record, posterior)
        rows = []
        if metrics and (folder / UTTERANCES).exists():
            rows = read_utterances(folder / UTTERANCES)
            check_rows(folder / UTTERANCES, rows, posterior, record)
        return cls(str(name), state, record, posterior, metrics, rows)

    @cached_property
    def options(self) -> dict[str, Any]:
        """The options as JSON has them: resolved, or as given where the fit is not that far."""
        config = self.record.config or FitConfig(**(self.record.options or {}))
        content: dict[str, Any] = json.loads(json.dumps(config.to_json()))
        return content

    @property
    def is_pruned(self) -> bool:
        """Whether errors before are those of the full adapter, and not of the base."""
        return "size" in self.metrics

    @property
    def sets(self) -> dict[str, Mapping[str, Any]]:
        """What was measured, by the set's name in `utterances.jsonl`."""
        domains = {domain_set(name): one for name, one in self.metrics.get("domains", {}).items()}
        own = {NEW_DOMAIN: self.metrics[NEW_DOMAIN]} if NEW_DOMAIN in self.metrics else {}
        return {**own, **domains, **self.backward}

    @property
    def backward(self) -> dict[str, Mapping[str, Any]]:
        """What was measured on the backward sets, by name."""
        return self.metrics.get("backward", {})

    @cached_property
    def counts(self) -> dict[str, dict[str, dict[str, Counts]]]:
        """Edit counts of the utterances by state, set and measure."""
        return {state: counts_of_utterances(self.rows, state)[1] for state in STATES}

    def rows_of(self, name: str, state: str = "adapted") -> list[dict[str, Any]]:
        """Rows of a set in a state."""
        return [row for row in self.rows if row["set"] == name and row["state"] == state]


# ---- one run


def show_run(run: ShownRun) -> tuple[dict[str, Any], list[Part]]:
    """Return a run as JSON, and as tables: what was measured, sizes of the fit, options."""
    about = run.record.to_json()
    short = {name: one for name, one in about.items() if name not in ("history", "kept")}
    content = {**_heading(run), "run": short, "metrics": run.metrics}
    parts: list[Part] = [f"{run.name}: {run.state}"]
    if run.record.alarm and not run.metrics:
        parts.append(alarm_line(run.record.alarm))
    if run.metrics:
        tables = prune_tables if run.is_pruned else fit_tables
        parts += tables(run.metrics)
    else:
        parts.append(NOTHING_MEASURED if run.state == "finished" else "nothing is measured yet")
    return content, [*parts, *about_tables({**about, "config": run.options}, run.posterior)]


def _heading(run: ShownRun) -> dict[str, Any]:
    return {"folder": run.name, "state": run.state}


def origin(about: Mapping[str, Any]) -> str:
    """Return how a run was made of others, "" if it was fitted."""
    if pruned := about.get("pruned"):
        ways = ("snr", "rank", "sparsity")
        kept = [f"{name} {pruned[name]}" for name in ways if pruned.get(name) is not None]
        return f"`blora-pyro prune` of {pruned['from']}, by {', '.join(kept)}."
    if combined := about.get("combined"):
        method = combined.get("method", "mean")
        return f"`blora-pyro combine`, {method} of {', '.join(combined['from'])}."
    return ""


def about_tables(about: Mapping[str, Any], posterior: Posterior | None) -> list[Part]:
    """Return sizes of a fit, and the options that are set.

    Args:
        about: The content of `run.json`, with `config`.
        posterior: Of the run, if there is one.
    """
    config = dict(about["config"])
    if posterior is not None:
        config |= {"base": posterior.base, "revision": posterior.revision}
        config["guide"] = config["guide"] or posterior.family.guide
    table = Table(text_columns("fit", "value"))
    for name, text in sizes_of(about, posterior).items():
        table.add_row(name, text)
    return [table, options_table(config)]


def options_table(config: Mapping[str, Any]) -> Table:
    """Return the options of a fit that are set, but those of the machine; see `to_json`."""
    options = Table(text_columns("option", "value"))
    for name in declarations(FitConfig):
        value = config.get(name)
        is_off = value is False or (value == 0 and isinstance(default_of(FitConfig, name), float))
        if (text := in_words(value)) and not is_off and name not in MACHINE_OPTIONS:
            options.add_row(flag_of(FitConfig, name), text)
    return options


def sizes_of(about: Mapping[str, Any], posterior: Posterior | None) -> dict[str, str]:
    """Return what a fit came to beside its options, in words; what is not known is left out."""
    strength = posterior.strength if posterior is not None and "kept" in about else None
    sizes = {
        "made by": origin(about) + " Below: the first one's fit." * ("combined" in about),
        "posteriors before": ", ".join(link["run"] for link in about.get("chain", ())),
        "training utterances": about.get("training_utterances"),
        "target tokens N": about.get("training_tokens"),
        "effective temperature T = beta · N": about.get("temperature"),
        "strength that keeps the contract": strength,
        "adapter weights": None if posterior is None else f"{posterior.num_weights:,}",
        "versions": ", ".join(f"{n} {v}" for n, v in about.get("versions", {}).items()),
    }
    return {name: text for name, value in sizes.items() if (text := in_words(value))}


def in_words(value: Any, digits: int = 4) -> str:
    """Return an option's value as text, "" for one that is not set."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={in_words(one, digits)}" for name, one in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(in_words(one, digits) for one in value)
    return (
        "" if value is None else f"{value:.{digits}g}" if isinstance(value, float) else f"{value}"
    )


# ---- two runs


def side_by_side(one: ShownRun, other: ShownRun) -> tuple[dict[str, Any], list[Part]]:
    """Return what differs between two runs, as JSON and as tables.

    Differences of errors are those of the adapted models, B - A, with 95% intervals of the paired
    bootstrap over utterances. Where two runs did not hear the same utterances, or were not scored
    alike, there is none, and a note says why.
    """
    runs = (one, other)
    options = {
        name: [run.options.get(name) for run in runs]
        for name in declarations(FitConfig)
        if one.options.get(name) != other.options.get(name)
    }
    sizes = [sizes_of(run.record.to_json(), run.posterior) for run in runs]
    about = {
        name: [found.get(name) for found in sizes]
        for name in dict.fromkeys([*sizes[0], *sizes[1]])
        if sizes[0].get(name) != sizes[1].get(name)
    }
    notes: list[str] = []
    shared = [name for name in one.sets if name in other.sets]
    for letter, run, others in (("A", one, other), ("B", other, one)):
        if not run.metrics:
            notes.append(f"nothing is measured of {letter}")
        elif others.metrics and (alone := [name for name in run.sets if name not in others.sets]):
            notes.append(f"only of {letter}: {', '.join(alone)}")
    why = _scored_otherwise(one, other)
    notes += [why] if why and shared else []
    unpaired = {name: "" if why else _why_unpaired(name, one, other) for name in shared}
    for reason in dict.fromkeys(filter(None, unpaired.values())):
        names = ", ".join(name for name, own in unpaired.items() if own == reason)
        notes.append(f"no difference on {names}: {reason}")
    paired = [name for name in shared if not (why or unpaired[name])]
    content = {
        "runs": [_heading(run) for run in runs],
        "options": options,
        "fit": about,
        "sets": {name: _set_content(name, one, other, name in paired) for name in shared},
        **_average_content(one, other, paired, notes),
        "notes": notes,
    }
    return content, _tables(content, one, other)


def _scored_otherwise(one: ShownRun, other: ShownRun) -> str:
    """Return why no set of two runs can be compared, "" if some can."""
    if one.metrics and other.metrics:
        for name in ("normalizer", "heard", "split"):
            found = [run.metrics.get(name) for run in (one, other)]
            if found[0] != found[1]:
                shown = " and ".join(f"'{value or 'unknown'}'" for value in found)
                return (
                    f"no difference is shown, for {name} is {shown}; score one again, by the same "
                    "version and --normalizer: blora-pyro evaluate RUN --output FILE"
                )
    return ""


def _why_unpaired(name: str, one: ShownRun, other: ShownRun) -> str:
    """Return why there is no difference on a set, "" if there is one."""
    for letter, run in (("A", one), ("B", other)):
        if not (rows := run.rows_of(name)):
            return f"{letter} has no rows of it in {UTTERANCES}"
        measure = run.sets[name]["adapted"]["metric"]
        for state in STATES:
            known = run.sets[name][state][measure]["rate"]
            found = run.counts[state].get(name, {}).get(measure)
            if rows[0]["metric"] != measure or found is None or not _agree(found.rate, known):
                return f"{UTTERANCES} and {METRICS} of {letter} were not measured together"
        if reason := unlike(run.rows_of(name, "base"), rows):
            return f"{letter} was not scored on the same as its base: {reason}"
    return unlike(one.rows_of(name), other.rows_of(name))


def _agree(counted: float, known: float | None) -> bool:
    return known is None or abs(counted - known) <= 1e-9


def _set_content(name: str, one: ShownRun, other: ShownRun, is_paired: bool) -> dict[str, Any]:
    """Return a set's errors in two runs by measure, the main one and PIER, and their difference."""
    own = [run.sets[name] for run in (one, other)]
    names = list(dict.fromkeys(both.get("name", name) for both in own))
    rates: dict[str, Any] = {}
    for measure in dict.fromkeys([*(both["adapted"]["metric"] for both in own), PIER]):
        found = [both["adapted"][measure] if measure in both["change"] else None for both in own]
        if any(found):
            counts = [run.counts["adapted"].get(name, {}).get(measure) for run in (one, other)]
            rates[measure] = {
                "rates": [None if rate is None else _plain(rate) for rate in found],
                "change": _change(*counts) if is_paired else None,
            }
    return {"names": names, "measures": rates}


def _plain(rate: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in rate.items() if name != "raw"}


def _change(before: Counts | None, after: Counts | None) -> dict[str, Any] | None:
    """Return after minus before; None if one is lacking, or they are of other words."""
    if before is None or after is None or before.lengths.tolist() != after.lengths.tolist():
        return None
    return change_of([before], [after])


def _average_content(
    one: ShownRun, other: ShownRun, paired: Sequence[str], notes: list[str]
) -> dict[str, Any]:
    """Return the backward average and forgetting of two runs, over the sets that both have."""
    shared = [name for name in one.backward if name in other.backward]
    if not shared:
        return {}
    is_all = {*shared} == {*one.backward} == {*other.backward}
    if not {*shared} <= {*paired}:
        averages = [run.metrics.get("backward_error", {}) for run in (one, other)]
        if not (is_all and all(averages)):
            notes.append("no backward average: the two are over different sets")
            return {}
        rates = [_plain(average["adapted"]) for average in averages]
        changes = [_plain(average["change"]) for average in averages]
        pruned = one.is_pruned or other.is_pruned  # against the full adapter, not the base
        lost = {} if pruned else {"forgetting": {"rates": changes, "change": None}}
        return {"backward_error": {"rates": rates, "change": None}, **lost}
    if not is_all:
        notes.append(f"backward average over {', '.join(shared)}, which both have")
    base, adapted = (
        [[run.counts[state][name][_main(run, name)] for name in shared] for run in (one, other)]
        for state in STATES
    )
    above = [
        [Counts(b.edits - a.edits, a.lengths) for a, b in zip(*own, strict=True)]
        for own in zip(base, adapted, strict=True)
    ]  # edits more than the base's: their rate is the forgetting
    return {
        "backward_error": {"rates": [*map(rate_of, adapted)], "change": change_of(*adapted)},
        "forgetting": {
            "rates": [change_of(*own) for own in zip(base, adapted, strict=True)],
            "change": change_of(*above),
        },
    }


def _main(run: ShownRun, name: str) -> str:
    measure: str = run.sets[name]["adapted"]["metric"]
    return measure


def _tables(content: Mapping[str, Any], one: ShownRun, other: ShownRun) -> list[Part]:
    """Return the tables of `side_by_side`."""
    parts: list[Part] = [f"A: {one.name}, {one.state}", f"B: {other.name}, {other.state}"]
    table = Table(text_columns("differs", "A", "B"))
    for name, values in content["options"].items():
        table.add_row(flag_of(FitConfig, name), *(in_words(one, 12) or NONE for one in values))
    for name, texts in content["fit"].items():
        table.add_row(name, *texts)
    parts.append(table if table.rows else "no option differs")
    columns = [*text_columns("set", "measure"), *figure_columns("A", "B", "B − A", wrap=True)]
    errors = Table(columns, "error in % [95% interval], adapted", grid=True)
    for name, found in content["sets"].items():
        label = f"backward {name}" if name in one.backward else name
        if name == NEW_DOMAIN:
            label = f"new domain {' / '.join(found['names'])}"
        for measure, figures in found["measures"].items():
            _add_figures(errors, label, measure.upper(), figures)
            label = ""
    for name, title in (("backward_error", "backward average"), ("forgetting", "forgetting")):
        if figures := content.get(name):
            _add_figures(errors, title, "", figures)
    seeds = "intervals are over utterances: fits with other seeds may differ by more"
    shown = [errors, seeds] if errors.rows else []
    return [*parts, *shown, *content["notes"]]


def _add_figures(table: Table, label: str, measure: str, figures: Mapping[str, Any]) -> None:
    cells = [None if one is None else Percent.of(one) for one in figures["rates"]]
    change = figures["change"]
    table.add_row(label, measure, *cells, None if change is None else Percent.of(change))
