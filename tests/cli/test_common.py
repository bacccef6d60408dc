import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import blora_pyro
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


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory; what was written before is whole"),
        (RuntimeError("could not create a primitive"), "out of memory; "),
        (RuntimeError("std::bad_alloc"), "out of memory; "),
        (OSError(28, "No space left on device", "a\x1b]0;b"), r"'a\x1b]0;b' can't be read or wri"),
        (OSError(28, "No space left on device"), "standard output can't be read or written (No s"),
        (RecursionError(), "something given is nested too deeply"),
        (UserError("set \x1b]0;title\x07\x9b31m \u202egnp"), r"set \x1b]0;title\x07\x9b31m \u202e"),
    ],
)
def test_what_the_machine_or_others_do_is_one_line_and_exit_code_2(capsys, error, words):
    with pytest.raises(typer.Exit) as caught, one_line_errors():
        raise error
    printed = capsys.readouterr()
    assert caught.value.exit_code == 2 and printed.out == ""
    assert printed.err.startswith(f"blora-pyro: {words}") and printed.err.count("\n") == 1


def test_an_error_of_ours_keeps_its_traceback():
    for error in (RuntimeError("sizes differ"), KeyError("x"), BrokenPipeError(32, "Broken pipe")):
        with pytest.raises(type(error)), one_line_errors():
            raise error


PRINTING = """
import typer
from blora_pyro.cli.common import one_line_errors, print_json
def command():
    with one_line_errors():
        print_json({})
typer.run(command)
"""


@pytest.mark.parametrize(
    ("redirected", "code", "words"),
    [
        (">&-", 0, ""),
        ("| true", 0, ""),
        ("> /dev/full", 2, "blora-pyro: standard output can't be read or written (No space left"),
    ],
)
def test_output_that_cannot_be_written_is_no_traceback(redirected, code, words):
    line = f"{sys.executable} -c '{PRINTING}' {redirected}"  # what it prints imports no torch
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(words) and done.stderr.count("\n") == bool(words)


def test_nothing_but_the_one_place_prints():
    ways = re.compile(r"\btyper\.echo\(|\bprint\(|\bConsole\(|std(?:out|err)\.write\(")
    found = {
        path.name: ways.findall(text)
        for path in Path(blora_pyro.__file__).parent.rglob("*.py")
        if ways.search(text := re.sub(r"\bconsole\.print\(", "", path.read_text(encoding="utf-8")))
    }
    assert found == {
        "common.py": ["typer.echo("],  # which `escaped` goes before
        "__init__.py": ["typer.echo("],  # the version
        "options.py": ["print("],  # the reference, from the declarations
    }


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
    steering = {"a\x1b]0;b\x07": "\x7f\x9b31m \u202e\U000e0041\ud800"}
    print_json(steering)
    text = capsys.readouterr().out
    assert text.isascii() and json.loads(text) == steering


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
        (finished, "transcribe", ["transcribe", "a.wav", "--engine", "torch"]),
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
