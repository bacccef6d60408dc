"""The site: `sphinx-build -W docs docs/_build/html`.

Pages that are made of something else (commands, measured tables, notebooks) are written to
`docs/generated` before each build. With `DOCS_OFFLINE` in the environment no other project's index
of names is fetched.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import typer  # noqa: E402
from docutils import nodes  # noqa: E402
from priors import line  # noqa: E402

from blora_pyro import __version__  # noqa: E402
from blora_pyro.cli import HOMES, app  # noqa: E402
from blora_pyro.declarations import declarations, flag_of  # noqa: E402
from blora_pyro.options import FitConfig  # noqa: E402
from blora_pyro.runs.report import fit_tables, strength_tables  # noqa: E402
from blora_pyro.tables import report_markdown  # noqa: E402

project, author, copyright = "blora-pyro", "the blora-pyro developers", "the blora-pyro developers"
version = release = __version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_nb"]
exclude_patterns = ["_build"]
default_role = "code"  # our docstrings write `code`
smartquotes = False  # it would make one dash of an option's two
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "off"  # the committed outputs are shown
autodoc_member_order = "bysource"
html_theme = "furo"
html_title = f"blora-pyro {version}"
html_theme_options = {"navigation_with_keys": True}

if "DOCS_OFFLINE" not in os.environ:
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "pyro": ("https://docs.pyro.ai/en/stable", None),
        "transformers": ("https://huggingface.co/docs/transformers/main/en", None),
        "peft": ("https://huggingface.co/docs/peft/main/en", None),
        "arviz": ("https://python.arviz.org/en/stable", None),
    }


def command_page() -> str:
    """Return every command with its arguments and options, but those that `fit` has."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("blora-pyro", ["fit"], resilient_parsing=True)
    pages = [
        "# Commands",
        "Made from the command line's own help. `fit` takes the [options of a fit](../options.md); "
        "`compare` and `sweep` take them, too.",
    ]
    for name in HOMES:
        command = group.get_command(context, name)
        for sub, one in (getattr(command, "commands", None) or {"": command}).items():
            pages += _command(f"{name} {sub}".strip(), one)
    return "\n\n".join(pages) + "\n"


def _command(name: str, command: Any) -> list[str]:
    fit = {flag_of(FitConfig, field) for field in declarations(FitConfig)}
    arguments, rows = [], []
    for one in command.params:
        if one.opts[0].startswith("--"):
            if (
                one.hidden
                or one.opts[0] == "--help"
                or (name in ALL_OPTIONS and one.opts[0] in fit)
            ):
                continue
            shown = ", ".join(f"`{flag}`" for flag in (*one.opts, *one.secondary_opts))
            shown += f" `{one.metavar}`" if one.metavar and not one.is_flag else ""
        else:
            arguments.append(one.metavar or one.name.upper() + "..." * (one.nargs < 0))
            shown = f"`{arguments[-1]}`"
            if not one.required:
                arguments[-1] = f"[{arguments[-1]}]"
        rows.append(f"| {_cell(shown)} | {_cell(one.help or '')} |")
    usage = " ".join(["blora-pyro", name, *arguments])
    text = [f"## {name}", f"```\n{usage}\n```", (command.help or "").strip()]
    return [*text, "\n".join(["| | |", "|---|---|", *rows])] if rows and name != "fit" else text


ALL_OPTIONS = ("fit", "compare", "sweep")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def measured_page() -> str:
    """Return the table and the curve of the run on a real Whisper."""
    found = json.loads((ROOT / "experiments/real/kichwa.json").read_text(encoding="utf-8"))
    curve = strength_tables(found["kept"]["curve"])
    return report_markdown([*fit_tables(found["metrics"]), *curve])


def study_pages(name: str) -> tuple[str, str]:
    """Return the main tables of a study, and all of them."""
    text = (ROOT / f"experiments/{name}/results.md").read_text(encoding="utf-8")
    tables = text.split("\n### ")
    heads = "seeds", "1 seed"
    main = [one.split("\n\n") for one in tables if one.partition("\n")[0].endswith(heads)]
    shown = "\n\n".join(f"**{head}**\n\n{table}" for head, table, *_ in main)
    return shown + "\n\n" + main[0][2], text.replace(
        "# Methods compared", "# All tables of the pocket", 1
    )


def priors_table() -> str:
    """Return a row for every prior family that `experiments/priors.py` has measured."""
    found = json.loads((ROOT / "experiments/priors/priors.json").read_text(encoding="utf-8"))
    heads = "| prior | de-en WER | forgetting | directions | weights left | at a cost of |"
    rows = [line(prior, one) for prior, one in found["families"].items()]
    return "\n".join([heads, "|---|---|---|---|---|---|", *rows]) + "\n"


def _unbroken(text: str) -> str:
    """Return tables whose intervals stay on one line, with the figures that they are of."""
    return re.sub(r"(\d)( ±\S+)? \[([^],|]+), ", lambda at: at[0].replace(" ", "\u00a0"), text)


def write_pages(folder: Path) -> None:
    """Write what is made of something else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "commands.md").write_text(command_page(), encoding="utf-8")
    (folder / "kichwa.md").write_text(_unbroken(measured_page()), encoding="utf-8")
    (folder / "priors.md").write_text(_unbroken(priors_table()), encoding="utf-8")
    for name, text in zip(("pocket_main", "pocket_tables"), study_pages("pocket"), strict=True):
        (folder / f"{name}.md").write_text(_unbroken(text), encoding="utf-8")
    (folder / "real_main.md").write_text(_unbroken(study_pages("real")[0]), encoding="utf-8")
    (folder / "notebooks").mkdir()
    for path in ROOT.glob("notebooks/*.ipynb"):
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"]\(\.\./(docs/)?", lambda at: "](../../" + "../" * (not at[1]), text)
        (folder / "notebooks" / path.name).write_text(text, encoding="utf-8")


write_pages(Path(__file__).with_name("generated"))
PARTS = "kichwa", "pocket_main", "real_main", "priors"
exclude_patterns += [f"generated/{one}.md" for one in PARTS]


def setup(app: Any) -> None:
    """Set dashes between a parameter and what it is, which smart quotes would set."""

    def dash(app: Any, doctree: nodes.document) -> None:
        for text in [*doctree.findall(nodes.Text)]:
            if text == " -- ":
                text.parent.replace(text, nodes.Text(" – "))

    app.connect("doctree-read", dash)
