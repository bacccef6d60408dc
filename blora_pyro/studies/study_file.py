"""Study files (TOML; `docs/studies.md` has one), and the short form that needs no file."""

import reprlib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blora_pyro.declarations import check_names
from blora_pyro.errors import UserError
from blora_pyro.families import check_code
from blora_pyro.options import POCKET, FitConfig, check_base_named
from blora_pyro.sources import Source, named_sources
from blora_pyro.studies.definition import SETTING, Setting, Study
from blora_pyro.studies.methods import (
    LORA,
    SET_BY_THE_STUDY,
    Shape,
    check_table,
    choose_methods,
    is_of,
    read_candidate,
    read_methods,
)

DEEPEST = 20  # tables and lists in one another
SOURCES = (list[str] | dict[str, str], 'names or paths, such as ["zh-en"], or a table of them')
OPTIONS = dict[str, Any]
BASES = 'a list, such as ["pocket"], or a table of names, or of tables of options'

STUDY: Shape = {
    "output": (str, "the path of a folder"),
    "results": (str, "the path of a CSV file"),
    "bases": (list[str] | dict[str, str | OPTIONS], BASES),
    "data": SOURCES,
    "backward": SOURCES,
    "seeds": (list[int], "whole numbers, such as [0, 1, 2]"),
    "methods": (list[str], 'names, such as ["lora", "blora"]'),
    "neighbours": (bool, "true or false"),
    "options": (OPTIONS, "a table [options]"),
    "settings": (dict[str, OPTIONS], "tables [settings.NAME]"),
    "method": (dict[str, OPTIONS], "tables [method.NAME]"),
    "search": (OPTIONS, "a table [search]"),
}
SEARCH_ABOUT: Shape = {
    "trials": (int, "a whole number"),
    "timeout": (float, "a number of seconds"),
}


def read_study_file(path: Path) -> dict[str, Any]:
    """Return what a study file holds, its keys and types checked (`UserError`)."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        if _is_deeper(content, DEEPEST):
            raise RecursionError("tables or lists in one another")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no study file ({error}); give a TOML file") from None
    check_table(content, STUDY, str(path))
    refused = {"methods", "method", "settings", "neighbours", "results"} & content.keys()
    if "search" in content and refused:
        raise UserError(
            f"{path} has both a search and {min(refused)}; give one study file for each"
        )
    return content


def _is_deeper(value: Any, levels: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_is_deeper(one, levels - 1) for one in parts)


def open_study(path: Path, output: Path | None = None) -> tuple[dict[str, Any], Path, Path]:
    """Return what a study file holds, the folder of its fits, and its table of results."""
    content = read_study_file(path)
    if output is None:
        output = Path(content.get("output", Path("runs") / path.stem))
    results = content.get("results")
    return content, output, output / "results.csv" if results is None else path.parent / results


def search_of(
    content: Mapping[str, Any], where: str, code: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, tuple[float, float]] | None, dict[str, Any]]:
    """Return the options, ranges, and `trials` and `timeout` of the search of a study file."""
    bases, seeds = _bases(content.get("bases", {"": {}})), content.get("seeds", [0])
    if len(bases) != 1 or len(seeds) != 1:
        raise UserError(f"{where}: a search is of one base with one seed; give one of each")
    options = {**next(iter(bases.values())), **content.get("options", {})}
    options |= {name: content[name] for name in ("data", "backward") if name in content}
    options |= {"seed": seeds[0]} if "seeds" in content else {}
    check_names(FitConfig, options, f"{where}, options")
    check_all([options], code, where)
    search = content["search"]
    about = {name: search[name] for name in SEARCH_ABOUT if name in search}
    check_table(about, SEARCH_ABOUT, where)
    ranges = {name: ends for name, ends in search.items() if name not in about}
    for name, ends in ranges.items():
        if not (is_of(ends, list[float]) and len(ends) == 2):
            raise UserError(
                f"{where}: search of {name} is {reprlib.repr(ends)}; give [LOW, HIGH], as numbers"
            )
    return options, {name: tuple(ends) for name, ends in ranges.items()} or None, about


def study_of(content: Mapping[str, Any], where: str, code: Sequence[str] = ()) -> Study:
    """Return the study that the content of a study file defines; refuse what can't be.

    `code` are the files of a prior or guide that it may name: whoever runs it names them, too.
    """
    options = dict(content.get("options", {}))
    data = named_sources(content.get("data", ()))
    is_named = "bases" in content or options.keys() & {"base", "prior_from"}
    check_base_named(bool(is_named), data.values())
    bases = _bases(content.get("bases", [options.pop("base", POCKET)]))
    settings = content.get("settings", {"": {}})
    for name, given in (("options", options), *settings.items(), *bases.items()):
        check_names(FitConfig, given, f"{where}, {name}")
        allowed = {"base", "revision", "backward"}
        if refused := given.keys() & SET_BY_THE_STUDY - allowed:
            raise UserError(f"{where}, {name} sets {min(refused)}; give data and seeds at the top")
    options |= {"backward": content["backward"]} if "backward" in content else {}
    methods = choose_methods(content.get("methods"), read_methods(content.get("method", {}), where))
    knobs = [{str(one.knob): value} for one in methods.values() for value in one.values]
    of_methods = [one.options for one in methods.values()]
    check_all([options, *settings.values(), *bases.values(), *of_methods, *knobs], code, where)
    prefix = "{} " if len(bases) > 1 else ""
    return Study(
        [
            Setting(label, f"{prefix.format(label)}{name}".strip(), {**base, **setting})
            for label, base in bases.items()
            for name, setting in settings.items()
        ],
        data,
        list(dict.fromkeys(content.get("seeds", [0]))),
        methods,
        options,
        neighbours=content.get("neighbours", True),
    )


def check_all(given: Iterable[Mapping[str, Any]], code: Sequence[str], where: str) -> None:
    """Refuse files of code that nobody but a study file names: they would be run."""
    for options in given:
        check_code(options, code, where, "give --code {name} to let it run")


def _bases(given: Any) -> dict[str, dict[str, Any]]:
    """Return options of base models by label."""
    bases: dict[str, Any] = named_sources(given) if isinstance(given, list) else given
    return {label: {"base": one} if isinstance(one, str) else one for label, one in bases.items()}


def short_study(
    *,
    methods: Sequence[str] | None = None,
    data: Mapping[str, Source] | Sequence[str],
    seeds: Sequence[int] = (0, 1, 2),
    settings: Sequence[str] = ("150x600", "400x400"),
    row: str | None = None,
    only_choose: bool = False,
    neighbours: bool = True,
    options: Mapping[str, Any] | None = None,
) -> Study:
    """Return the study that `blora-pyro compare` makes: built-in methods, LoRA among them.

    Args:
        methods: Names; None is all that are built in.
        data: New domains by name, or names of sources.
        seeds: Of the fits.
        settings: UTTERANCESxSTEPS.
        row: The only candidate, METHOD:VALUE, that is scored, without any choosing.
        only_choose: See `Study`.
        neighbours: See `Study`.
        options: Of `FitConfig`, for all fits.
    """
    given = dict(options or {})
    sources = named_sources(data)
    check_base_named(bool(given.keys() & {"base", "prior_from"}), sources.values())
    base = str(given.pop("base", POCKET))
    candidate = None if row is None else read_candidate(row)
    names = None if methods is None else [LORA, *methods]
    content = {
        "bases": {Path(base).name if Path(base).is_dir() else base: base},
        "data": data,
        "seeds": seeds,
        "settings": {text: _setting(text) for text in settings},
        "methods": names if candidate is None else [candidate.method.name],
        "options": given,
        "neighbours": neighbours,
    }
    return replace(study_of(content, "compare"), only_choose=only_choose, row=candidate)


def _setting(text: str) -> dict[str, int]:
    """Return the options of a text UTTERANCESxSTEPS, such as 150x200 or allx400."""
    match = SETTING.fullmatch(text)
    if not match:
        raise UserError(f"setting is '{text}'; give UTTERANCESxSTEPS, such as 150x600, or allx400")
    amount, steps = match.groups()
    return {**({} if amount == "all" else {"max_utterances": int(amount)}), "steps": int(steps)}
