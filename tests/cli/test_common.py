import json

import pytest
import typer

from blora_pyro.cli.common import help_of, one_line_errors, print_json, print_result
from blora_pyro.declarations import declarations
from blora_pyro.errors import Interrupted, OtherProcessFailed, UserError
from blora_pyro.options import FitConfig
from blora_pyro.runs import finished, fits

from .conftest import complaint, run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("two\nlines"), 2, "blora-pyro: two lines\n"),
        (FloatingPointError("the loss is nan"), 1, "blora-pyro: the loss is nan; try a smaller --"),
        (Interrupted(15, "interrupted; all is safe"), 143, "blora-pyro: interrupted; all is safe"),
        (KeyboardInterrupt(), 130, "blora-pyro: interrupted\n"),
        (OtherProcessFailed("elsewhere"), 2, ""),
    ],
)
def test_what_ends_a_command_is_one_line_with_its_exit_code(capsys, error, code, line):
    with pytest.raises(typer.Exit) as caught, one_line_errors():
        raise error
    printed = capsys.readouterr()
    assert caught.value.exit_code == code and printed.out == ""
    assert printed.err.startswith(line) and printed.err.count("\n") == bool(line)


def test_of_several_processes_with_one_error_the_main_one_prints_it(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(typer.Exit), one_line_errors(only_main=True):
            raise UserError("wrong")
        assert capsys.readouterr().err.count("\n") == lines


def test_json_is_printed_with_its_letters_as_they_are(capsys):
    print_json({"word": "你好"})
    text = capsys.readouterr().out
    assert "你好" in text and json.loads(text) == {"word": "你好"}


def test_a_result_is_printed_as_json_or_as_tables(capsys):
    print_result({"a": 1}, True, lambda: 1 / 0)
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    print_result({"a": 1}, False, lambda: ["one line"])
    assert capsys.readouterr().out == "one line\n"


def test_shared_options_have_the_help_of_their_declaration():
    assert help_of("device") == declarations(FitConfig)["device"].help


@pytest.mark.parametrize(
    ("module", "function", "arguments"),
    [
        (fits, "fit", ["fit"]),
        (finished, "evaluate_run", ["evaluate", "run"]),
        (finished, "transcribe", ["transcribe", "a.wav"]),
        (finished, "merge_run", ["merge", "run", "out"]),
    ],
)
def test_ctrl_c_ends_a_command_with_130(monkeypatch, module, function, arguments):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, function, interrupt)
    assert complaint(run(*arguments), exit_code=130) == "blora-pyro: interrupted"


def test_an_error_of_ours_is_not_hidden(monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(fits, "fit", fail)
    result = run("fit")
    assert isinstance(result.exception, ZeroDivisionError)
