"""What a study is: settings, data, seeds and methods; the options of its fits; all checks."""

import hashlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from blora_pyro.data import split_names
from blora_pyro.declarations import flag_of
from blora_pyro.errors import UserError
from blora_pyro.guides import with_prior_arguments
from blora_pyro.options import AUTO, POCKET, FitConfig, fit_command
from blora_pyro.runs.scoring import DEV_SPLITS
from blora_pyro.runs.shown import in_words
from blora_pyro.sources import Source, describe_source
from blora_pyro.studies.methods import AFTER, BASE, SHARE, Candidate, Method, is_of
from blora_pyro.studies.results import DEV, TEST, Key, ScoredFit
from blora_pyro.tables import Table, described, described_html, text_columns

SETTING = re.compile(r"(all|[1-9]\d*)x([1-9]\d*)")


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


@dataclass(frozen=True, repr=False)
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

    @property
    def _facts(self) -> dict[str, object]:
        names = [" ".join(filter(None, (one.base, one.name))) for one in self.settings]
        return {
            "settings": ", ".join(names),
            "data": ", ".join(self.data),
            "seeds": ", ".join(map(str, self.seeds)),
            "methods": ", ".join(self.methods),
        }

    def __repr__(self) -> str:
        """Tell what is compared in a few lines."""
        return described("Study", self._facts)

    def _repr_html_(self) -> str:
        """Tell the same in a notebook, with sections that can be opened."""
        methods = Table(text_columns("method", "knob", "values", "options"))
        for one in self.methods.values():
            methods.add_row(
                one.title or one.name, one.knob, in_words(one.values), in_words(one.options)
            )
        settings = Table(text_columns("base", "setting", "options"))
        for setting in self.settings:
            settings.add_row(setting.base, setting.title, in_words(setting.options))
        data = Table(text_columns("name", "source"))
        for name, source in self.data.items():
            data.add_row(name, describe_source(source))
        options = Table(text_columns("option", "value"))
        for name, value in self.options.items():
            options.add_row(flag_of(FitConfig, name), in_words(value))
        sections = {"Methods": methods, "Settings": settings, "Data": data, "Options": options}
        filled = {name: [table] for name, table in sections.items() if table.rows}
        return described_html("Study", self._facts, filled)

    def base_config(self, setting: Setting) -> FitConfig:
        """Return what all fits of a setting share."""
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
    def named(self) -> ScoredFit:
        """What its row is named, without results."""
        candidate, setting = self.candidate, self.setting
        names = (setting.base, setting.name, candidate.method.name, candidate.text)
        return ScoredFit(*names, self.data, self.seed, self.split)

    @property
    def key(self) -> Key:
        """What tells its row from others."""
        return self.named.key

    @property
    def scored(self) -> ScoredFit:
        """Its row without results, with the step after the fit and the command of the fit."""
        after = " ".join(f"{name} {value:g}" for name, value in self.after.items())
        return replace(
            self.named, after=after, command="" if self.is_base else fit_command(self.config)
        )

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
        """The options of its fit; of the base model those by which sets are read."""
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
            about += ["trimmed"] if config.trim_audio else []
            about += [str(most)] if (most := config.max_eval_utterances) else []
            about += [] if config.language_map == AUTO else [str(config.language_map)]
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


def deciding_words(command: str) -> list[str]:
    """Return the words of a command, but for where the base is and where the fit is computed."""
    words, left = iter(shlex.split(command)), []
    for word in words:
        if word in ("--base", "--revision", "--device", "--track"):
            next(words, None)
        elif word != "--local-files-only":
            left.append(word)
    return left


# ---- what is refused before the first fit


def check_study(study: Study) -> None:
    """Check everything that can be known without loading a base model.

    Raises:
        UserError: If a fit could not be made or scored.
    """
    if not (study.data and study.seeds and study.settings):
        raise UserError("no data, seed or setting is given; give one of each, or more")
    for seed in study.seeds:
        FitConfig(seed=seed)
    for setting in study.settings:
        backward = study.base_config(setting).backward_sets
        if not backward:
            raise UserError(
                f"base {setting.base} has no backward sets; give sets of what it already knows as "
                "backward"
            )
        base = Candidate(study.methods[BASE])
        alike = [one for one in study.settings if one.base == setting.base]
        for place, (name, source) in enumerate(study.data.items()):
            specs = [ScoreSpec(study, one, base, name, study.seeds[0], TEST) for one in alike]
            if len({spec.run for spec in specs}) > 1:
                raise UserError(
                    "settings differ in how the base is scored (normalizer, language, task, "
                    "backward sets, ...); give a study for each"
                )
            for candidate in _any_candidates(study):
                _check_spec(ScoreSpec(study, setting, candidate, name, study.seeds[0], TEST))
            _check_scored(study, source, on_dev=place == 0)
        for source in backward.values():
            _check_scored(study, source, on_dev=True)


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
        if name != BASE and not method.external:
            yield from values


def _check_spec(spec: ScoreSpec) -> None:
    """Refuse a candidate that can't be fitted, or whose fit can't be edited so."""
    text, options = spec.candidate.text, spec.candidate.options
    for name, possible, words in (
        ("strength", lambda value: 0 <= value <= 2, "a number from 0 to 2"),
        ("sparsity", lambda value: 0 <= value < 1, "a number from 0 to below 1"),
        (SHARE, lambda value: 0 < value < 1, "a number between 0 and 1"),
    ):
        if name in options and not (is_of(options[name], float) and possible(options[name])):
            raise UserError(f"method {text}: {name} is {options[name]}; give {words}")
    config = spec.config
    if config.pooling is not None:
        raise UserError(f"pooling is {config.pooling}; a study takes fits with pooling complete")
    for source in [*config.sources, *(config.backward_sets.values() if config.ewc else ())]:
        if "train" not in split_names(source):
            raise UserError(
                f"{describe_source(source)} has no train split, which method "
                f"{spec.candidate.method.name} learns from; give a set that has one, or leave the "
                "method out"
            )


def _check_scored(study: Study, source: Source, on_dev: bool) -> None:
    """Refuse a set without the splits that the study scores."""
    splits = [DEV] if on_dev and study.row is None else []
    for split in [*splits, *([] if study.only_choose else [TEST])]:
        known = DEV_SPLITS if split == DEV else (TEST,)
        if not {*known} & {*split_names(source)}:
            raise UserError(
                f"{describe_source(source)} has no {split} split; a study chooses on dev and "
                "reports on test: give a folder or data set with train, dev and test"
            )
