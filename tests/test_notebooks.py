"""The notebooks run from end to end, with `CI` set on little, each in a process of its own."""

import json
import os
from pathlib import Path

import pytest

from . import forks

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def run_cells(notebook: Path, folder: Path) -> None:
    """Run the cells of a notebook by IPython, as Jupyter does."""
    from IPython.core.interactiveshell import InteractiveShell

    class Shell(InteractiveShell):
        def enable_gui(self, gui=None):
            """Do nothing: inline plots need none."""

    os.chdir(folder)
    shell = Shell.instance()
    shell.history_manager.enabled = False
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            shell.run_cell("".join(cell["source"])).raise_error()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_of_a_notebook_runs(notebook, tmp_path):
    streams = [tmp_path / "output", tmp_path / "errors"]
    here = {"CI": "1", "IPYTHONDIR": str(tmp_path / "ipython")}
    process = forks.start(run_cells, notebook, tmp_path, streams=streams, variables=here)
    assert forks.ended(process) == [0], "\n".join(path.read_text() for path in streams)
