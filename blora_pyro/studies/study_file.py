"""Study files (TOML), and the short form of a study that needs no file.

    output = "runs/priors"          # where fits are kept; runs/NAME-OF-THE-FILE by default
    results = "priors.csv"          # beside this file; OUTPUT/results.csv by default
    bases = ["pocket"]              # or a table: NAME = "BASE", or NAME = { base = ..., ... }
    data = ["zh-en", "de-en"]       # new domains, with splits train, dev and test; or a table
    backward = ["de", "en"]         # held-out sets, with dev and test; as the base's by default
    seeds = [0, 1, 2]
    methods = ["lora", "blora", "mine"]
    neighbours = true               # also score the values next to the chosen one on test

    [options]                       # of every fit, as of `blora-pyro fit`
    rank = 16

    [settings.short]                # further options; a table of results each
    max_utterances = 150
    steps = 200

    [method.mine]                   # as in methods.toml; replaces one of that name
    title = "BLoRA, Student's t"
    family = "priors"
    knob = "beta"
    values = [1e-6, 1e-5]
    options = { prior = "student-t", lr = 5e-3 }

With a table `[search]` instead of methods the study is a search, see `search`.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blora_pyro.declarations import check_names, suggestion
from blora_pyro.errors import UserError
from blora_pyro.families import check_code
from blora_pyro.options import POCKET, FitConfig, check_base_named
from blora_pyro.sources import Source, named_sources
from blora_pyro.studies.definition import SETTING, Setting, Study
from blora_pyro.studies.methods import LORA, choose_methods, read_candidate, read_methods

KEYS = ("output", "results", "bases", "data", "backward", "seeds", "methods", "neighbours")
TABLES = ("options", "settings", "method", "search")


def read_study_file(path: Path) -> dict[str, Any]:
    """Return what a study file holds, its keys checked.

    Raises:
        UserError: In one line, if it can't be read.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no study file ({error}); give a TOML file") from None
    for name in content:
        if name not in (*KEYS, *TABLES):
            listed = suggestion(name, (*KEYS, *TABLES))
            raise UserError(f"{path} has no '{name}'{listed or '; see the docs on studies'}")
    for name in ("options", "settings", "method", "search"):
        if not isinstance(content.get(name, {}), Mapping):
            raise UserError(f"{path}: {name} is {content[name]!r}; give a table [{name}]")
    if "search" in content and {"methods", "method", "settings"} & content.keys():
        raise UserError(f"{path} has both methods and a search; give one study file for each")
    return content


def open_study(path: Path, output: Path | None = None) -> tuple[dict[str, Any], Path, Path]:
    """Return what a study file holds, the folder of its fits, and its table of results.

    Raises:
        UserError: See `read_study_file`.
    """
    content = read_study_file(path)
    if output is None:
        output = Path(content.get("output", Path("runs") / path.stem))
    results = content.get("results")
    return content, output, output / "results.csv" if results is None else path.parent / results


def search_of(
    content: Mapping[str, Any], where: str, code: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, tuple[float, float]] | None, dict[str, Any]]:
    """Return the search of a study file: options of its fits, ranges, and `trials` and `timeout`.

    Raises:
        UserError: If something in it can't be.
    """
    (base,) = [*_bases(content["bases"], where).values()][:1] if "bases" in content else [{}]
    options = {**base, **content.get("options", {})}
    options |= {name: content[name] for name in ("data", "backward") if name in content}
    if "seeds" in content:
        options["seed"] = content["seeds"][0]
    check_names(FitConfig, options, f"{where}, options")
    check_all([options], code, where)
    search = dict(content["search"])
    about = {name: search.pop(name) for name in ("trials", "timeout") if name in search}
    for name, ends in search.items():
        if not (_is_list(ends, int | float) and len(ends) == 2):
            raise UserError(f"{where}: search of {name} is {ends!r}; give [LOW, HIGH]")
    return options, {name: tuple(ends) for name, ends in search.items()} or None, about


def study_of(content: Mapping[str, Any], where: str, code: Sequence[str] = ()) -> Study:
    """Return the study that a study file defines.

    Args:
        content: Of `read_study_file`.
        where: The file, for messages.
        code: Files of code (of a prior or guide) that it may name: whoever runs it names them, too.

    Raises:
        UserError: If something in it can't be.
    """
    methods = content.get("methods")
    if methods is not None and not _is_list(methods, str):
        raise UserError(f"{where}: methods is {methods!r}; give a list of names")
    seeds = content.get("seeds", [0])
    if not _is_list(seeds, int):
        raise UserError(f"{where}: seeds is {seeds!r}; give whole numbers, such as [0, 1, 2]")
    options = dict(content.get("options", {}))
    if "backward" in content:
        options["backward"] = content["backward"]
    settings = content.get("settings") or {"": {}}
    data = named_sources(content.get("data", ()))
    is_named = "bases" in content or options.keys() & {"base", "prior_from"}
    check_base_named(bool(is_named), data.values())
    bases = _bases(content.get("bases", [options.pop("base", POCKET)]), where)
    for name, given in (("options", options), *settings.items(), *bases.items()):
        check_names(FitConfig, given, f"{where}, {name}")
        if refused := given.keys() & {"data", "seed", "data_weights", "dev", "test"}:
            raise UserError(f"{where}, {name} sets {min(refused)}; give data and seeds at the top")
    methods_by_name = choose_methods(methods, read_methods(content.get("method", {}), where))
    every = [options, *settings.values(), *bases.values()]
    knobs = [{str(one.knob): value} for one in methods_by_name.values() for value in one.values]
    check_all([*every, *(one.options for one in methods_by_name.values()), *knobs], code, where)
    neighbours = content.get("neighbours", True)
    if not isinstance(neighbours, bool):
        raise UserError(f"{where}: neighbours is {neighbours!r}; give true or false")
    prefix = "{} " if len(bases) > 1 else ""
    return Study(
        [
            Setting(label, f"{prefix.format(label)}{name}".strip(), {**base, **setting})
            for label, base in bases.items()
            for name, setting in settings.items()
        ],
        data,
        list(dict.fromkeys(seeds)),
        methods_by_name,
        options,
        neighbours=neighbours,
    )


def check_all(given: Sequence[Mapping[str, Any]], code: Sequence[str], where: str) -> None:
    """Refuse files of code that nobody but a study file names: they would be run.

    Raises:
        UserError: Naming the first.
    """
    for options in given:
        check_code(options, code, where, "give --code {name} to let it run")


def _is_list(value: Any, kind: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, kind) for one in value)


def _bases(given: Any, where: str) -> dict[str, dict[str, Any]]:
    """Return options of base models by label."""
    if _is_list(given, str):
        given = named_sources(given)
    if not isinstance(given, Mapping) or not given:
        raise UserError(f'{where}: bases is {given!r}; give a list, such as ["pocket"], or a table')
    found = {}
    for label, one in given.items():
        found[label] = {"base": one} if isinstance(one, str) else one
        if not isinstance(found[label], Mapping):
            raise UserError(f"{where}: base {label} is {one!r}; give a name, or a table of options")
    return found


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
        only_choose: Stop after the choice on the dev sets.
        neighbours: Also score the values next to the chosen one on the test sets.
        options: Of `FitConfig`, for all fits.

    Raises:
        UserError: If one of them can't be.
    """
    given = dict(options or {})
    sources = named_sources(data)
    check_base_named(bool(given.keys() & {"base", "prior_from"}), sources.values())
    base = str(given.pop("base", POCKET))
    label = Path(base).name if Path(base).is_dir() else base
    names = None if methods is None else [LORA, *methods]
    candidate = None if row is None else read_candidate(row)
    return Study(
        [
            replace(one, options={"base": base, **one.options})
            for one in short_settings(settings, label)
        ],
        sources,
        list(dict.fromkeys(seeds)),
        choose_methods(names if candidate is None else [candidate.method.name]),
        given,
        only_choose,
        neighbours,
        candidate,
    )


def short_settings(texts: Sequence[str], base: str) -> list[Setting]:
    """Return the settings of texts UTTERANCESxSTEPS, such as 150x200 or allx400.

    Raises:
        UserError: If one is no such text.
    """
    found = []
    for text in texts:
        match = SETTING.fullmatch(text)
        if not match:
            raise UserError(
                f"setting is '{text}'; give UTTERANCESxSTEPS, such as 150x600, or allx400"
            )
        amount, steps = match.groups()
        size = {} if amount == "all" else {"max_utterances": int(amount)}
        found.append(Setting(base, text, {**size, "steps": int(steps)}))
    return found
