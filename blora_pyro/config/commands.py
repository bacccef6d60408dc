"""Options of a fit as a command line."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from blora_pyro.config.fit_config import FitConfig


def fit_command(options: Mapping[str, Any]) -> str:
    """The `blora-pyro fit` that fits with these options; what is the default is left out.

    Args:
        options: Attributes of `FitConfig`. Objects of `datasets` are only described: no command
            line can name them.

    Raises:
        UserError: See `FitConfig`.
    """
    given, default = FitConfig(**options).to_json(), FitConfig().to_json()
    words = ["blora-pyro", "fit"]
    for name, value in given.items():
        if value != default[name]:
            for text in _texts(name, value):
                words += [f"--{name.removesuffix('s') if name == 'prior_args' else name}"]
                words[-1] = words[-1].replace("_", "-")
                words += [] if text is None else [shlex.quote(text)]
    return " ".join(words)


def _texts(name: str, value: Any) -> Iterator[str | None]:
    """What stands after the option, once for every time that it is given; None is a switch."""
    if value is True:
        yield None
    elif name in ("data_weights", "distillation_languages", "track"):
        yield ",".join(map(str, value))
    elif name == "prior_args":
        yield from (f"{key}={one}" for key, one in value.items())
    elif name == "backward" and not value:
        yield "none"
    elif isinstance(value, Mapping):
        yield from (key if key == one else f"{key}={one}" for key, one in value.items())
    elif isinstance(value, list | tuple):
        yield from map(str, value)
    else:
        yield str(value)
