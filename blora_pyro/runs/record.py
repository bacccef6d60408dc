"""The content of `run.json`, as a typed record."""

import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from blora_pyro.errors import UserError
from blora_pyro.files import write_json
from blora_pyro.fitting.svi import Step
from blora_pyro.options import FitConfig

RUN = "run.json"
FITTING, EVALUATING, FINISHED = "fitting", "evaluating", "finished"  # states of a run
PACKAGES = ("blora-pyro", "torch", "pyro-ppl", "transformers", "datasets", "peft", "jiwer")


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
        pruned: How the run was made of another by pruning, see `prune_run`.
        combined: How the run was made of several, see `combine_runs`.
        other: Further content of the file.
    """

    state: str = FITTING
    options: dict[str, Any] | None = None
    config: FitConfig | None = None
    chain: list[dict[str, Any]] | None = None
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
    dev: dict[str, Any] | None = None
    pruned: dict[str, Any] | None = None
    combined: dict[str, Any] | None = None
    other: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """Return the record of JSON content, of this version or an earlier one.

        Raises:
            KeyError, TypeError, ValueError, AttributeError, UserError: If it is none.
        """
        known = {one.name for one in fields(cls)} - {"other"}
        values = {name: value for name, value in content.items() if name in known}
        other = {name: value for name, value in content.items() if name not in known}
        record = cls(**{"state": FINISHED, **values}, other=other)
        for how in (record.pruned, record.combined):
            if how is not None and not isinstance(how["from"], str | list):
                raise ValueError(f"'from' is {how['from']!r}")
        if record.config is not None:
            record.config = FitConfig(**values["config"])
            record.language = values["language"]  # may be null, but not missing
        if record.history is not None:
            record.history = [Step(**step) for step in values["history"]]
        return record

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return the record of a run folder.

        Raises:
            UserError: If there is none, or it is damaged.
        """
        try:
            return cls.from_json(json.loads((folder / RUN).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
            raise UserError(f"{folder / RUN} is missing or damaged ({error}); fit again") from None

    def to_json(self) -> dict[str, Any]:
        """Return the content of `run.json`."""
        content = {one.name: getattr(self, one.name) for one in fields(self)} | self.other
        del content["other"]
        if self.config is not None:
            content["config"] = self.config.to_json()
        if self.history is not None:
            content["history"] = [asdict(step) for step in self.history]
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
        content = json.loads((folder / RUN).read_text(encoding="utf-8"))
        return str(content.get("state", FINISHED))
    except (OSError, ValueError, AttributeError):
        return None


def versions() -> dict[str, str]:
    """Return the versions of Python and of `PACKAGES`."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}
