"""The tables of a study, for a terminal, as Markdown and as JSON, made from its scores alone."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from blora_pyro import __version__
from blora_pyro.errors import UserError
from blora_pyro.files import replace_file, write_json
from blora_pyro.options import POCKET
from blora_pyro.runs.report import above_all, is_above_all
from blora_pyro.runs.scoring import NEW_DOMAIN
from blora_pyro.sources import describe_source
from blora_pyro.studies.definition import SETTING
from blora_pyro.studies.estimates import BACKWARD
from blora_pyro.studies.methods import BASE
from blora_pyro.studies.picture import draw
from blora_pyro.studies.results import PARTS, PIER, TEST
from blora_pyro.studies.running import StudyRun
from blora_pyro.studies.standings import FORGETTING, Row, Standing, standings
from blora_pyro.tables import (
    Cell,
    Part,
    Percent,
    Table,
    figure_columns,
    percent,
    text_columns,
)

MEASURES = (
    "new domain: WER in %, or MER where a language is written without spaces; PIER: of it, at "
    "words of the embedded language; backward: mean error of the backward sets; forgetting: that "
    "less the base's, in points; ± standard deviation over seeds, [95% interval over utterances "
    "and seeds]"
)
AGAINST = (
    "backward gain: share of LoRA's backward error that is gone; new-domain drop: by how much the "
    "error on the new domain is higher, as a share of LoRA's; forgetting removed: share of LoRA's "
    "forgetting; in %, paired intervals"
)
MATCHED = (
    "against the curve through the base and all values of a method that were scored, two at least, "
    "straight between them: by how many points the backward error is lower at the same new-domain "
    "error, and the other way round; –: the curve does not get there; paired intervals"
)
CHOICE = "balanced: mean of new-domain and backward error, the lowest is chosen; errors in %"
ERRORS = (NEW_DOMAIN, PIER, BACKWARD, FORGETTING)
DEV_ERRORS = (NEW_DOMAIN, BACKWARD, "balanced")
CHOSEN = "chosen"
COSTS = "A, B, ΔW: share of elements below 1e-3 in magnitude, in %; the adapter's file as PEFT's"


def write_report(
    run: StudyRun, name: str | None = None, title: str = "Methods compared"
) -> tuple[list[Part], dict[str, Any]]:
    """Write Markdown, JSON and the picture of a study's scores beside the table of results.

    The files are called `name`, or as the table. Returns the tables, for a terminal, and the
    content of the JSON file.
    """
    found = standings(run.plan)
    if not found:
        return [f"no row is in {run.results} yet"], {}
    notes = _notes(run, found)
    content = _to_json(run, found)
    stem = run.results.with_name(name or run.results.stem)
    files = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".md", ".json", ".png")]
    try:
        files[0].parent.mkdir(parents=True, exist_ok=True)
        replace_file(files[0], _markdown(run, found, notes, title).encode())
        write_json(files[1], content)
        if shown := [one for one in found if one.results]:  # otherwise every fit failed
            draw(shown).savefig(files[2], dpi=150)
    except OSError as error:
        raise UserError(
            f"output '{files[0].parent}' can't be written ({error.strerror}); put that right and "
            "start the same command again: no row is lost"
        ) from None
    tables = [table for one in found for table in tables_of(one)]
    written = ", ".join([str(files[0]), *(file.name for file in files[1:])])
    return [*tables, *notes, f"written: {written}"], content


def _markdown(run: StudyRun, found: Sequence[Standing], notes: Sequence[str], title: str) -> str:
    """Return the tables, and the commands that make a row again."""
    parts = [f"# {title}"]
    for one in found:
        parts.append(f"## {one.setting.title or title}")
        parts += [table.to_markdown() for table in tables_of(one)]
        if commands := _commands(run, one):
            block = "\n".join(["```", *commands, "```"])
            parts += ["A row again, in a folder of its own:", block]
    return "\n\n".join([*parts, *notes]) + "\n"


def _to_json(run: StudyRun, found: Sequence[Standing]) -> dict[str, Any]:
    """Return all figures, rates and shares as fractions."""
    study, wanted = run.study, run.plan.wanted()
    scores = [score for spec in wanted if (score := run.plan.score_of(spec)) is not None]
    hashes = {one.base: one.base_hash for one in scores if one.base_hash}
    return {
        "version": __version__,
        "bases": {
            one.base: {"name": study.base_config(one).base, "hash": hashes.get(one.base, "")}
            for one in study.settings
        },
        "data": list(study.data),
        "backward": list(dict.fromkeys(name for one in scores for name in one.backward_sets)),
        "seeds": list(study.seeds),
        "rows": {"made": len(scores), "missing": len(wanted) - len(scores)},
        "machines": list(dict.fromkeys(one.machine for one in scores)),
        "settings": {
            one.setting.name or one.setting.base: {
                "split": one.split,
                "chosen": {name: candidate.text for name, candidate in one.chosen.items()},
                "results": [_plain(row) for row in one.rows],
                "matched": [_plain(row) for row in one.matched],
                "failed": one.failed,
            }
            for one in found
        },
    }


def _plain(value: Any) -> Any:
    """Return a row as JSON has it."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return asdict(value) if isinstance(value, Percent) else value


def _notes(run: StudyRun, found: Sequence[Standing]) -> list[str]:
    """Return what is to be known of the tables: what is not there, or could not be."""
    lines = []
    if missing := run.plan.missing():
        lines.append(f"{len(missing)} rows are not made yet: these figures will change")
    failed = [title for one in found for title in one.failed]
    return [*lines, *(f"failed, and in no figure: {title}" for title in failed)]


def _commands(run: StudyRun, standing: Standing) -> list[str]:
    """Return what makes each chosen candidate's first row again, if options alone can say it."""
    study, setting = run.study, standing.setting
    known = study.options.keys() <= {"base", "device", "backward"}
    plain = known and SETTING.fullmatch(setting.name)
    config = study.base_config(setting)
    name, source = next(iter(study.data.items()))
    more = ["--settings", setting.name, "--domains", _named(name, source)]
    more += ["--seeds", str(study.seeds[0])]
    if config.base != POCKET:
        more += ["--base", config.base]
    if config.backward is not None:
        more += [f"--backward={_named(*one)}" for one in config.backward_sets.items()]
    return [
        shlex.join(["blora-pyro", "compare", "--row", one.text, *more, "--output", "again"])
        for one in standing.chosen.values()
        if plain and one.method.name != BASE and not one.method.external
    ]


def _named(name: str, source: Any) -> str:
    """Return a source as the command line takes it."""
    text = describe_source(source)
    return text if text == name else f"{name}={text}"


# ---- the tables of one setting


def tables_of(standing: Standing) -> list[Table]:
    """Return all tables of one setting that have a row."""
    rows, titles = standing.chosen_results, {one["name"]: one["title"] for one in standing.rows}
    repeats = [repeat for one in rows for repeat in one["repeats"]]
    data, seeds = (
        list(dict.fromkeys(name for name, _ in repeats)),
        len({seed for _, seed in repeats}),
    )
    known = dict.fromkeys(name for one in rows for name in one["sets"])
    sets = [*data, *(name for name in known if name not in data)]
    tables: list[Table] = []

    def add(
        title: str,
        names: Sequence[str],
        figures: Sequence[str],
        rows: Sequence[Any],
        *notes: str,
    ) -> None:
        """Add a table of columns of names, then of figures; a row that ends in CHOSEN is bold."""
        title = ": ".join(part for part in (standing.setting.title, title) if part)
        heads = [*text_columns(*names), *figure_columns(*figures)]
        table = Table(heads, title, notes, stack_intervals=True)
        for row in rows:
            table.add_row(*row, emphasis="bold" if row[-1] == CHOSEN else "")
        tables.extend([table] if rows else [])

    on = "" if standing.split == TEST else f" (on {standing.split})"
    both, heads = ("method", "knob"), ("new domain", "PIER", "backward", "forgetting")

    errors = [[one[name] for name in ("title", "knob", *ERRORS)] for one in rows]
    amount = f"{', '.join(data)}, {seeds} seed{'s' if seeds != 1 else ''}"
    add(f"{amount}{on}", both, heads, errors, MEASURES, *_odd(rows))
    parts = ("A", "B", "ΔW", "weights", "MB", "fit, s")
    add(f"sparsity, size, time{on}", ("method",), parts, [*map(_costs, rows)], COSTS)
    gains = ("backward gain", "new-domain drop", "forgetting removed")
    for what, words in (
        ("against_lora", "against LoRA at its best learning rate"),
        ("same_rate", "against LoRA at the same learning rate, as in the paper"),
    ):
        against = [[one["title"], *one[what].values()] for one in rows if one[what]]
        add(f"{words}{on}", ("method", "LoRA's knob"), gains, against, AGAINST)
    matched = [
        [one["title"], titles[one["method"]], one["lower_backward"], one["lower_new_domain"]]
        for one in standing.matched
    ]
    lower = ("lower backward error", "lower new-domain error")
    add(f"at equal error{on}", ("method", "against"), lower, matched, MATCHED)
    by_set = [[one["title"], *(percent(one["sets"].get(name)) for name in sets)] for one in rows]
    add(f"error by set, in %{on}", ("method",), sets, by_set)
    tried = [_choice(one) for one in standing.rows if one["dev"] is not None]
    add("the choice, on dev", both, ("new domain", "backward", "balanced", ""), tried, CHOICE)
    return tables


def _odd(rows: Sequence[Row]) -> Iterator[str]:
    """Yield lines on transcripts that repeat themselves, and on error rates above 100%."""
    if loops := [f"{one['title']} {one['loops']}" for one in rows if one["loops"]]:
        yield f"transcripts that repeat themselves: {', '.join(loops)}"
    for one in rows:
        for name, error in one["sets"].items():
            if is_above_all({"rate": error}):
                yield above_all(one["title"], name)


def _costs(row: Row) -> list[Cell]:
    """Return the sparsity, size and time of a method at its chosen value."""
    return [
        row["title"],
        *(percent(row[part]) for part in PARTS),
        f"{row['weights']:,}" if row["weights"] else None,
        f"{row['bytes'] / 1e6:.1f}" if row["bytes"] else None,
        f"{row['seconds']:.0f}" if row["seconds"] else None,
    ]


def _choice(row: Row) -> list[Cell]:
    """Return a candidate with the errors by which one was chosen."""
    errors = [percent(row["dev"][name]) if row["dev"] else "failed" for name in DEV_ERRORS]
    return [row["title"], row["knob"], *errors, CHOSEN if row["is_chosen"] else ""]
