"""The tables of a study, for a terminal, as Markdown and as JSON, made from its scores alone."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from blora_pyro import __version__
from blora_pyro.errors import UserError
from blora_pyro.files import replace_file, write_json
from blora_pyro.options import POCKET
from blora_pyro.sources import describe_source
from blora_pyro.studies.definition import SETTING
from blora_pyro.studies.estimates import PARTS, Against, Estimate
from blora_pyro.studies.picture import draw
from blora_pyro.studies.results import BASE
from blora_pyro.studies.running import StudyRun
from blora_pyro.studies.standings import Standing, standings
from blora_pyro.tables import (
    Column,
    Emphasis,
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
    "less the base's, in points; ± standard deviation over seeds, [95% interval over utterances]"
)
AGAINST = (
    "backward gain: share of LoRA's backward error that is gone; new-domain drop: by how much the "
    "error on the new domain is higher, as a share of LoRA's; forgetting removed: share of LoRA's "
    "forgetting; in %, paired intervals"
)
MATCHED = (
    "against the curve through the base and all values of a method that were scored, straight "
    "between them: by how many points the backward error is lower at the same new-domain error, "
    "and the other way round; –: the curve does not get there; paired intervals"
)
CHOICE = "balanced: mean of new-domain and backward error, the lowest is chosen; errors in %"
COSTS = "A, B, ΔW: share of elements below 1e-3 in magnitude, in %; the adapter's file as PEFT's"


def write_report(
    run: StudyRun, name: str | None = None, title: str = "Methods compared"
) -> tuple[list[Part], dict[str, Any]]:
    """Write Markdown, JSON and the picture, beside the table of results.

    Args:
        run: Whose scores are reported; nothing else is read.
        name: Of the files; None is that of the table.
        title: At the top.

    Returns:
        The tables, for a terminal, and the content of the JSON file.

    Raises:
        UserError: If they can't be written.
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
    backward = dict.fromkeys(name for one in scores for name in one.backward_sets)
    bases = {one.base: study.base_config(one).base for one in study.settings}
    return {
        "version": __version__,
        "bases": {
            label: {
                "name": name,
                "fingerprint": max((s.base_hash for s in scores if s.base == label), default=""),
            }
            for label, name in bases.items()
        },
        "data": list(study.data),
        "backward": list(backward),
        "seeds": list(study.seeds),
        "rows": {"made": len(scores), "missing": len(wanted) - len(scores)},
        "machines": list(dict.fromkeys(one.machine for one in scores)),
        "settings": {one.setting.name or one.setting.base: one.to_json() for one in found},
    }


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
    best, same = "against LoRA at its best learning rate", "against LoRA at the same learning rate"
    found = [
        _errors(standing),
        _costs(standing),
        _against(best, standing, standing.against_lora),
        _against(f"{same}, as in the paper", standing, standing.same_rate),
        _matched(standing),
        _by_set(standing),
        _choice(standing),
    ]
    return [one for one in found if one.filled_rows]


def _table(
    standing: Standing, what: str, names: Sequence[str], figures: Sequence[str], note: str = ""
) -> Table:
    on = "" if standing.split == "test" else f" (on {standing.split})"
    title = ": ".join(part for part in (standing.setting.title, f"{what}{on}") if part)
    columns: list[Column] = [*text_columns(*names), *figure_columns(*figures)]
    return Table(columns, title, [note] if note else [], stack_intervals=True)


def _errors(standing: Standing) -> Table:
    """Return the errors of each method at its chosen value."""
    figures = ("new domain", "PIER", "backward", "forgetting")
    table = _table(standing, _amount(standing), ("method", "knob"), figures, MEASURES)
    for one in standing.chosen_results:
        errors = (_cell(one.new_domain), _cell(one.pier), _cell(one.backward))
        table.add_row(*_names(one), *errors, _cell(one.forgetting, signed=True))
    return table


def _amount(standing: Standing) -> str:
    """Return the data sets and the number of seeds in words."""
    repeats = [repeat for one in standing.chosen_results for repeat in one.repeats]
    data = list(dict.fromkeys(name for name, _ in repeats))
    seeds = len({seed for _, seed in repeats})
    return f"{', '.join(data)}, {seeds} seed{'s' if seeds != 1 else ''}"


def _costs(standing: Standing) -> Table:
    """Return the sparsity, size and time of each method at its chosen value."""
    figures = ("A", "B", "ΔW", "weights", "MB", "fit, s")
    table = _table(standing, "sparsity, size, time", ("method",), figures, COSTS)
    for one in standing.chosen_results:
        table.add_row(
            one.candidate.method.title,
            *(percent(one.sparsity[part]) for part in PARTS),
            f"{one.weights:,}" if one.weights else None,
            f"{one.bytes / 1e6:.1f}" if one.bytes else None,
            f"{one.seconds:.0f}" if one.seconds else None,
        )
    return table


def _against(what: str, standing: Standing, found: Mapping[str, Against]) -> Table:
    """Return each method at its chosen value against a LoRA."""
    figures = ("backward gain", "new-domain drop", "forgetting removed")
    table = _table(standing, what, ("method", "LoRA's knob"), figures, AGAINST)
    for one in found.values():
        gains = (one.backward_gain, one.new_domain_drop, one.forgetting_removed)
        cells = [_cell(gain, signed=True) for gain in gains]
        table.add_row(one.candidate.method.title, one.other.label, *cells)
    return table


def _matched(standing: Standing) -> Table:
    """Return each Bayesian method against each other one, at equal error."""
    figures = ("lower backward error", "lower new-domain error")
    table = _table(standing, "at equal error", ("method", "against"), figures, MATCHED)
    for one in standing.matched:
        other = standing.chosen[one.method].method.title
        cells = (_cell(one.backward, signed=True), _cell(one.new_domain, signed=True))
        table.add_row(one.candidate.method.title, other, *cells)
    return table


def _by_set(standing: Standing) -> Table:
    """Return the error of each method at its chosen value on every set."""
    results = standing.chosen_results
    data, backward = _keys(one.data for one in results), _keys(one.sets for one in results)
    table = _table(standing, "error by set, in %", ("method",), [*data, *backward])
    for one in results:
        cells = [*(one.data.get(name) for name in data), *(one.sets.get(name) for name in backward)]
        table.add_row(one.candidate.method.title, *map(percent, cells))
    return table


def _choice(standing: Standing) -> Table:
    """Return every candidate with the errors by which one was chosen."""
    title = ": ".join(part for part in (standing.setting.title, "the choice, on dev") if part)
    figures = ("new domain", "backward", "balanced", "")
    columns = [*text_columns("method", "knob"), *figure_columns(*figures)]
    table = Table(columns, title, [CHOICE])
    for one in standing.choices:
        errors = (one.new_domain, one.backward, one.balanced)
        cells = ["failed" if error is None else percent(error) for error in errors]
        names = (one.candidate.method.title, one.candidate.label)
        emphasis: Emphasis = "bold" if one.is_chosen else ""
        table.add_row(*names, *cells, "chosen" if one.is_chosen else "", emphasis=emphasis)
    return table


def _names(one: Any) -> tuple[str, str]:
    return one.candidate.method.title, one.candidate.label


def _keys(columns: Iterable[Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for one in columns for name in one))


def _cell(one: Estimate | None, signed: bool = False) -> Percent | None:
    return None if one is None else Percent(one.value, one.interval, one.stddev, signed)
