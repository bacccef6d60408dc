import json
import os
import shutil
import signal

import pytest
import torch
from matplotlib.figure import Figure
from optuna.trial import TrialState

from blora_pyro import fit
from blora_pyro.data import read_manifest
from blora_pyro.errors import Interrupted, UserError
from blora_pyro.options import FitConfig
from blora_pyro.posterior import Posterior
from blora_pyro.runs.listeners import Listener
from blora_pyro.studies import searching
from blora_pyro.studies.searching import METRICS, sweep
from blora_pyro.studies.trials import DATABASE, Trials, quiet_optuna

from ..forks import ended, start
from .conftest import Stages, no_heartbeat_for_an_hour

SEARCH = {"beta": (1e-6, 1e-3), "prior_scale": (0.01, 0.3)}


@pytest.fixture(scope="session")
def dev_folder(tones_folder, tmp_path_factory):
    """The tones with a dev split, and a test split that can't be read."""
    folder = shutil.copytree(tones_folder, tmp_path_factory.mktemp("with_dev") / "tones")
    (folder / "test.jsonl").rename(folder / "dev.jsonl")
    (folder / "test.jsonl").write_text("touched\n")
    return folder


@pytest.fixture
def options(fit_options, dev_folder, monkeypatch):
    """Of a sweep, but for its output, without its picture."""
    monkeypatch.setattr(searching, "search_plot", lambda found: Figure())
    short = {key: value for key, value in fit_options.items() if key != "beta"}
    return {**short, "data": str(dev_folder), "steps": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, fit_options, dev_folder):
    """Three trials that adapt a little. Read them, and leave them as they are."""
    torch.set_num_threads(1)
    short = {key: value for key, value in fit_options.items() if key != "beta"}
    given = {**short, "data": str(dev_folder), "steps": 10}
    return sweep(given, tmp_path_factory.mktemp("sweeps") / "three", trials=3)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


# ---- what comes of it


def test_every_trial_is_a_run_with_the_values_that_the_study_has(finished):
    assert [one.number for one in finished.trials] == [0, 1, 2]
    for one in finished.trials:
        config = read(finished.output / one.folder / "run.json")["config"]
        assert config["beta"] == one.values["beta"]
        assert config["prior_args"] == {"scale": one.values["prior_scale"]}
        for name, (low, high) in SEARCH.items():
            assert low <= one.values[name] <= high
        assert one.seconds > 0 and 0 <= one.sparsity["A"] <= 1
    assert len({one.values["beta"] for one in finished.trials}) == 3


def test_errors_are_those_of_the_dev_sets(finished, fit_options, dev_folder):
    one = finished.trials[1]
    given = {**fit_options, "data": str(dev_folder), "test": str(dev_folder / "dev.jsonl")}
    values = {"beta": one.values["beta"], "prior_scale": one.values["prior_scale"]}
    run = fit(FitConfig(**{**given, "steps": 10, **values}))
    stored = Posterior.load(finished.output / one.folder)
    assert all(torch.equal(mean, stored.mean[name]) for name, mean in run.posterior.mean.items())
    domain, backward = run.metrics["new_domain"], run.metrics["backward_error"]
    assert one.new_domain["rate"] == domain["adapted"]["wer"]["rate"]
    assert finished.base["new_domain"]["rate"] == domain["base"]["wer"]["rate"]
    assert (one.backward, one.forgetting) == (backward["adapted"], backward["change"])
    assert one.sparsity == run.metrics["sparsity"]


def test_the_result_is_on_disk(finished):
    content = read(finished.output / "sweep.json")
    assert [one["number"] for one in content["trials"]] == [0, 1, 2]
    assert content["front"] == [one.number for one in finished.front]
    assert content["knee"]["number"] == finished.knee.number
    value = repr(finished.knee.values["beta"])
    assert f"--beta {value}" in content["knee"]["command"]
    assert content["options"]["steps"] == 10
    assert content["options"]["search"] == {name: list(ends) for name, ends in SEARCH.items()}
    assert (finished.output / "sweep.png").stat().st_size > 10_000


def test_a_finished_sweep_is_only_read(finished, fit_options, dev_folder):
    stages = Stages()
    short = {key: value for key, value in fit_options.items() if key != "beta"}
    given = {**short, "data": str(dev_folder), "steps": 10}
    again = sweep(given, finished.output, trials=3, progress=stages)
    assert (again.trials, again.base, stages.seen) == (finished.trials, finished.base, [])


def test_objects_of_datasets_can_be_swept(options, dev_folder, tmp_path):
    rows = read_manifest(dev_folder / "dev.jsonl")
    given = {**options, "data": rows, "dev": rows, "backward": {"de": rows}}
    found = sweep(given, tmp_path / "sweep", trials=1, search={"beta": (1e-6, 1e-3)})
    assert found.knee == found.trials[0]
    assert found.trials[0].values.keys() == {"beta"}


# ---- stopped, and gone on with


@pytest.mark.parametrize("place", ["base on the dev sets", "trial 0 on the dev sets"])
def test_a_signal_ends_a_sweep_that_the_same_call_goes_on_with(options, tmp_path, place):
    with pytest.raises(Interrupted, match=r"interrupted; 0 of 1 trials .* same command$"):
        sweep(options, tmp_path / "sweep", trials=1, progress=Stages(place))
    stages = Stages()
    (trial,) = sweep(options, tmp_path / "sweep", trials=1, progress=stages).trials
    assert (trial.number, trial.folder) == (1, "trial-0")
    fitted = "finished already: reading" not in stages.seen
    assert fitted == (place != "trial 0 on the dev sets")
    with quiet_optuna():
        trials = Trials(tmp_path / "sweep", METRICS)
        first, second = trials.of()
        trials.close()
    assert [one.state for one in (first, second)] == [TrialState.FAIL, TrialState.COMPLETE]
    assert first.params == second.params


class Dies(Listener):
    def step(self, step):
        if step.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def work(options, output, file=None):
    """What a process does; without a file for the trials it dies in the first."""
    found = sweep(options, output, trials=3, progress=Listener() if file else Dies())
    file.write_text(json.dumps(found.to_json()["trials"]))


def test_a_killed_trial_goes_on_and_two_processes_share_the_others(options, tmp_path):
    given = {**options, "steps": 6}
    dead = start(work, given, tmp_path / "sweep")
    assert ended(dead) == [-signal.SIGKILL]
    begun = read(tmp_path / "sweep" / "trial-0" / "run.json")
    assert begun["state"] == "fitting"
    no_heartbeat_for_an_hour(tmp_path / "sweep" / DATABASE)
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    workers = [start(work, given, tmp_path / "sweep", file) for file in files]
    assert ended(*workers) == [0, 0]
    outputs = [read(file) for file in files]
    assert outputs[0] == outputs[1] and len(outputs[0]) == 3
    assert len({one["values"]["beta"] for one in outputs[0]}) == 3
    (gone_on,) = [one for one in outputs[0] if one["folder"] == "trial-0"]
    assert gone_on["number"] > 0
    last = read(tmp_path / "sweep" / "trial-0" / "run.json")
    assert last["config"]["beta"] == begun["options"]["beta"] == gone_on["values"]["beta"]
    folders = {path.name for path in (tmp_path / "sweep").glob("trial-*")}
    assert folders == {one["folder"] for one in outputs[0]}


def test_of_two_processes_at_the_last_trial_one_withdraws(options, tmp_path):
    with quiet_optuna():
        trials = Trials(tmp_path, METRICS)
        with pytest.warns(UserWarning, match="Heartbeat of storage"):
            trials.study.ask()  # another process works on the only trial

        searcher = searching._Searcher(trials, None, {}, {}, total=1)
        assert not searcher.finished()
        trials.run_next(searcher)
        states = [one.state for one in trials.of()]
        trials.close()
    assert states == [TrialState.RUNNING, TrialState.PRUNED]


def test_fits_that_diverge_are_told_and_no_knee(options, tmp_path):
    given = {**options, "lr": 1e30, "steps": 14}
    found = sweep(given, tmp_path / "sweep", trials=1)
    assert (found.trials, found.front, found.knee) == ((), [], None)
    (lost,) = found.diverged
    assert lost["values"].keys() == SEARCH.keys() and "nan" in lost["failure"]
    assert read(tmp_path / "sweep" / "sweep.json")["knee"] is None


def test_no_trial_begins_after_the_timeout(options, tmp_path):
    found = sweep(options, tmp_path / "sweep", trials=9, timeout=1e-9)
    assert found.trials == () and found.base is None


# ---- what is refused


def test_other_options_are_refused(finished, fit_options, dev_folder):
    short = {key: value for key, value in fit_options.items() if key != "beta"}
    given = {**short, "data": str(dev_folder), "steps": 10}
    with pytest.raises(UserError, match="has steps = 10, not 11; give the same"):
        sweep({**given, "steps": 11}, finished.output, trials=4)
    with pytest.raises(UserError, match="has search = "):
        sweep(given, finished.output, trials=4, search={**SEARCH, "beta": (1e-6, 1)})


def test_sets_without_a_dev_split_are_refused(options, tones_folder, tmp_path):
    given = {**options, "data": str(tones_folder)}
    with pytest.raises(UserError, match=r"tones.* has no dev split; give a set that has one"):
        sweep(given, tmp_path / "one", trials=1)
    given = {**options, "backward": (str(tones_folder),)}
    with pytest.raises(UserError, match=r"tones.* has no dev split; give a set that has one"):
        sweep(given, tmp_path / "two", trials=1)


@pytest.mark.parametrize(
    ("given", "words"), [({"trials": 0}, "trials is 0"), ({"timeout": -1}, "timeout is -1")]
)
def test_numbers_that_cannot_be_are_refused(options, tmp_path, given, words):
    with pytest.raises(UserError, match=words):
        sweep(options, tmp_path / "sweep", **given)
    assert not (tmp_path / "sweep").exists()


def test_a_dry_run_refuses_what_a_run_refuses_and_makes_nothing(options, tones_folder, tmp_path):
    found = sweep(options, tmp_path / "sweep", dry_run=True)
    assert (found.trials, found.knee) == ((), None)
    with pytest.raises(UserError, match="has no dev split"):
        sweep({**options, "data": str(tones_folder)}, tmp_path / "sweep", dry_run=True)
    with pytest.raises(UserError, match="no option 'rnk'; did you mean 'rank'"):
        sweep({**options, "rnk": 2}, tmp_path / "sweep", dry_run=True)
    assert not (tmp_path / "sweep").exists()
