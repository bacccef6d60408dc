"""Prints the lower bounds of pyproject.toml as pip's constraints, but torch's."""

import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
for requirement in sum(project["optional-dependencies"].values(), project["dependencies"]):
    name, _, bound = requirement.partition(">=")
    if bound and name != "torch":
        print(f"{name.partition('[')[0]}=={bound}")
