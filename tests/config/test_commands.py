import inspect
import shlex

import pytest
import typer
from typer.testing import CliRunner

from blora_pyro import FitConfig
from blora_pyro.cli.fit import fit, given_options
from blora_pyro.config.commands import fit_command


def parsed(command: str):
    """The options of a `blora-pyro fit`, as `fit` itself reads them."""
    seen = {}
    app = typer.Typer()

    def read(context: typer.Context, **_):
        seen.update(given_options(context))

    read.__signature__ = inspect.signature(fit)
    app.command()(read)
    program, name, *words = shlex.split(command)
    assert (program, name) == ("blora-pyro", "fit")
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 3.210987654321e-05, "prior_scale": 0.123456789, "lr": 1e-2},
        {"beta": "auto", "prior": "horseshoe", "prior_args": {"global_scale": 0.01}},
        {"data": ("de-en", "my corpus/a.csv"), "data_weights": (3, 1), "language": "de-en"},
        {"distillation": 0.3, "distillation_languages": ("de", "en"), "max_utterances": 150},
        {"backward": {"German": "my de.csv", "en": "en"}, "base": "owner/whisper"},
        {"backward": ()},
        {"data": {"a": "my a.csv", "es-en": "es-en"}, "pooling": "hierarchical"},
        {"data": {"a": "de-en", "b": "es-en"}, "pooling": "complete", "pooling_scale": None},
        {"prior_from": "runs/my first", "prior_inflation": 1.5, "rank": 8},
        {"spec_augment": True, "gradient_checkpointing": True, "target_modules": "q_proj,v_proj"},
        {"track": ("tensorboard", "wandb")},
        {"dev": "de", "eval_every": 5, "patience": 2, "epochs": 1.5, "dtype": "bfloat16"},
    ],
)
def test_the_command_says_what_the_options_say(options):
    found = parsed(fit_command(options))
    same = FitConfig(**found).with_prior_args(), FitConfig(**options).with_prior_args()
    assert same[0] == same[1]


def test_defaults_are_left_out():
    assert fit_command({"rank": 16, "data": "de-en", "seed": 0}) == "blora-pyro fit"
    assert fit_command({"steps": 200, "data": "zh-en"}) == "blora-pyro fit --data zh-en --steps 200"
