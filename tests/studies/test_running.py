import itertools
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from optuna.trial import TrialState
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from blora_pyro.data import load_split
from blora_pyro.errors import Interrupted, UserError
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.record import FINISHED, state_of
from blora_pyro.studies import base_fits, trials
from blora_pyro.studies.base_fits import commit
from blora_pyro.studies.definition import ScoreSpec
from blora_pyro.studies.methods import Candidate
from blora_pyro.studies.results import DEV, TEST, read_results
from blora_pyro.studies.running import METRICS, StudyRun, run_study
from blora_pyro.studies.trials import DATABASE, Trials, quiet_optuna

from ..forks import ended, start
from .conftest import Stages, made_up, no_heartbeat_for_an_hour


@pytest.fixture
def fake_scores(monkeypatch):
    """Scores are made up instead of fitted; the titles of those that were made."""
    made: list[str] = []

    def score(run: StudyRun, spec: ScoreSpec):
        made.append(spec.title)
        return made_up(spec.scored, 0.2, 0.1)

    monkeypatch.setattr(StudyRun, "score", score)
    monkeypatch.setattr(StudyRun, "load_bases", lambda run: None)
    return made


def spec_of(study, name, value=None, parent=None, **more):
    candidate = Candidate(study.methods[name], value, parent)
    given = {"data": "mix", "seed": 0, "split": TEST, **more}
    return ScoreSpec(study, study.settings[0], candidate, **given)


# ---- from end to end


@pytest.fixture(scope="module")
def finished(tmp_path_factory, fluent_folder, sets_folder):
    """The study of the file, finished, and its stages. Read it, and leave it as it is."""
    from blora_pyro.studies.study_file import read_study_file, study_of

    from .conftest import STUDY

    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("studies") / "small.toml"
    path.write_text(STUDY.format(sets=sets_folder, base=fluent_folder), encoding="utf-8")
    study, stages = study_of(read_study_file(path), "small.toml"), Stages()
    return run_study(study, path.parent / "out", progress=stages), stages


def test_a_study_makes_every_score_once_in_ordinary_run_folders(finished):
    run, stages = finished
    assert run.plan.missing() == []
    assert len(stages.seen) == len(run.scores) == len({*stages.seen})
    folders = {path.name for path in (run.output / "fits").iterdir()}
    runs = {name for name in folders if not name.startswith("base_")}
    assert runs == {
        *(f"lora-{rate}_fluent_mix_seed0" for rate in ("0.01", "0.03")),
        "blora-1e-05_fluent_mix_seed0",
    }
    for name in runs:
        assert state_of(run.output / "fits" / name) == FINISHED
    rates = [one for one in run.scores.values() if one.candidate == "lora:0.03"]
    for one in rates:
        folder = run.output / "fits" / one.run
        name = "metrics.json" if one.split == TEST else "metrics-dev.json"
        metrics = json.loads((folder / name).read_text())
        adapted = metrics["new_domain"]["adapted"][one.metrics["new_domain"]]
        assert adapted["rate"] == one.new_domain_error
        assert metrics["backward_error"]["adapted"]["rate"] == one.backward_error
        assert one.sparsity == pytest.approx(metrics["sparsity"], rel=1e-5)
        assert one.weights > 0 and one.bytes > 0 and one.seconds > 0
        assert "--lr 0.03" in one.command and one.commit == commit()
        assert "1 threads" in one.machine and len(one.base_hash) == 12


def test_a_fit_of_strength_zero_is_the_base(finished):
    run, _ = finished
    scored = {(one.method, one.candidate.split(":")[1:2] == ["0"]): one
              for one in run.scores.values() if one.split == "dev"}  # fmt: skip
    base, nothing = scored["base", False], scored["scaled-lora", True]
    for name in base.counts:
        assert base.main(name).edits.tolist() == nothing.main(name).edits.tolist()
    assert nothing.after == "strength 0"
    assert nothing.sparsity["delta_w"] == 1


def test_a_finished_study_is_only_read(finished):
    run, _ = finished
    stages = Stages()
    again = run_study(run.study, run.output, progress=stages)
    assert stages.seen == []
    assert again.scores.keys() == run.scores.keys()


def test_scores_of_another_adapter_are_made_again(finished, tmp_path):
    run, _ = finished
    output, name = tmp_path / "out", "lora-0.01_fluent_mix_seed0"
    shutil.copytree(run.output, output)
    own, other = (output / "fits" / one for one in (name, "lora-0.03_fluent_mix_seed0"))
    files = ("metrics-dev.json", "utterances-dev.jsonl")
    right = [(own / file).read_bytes() for file in files]
    for file in files:
        shutil.copy(other / file, own / file)
    again = StudyRun(run.study, output, output / "none.csv")
    (spec,) = [
        one
        for one in run.plan.wanted()
        if one.run == name and one.split == DEV and not one.scored.after
    ]
    assert again.score(spec).new_domain_error == run.scores[spec.key].new_domain_error
    assert right == [(own / file).read_bytes() for file in files]


def test_the_table_alone_is_enough_for_a_report(finished, tmp_path):
    run, _ = finished
    run_of_table = run_study(run.study, tmp_path, results=run.results, work=False)
    assert run_of_table.plan.missing() == []
    assert not (tmp_path / "study.db").exists()
    for key, one in run_of_table.scores.items():
        assert one.to_row() == run.scores[key].to_row()


def test_the_base_scored_here_has_the_rates_of_a_run(finished, finished_run):
    run, _ = finished
    (base,) = [one for one in run.scores.values() if one.key[2] == "base" and one.split == TEST]
    expected = finished_run.metrics
    assert base.new_domain_error == expected["new_domain"]["base"]["wer"]["rate"]
    assert base.backward_error == expected["backward_error"]["base"]["rate"]


def test_objects_of_datasets_are_sources(study, sets_folder, tmp_path):
    from datasets import DatasetDict

    splits = {name: load_split(str(sets_folder / "mix"), name) for name in ("train", "dev", "test")}
    rows = DatasetDict({name: one.remove_columns("origin") for name, one in splits.items()})
    own = replace(study, data={"mix": rows}, row=Candidate(study.methods["lora"], 0.01))
    run = run_study(own, tmp_path / "out")
    assert run.plan.missing() == [] and len(read_results(run.results)) == 2


# ---- started again, and other options


def test_started_again_a_study_makes_what_is_not_there(study, fake_scores, tmp_path):
    study = replace(study, row=Candidate(study.methods["lora"], 0.01))
    run_study(study, tmp_path)
    first = [*fake_scores]
    assert first and len(first) == len({*first})
    run_study(study, tmp_path)
    assert fake_scores == first
    run_study(replace(study, seeds=[0, 1]), tmp_path)
    more = fake_scores[len(first) :]
    assert more and all("seed 1, test" in title for title in more)


def test_one_candidate_without_any_choice(study, fake_scores, tmp_path):
    lora = Candidate(study.methods["lora"], 0.002)  # not among the values
    run_study(replace(study, row=lora), tmp_path)
    assert fake_scores == ["base, mix, seed 0, test", "lora:0.002, mix, seed 0, test"]


def test_without_work_nothing_is_made(study, tmp_path):
    run = run_study(study, tmp_path / "out", work=False)
    assert len(run.plan.missing()) == 1 + 2 + 1
    assert not (tmp_path / "out").exists()


def test_rows_of_other_options_are_refused(study, fake_scores, tmp_path):
    study = replace(study, only_choose=True)
    run_study(study, tmp_path)
    other = replace(study, options={**study.options, "rank": 3})
    for work in (True, False):
        with pytest.raises(UserError, match=r"has lora:0.01, mix, seed 0, dev of .*--rank 2.* not"):
            run_study(other, tmp_path, work=work)
    elsewhere = replace(study, options={**study.options, "local_files_only": True})
    run_study(elsewhere, tmp_path)  # decides nothing


def test_a_base_that_was_scored_in_another_way_is_refused(study, tmp_path):
    run = StudyRun(study, tmp_path, tmp_path / "results.csv")
    spec = spec_of(study, "base", split=DEV)
    scored = made_up(spec.scored, 0.2, 0.1)
    run.scores = {spec.key: scored}
    run.refresh()
    other = StudyRun(study, tmp_path, tmp_path / "results.csv")
    other.scores = {spec.key: replace(scored, run="base_mix_0123abcd")}
    with pytest.raises(UserError, match="give the same options, or another output"):
        other.refresh()


def test_another_step_after_the_fit_is_refused(study, tmp_path):
    run = StudyRun(study, tmp_path, tmp_path / "results.csv")
    spec = spec_of(study, "lora", study.methods["lora"].values[0], split=DEV)
    run.scores = {spec.key: replace(spec.scored, after="strength 0.5")}
    with pytest.raises(UserError, match=r"of 'strength 0\.5', not 'nothing'"):
        run.refresh()


def test_a_base_whose_weights_have_changed_is_refused(study, tmp_path, monkeypatch):
    run = StudyRun(study, tmp_path, tmp_path / "results.csv")
    base = spec_of(study, "base")
    run.scores[base.key] = replace(run.score(base), base_hash="0123456789ab")
    with pytest.raises(UserError, match="whose weights have changed since; give another output"):
        run.score(spec_of(study, "lora", 0.01))


def test_replay_draws_a_share_from_the_backward_sets(study, sets_folder, tmp_path):
    from blora_pyro.studies.methods import Method

    replay = Method("replay", knob="share", values=(0.5,), of="lora")
    methods = {**study.methods, "replay": replay}
    parent = Candidate(study.methods["lora"], 0.01)
    own = replace(study, methods=methods, row=Candidate(replay, 0.5, parent))
    run = run_study(own, tmp_path / "out")
    (one,) = [one for one in run.scores.values() if one.method == "replay"]
    about = json.loads((run.output / "fits" / one.run / "run.json").read_text())
    assert about["config"]["data"] == [str(sets_folder / name) for name in ("mix", "de", "en")]
    assert about["config"]["data_weights"] == [0.5, 0.25, 0.25]


def test_a_fit_that_is_not_finite_is_a_failed_row_and_does_not_stop_the_study(
    study, tmp_path, monkeypatch
):
    def fail(*given, **more):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(base_fits.fits, "fit", fail)
    run = run_study(replace(study, only_choose=True), tmp_path)
    failed = [one for one in run.scores.values() if one.failed]
    assert {one.failed for one in failed} == {"the loss is nan"} and len(failed) == 3
    assert [one.failed for one in read_results(run.results)].count("the loss is nan") == 3


# ---- stopped, and shared


def test_an_interrupted_study_says_what_is_safe_and_goes_on(study, tmp_path):
    with pytest.raises(Interrupted, match=r"interrupted; 1 rows are safe in .*; start the same"):
        run_study(study, tmp_path, progress=Stages("lora:0.01"))
    with quiet_optuna(), Trials(tmp_path, METRICS) as trials:
        assert [one.state for one in trials.of()] == [
            *(TrialState.COMPLETE, TrialState.FAIL, TrialState.WAITING)
        ]
    stages = Stages()
    run = run_study(replace(study, only_choose=True), tmp_path, progress=stages)
    assert run.plan.missing() == []
    assert not any(title.startswith("base") for title in stages.seen)


class Told(Listener):
    def __init__(self, dies):
        self.dies = dies

    def stage(self, name):
        print(name, flush=True)

    def step(self, step):
        if self.dies and step.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def work(file, output, dies=False):
    """What a process does."""
    from blora_pyro.studies.study_file import read_study_file, study_of

    study = replace(study_of(read_study_file(file), file.name), only_choose=True)
    run_study(study, output, progress=Told(dies))


def test_a_killed_fit_goes_on_with_its_folder_and_two_processes_share_the_rest(
    study_file, tmp_path
):
    text = study_file.read_text().replace("steps = 2\n", "steps = 6\n")
    study_file.write_text(text)
    told = [tmp_path / name for name in ("dead", "one", "two")]
    dead = start(work, study_file, tmp_path / "out", dies=True, streams=told[:1])
    assert ended(dead) == [-signal.SIGKILL]
    titles = told[0].read_text().splitlines()
    assert [title.split(",")[0] for title in titles] == ["base", "lora:0.01"]
    begun = json.loads((tmp_path / "out/fits/lora-0.01_fluent_mix_seed0/run.json").read_text())
    assert begun["state"] == "fitting"

    no_heartbeat_for_an_hour(tmp_path / "out" / DATABASE)
    workers = [start(work, study_file, tmp_path / "out", streams=[path]) for path in told[1:]]
    assert ended(*workers) == [0, 0]
    outputs = [path.read_text().splitlines() for path in told[1:]]
    names = [title.partition(";")[0] for output in outputs for title in output]
    assert len(names) == len({*names})  # none was made twice
    assert any(name.startswith("lora:0.01") for name in names)
    rows = read_results(tmp_path / "out" / "results.csv")
    assert len(rows) == 1 + len(names)
    run = json.loads((tmp_path / "out/fits/lora-0.01_fluent_mix_seed0/run.json").read_text())
    assert run["state"] == "finished" and len(run["history"]) == 6


def test_rows_of_one_machine_come_to_another_and_a_fit_stays_where_it_was_made(
    study, fake_scores, tmp_path
):
    url = f"sqlite:///{tmp_path}/shared.db"
    given = {"storage": url, "study_name": "shared"}
    one = run_study(replace(study, only_choose=True), tmp_path / "here", **given)
    made = len(fake_scores)
    other = run_study(replace(study, only_choose=True), tmp_path / "there", **given)
    assert len(fake_scores) == made
    assert Path(other.results).read_text() == Path(one.results).read_text()


def test_fits_that_are_finished_here_are_scored_first(study, tmp_path, monkeypatch):
    run = StudyRun(study, tmp_path, tmp_path / "results.csv")
    missing, seen = run.plan.missing(), []
    last = missing[-1].run
    monkeypatch.setattr(StudyRun, "_is_finished", lambda run, name: name == last)

    class Queue:
        def open_runs(self):
            return set()

        def of(self, *states):
            return []

        def run_next(self, objective, about):
            seen.append(about["run"])

    run.trials = Queue()
    run._next(missing)
    assert seen == [last]


@pytest.mark.parametrize(
    ("what", "count"),
    [
        ("before_cursor_execute", 0),
        ("begin", 12),
        ("before_cursor_execute", 60),
    ],
)
def test_a_storage_that_goes_away_is_one_line_and_the_same_call_goes_on(
    study, fake_scores, tmp_path, monkeypatch, what, count
):
    for name, value in {"SECONDS": 1, "MISSED": 1, "PATIENCE": 0.1}.items():
        monkeypatch.setattr(trials, name, value)  # what was worked on is soon taken for dead
    opened = Trials._open

    def open_storage(self, *given):
        storage, seen = opened(self, *given), itertools.count()

        def away(*_):
            if next(seen) >= count:
                raise OperationalError("SELECT 1", {}, Exception("server closed the connection"))

        event.listen(storage.engine, what, away)
        return storage

    chosen = replace(study, only_choose=True)
    with monkeypatch.context() as patched:
        patched.setattr(Trials, "_open", open_storage)
        with pytest.raises(UserError, match=r"^storage 'study\.db' can't be ") as error:
            run_study(chosen, tmp_path)
    assert "\n" not in str(error.value) and "server closed the connection" in str(error.value)
    assert run_study(chosen, tmp_path).plan.missing() == []


# ---- what is refused before the first fit, by a dry run alike


@pytest.mark.parametrize("work", [True, False])
def test_sets_without_the_split_are_refused(study, tones_folder, sets_folder, tmp_path, work):
    from blora_pyro.studies.methods import Method

    def refused(words, **changes):
        with pytest.raises(UserError, match=words):
            run_study(replace(study, **changes), tmp_path / "out", work=work)

    refused("has no dev split; a study chooses on dev", data={"mix": str(tones_folder)})
    one_file = str(tones_folder / "test.jsonl")
    options = {**study.options, "backward": {"de": one_file}}
    refused("has no dev split", options=options)
    (tmp_path / "no_train").mkdir()
    for split in ("dev", "test"):
        text = (sets_folder / "de" / f"{split}.jsonl").read_text()
        (tmp_path / "no_train" / f"{split}.jsonl").write_text(text)
    options["backward"] = {"de": str(tmp_path / "no_train")}
    replay = Method("replay", knob="share", values=(0.5,), of="lora")
    ewc = Method("ewc", knob="ewc", values=(10.0,), of="lora")
    for method in (replay, ewc):
        methods = {**study.methods, method.name: method}
        words = f"no_train has no train split, which method {method.name} learns from"
        refused(words, options=options, methods=methods)
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_there_is_refused_before_the_first_fit(study, tmp_path):
    lost = replace(study.settings[0], base="lost", options={"base": str(tmp_path / "nowhere")})
    run = StudyRun(replace(study, settings=[*study.settings, lost]), tmp_path, tmp_path / "r.csv")
    with pytest.raises(UserError, match="nowhere"):
        run.load_bases()
