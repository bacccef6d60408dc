"""What a comparison leaves beside its rows: Markdown, JSON, a picture; and what is to do."""

import shlex
from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType

from blora_pyro import __version__
from blora_pyro.comparison.comparing import Comparison
from blora_pyro.comparison.methods import BASE
from blora_pyro.comparison.picture import draw
from blora_pyro.comparison.standing import Standing, standings
from blora_pyro.comparison.tables import sheets
from blora_pyro.errors import UserError
from blora_pyro.files import replace_file, write_json
from blora_pyro.options import POCKET
from blora_pyro.runs.record import FINISHED, state_of
from blora_pyro.sources import Source, describe_source

MARKDOWN, JSON, PICTURE = "compare.md", "compare.json", "compare.png"


def report(comparison: Comparison) -> tuple[list[RenderableType], dict[str, Any]]:
    """Write Markdown, JSON and the picture of a comparison.

    Returns:
        The tables, for a terminal, and the content of the JSON file.

    Raises:
        UserError: If they can't be written.
    """
    found, output = standings(comparison), comparison.study.output
    if not found:
        return [f"no row is in {output} yet"], {}
    lines: list[RenderableType] = []
    for one in found:
        lines += [sheet.to_rich() for sheet in sheets(one)]
    lines += notes(comparison, found)
    content = to_json(comparison, found)
    try:
        replace_file(output / MARKDOWN, markdown(comparison, found).encode())
        write_json(output / JSON, content)
        if shown := [one for one in found if one.results]:  # else every fit failed
            draw(shown).savefig(output / PICTURE, dpi=150)
    except OSError as error:
        raise UserError(
            f"output '{output}' can't be written ({error.strerror}); put that right and start the "
            "same command again: no row is lost"
        ) from None
    return [*lines, f"written: {output / MARKDOWN}, {JSON}, {PICTURE}"], content


def markdown(comparison: Comparison, found: Sequence[Standing]) -> str:
    """The tables, and the commands that make a row again."""
    parts = ["# Methods compared", ""]
    for one in found:
        parts += [f"## {one.setting.title}", ""]
        parts += [sheet.to_markdown() for sheet in sheets(one)]
        parts += ["A row again, in a folder of its own:", "", "```", *_commands(comparison, one)]
        parts += ["```", ""]
    return "\n".join([*parts, *notes(comparison, found)]) + "\n"


def to_json(comparison: Comparison, found: Sequence[Standing]) -> dict[str, Any]:
    """All figures, rates and shares as fractions."""
    plan, study = comparison.plan, comparison.study
    return {
        "version": __version__,
        "base": {"name": study.common.base, "fingerprint": study.fingerprint},
        "domains": list(plan.domains),
        "backward": list(study.backward),
        "seeds": list(plan.seeds),
        "rows": {"made": comparison.made(), "missing": len(comparison.unmade())},
        "machines": _machines(comparison),
        "settings": {one.setting.name: one.to_json() for one in found},
    }


def _machines(comparison: Comparison) -> list[dict[str, object]]:
    """What the rows were made on, each once."""
    found: list[dict[str, object]] = []
    for spec in comparison.plan.rows():
        row = comparison.study.row_of(spec)
        if row is not None and (about := dict(row.about["machine"])) not in found:
            found.append(about)
    return found


def notes(comparison: Comparison, found: Sequence[Standing]) -> list[str]:
    """What is to be known of the tables: what is not there, or could not be."""
    lines = []
    if missing := comparison.unmade():
        lines.append(f"{len(missing)} rows are not made yet: these figures will change")
    for one in found:
        for title in one.failed:
            lines.append(f"failed, and in no figure: {title}")
    return lines


def _commands(comparison: Comparison, standing: Standing) -> list[str]:
    """What makes each chosen candidate's first row again; sources that are objects have no name."""
    plan, study = comparison.plan, comparison.study
    first = plan.domains[0]
    more = ["--settings", standing.setting.name, "--domains", _named(first, study.domains[first])]
    more += ["--seeds", str(plan.seeds[0])]
    if study.common.base != POCKET:
        more += ["--base", study.common.base]
    if study.common.backward is not None:
        more += [f"--backward={_named(*one)}" for one in study.backward.items()]
    return [
        shlex.join(["blora-pyro", "compare", "--row", one.text, *more, "--output", "again"])
        for one in standing.chosen.values()
        if one.method.name != BASE
    ]


def _named(name: str, source: Source) -> str:
    """A source as the command line takes it."""
    text = describe_source(source)
    return text if text == name else f"{name}={text}"


def plan_lines(comparison: Comparison) -> list[str]:
    """What is done and to do, for `--dry-run`."""
    plan, study = comparison.plan, comparison.study
    settings = ", ".join(one.name for one in plan.settings)
    lines = [
        f"{len(plan.methods)} methods, settings {settings}, domains {', '.join(plan.domains)}, "
        f"seeds {', '.join(map(str, plan.seeds))}"
    ]
    unmade = comparison.unmade()
    fits = {fit.key for spec in unmade if (fit := study.fit_of(spec)[0]) is not None}
    done = [key for key in fits if state_of(study.output / "fits" / key) == FINISHED]
    lines.append(
        f"rows known: {comparison.made()} done, {len(unmade)} to do, with {len(fits) - len(done)} "
        "fits to make"
    )
    if waiting := plan.waiting():
        lines.append(f"not known yet, until what they build on is chosen: {', '.join(waiting)}")
    if most := plan.most_test_rows():
        lines.append(f"the second stage comes to {most} rows or so")
    return [*lines, *(f"to do: {spec.title}" for spec in unmade)]
