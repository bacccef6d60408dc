"""Processes that start at once: forks of one that has imported everything, once for a worker."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    [
        "IPython.core.interactiveshell",
        "arviz",
        "blora_pyro.cli.progress",
        "blora_pyro.runs.fits",
        "blora_pyro.studies.running",
        "blora_pyro.studies.search",
        "matplotlib.pyplot",
        "pandas",
        "peft",
        "pytest",
        "transformers.models.whisper.feature_extraction_whisper",
        "transformers.models.whisper.modeling_whisper",
        "transformers.models.whisper.tokenization_whisper",
    ]
)


def start(
    function: Callable[..., Any],
    *args: Any,
    streams: Sequence[Path | None] = (),
    variables: dict[str, str] | None = None,
    **options: Any,
) -> BaseProcess:
    """Start a process that calls a module's function.

    Args:
        function: Its module is imported in the process.
        args: Its arguments.
        streams: Files that the process's output and errors are appended to; None keeps them.
        variables: Variables of the environment, beside those that are set here.
        options: Further arguments.
    """
    given = (function, args, options, streams, {**os.environ, **(variables or {})})
    process = _forks.Process(target=_call, args=given, daemon=True)
    process.start()
    return process


def ended(*processes: BaseProcess) -> list[int | None]:
    """Wait for processes; their exit codes, or minus the signals that killed them."""
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _call(function, args, options, streams, environment) -> None:
    import torch

    from blora_pyro.models import base

    base.has_bfloat16_units = lambda device: False  # as in the process of the tests
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(streams, start=1):
        if path is not None:
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    torch.set_num_threads(1)
    function(*args, **options)
