"""`python -m blora_pyro`: the command line, for launchers that take a module."""

from blora_pyro.cli import app

app(prog_name="blora-pyro")
