"""The folder of a fit: how it keeps what it has, says what is safe, and is opened again."""

import importlib.metadata
import json
import platform
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from blora_pyro.errors import UserError
from blora_pyro.families import is_code
from blora_pyro.files import write_json
from blora_pyro.fitting.checkpoints import stored_step
from blora_pyro.fitting.stopping import EarlyStopping
from blora_pyro.fitting.svi import Step
from blora_pyro.options import FitConfig
from blora_pyro.posterior import Family, Posterior
from blora_pyro.runs.chains import Previous, previous_of
from blora_pyro.runs.folders import (
    CHECKPOINT,
    EVALUATING,
    FINISHED,
    FITTING,
    METRICS,
    RESULTS,
    RUN,
    TRANSCRIPTS,
    UNFINISHED,
    UTTERANCES,
    claim,
    remove_files,
    save_posterior,
)
from blora_pyro.runs.skipped_rows import SKIPPED, SkippedRow, SkippedRows
from blora_pyro.runs.utterances import write_utterances

PACKAGES = ("blora-pyro", "torch", "pyro-ppl", "transformers", "datasets", "peft", "jiwer")


class FitFolder:
    """The folder of a fit, from its first second to its end.

    `run.json` is there from the start, with the options, so that the fit can go on after a kill at
    any moment; its `state` tells how far it has come. Without a path nothing is kept.

    Attributes:
        path: The folder, or None.
        config: The options of the fit.
        about: What `run.json` holds.
        previous: The run whose posterior is the prior of a fit that is to go on, if any.
    """

    def __init__(
        self,
        path: Path | None,
        config: FitConfig,
        about: dict[str, Any],
        previous: Previous | None = None,
    ) -> None:
        """See `create` and `reopen`."""
        self.path, self.config, self.about, self.previous = path, config, about, previous
        self._occupied = False
        self._skipped: SkippedRows | None = None

    @classmethod
    def create(
        cls,
        path: Path | None,
        config: FitConfig,
        overwrite: bool,
        previous: Previous | None = None,
    ) -> "FitFolder":
        """A folder for a new fit. An earlier run in it stays whole until `begin`.

        Raises:
            UserError: See `claim`; or if it is the folder of the run that is carried on.
        """
        about: dict[str, Any] = {"state": FITTING, "options": config.to_json()}
        if previous is not None:
            if path is not None and path.resolve() == Path(previous.folder).resolve():
                raise UserError(f"output and prior_from are both {path}; give another output")
            about["chain"] = previous.link(config.prior_inflation)
        folder = cls(path, config, about, previous)
        if path is not None:
            claim(path, overwrite)
            folder._occupied = any((path / name).exists() for name in (RUN, *RESULTS))
            try:
                if not folder._occupied:
                    folder._write()
            except OSError as error:
                why = error.strerror
                raise UserError(f"output '{path}' can't be written ({why}); give another") from None
        return folder

    @classmethod
    def reopen(cls, path: Path, config: FitConfig) -> "FitFolder":
        """Open the folder of a fit that has been started.

        Args:
            path: The folder.
            config: Its given options must be those of the fit. A prior or guide that is a user's
                file must be among them: its code is run only where it is named.

        Raises:
            UserError: If there is none, it is damaged, an option is another, or the run that it
                continues has changed before it was fitted.
        """
        given = config.given_options
        try:
            about = json.loads((path / RUN).read_text(encoding="utf-8"))
            about.setdefault("state", FINISHED)
            stored = about.get("options") or about["config"]
            # with what were objects of Python, and texts in the file
            config = FitConfig(**{**stored, **given})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path / RUN} is damaged ({error}); start again with --overwrite"
            ) from None
        wanted = json.loads(json.dumps(config.to_json()))
        for name in given:
            value, known = wanted[name], [stored.get(name), about.get("config", {}).get(name)]
            if value not in known:
                raise UserError(
                    f"the fit in {path} has {name} = {known[0]}, not {value}; leave the option "
                    "out, or start another fit in another output"
                )
        for name in ("prior", "guide"):
            if is_code(stored.get(name)) and name not in given:
                raise UserError(
                    f"the run's {name} is code, in {stored[name]}; name it with --{name} to run it"
                )
        going_on = about["state"] == FITTING
        previous = previous_of(config, about.get("chain", [])) if going_on else None
        return cls(path, config, about, previous)

    @classmethod
    def follow(cls, about: Mapping[str, Any], config: FitConfig) -> "FitFolder":
        """Return what a process that writes nothing needs of the folder that the main one has open.

        Args:
            about: `state`, `options` and `chain` of what `run.json` holds.
            config: Its given options take the place of those that are texts in `run.json`.

        Raises:
            UserError: If the run that is continued can't be read here.
        """
        config = FitConfig(**{**about["options"], **config.given_options})
        return cls(None, config, dict(about), previous_of(config, about["chain"] or []))

    @property
    def state(self) -> str:
        """`fitting`, `evaluating` or `finished`."""
        return self.about["state"]

    def _write(self, **about: Any) -> None:
        self.about |= about
        if self.path is not None:
            write_json(self.path / RUN, self.about)

    def begin(
        self,
        config: FitConfig,
        language: str,
        utterances: int | None,
        tokens: int | None,
        weights: int,
        domain_languages: Sequence[str] = (),
    ) -> None:
        """All is loaded: keep the resolved configuration, and remove an earlier run's results.

        Args:
            config: The resolved configuration.
            language: Of the training data.
            utterances: In it; None is not known, of a stream.
            tokens: Target tokens in it, likewise.
            weights: Number of adapter weights.
            domain_languages: Of the training data of each domain, if they are told apart.
        """
        if self.state != FITTING:
            return
        if self.path is not None and self._occupied:
            remove_files(self.path, *UNFINISHED)
        apart = dict(zip(config.domains, domain_languages, strict=True)) if domain_languages else {}
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        self._write(
            config=config.to_json(),
            language=language,
            training_utterances=utterances,
            training_tokens=tokens,
            temperature=None if tokens is None else float(config.beta) * tokens,
            adapter_weights=weights,
            **({"domain_languages": apart} if apart else {}),
            versions={"python": platform.python_version(), **versions},
        )
        if self.path is not None and self._occupied:
            remove_files(self.path, *RESULTS)
        self._occupied = False

    def list_skipped(self, rows: Sequence[SkippedRow]) -> str:
        """Add the rows that were left out to a list of them; return where, "" if nowhere."""
        if self.path is None or not rows:
            return ""
        if self.state == FITTING and not self._occupied:
            self._skipped = self._skipped or SkippedRows(self.path)
            self._skipped.add(rows)
        return str(self.path / SKIPPED)

    def save(
        self,
        fitted: Posterior,
        history: list[Step],
        stopping: EarlyStopping | None,
        seconds: float,
    ) -> None:
        """The fit is done: keep the posterior, before anything else can go wrong."""
        if self.path is not None:
            save_posterior(self.path, fitted)
        rows = [asdict(step) for step in history]
        steps = stopping.errors[-1].step if stopping else self.about["config"]["steps"]
        self._write(
            state=EVALUATING,
            seconds={"fit": round(seconds, 3)},
            skipped_steps=steps - len(rows),
            history=rows,
            **({"dev": stopping.to_json()} if stopping else {}),
        )
        if self.path is not None:
            remove_files(self.path, CHECKPOINT)

    def finish(
        self, metrics: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], seconds: float
    ) -> None:
        """All is measured: keep it, the figures and the rows of all utterances, and `tidy`."""
        if self.path is None:
            return
        write_utterances(self.path / UTTERANCES, rows)
        write_json(self.path / METRICS, metrics)
        self._write(state=FINISHED, seconds={**self.about["seconds"], "total": round(seconds, 3)})
        self.tidy()

    def tidy(self) -> None:
        """Remove what was there to go on with."""
        if self.path is not None:
            remove_files(self.path, *UNFINISHED)

    def transcripts(self, state: str) -> Path | None:
        """Where transcripts of the test sets are kept until the run is finished.

        Args:
            state: Of the model, `base` or `adapted`.
        """
        return None if self.path is None else self.path / TRANSCRIPTS[state]

    def safe(self) -> str:
        """What is safe on disk now."""
        if self.path is None:
            return "nothing was to be kept on disk"
        if self._occupied:
            return f"what was in {self.path} before is as it was"
        if self.state != FITTING:
            return f"the posterior is safe in {self.path}"
        step = stored_step(self.path / CHECKPOINT)
        if step is None:
            return f"no step is in {self.path} yet"
        return f"the checkpoint of step {step} is safe in {self.path}"

    def way_on(self) -> str:
        """How to go on."""
        if self.path is None or self._occupied:
            return "start again"
        files = [(name, str(getattr(self.config, name))) for name in ("prior", "guide")]
        options = [f"--{name} {shlex.quote(file)}" for name, file in files if is_code(file)]
        line = ["blora-pyro fit --resume --output", shlex.quote(str(self.path)), *options]
        return f"go on with: {' '.join(line)}"

    @property
    def resolved(self) -> FitConfig:
        """The resolved configuration, once it is kept.

        Raises:
            UserError: If it is damaged.
        """
        try:
            config = FitConfig(**self.about["config"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.path}/{RUN} is damaged ({error}); fit again") from None
        return replace(config, backward=config.backward_sets)

    def fitted(self) -> tuple[Posterior, list[Step]]:
        """Posterior and history, once they are kept.

        Raises:
            UserError: If they are damaged.
        """
        assert self.path is not None
        loaded, config = Posterior.load(self.path), self.resolved
        try:
            history = [Step(**step) for step in self.about["history"]]
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.path}/{RUN} is damaged ({error}); fit again") from None
        family = Family(config.prior, config.prior_args, str(config.guide))
        return replace(loaded, family=family), history

    @property
    def dev(self) -> dict[str, Any] | None:
        """What is kept of the dev error, if it was measured."""
        return self.about.get("dev")

    def metrics(self) -> dict[str, Any]:
        """What was measured, once it is kept.

        Raises:
            UserError: If it is damaged.
        """
        assert self.path is not None
        try:
            return json.loads((self.path / METRICS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path / METRICS} is missing or damaged ({error}); measure again with: "
                f"blora-pyro evaluate {shlex.quote(str(self.path))}"
            ) from None
