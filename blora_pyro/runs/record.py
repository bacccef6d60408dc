"""The content of `run.json`, as a typed record.

Nothing here imports torch, so that runs are listed at once.
"""

import importlib.metadata
import platform
import sys
import types
import typing
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NotRequired, Self, TypedDict, get_args, get_origin, get_type_hints

from blora_pyro.errors import UserError, reason
from blora_pyro.files import read_json, write_json
from blora_pyro.fitting.history import DevErrors, Ended, Step
from blora_pyro.options import AVERAGE, EACH, FitConfig

RUN, METRICS = "run.json", "metrics.json"  # see `measurements` for the second
FITTING: Literal["fitting"] = "fitting"  # states of a run
EVALUATING: Literal["evaluating"] = "evaluating"
FINISHED: Literal["finished"] = "finished"
PACKAGES = ("blora-pyro", "torch", "pyro-ppl", "transformers", "datasets", "peft", "jiwer")


class Link(TypedDict):
    """A run that another continues; see `Previous.link`."""

    run: str
    fingerprint: str
    inflation: float


# How a run was made of others, and its sizes: see `prune_run` and `combine_runs`.
Size = dict[str, int]
Pruned = TypedDict(
    "Pruned",
    {
        "from": str,
        "rank": NotRequired[int | None],
        "snr": NotRequired[float | None],
        "sparsity": NotRequired[float | None],
        "full": NotRequired[Size],
        "pruned": NotRequired[Size],
    },
)
Combined = TypedDict(
    "Combined",
    {
        "from": list[str],
        "method": NotRequired[str],
        "weights": NotRequired[list[float] | None],
        "rank": NotRequired[int],
        "adapter_weights": NotRequired[int],
        "kept_norm": NotRequired[float],
    },
)


class Kept(TypedDict):
    """A contract on the dev sets, and the strength that keeps it; see `contracts.keep_contract`.

    Limits and losses are fractions.
    """

    limits: dict[str, float]
    confidence: float
    strength: float
    losses: dict[str, float]
    curve: dict[str, Any]


@dataclass
class RunRecord:
    """The content of `run.json`. A field that is None is not in the file.

    Attributes:
        state: `fitting`, `evaluating` or `finished`.
        options: Options of the fit, as given; see `FitConfig.to_json`.
        config: The resolved options; None until the data are loaded.
        chain: The runs that this one continues, oldest first; see `Previous.link`.
        language: Language of the training data; None if it is to be given or detected.
        domain_languages: The same for each domain, if each has an adapter of its own.
        training_utterances: Number of utterances; None if they are streamed.
        training_tokens: N, their number of target tokens, likewise.
        temperature: T = beta · N.
        adapter_weights: Number of elements of A and B.
        code_sha256: SHA-256 of the user's files among prior and guide, see `code_hashes`.
        versions: Versions of Python and of the packages that the fit depends on.
        seconds: Duration of the `fit`, and in `total`.
        skipped_steps: Steps whose loss or gradient was not finite.
        history: One `Step` for each step of SVI.
        dev: Errors on the dev set, the best step, and what ended the fit, with `eval_every`.
        kept: The contract and the strength that keeps it, with `keep`; None until it is chosen.
        ended_by: `alarm`, if one ended the fit early; then `alarm` has the steps and the reason.
        alarm: See `Ended`.
        pruned: How the run was made of another by pruning, see `prune_run`.
        combined: How the run was made of several, see `combine_runs`.
        other: Further content of the file.
    """

    state: Literal["fitting", "evaluating", "finished"] = FITTING
    options: dict[str, Any] | None = None
    config: FitConfig | None = None
    chain: list[Link] | None = None
    language: str | None = None
    domain_languages: dict[str, str] | None = None
    training_utterances: int | None = None
    training_tokens: int | None = None
    temperature: float | None = None
    adapter_weights: int | None = None
    code_sha256: dict[str, str] | None = None
    versions: dict[str, str] | None = None
    seconds: dict[str, float] | None = None
    skipped_steps: int | None = None
    history: list[Step] | None = None
    dev: DevErrors | None = None
    kept: Kept | None = None
    ended_by: Literal["alarm"] | None = None
    alarm: Ended | None = None
    pruned: Pruned | None = None
    combined: Combined | None = None
    other: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """Return the record of JSON content, of this version or an earlier one.

        Raises:
            ValueError: If it is none, naming the key.
        """
        kinds = {name: kind for name, kind in type_hints(RunRecord).items() if name != "other"}
        values = {name: value for name, value in content.items() if name in kinds}
        other = {name: value for name, value in content.items() if name not in kinds}
        for name, kind in kinds.items():
            stored = dict[str, Any] | None if name == "config" else kind
            if name in values and not conforms(values[name], stored):
                raise ValueError(f"'{name}' is {reason(ValueError(values[name]), 60)}")
        record = cls(**{"state": FINISHED, **values}, other=other)
        try:
            if record.config is not None:
                record.config = FitConfig(**values["config"])
                record.language = values["language"]  # may be null, but not missing
            if record.history is not None:
                record.history = [Step(**step) for step in values["history"]]
            dev = values.get("dev")
            if dev is not None and dev["best_step"] not in [one["step"] for one in dev["errors"]]:
                raise ValueError("'dev' has no errors with one of its best step")
            if record.kept is not None:
                known = {AVERAGE, EACH, *record.resolved.backward_sets}
                if unknown := record.kept["limits"].keys() - known:
                    raise ValueError(f"'kept' has limits for {min(unknown)!r:.60}, no backward set")
        except (KeyError, TypeError, UserError) as error:
            raise ValueError(str(error)) from None
        return record

    @classmethod
    def read(cls, folder: Path, way_on: str = "fit again") -> Self:
        """Return the record of a run folder.

        Args:
            folder: The folder.
            way_on: What to do if there is none.

        Raises:
            UserError: If there is none, or it is damaged.
        """
        try:
            return cls.from_json(read_json(folder / RUN))
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or reason(error)
            raise UserError(f"{folder / RUN} is missing or damaged ({why}); {way_on}") from None

    def to_json(self) -> dict[str, Any]:
        """Return the content of `run.json`."""
        content = {one.name: getattr(self, one.name) for one in fields(self)} | self.other
        del content["other"]
        if self.config is not None:
            content["config"] = self.config.to_json()
        if self.history is not None:
            content["history"] = [step.to_json() for step in self.history]
        always = {"language"} if self.config is not None else set()  # where None means something
        if self.history is not None:
            always |= {"training_utterances", "training_tokens", "temperature"}
        return {k: v for k, v in content.items() if v is not None or k in always}

    def write(self, folder: Path) -> None:
        """Put the record into a folder, whole and on the disk.

        Raises:
            OSError: If it can't be written.
        """
        write_json(folder / RUN, self.to_json())

    @property
    def resolved(self) -> FitConfig:
        """Return the resolved configuration.

        Raises:
            UserError: If the fit has not got that far.
        """
        if self.config is None:
            raise UserError("the run has no configuration yet; go on with its fit")
        return self.config

    @property
    def awaits_contract(self) -> bool:
        """Return whether the fit is done, and the strength that keeps its contract not chosen."""
        has_contract = self.config is not None and self.config.keep is not None
        return self.state == EVALUATING and has_contract and self.kept is None

    @property
    def made_of(self) -> tuple[str, str] | None:
        """Return how the run was edited, `pruned` or `combined`, and from what; None of a fit."""
        for how, about in (("pruned", self.pruned), ("combined", self.combined)):
            if about is not None:
                origin = about["from"]
                return how, origin if isinstance(origin, str) else " or ".join(origin)
        return None


def state_of(folder: Path) -> str | None:
    """Return the state of the run in a folder; None if there is none, or it can't be read."""
    try:
        return str(read_json(folder / RUN).get("state", FINISHED))
    except (OSError, ValueError):
        return None


@cache
def type_hints(kind: Any) -> dict[str, Any]:
    """Return the types of the fields or keys of a class, as `conforms` takes them."""
    return get_type_hints(kind, include_extras=True)


@cache
def _parts(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    return get_origin(kind) or kind, get_args(kind)


def conforms(value: Any, kind: Any) -> bool:
    """Return whether a value of JSON is of a type: a class, a union, or what holds such.

    Numbers are finite, and whole ones fit into 64 bits. Of dataclasses and typed dictionaries the
    keys and the values count.
    """
    origin, parts = _parts(kind)
    match origin:
        case typing.Union | types.UnionType:
            return any(conforms(value, part) for part in parts)
        case typing.Literal:
            return isinstance(value, str) and value in parts
        case typing.NotRequired:
            return conforms(value, parts[0])
        case origin if origin is dict:
            return isinstance(value, dict) and all(
                conforms(one, parts[1]) for one in value.values()
            )
        case origin if origin is list:
            return isinstance(value, list) and all(conforms(one, parts[0]) for one in value)
        case origin if is_dataclass(origin) or typing.is_typeddict(origin):
            return isinstance(value, dict) and _conforms_by_key(value, origin)
        case origin if origin is float:
            is_number = isinstance(value, float | int) and not isinstance(value, bool)
            return is_number and abs(value) < sys.float_info.max
        case origin if origin is int:
            return type(value) is int and abs(value) < 2**63
    return kind is Any or isinstance(value, kind)


def _conforms_by_key(value: dict[str, Any], kind: Any) -> bool:
    kinds = type_hints(kind)
    if is_dataclass(kind):
        wanted = {one.name for one in fields(kind) if one.default is MISSING}
    else:
        wanted = kind.__required_keys__
    return value.keys() >= wanted and all(
        name in kinds and conforms(one, kinds[name]) for name, one in value.items()
    )


def versions() -> dict[str, str]:
    """Return the versions of Python and of `PACKAGES`."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}
