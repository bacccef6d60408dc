"""The notebooks run from end to end, with `CI` set on little, each in a process of its own.

One that needs a run of a real Whisper says so in its metadata, and has its outputs committed.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from . import forks

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def read(notebook: Path) -> dict[str, Any]:
    return json.loads(notebook.read_text(encoding="utf-8"))


def needs_a_run(notebook: Path) -> bool:
    return "needs" in read(notebook)["metadata"].get("blora_pyro", {})


def run_cells(notebook: Path, folder: Path) -> None:
    """Run the cells of a notebook by IPython, as Jupyter does."""
    from IPython.core.interactiveshell import InteractiveShell

    class Shell(InteractiveShell):
        def enable_gui(self, gui=None):
            """Do nothing: inline plots need none."""

    os.chdir(folder)
    shell = Shell.instance()
    shell.history_manager.enabled = False
    for cell in read(notebook)["cells"]:
        if cell["cell_type"] == "code":
            shell.run_cell("".join(cell["source"])).raise_error()


@pytest.mark.parametrize(
    "notebook", [one for one in NOTEBOOKS if not needs_a_run(one)], ids=lambda path: path.stem
)
def test_every_cell_of_a_notebook_runs(notebook, tmp_path):
    streams = [tmp_path / "output", tmp_path / "errors"]
    here = {"CI": "1", "IPYTHONDIR": str(tmp_path / "ipython")}
    process = forks.start(run_cells, notebook, tmp_path, streams=streams, variables=here)
    assert forks.ended(process) == [0], "\n".join(path.read_text() for path in streams)


def test_what_is_not_run_here_has_its_outputs_and_only_that():
    (notebook,) = filter(needs_a_run, NOTEBOOKS)
    assert len(NOTEBOOKS) == 4
    cells = [one for one in read(notebook)["cells"] if one["cell_type"] == "code"]
    assert all(cell["outputs"] and cell["execution_count"] for cell in cells)
    for cell in cells:
        compile("".join(cell["source"]).replace("%matplotlib inline", ""), notebook.name, "exec")
