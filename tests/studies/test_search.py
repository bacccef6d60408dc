import json
import math
import os
import shutil
import signal

import pytest
import torch
from optuna.trial import TrialState

from blora_pyro import fit
from blora_pyro.data import read_manifest
from blora_pyro.errors import Interrupted, UserError
from blora_pyro.options import FitConfig
from blora_pyro.posterior import Posterior
from blora_pyro.runs.listeners import Listener
from blora_pyro.studies import search
from blora_pyro.studies.search import (
    METRICS,
    SEARCH,
    agreed_options,
    dev_config,
    ranges_of,
    rounded,
    sweep,
    with_values,
)
from blora_pyro.studies.trials import DATABASE, Trials, quiet_optuna

from ..forks import ended, start
from .conftest import Stages, no_heartbeat_for_an_hour

# ---- what is searched


def test_beta_scale_and_further_arguments_find_their_places():
    options = {"prior": "student-t", "prior_args": {"df": 4}, "rank": 8}
    assert with_values(options, {"beta": 1e-5, "prior_scale": 0.1}) == {
        **options,
        "beta": 1e-5,
        "prior_scale": 0.1,
    }
    found = with_values(options, {"df": 3.5, "lr": 0.01})
    assert found == {**options, "lr": 0.01, "prior_args": {"df": 3.5}}
    assert options["prior_args"] == {"df": 4}


def test_a_dev_set_is_handed_to_a_fit_that_asks_for_one_alone():
    assert with_values({"dev": "de"}, {}) == {}
    assert with_values({"dev": "de", "eval_every": 5}, {}) == {"dev": "de", "eval_every": 5}
    assert dev_config({"dev": "de"}, SEARCH).dev == "de"
    assert dev_config({}, SEARCH).dev is None


def test_every_option_that_is_a_number_can_be_searched():
    assert ranges_of({"distillation": (0.01, 1)}, {}) == {"distillation": (0.01, 1.0)}
    assert with_values({}, {"ewc": 10.0}) == {"ewc": 10.0}


def test_scale_is_prior_scale():
    assert ranges_of({"scale": (1, 2)}, {}) == {"prior_scale": (1.0, 2.0)}


@pytest.mark.parametrize(
    ("search", "options", "words"),
    [
        ({}, {}, "nothing is to be searched"),
        ({"df": (1, 9)}, {}, r"prior normal has no 'df' to be searched; .*the prior \(scale\)$"),
        ({"rank": (1, 9)}, {}, "has no 'rank'"),  # a whole number
        ({"beta": (0, 1)}, {}, "search of beta is from 0.0 to 1.0; give 0 < low < high"),
        ({"beta": (1, 1)}, {}, "search of beta is from 1.0"),
        ({"beta": (1, math.inf)}, {}, "search of beta is from 1.0 to inf"),
        ({"beta": (math.nan, 1)}, {}, "search of beta is from nan"),
        ({"beta": (1e-6, 1)}, {"beta": 1e-4}, "beta is searched and given, too"),
        (SEARCH, {"prior_args": {"scale": 1}}, "prior_scale is searched and given, too"),
        ({"scale": (1, 2)}, {"prior_scale": 1}, "prior_scale is searched and given, too"),
        (SEARCH, {"prior": "uniform"}, "'uniform' is none of"),
    ],
)
def test_what_cannot_be_searched_is_told_in_one_line(search, options, words):
    with pytest.raises(UserError, match=words):
        ranges_of(search, options)


def test_a_prior_without_a_scale_says_what_it_has(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("class Prior:\n    def __init__(self, width: float = 0.1):\n        pass\n")
    with pytest.raises(UserError, match=r"has no 'scale' to be searched; .* \(width\)$"):
        ranges_of(SEARCH, {"prior": str(path)})
    assert ranges_of({"width": (0.1, 1)}, {"prior": str(path)}) == {"width": (0.1, 1)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prior": "student-t", "search": {"df": (1, 9)}}, "df is 1.0; give a number above 2"),
        ({"backward": ()}, r"base pocket has no backward sets, .*: --backward NAME=SOURCE$"),
        ({"base": "owner/whisper"}, "base owner/whisper has no backward sets"),
        ({"rank": 0}, "rank is 0"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_anything_is_loaded(options, words):
    options = dict(options)
    ranges = ranges_of(options.pop("search", SEARCH), options)
    with pytest.raises(UserError, match=words):
        dev_config(options, ranges)


def test_what_is_searched_and_where_it_is_computed_need_not_agree():
    ranges = ranges_of({"beta": (1e-6, 1e-3), "df": (3, 9)}, {"prior": "student-t"})
    options = {"prior": "student-t", "prior_args": {"scale": "0.2"}, "local_files_only": True}
    about = agreed_options(dev_config(options, ranges), ranges)
    assert about["prior_args"] == {"scale": 0.2}
    assert about["search"] == {"beta": [1e-6, 1e-3], "df": [3.0, 9.0]}
    assert not {"beta", "device", "local_files_only"} & about.keys()
    assert "prior_scale" in about
    ranges = ranges_of(SEARCH, {})
    assert "scale" not in agreed_options(dev_config({}, ranges), ranges)["prior_args"]


def test_sampled_values_are_rounded_to_what_can_be_copied():
    assert rounded({"beta": 4.0438780095151014e-05, "lr": 0.2}) == {"beta": 4.04e-05, "lr": 0.2}


# ---- running it


@pytest.fixture(scope="session")
def dev_folder(tones_folder, tmp_path_factory):
    """The tones with a dev split, and a test split that can't be read."""
    folder = shutil.copytree(tones_folder, tmp_path_factory.mktemp("with_dev") / "tones")
    (folder / "test.jsonl").rename(folder / "dev.jsonl")
    (folder / "test.jsonl").write_text("touched\n")
    return folder


@pytest.fixture
def options(fit_options, dev_folder):
    """Of a sweep, but for its output."""
    short = {key: value for key, value in fit_options.items() if key != "beta"}
    return {**short, "data": str(dev_folder), "steps": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, fit_options, dev_folder):
    """Two trials that adapt a little. Read them, and leave them as they are."""
    torch.set_num_threads(1)
    short = {key: value for key, value in fit_options.items() if key != "beta"}
    given = {**short, "data": str(dev_folder), "steps": 10}
    return sweep(given, tmp_path_factory.mktemp("sweeps") / "two", trials=2)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


# ---- what comes of it


def test_every_trial_is_a_run_with_the_values_that_the_study_has(finished):
    assert [one["number"] for one in finished.trials] == [0, 1]
    for one in finished.trials:
        config = read(finished.output / one["folder"] / "run.json")["config"]
        assert config["beta"] == one["values"]["beta"]
        assert config["prior_args"] == {"scale": one["values"]["prior_scale"]}
        for name, (low, high) in SEARCH.items():
            assert low <= one["values"][name] <= high
        assert one["seconds"] > 0 and 0 <= one["sparsity"]["A"] <= 1
    assert len({one["values"]["beta"] for one in finished.trials}) == 2


def test_errors_are_those_of_the_dev_sets(finished, fit_options, dev_folder):
    one = finished.trials[1]
    given = {**fit_options, "data": str(dev_folder), "test": str(dev_folder / "dev.jsonl")}
    run = fit(FitConfig(**{**given, "steps": 10, **one["values"]}))
    stored = Posterior.load(finished.output / one["folder"])
    assert all(torch.equal(mean, stored.mean[name]) for name, mean in run.posterior.mean.items())
    domain, backward = run.metrics["new_domain"], run.metrics["backward_error"]
    assert one["new_domain"]["rate"] == domain["adapted"]["wer"]["rate"]
    assert finished.base["new_domain"]["rate"] == domain["base"]["wer"]["rate"]
    assert (one["backward"], one["forgetting"]) == (backward["adapted"], backward["change"])
    assert one["sparsity"] == run.metrics["sparsity"]


def test_a_finished_sweep_is_only_read(finished, fit_options, dev_folder):
    stages = Stages()
    short = {key: value for key, value in fit_options.items() if key != "beta"}
    given = {**short, "data": str(dev_folder), "steps": 10}
    again = sweep(given, finished.output, trials=2, progress=stages)
    assert (again.trials, again.base, stages.seen) == (finished.trials, finished.base, [])


def test_objects_of_datasets_can_be_swept(options, dev_folder, tmp_path):
    rows = read_manifest(dev_folder / "dev.jsonl")
    given = {**options, "data": rows, "dev": rows, "backward": {"de": rows}}
    found = sweep(given, tmp_path / "sweep", trials=1, search={"beta": (1e-6, 1e-3)})
    assert found.knee == found.trials[0]
    assert found.trials[0]["values"].keys() == {"beta"}


# ---- stopped, and gone on with


@pytest.mark.parametrize("place", ["base on the dev sets", "trial 0 on the dev sets"])
def test_a_signal_ends_a_sweep_that_the_same_call_goes_on_with(options, tmp_path, place):
    with pytest.raises(Interrupted, match=r"interrupted; 0 of 1 trials .* same command$"):
        sweep(options, tmp_path / "sweep", trials=1, progress=Stages(place))
    stages = Stages()
    fitted = tmp_path / "sweep" / "trial-0" / "posterior.safetensors"
    before = fitted.stat().st_mtime_ns if fitted.exists() else None
    assert (before is None) == (place != "trial 0 on the dev sets")
    (trial,) = sweep(options, tmp_path / "sweep", trials=1, progress=stages).trials
    assert (trial["number"], trial["folder"]) == (1, "trial-0")
    assert before in (None, fitted.stat().st_mtime_ns)
    with quiet_optuna(), Trials(tmp_path / "sweep", METRICS) as trials:
        first, second = trials.of()
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
    with quiet_optuna(), Trials(tmp_path, METRICS) as trials:
        with pytest.warns(UserWarning, match="Heartbeat of storage"):
            trials.study.ask()  # another process works on the only trial

        searcher = search._Searcher(trials, None, {}, {}, 1, Stages())
        assert not searcher.finished()
        trials.run_next(searcher)
        states = [one.state for one in trials.of()]
    assert states == [TrialState.RUNNING, TrialState.PRUNED]


def test_fits_that_diverge_are_told_and_no_knee(options, tmp_path):
    given = {**options, "lr": 1e14, "steps": 14}
    found = sweep(given, tmp_path / "sweep", trials=1)
    assert (found.trials, found.front, found.knee) == ([], [], None)
    (lost,) = found.diverged
    assert lost["values"].keys() == SEARCH.keys() and "nan" in lost["failure"]
    assert found.to_json()["knee"] is None


def test_no_trial_begins_after_the_timeout(options, tmp_path):
    found = sweep(options, tmp_path / "sweep", trials=9, timeout=1e-9)
    assert found.trials == [] and found.base is None


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
