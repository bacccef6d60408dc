import json
import sys
from types import SimpleNamespace
from typing import Any, ClassVar

import accelerate.tracking
import pytest
import torch
from typer.testing import CliRunner

from blora_pyro.cli import app
from blora_pyro.diagnostics import summarise
from blora_pyro.errors import UserError
from blora_pyro.fitting.history import Step
from blora_pyro.guides import build_guide, build_prior
from blora_pyro.models import BLoRA
from blora_pyro.options import FitConfig
from blora_pyro.posterior import Family, Posterior
from blora_pyro.runs import listeners
from blora_pyro.runs.fits import fit
from blora_pyro.runs.folders import claim
from blora_pyro.runs.listeners import Bars, Listener, heard_by


class Recorder(accelerate.tracking.GeneralTracker):
    """Keeps what it is told, in the order of the telling, of all its instances together."""

    name = "recorder"
    requires_logging_directory = True
    told: ClassVar[list[tuple]] = []

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        self.place = (run_name, logging_dir)

    @property
    def tracker(self) -> Any:
        return self.told

    def start(self) -> None:
        self.told.append(("start", *self.place))

    def store_init_configuration(self, values: dict) -> None:
        self.told.append(("configuration", values))

    def log(self, values: dict, step: int | None = None, **_: Any) -> None:
        self.told.append(("log", step, values))

    def finish(self) -> None:
        self.told.append(("finish",))


class Failing(Recorder):
    """Fails wherever it is to."""

    name = "failing"
    where: ClassVar[str] = "log"

    def start(self) -> None:
        if self.where == "start":
            raise ConnectionError("no\nserver")
        super().start()

    def log(self, values: dict, step: int | None = None, **_: Any) -> None:
        if step == 2:
            raise ConnectionError("no server")
        super().log(values, step)


class Heard(Listener):
    """Keeps stages and notes; dies at a step."""

    def __init__(self, last: int = 0) -> None:
        self.last, self.stages, self.notes = last, [], []

    def stage(self, name):
        self.stages.append(name)

    def note(self, text):
        self.notes.append(text)

    def step(self, step):
        if step.step == self.last:
            raise ZeroDivisionError


@pytest.fixture
def told(monkeypatch):
    """What the tracker `recorder` is told; the posterior is looked at every second step."""
    monkeypatch.setattr(Recorder, "told", [])
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "failing", Failing)
    monkeypatch.setattr(listeners, "EVERY", 2)
    return Recorder.told


@pytest.fixture
def short(fit_options):
    return {**fit_options, "steps": 4, "backward": fit_options["backward"][:1]}


def logged(told, name):
    """Step -> value, of the last that was told of it."""
    return {one[1]: one[2][name] for one in told if one[0] == "log" and name in one[2]}


def contraction_of(posterior):
    rows = summarise(posterior).factors
    return sum(row.contraction * row.weights for row in rows) / posterior.num_weights


def test_a_tracker_is_told_all_of_a_fit_which_does_not_depend_on_it(
    told, short, tones_folder, tmp_path
):
    short |= {"dev": str(tones_folder / "test.jsonl"), "eval_every": 3}
    run = fit(FitConfig(track="recorder", **short), tmp_path / "run")
    assert fit(FitConfig(**short), evaluate=False).history == run.history

    assert told[0] == ("start", "blora-pyro", str(tmp_path / "run" / "tracking"))
    (_, values), *_ = [one for one in told if one[0] == "configuration"]
    assert (values["rank"], values["training_tokens"], values["prior_from"]) == (4, 22, None)
    assert json.loads(values["data"]) == [short["data"]]
    assert [one[0] for one in told].count("start") == 1
    assert [one for one in told if one[0] == "finish"] == [told[-1]] == [("finish",)]

    for name in ("loss", "nll", "kl", "lr", "regularizer", "tokens", "grad_norm"):
        assert logged(told, name) == {one.step: getattr(one, name) for one in run.history}
    errors = {one["step"]: one["error"] for one in run.dev["errors"]}
    assert logged(told, "dev_error") == errors and errors.keys() == {3, 4}
    sparsity = run.metrics["sparsity"]
    for name in ("A", "B", "delta_w"):
        assert logged(told, f"sparsity/{name}")[4] == pytest.approx(sparsity[name])
    contractions = logged(told, "contraction")
    assert contractions.keys() == {2, 4}
    assert contractions[4] == pytest.approx(contraction_of(run.posterior), rel=1e-5)
    for name, value in run.metrics["new_domain"]["adapted"].items():
        if name not in ("metric", "utterances", "length", "loops"):
            assert logged(told, f"new_domain/adapted/{name}") == {4: value["rate"]}
    change = run.metrics["backward_error"]["change"]["difference"]
    assert logged(told, "backward_error/change") == {4: change}


def test_a_resumed_fit_goes_on_in_the_same_run_and_another_begins_a_new_one(told, short, tmp_path):
    folder, key = tmp_path / "run", tmp_path / "run" / "tracking" / "id"
    with pytest.raises(ZeroDivisionError):
        fit(
            FitConfig(track="recorder", **short),
            folder,
            checkpoint_every=2,
            progress=Heard(3),
            evaluate=False,
        )
    assert told[-1] == ("finish",)
    before, first = key.read_text(), list(told)
    told.clear()
    fit(output=folder, resume=True, evaluate=False)
    assert told[0] == first[0] and list(logged(told, "loss")) == [3, 4]
    assert key.read_text() == before
    again = {"overwrite": True, "evaluate": False, "progress": Heard(1)}
    with pytest.raises(ZeroDivisionError):
        fit(FitConfig(track="recorder", **short), folder, **again)
    assert key.read_text() != before
    claim(folder, overwrite=False)  # a fit without a checkpoint leaves nothing that is in the way
    assert not key.parent.exists()


def test_what_died_in_its_evaluation_tells_its_error_rates(told, short, tmp_path):
    class Dying(Listener):
        def stage(self, name):
            if name.startswith("adapted on"):
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(FitConfig(track="recorder", **short), tmp_path, progress=Dying())
    told.clear()
    run = fit(output=tmp_path, resume=True)
    assert [one[0] for one in told] == ["start", "log", "finish"]
    rate = run.metrics["new_domain"]["adapted"]["wer"]["rate"]
    assert logged(told, "new_domain/adapted/wer") == {4: rate}


def test_a_tracker_that_fails_on_the_way_does_not_end_the_fit(told, short, tmp_path):
    heard = Heard()
    fit(FitConfig(track=("failing", "recorder"), **short), tmp_path, progress=heard, evaluate=False)
    assert heard.notes == ["failing gets no more of this fit (ConnectionError: no server)"]
    assert [one[1] for one in told if one[0] == "log" and "loss" in one[2]] == [1, 1, 2, 3, 4]


def test_one_that_does_not_start_is_told_in_one_line(told, short, tmp_path, monkeypatch):
    monkeypatch.setattr(Failing, "where", "start")
    with pytest.raises(UserError, match=r"^failing does not start \(ConnectionError: no server\);"):
        fit(FitConfig(track="failing", **short), tmp_path, evaluate=False)


@pytest.mark.parametrize(
    ("track", "words"),
    [
        ("wandb", "track is 'wandb', whose package is not installed; pip install wandb, or leave"),
        ("diary, recorder", "track is 'diary'; give some of: "),
        ("recorder", "track is 'recorder', which writes into the output; give one"),
    ],
)
def test_what_could_not_be_told_is_refused_before_anything_is_loaded(
    told, short, track, words, monkeypatch
):
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", list)
    heard = Heard()
    with pytest.raises(UserError) as caught:
        fit(FitConfig(track=track, **short), progress=heard)
    assert str(caught.value).startswith(words) and heard.stages == []


def test_the_command_ends_in_one_line_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", list)
    words = ["fit", "--track", "tensorboard", "--output", str(tmp_path / "run")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and result.stdout == "" and not (tmp_path / "run").exists()
    assert result.stderr.startswith("blora-pyro: track is 'tensorboard', whose package is not inst")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("family", ["normal", "pretrained-scale", "learned-scale", "horseshoe"])
def test_figures_are_those_of_diagnose_at_any_moment_and_draw_nothing(net, family):
    model = BLoRA(net, build_prior(family), rank=2, target_modules="q_proj")
    guide = build_guide(family, model)
    figures = listeners.PosteriorFigures(model, guide)
    for shift in (0.0, 0.5):
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter += shift
        before = torch.get_rng_state()
        found = figures()
        assert torch.equal(torch.get_rng_state(), before)
        posterior = Posterior.from_guide("tiny", model, guide, Family(family, {}, family))
        assert found["contraction"] == pytest.approx(contraction_of(posterior), rel=1e-4, abs=1e-6)
        sparsity = posterior.sparsity()
        assert [found[f"sparsity/{name}"] for name in "AB"] == [sparsity["A"], sparsity["B"]]


@pytest.mark.parametrize(
    ("shell", "kind"),
    [(None, Listener), (SimpleNamespace(), Listener), (SimpleNamespace(kernel=1), Bars)],
)
def test_without_a_listener_there_are_bars_in_a_notebook_alone(monkeypatch, shell, kind):
    module = SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", module)
    assert type(heard_by(None)) is kind
    given = Listener()
    assert heard_by(given) is given


def test_bars_count_sets_and_steps_one_after_another(capsys):
    bars, seen = Bars(), []
    for name, total in (("train", 3), ("one batch", 1)):
        for done in range(1, total + 1):
            bars.features(name, done, total)
            seen.append(bars.bar and (bars.what, bars.bar.n, bars.bar.total))
    assert seen == [("features of train", 1, 3), ("features of train", 2, 3), None, None]
    bars.ready(FitConfig(steps=4), 100, 10)
    for step in (2, 3):  # of a fit that goes on, and ends early
        bars.step(Step(step, 2.0, 1.5, None, 1e-3, 40))
    assert (bars.bar.n, bars.bar.total, bars.bar.postfix) == (3, 4, "NLL 1.500")
    bars.fitted()
    assert bars.bar is None
    bars.transcripts("base on de", 1, 2)
    bars.note("a row is left out")
    shown = capsys.readouterr().err
    assert "base on de:  50%" in shown and "a row is left out\n" in shown
    bars.transcripts("base on de", 2, 2)
    assert bars.bar is None
