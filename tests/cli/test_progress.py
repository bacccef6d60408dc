import io
import re

import pytest
from rich.console import Console

from blora_pyro.cli.common import verbosity
from blora_pyro.cli.progress import TerminalProgress
from blora_pyro.fitting.history import DevError, Step
from blora_pyro.options import FitConfig, Verbosity
from blora_pyro.runs.listeners import Heard


def test_brackets_in_a_stage_are_shown_as_they_are(capsys):
    TerminalProgress().stage("base on [/] of [bold]")
    assert capsys.readouterr().err == "base on [/] of [bold] ...\n"


def test_progress_goes_to_stderr_and_names_the_temperature(capsys):
    config = FitConfig(beta=2e-4, steps=2)
    with TerminalProgress() as progress:
        progress.stage("loading")
        progress.ready(config, num_tokens=10_000, num_weights=1234)
        progress.step(Step(1, 3.5, 3.0, 2500.0, 1e-3, 40))
        progress.step(Step(2, 3.5, 3.0, 2500.0, 1e-3, 40))
    out, err = capsys.readouterr()
    assert out == ""
    assert "loading ..." in err
    text = " ".join(err.split())
    assert "1,234 adapter weights" in text
    assert "N = 10,000 target tokens" in text
    assert "beta 0.0002" in text
    assert "T = beta · N = 2" in text


@pytest.mark.parametrize(("beta", "kl"), [(0.0, None), (1e-4, 2500.0)])
def test_the_figures_beside_the_bar_are_running_means(beta, kl):
    progress = TerminalProgress()
    progress.ready(FitConfig(beta=beta, steps=3), num_tokens=100, num_weights=10)
    progress.step(Step(1, 3.0, 3.0, kl, 1e-3, 40))
    progress.step(Step(2, 2.0, 2.0, kl, 1e-3, 40))
    (task,) = progress.bar.tasks
    assert (task.completed, task.total) == (2, 3)
    assert "NLL 2.900" in task.fields["figures"]
    assert ("beta·KL 0.250" in task.fields["figures"]) == (kl is not None)
    assert ("KL" in task.fields["figures"]) == (kl is not None)


def test_one_fit_after_another_starts_afresh():
    with TerminalProgress() as progress:
        for steps, nll in ((3, 9.0), (5, 2.0)):
            progress.ready(FitConfig(beta=0, steps=steps), num_tokens=100, num_weights=10)
            progress.step(Step(1, nll, nll, None, 1e-3, 40))
            progress.fitted()
        (task,) = progress.bar.tasks
        assert (task.completed, task.total) == (1, 5)
        assert "NLL 2.000" in task.fields["figures"]


def test_dev_errors_are_told_one_a_line(capsys):
    progress = TerminalProgress()
    best = DevError(50, 0.1234)
    progress.evaluated(best, best)
    progress.evaluated(DevError(100, 0.2, -0.001, 0.25), best)
    assert capsys.readouterr().err.splitlines() == [
        "step 50: dev error 12.3% (the best so far)",
        "step 100: dev error 20.0% (12.3% at step 50), backward average -0.1 points, 25.0% to be "
        "expected within the contract",
    ]


def test_utterances_of_the_dev_set_are_shown_as_they_were_and_are_heard(capsys):
    progress = TerminalProgress()
    progress.heard([Heard("das rote [b]", " das tote", "das rote")])
    for step in (50, 100):
        progress.evaluated(DevError(step, 0.25), DevError(50, 0.25))
    assert capsys.readouterr().err.splitlines() == [
        "step 50: dev error 25.0% (the best so far)",
        "  reference  das rote [b]",
        "  before     das tote",
        "  now        das rote",
        "step 100: dev error 25.0% (25.0% at step 50)",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_sets_are_counted_in_a_terminal_only(terminal):
    text = io.StringIO()
    with TerminalProgress() as progress:
        progress.telling.console = Console(file=text, force_terminal=terminal, width=80)
        progress.features("[red] train", 0, 9)
        progress.features("[red] train", 9, 9)
        progress.audio("mine test", 1, 2)
        assert (progress.telling.bar is not None) == terminal
    shown = text.getvalue()
    for part in ("features of [red] train", "9 of 9", "audio of mine test", "1 of 2"):
        assert (part in shown) == terminal


def test_off_a_terminal_a_line_every_half_minute_says_what_is_left(capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = TerminalProgress()
    for done in range(0, 101, 10):  # 4 seconds each
        progress.transcripts("base on [en]", done, 100)
        now[0] += 4
    assert capsys.readouterr().err.splitlines() == ["base on [en]: 80 of 100, 0:00:08 left"]
    progress.ready(FitConfig(beta=0.0, steps=60), num_tokens=100, num_weights=10)
    capsys.readouterr()
    for step in range(1, 61):
        progress.step(Step(step, 2.0, 2.0, None, 1e-3, 40))
        now[0] += 1
    assert capsys.readouterr().err == "fit: 31 of 60, 0:00:29 left; NLL 2.000\n"


def test_a_note_is_one_line_whatever_is_in_it(capsys):
    TerminalProgress().note("bad rows [bold] left out: " + "x" * 200)
    assert capsys.readouterr().err == "bad rows [bold] left out: " + "x" * 200 + "\n"


def test_one_fit_after_another_has_the_bar_to_itself():
    progress = TerminalProgress()
    for nll in (3.0, 1.0):
        progress.ready(FitConfig(beta=0.0, steps=2), num_tokens=100, num_weights=10)
        progress.step(Step(1, nll, nll, None, 1e-3, 40))
        progress.fitted()
    (task,) = progress.bar.tasks
    assert task.completed == 1
    assert task.fields["figures"].startswith("NLL 1.000")


def told_of_a_fit(terminal=False, **how):
    """What is told on stderr of a short fit."""
    text, chosen = io.StringIO(), verbosity.set(Verbosity(**how))
    try:
        with TerminalProgress() as progress:
            console = Console(file=text, force_terminal=terminal, width=200)
            progress.telling.console = progress.bar.live.console = console
            progress.stage("loading")
            progress.features("train", 8, 16)
            progress.note("one row is left out")
            progress.ready(FitConfig(beta=0.0, steps=2), num_tokens=100, num_weights=10)
            progress.step(Step(1, 2.5, 2.0, None, 1e-3, 40, grad_norm=0.25))
            progress.heard([Heard("a", "b", "c")])
            progress.evaluated(DevError(1, 0.5), DevError(1, 0.5))
            progress.fitted()
    finally:
        verbosity.reset(chosen)
    return text.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_leaves_only_notes(terminal):
    text = told_of_a_fit(terminal, quiet=True)
    assert "one row is left out" in text and text.count("\n") == 1
    assert "loading" not in text and "step" not in text and "train" not in text


@pytest.mark.parametrize("terminal", [False, True])
def test_verbose_has_a_line_for_every_step_and_batch_with_the_time(terminal, monkeypatch):
    monkeypatch.setattr("time.monotonic", iter(range(1000, 2000)).__next__)
    text = re.sub(r"\x1b\[[\d;]*m", "", told_of_a_fit(terminal, verbose=True))
    assert all(re.match(r"\[0:00:\d\d\] ", line) for line in text.splitlines())
    rest = [line.partition("] ")[2] for line in text.splitlines()]
    assert rest[:3] == ["loading ...", "features of train: 8 of 16", "one row is left out"]
    step = "fit: 1 of 2; NLL 2.000  loss 2.500  lr 1.00e-03  gradient 0.25"
    assert rest[4] == step and len(rest) == 9
