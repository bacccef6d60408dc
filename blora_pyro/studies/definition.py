"""What a study is: the TOML file that defines it, the options of its fits, and all checks.

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

import hashlib
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blora_pyro.data import split_names
from blora_pyro.declarations import check_names, suggestion
from blora_pyro.errors import UserError
from blora_pyro.families import is_code
from blora_pyro.guides import with_prior_arguments
from blora_pyro.options import POCKET, FitConfig, fit_command
from blora_pyro.runs.record import RUN
from blora_pyro.runs.scoring import DEV_SPLITS
from blora_pyro.sources import Source, describe_source, named_sources
from blora_pyro.studies.methods import (
    AFTER,
    LORA,
    SHARE,
    Candidate,
    Method,
    choose_methods,
    read_candidate,
    read_methods,
)
from blora_pyro.studies.results import BASE, DEV, TEST, Key, ScoredFit

SETTING = re.compile(r"(all|[1-9]\d*)x([1-9]\d*)")
KEYS = ("output", "results", "bases", "data", "backward", "seeds", "methods", "neighbours")
TABLES = ("options", "settings", "method", "search")
MACHINE_OPTIONS = ("device", "local_files_only", "track")  # they decide nothing of what is found


@dataclass(frozen=True)
class Setting:
    """A base model and options: one table of results.

    Attributes:
        base: Label of the base model.
        name: Of the setting, after the base's where there are several; "" if there is only one.
        options: Of its fits.
    """

    base: str
    name: str
    options: Mapping[str, Any]

    @property
    def title(self) -> str:
        """In words: "150 utterances, 200 steps" for 150x200."""
        match = SETTING.fullmatch(self.name)
        return "{} utterances, {} steps".format(*match.groups()) if match else self.name


@dataclass(frozen=True)
class Study:
    """Methods, fitted to data sets with seeds in settings.

    Attributes:
        settings: One or more.
        data: New domains by name; on the first the values of knobs are chosen.
        seeds: Of the fits; the values of knobs are chosen with the first.
        methods: By name, parents before children; `base` is the first.
        options: Of every fit.
        only_choose: Stop after the choice on the dev sets.
        neighbours: Also score the values next to the chosen one on the test sets.
        row: The only candidate that is scored, on the test sets; None chooses.
    """

    settings: Sequence[Setting]
    data: Mapping[str, Source]
    seeds: Sequence[int]
    methods: Mapping[str, Method]
    options: Mapping[str, Any] = field(default_factory=dict)
    only_choose: bool = False
    neighbours: bool = True
    row: Candidate | None = None

    def base_config(self, setting: Setting) -> FitConfig:
        """Return what all fits of a setting share.

        Raises:
            UserError: If an option can't be.
        """
        return FitConfig(**{**self.options, **setting.options})


@dataclass(frozen=True)
class ScoreSpec:
    """A score that is wanted: of a candidate, fitted to a data set with a seed, on a split.

    Attributes:
        study: Of which it is one.
        setting: Base and options.
        candidate: A method at a value of its knob.
        data: Name of the data set.
        seed: Of the fit.
        split: `dev` or `test`, of the data set and of the backward sets.
    """

    study: Study
    setting: Setting
    candidate: Candidate
    data: str
    seed: int
    split: str

    @property
    def scored(self) -> ScoredFit:
        """What its row is named, without results."""
        candidate, setting = self.candidate, self.setting
        names = (setting.base, setting.name, candidate.method.name, candidate.text)
        command = "" if self.is_base else fit_command(self.config)
        after = " ".join(f"{name} {value:g}" for name, value in self.after.items())
        return ScoredFit(*names, self.data, self.seed, self.split, after=after, command=command)

    @property
    def key(self) -> Key:
        """What tells its row from others."""
        setting = self.setting
        names = (setting.base, setting.name, self.candidate.method.name, self.candidate.text)
        return ScoredFit(*names, self.data, self.seed, self.split).key

    @property
    def title(self) -> str:
        """In one line."""
        where = ", ".join(part for part in (self.setting.name, self.data) if part)
        return f"{self.candidate.text}, {where}, seed {self.seed}, {self.split}"

    @property
    def is_base(self) -> bool:
        """Whether it is that of the base model as it is."""
        return self.candidate.method.name == BASE

    @property
    def after(self) -> dict[str, float]:
        """What is done to the fit before it is scored: `sparsity`, `strength`."""
        options = self.candidate.options
        return {name: float(options[name]) for name in AFTER if name in options}

    @property
    def config(self) -> FitConfig:
        """The options of its fit; of the base model those by which sets are read.

        Raises:
            UserError: If they can't be, naming the method.
        """
        study, candidate = self.study, self.candidate
        common = study.base_config(self.setting)
        options = {**study.options, **self.setting.options, **candidate.options}
        options = {name: value for name, value in options.items() if name not in AFTER}
        share = options.pop(SHARE, None)
        options |= {"seed": self.seed, "data": (study.data[self.data],)}
        if share is not None:
            sets = common.backward_sets
            options["data"] += tuple(sets.values())
            options["data_weights"] = (1.0 - share, *[share / len(sets)] * len(sets))
        try:
            config = FitConfig(**options)
            with_prior_arguments(config)  # refuses what the prior does not take
        except UserError as error:
            raise UserError(f"method {candidate.text}: {error}") from None
        return config

    @property
    def run(self) -> str:
        """Name of the run folder, which candidates that share a fit share."""
        config, base = self.study.base_config(self.setting), self.setting.base
        if self.is_base:
            about = [describe_source(one) for one in config.backward_sets.values()]
            about += [describe_source(self.study.data[self.data]), config.normalizer, config.task]
            about += [str(config.language), config.on_bad_row, config.base, str(config.revision)]
            return _file_name("base", base, self.data, _digits("\n".join(about)))
        text, name = self.candidate.fitted.text.replace(":", "-"), self.setting.name
        base = "" if base == POCKET or name.startswith(base) else base
        return _file_name(text, base, name, self.data, f"seed{self.seed}")


def _file_name(*parts: str) -> str:
    """Return parts as one name of a file; one that had to be changed has digits at its end."""
    text = "_".join(part for part in parts if part)
    safe = re.sub(r"[^\w.-]+", "-", text).strip("-.")[-120:]
    return safe if safe == text else f"{safe}-{_digits(text)}"


def _digits(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def to_go_on(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return options of a fit; of one that was begun without those in which machines differ."""
    begun = (folder / RUN).exists()
    return {
        name: value for name, value in options.items() if not (begun and name in MACHINE_OPTIONS)
    }


def deciding_words(command: str) -> list[str]:
    """Return the words of a command, but for where the base is and where the fit is computed."""
    words = shlex.split(command)
    left: list[str] = []
    while words:
        word = words.pop(0)
        if word in ("--base", "--revision", "--device", "--track") and words:
            words.pop(0)
        elif word != "--local-files-only":
            left.append(word)
    return left


# ---- the file


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
    (base,) = [*_bases(content.get("bases", [POCKET]), where).values()][:1]
    options = {**base, **content.get("options", {})}
    options |= {name: content[name] for name in ("data", "backward") if name in content}
    if "seeds" in content:
        options["seed"] = content["seeds"][0]
    check_names(FitConfig, options, f"{where}, options")
    check_code([options], code, where)
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
    bases = _bases(content.get("bases", [options.pop("base", POCKET)]), where)
    for name, given in (("options", options), *settings.items(), *bases.items()):
        check_names(FitConfig, given, f"{where}, {name}")
        if refused := given.keys() & {"data", "seed", "data_weights", "dev", "test"}:
            raise UserError(f"{where}, {name} sets {min(refused)}; give data and seeds at the top")
    methods_by_name = choose_methods(methods, read_methods(content.get("method", {}), where))
    every = [options, *settings.values(), *bases.values()]
    check_code([*every, *(one.options for one in methods_by_name.values())], code, where)
    prefix = "{} " if len(bases) > 1 else ""
    return Study(
        [
            Setting(label, f"{prefix.format(label)}{name}".strip(), {**base, **setting})
            for label, base in bases.items()
            for name, setting in settings.items()
        ],
        named_sources(content.get("data", ())),
        list(dict.fromkeys(seeds)),
        methods_by_name,
        options,
        neighbours=bool(content.get("neighbours", True)),
    )


def check_code(given: Sequence[Mapping[str, Any]], code: Sequence[str], where: str) -> None:
    """Refuse files of code that nobody but a study file names: they would be run.

    Raises:
        UserError: Naming the first.
    """
    for options in given:
        for name in ("prior", "guide"):
            path = options.get(name)
            if is_code(path) and path not in code:
                raise UserError(
                    f"{where} names {path}, a file of code; give --code {path} to let it run"
                )


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
    base = str(given.pop("base", POCKET))
    label = Path(base).name if Path(base).is_dir() else base
    names = None if methods is None else [LORA, *methods]
    candidate = None if row is None else read_candidate(row)
    return Study(
        [
            replace(one, options={"base": base, **one.options})
            for one in short_settings(settings, label)
        ],
        named_sources(data),
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


# ---- what is refused before the first fit


def check_study(study: Study) -> None:
    """Check everything that can be known without loading a base model.

    Raises:
        UserError: If a fit could not be made or scored.
    """
    if not (study.data and study.seeds and study.settings):
        raise UserError("no data, seed or setting is given; give one of each, or more")
    on_dev = study.row is None
    for setting in study.settings:
        config = study.base_config(setting)
        if not config.backward_sets:
            raise UserError(
                f"base {setting.base} has no backward sets; give sets of what it already knows as "
                "backward"
            )
        for candidate in _any_candidates(study):
            for name in study.data:
                spec = ScoreSpec(study, setting, candidate, name, study.seeds[0], TEST)
                _check_after(spec)
                _check_training(spec)
        for place, source in enumerate(study.data.values()):
            _check_scored(source, on_dev and place == 0, not study.only_choose)
        for source in config.backward_sets.values():
            _check_scored(source, on_dev, not study.only_choose)


def _any_candidates(study: Study) -> Iterator[Candidate]:
    """Yield every method that is fitted here at every value, its parents at their first."""
    if study.row is not None:
        yield study.row
        return
    first: dict[str, Candidate] = {}
    for name, method in study.methods.items():
        parent = first.get(method.of) if method.of else None
        values = [Candidate(method, value, parent) for value in method.choices]
        first[name] = values[0]
        if not method.external:
            yield from values


def _check_after(spec: ScoreSpec) -> None:
    strength, sparsity = spec.after.get("strength", 1.0), spec.after.get("sparsity", 0.0)
    if not 0 <= strength <= 2 or not 0 <= sparsity < 1:
        raise UserError(
            f"method {spec.candidate.text}: strength is {strength:g} and sparsity {sparsity:g}; "
            "give a strength from 0 to 2, and a sparsity from 0 to below 1"
        )
    share = spec.candidate.options.get(SHARE, 0.5)
    if not (isinstance(share, int | float) and 0 < share < 1):
        raise UserError(f"method {spec.candidate.text}: share is {share}; give one between 0 and 1")


def _check_training(spec: ScoreSpec) -> None:
    if spec.is_base:
        return
    config = spec.config
    if config.pooling is not None:
        raise UserError(f"pooling is {config.pooling}; a study takes fits with pooling complete")
    sources = [*config.sources, *(config.backward_sets.values() if config.ewc else ())]
    for source in sources:
        if "train" not in split_names(source):
            raise UserError(
                f"{describe_source(source)} has no train split, which method "
                f"{spec.candidate.method.name} learns from; give a set that has one, or leave the "
                "method out"
            )


def _check_scored(source: Source, on_dev: bool, on_test: bool) -> None:
    names = split_names(source)
    for split, wanted, known in ((DEV, on_dev, DEV_SPLITS), (TEST, on_test, (TEST,))):
        if wanted and not {*known} & {*names}:
            raise UserError(
                f"{describe_source(source)} has no {split} split; a study chooses on dev and "
                "reports on test: give a folder or data set with train, dev and test"
            )
