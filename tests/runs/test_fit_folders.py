import json
import shutil
from dataclasses import replace

import pytest

from blora_pyro.errors import UserError
from blora_pyro.options import FitConfig
from blora_pyro.posterior import Family, Posterior
from blora_pyro.runs.fit_folders import FitFolder, SkippedRows
from blora_pyro.runs.fits import fit
from blora_pyro.runs.folders import CHECKPOINT, REPORT, SKIPPED
from blora_pyro.runs.loading import SkippedRow
from blora_pyro.runs.record import EVALUATING, FINISHED, FITTING, METRICS, RUN, RunRecord

ROWS = [SkippedRow("a.csv", "train", f"a.csv, line {n}", "no text") for n in range(4)]
CONFIG = FitConfig(data="de-en", steps=3)


def begun(path, config=CONFIG, overwrite=False) -> FitFolder:
    """The folder of a fit that has loaded its data."""
    folder = FitFolder.create(path, config, overwrite)
    folder.begin(config.resolved(100, 10), "de-en", 10, 100, 512)
    return folder


def listed(path):
    return [json.loads(line)["origin"] for line in path.read_text().splitlines()]


# ---- from start to end


def test_options_are_on_disk_before_anything_is_loaded(tmp_path):
    FitFolder.create(tmp_path / "run", CONFIG, overwrite=False)
    record = RunRecord.read(tmp_path / "run")
    assert record.state == FITTING and record.config is None
    assert FitConfig(**record.options) == CONFIG


def test_a_fit_that_has_loaded_its_data_keeps_its_resolved_options_and_sizes(tmp_path):
    folder = begun(tmp_path)
    record = RunRecord.read(tmp_path)
    assert record.resolved == CONFIG.resolved(100, 10) and folder.state == FITTING
    assert (record.training_utterances, record.training_tokens) == (10, 100)
    assert record.temperature == pytest.approx(float(CONFIG.beta) * 100)
    assert (record.adapter_weights, record.language) == (512, "de-en")
    assert "torch" in record.versions


def test_without_a_path_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = begun(None)
    assert folder.list_skipped(ROWS) == "" and folder.transcripts("base") is None
    folder.finish({}, [], 1.0)
    folder.tidy()
    assert folder.safe() == "nothing was to be kept on disk" and folder.way_on() == "start again"
    assert not list(tmp_path.iterdir())


def test_an_earlier_run_stays_whole_until_the_new_fit_has_loaded_its_data(tmp_path):
    for name in (RUN, METRICS, REPORT, "adapter_model.safetensors"):
        (tmp_path / name).write_text('{"state": "finished"}')
    folder = FitFolder.create(tmp_path, CONFIG, overwrite=True)
    folder.list_skipped(ROWS)  # not yet its own list
    assert folder.safe() == f"what was in {tmp_path} before is as it was"
    assert (tmp_path / METRICS).exists() and not (tmp_path / SKIPPED).exists()
    folder.begin(CONFIG.resolved(100, 10), "de-en", 10, 100, 512)
    assert [path.name for path in tmp_path.iterdir()] == [RUN]


def test_a_posterior_is_kept_before_it_is_scored_and_metrics_finish_the_run(
    tmp_path, random_posterior
):
    folder, posterior = begun(tmp_path), random_posterior(0)
    (tmp_path / CHECKPOINT).touch()
    folder.save(posterior, [], None, 1.0)
    assert folder.state == EVALUATING and not (tmp_path / CHECKPOINT).exists()
    assert folder.safe() == f"the posterior is safe in {tmp_path}"
    again = FitFolder.reopen(tmp_path, FitConfig())
    assert again.fitted()[0].mean.keys() == posterior.mean.keys()
    assert again.record.skipped_steps == 3
    folder.transcripts("base").write_text("{}")
    folder.finish({"backward": {}}, [], 2.0)
    assert not folder.transcripts("base").exists()
    done = FitFolder.reopen(tmp_path, FitConfig())
    assert done.state == FINISHED and done.metrics() == {"backward": {}}
    assert done.record.seconds == {"fit": 1.0, "total": 2.0}
    assert Posterior.load(tmp_path).num_weights == posterior.num_weights


def test_damaged_metrics_of_a_finished_run_can_be_measured_again(tmp_path):
    begun(tmp_path)
    (tmp_path / METRICS).write_text("{")
    with pytest.raises(UserError, match="measure again with: blora-pyro evaluate"):
        FitFolder.reopen(tmp_path, FitConfig()).metrics()


# ---- reopening


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"steps": 50}, "steps = 3, not 50; leave the option out"),
        ({"prior_args": {"scale": 0.1}}, "prior_args"),
        ({"backward": ()}, "backward"),
    ],
)
def test_a_fit_is_reopened_with_its_own_options_alone(tmp_path, other, words):
    begun(tmp_path)
    assert FitFolder.reopen(tmp_path, FitConfig(steps=3)).config == CONFIG
    with pytest.raises(UserError, match=words):
        FitFolder.reopen(tmp_path, FitConfig(**other))


def test_a_resolved_value_may_be_given_for_one_that_was_left_out(tmp_path):
    begun(tmp_path)
    assert FitFolder.reopen(tmp_path, FitConfig(alpha=CONFIG.resolved(1, 1).alpha)).config.alpha


def test_code_of_a_fit_is_run_only_if_it_is_named_again(tmp_path):
    code = tmp_path / "mine.py"
    code.write_text("from blora_pyro.guides.normal import Guide, Prior\n")
    begun(tmp_path / "run", replace(CONFIG, prior=str(code)))
    with pytest.raises(UserError, match=r"the run names code as prior, .*; name it with --prior"):
        FitFolder.reopen(tmp_path / "run", FitConfig())
    folder = FitFolder.reopen(tmp_path / "run", FitConfig(prior=str(code)))
    assert folder.way_on().endswith(f"--output {tmp_path / 'run'} --prior {code}")


@pytest.mark.parametrize("part", ["options", "config", "posterior"])
@pytest.mark.parametrize("role", ["prior", "guide"])
def test_a_finished_run_that_names_code_is_not_read_with_it(finished_run, tmp_path, part, role):
    folder, code = tmp_path / "run", tmp_path / "mine.py"
    code.write_text(
        "from pathlib import Path\nfrom blora_pyro.guides.normal import Guide, Prior\n"
        "Path(__file__).with_name('ran').touch()"
    )
    shutil.copytree(finished_run.output, folder)
    if part == "posterior":
        replace(finished_run.posterior, family=Family(**{role: f"{code}/"})).save(folder)
    else:
        content = json.loads((folder / RUN).read_text())
        content[part][role] = f"{code}/"
        (folder / RUN).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"the run names code as {role}, .*; name it with --"):
        next(fit(output=folder, resume=True).posterior.draws(1))
    assert not (tmp_path / "ran").exists()
    if part != "posterior":  # which names another file than the run: no trust in that one
        trusted = fit(output=folder, resume=True, trust_prior_file=True)
        assert next(trusted.posterior.draws(1))


def test_another_process_follows_by_what_the_main_one_sends(tmp_path):
    begun(tmp_path)
    content = {"state": FITTING, "options": CONFIG.to_json(), "chain": None}
    folder = FitFolder.follow(content, FitConfig())
    assert (folder.path, folder.state, folder.config) == (None, FITTING, CONFIG)


# ---- rows that were left out


def test_a_row_is_listed_once_also_after_a_kill_in_the_middle_of_a_line(tmp_path):
    path = tmp_path / SKIPPED
    SkippedRows(path).add(ROWS[:2])
    path.write_text(path.read_text() + '{"source": "a.c')  # the kill
    rows = SkippedRows(path)
    rows.add(ROWS[1:3])
    rows.add(ROWS)
    assert listed(path) == [row.origin for row in ROWS]


def test_rows_are_listed_by_a_fit_alone_and_their_list_is_named(tmp_path):
    folder = begun(tmp_path)
    assert folder.list_skipped([]) == "" and not (tmp_path / SKIPPED).exists()
    assert folder.list_skipped(ROWS) == str(tmp_path / SKIPPED)
    folder.record.state = EVALUATING  # the rows of the test sets have been listed by then
    folder.list_skipped([replace(ROWS[0], origin="a.csv, line 9")])
    assert len(listed(tmp_path / SKIPPED)) == len(ROWS)
