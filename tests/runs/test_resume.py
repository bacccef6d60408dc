"""Interrupted fits go on bit by bit as if they had not been interrupted."""

import json
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from blora_pyro.errors import UserError
from blora_pyro.fitting import checkpoints as checkpoints_module
from blora_pyro.fitting.checkpoints import FILE, read_checkpoint, stored_step
from blora_pyro.options import FitConfig
from blora_pyro.posterior import Posterior
from blora_pyro.runs import fits, scoring
from blora_pyro.runs.finished import evaluate_run
from blora_pyro.runs.fits import Run, fit
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.loading import Loader

from ..forks import ended, start

KILLS = int(os.environ.get("BLORA_PYRO_KILLS", "2"))
FINISHED_FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "posterior.safetensors",
    "run.json",
    "metrics.json",
    "utterances.jsonl",
    "report.html",
}


class Crash(Exception):
    """Stands for the end of the process."""


class Crashing(Listener):
    """Dies at a step or a stage, whose names are kept."""

    def __init__(self, step=None, stage=None, error=Crash):
        self.at, self.name, self.error = step, stage, error
        self.steps, self.stages = [], []

    def step(self, step):
        self.steps.append(step.step)
        if step.step == self.at:
            raise self.error

    def stage(self, name):
        self.stages.append(name)
        if self.name is not None and name.startswith(self.name):
            raise self.error


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def assert_same_run(folder, other):
    """Every file of two finished runs, but for times."""
    assert {path.name for path in folder.iterdir()} == FINISHED_FILES
    for name in ("posterior.safetensors", "adapter_model.safetensors"):
        one, two = load_file(folder / name), load_file(other / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(value, two[key]) for key, value in one.items())
    for name in ("metrics.json", "utterances.jsonl"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()
    one, two = read_json(folder / "run.json"), read_json(other / "run.json")
    assert one.pop("seconds").keys() == two.pop("seconds").keys()
    assert one == two


def crashed(folder, options, overwrite=False, **where):
    crashing = Crashing(**where)
    with pytest.raises(Crash):
        fit(
            FitConfig(**options),
            folder,
            overwrite=overwrite,
            checkpoint_every=4,
            progress=crashing,
        )
    return folder


@pytest.fixture(scope="module")
def options(fit_options) -> dict[str, Any]:
    """Options of a shorter fit of fewer layers, with one backward set."""
    few = {"target_modules": r".*decoder.*(q|v)_proj", "backward": fit_options["backward"][:1]}
    return {**fit_options, **few, "steps": 8}


@pytest.fixture(scope="module")
def written() -> list[Path]:
    """The JSON files that `straight` writes, in order."""
    return []


@pytest.fixture(scope="module")
def straight(tmp_path_factory, options, written) -> Run:
    """The run that was never interrupted."""
    torch.set_num_threads(1)
    folder, replace = tmp_path_factory.mktemp("runs") / "straight", os.replace

    def noted(source, target):
        replace(source, target)
        if is_json_in(folder, target):
            written.append(target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", noted)
        return fit(FitConfig(**options), folder)


def is_json_in(folder, path):
    return str(path).endswith(".json") and folder in path.parents


@pytest.fixture(scope="module")
def crashed_at_six(tmp_path_factory, options) -> Path:
    torch.set_num_threads(1)
    return crashed(tmp_path_factory.mktemp("runs") / "crashed", options, step=6)


@pytest.fixture
def half_done(crashed_at_six, tmp_path) -> Path:
    """A run that died at step 6 of 8, its last checkpoint being that of step 4."""
    return Path(shutil.copytree(crashed_at_six, tmp_path / "run"))


def test_a_resumed_run_is_that_of_a_fit_never_interrupted(half_done, straight):
    assert read_json(half_done / "run.json")["state"] == "fitting"
    torch.rand(3)
    listener = Crashing()
    run = fit(output=half_done, resume=True, progress=listener)
    assert listener.steps == list(range(5, 9))
    assert "going on from step 4" in listener.stages
    assert not any(stage.startswith("base on") for stage in listener.stages)  # kept from before
    assert run.history == straight.history
    assert run.metrics == straight.metrics
    assert run.config == straight.config
    assert_same_run(half_done, straight.output)


@pytest.mark.parametrize(
    "where",
    [
        {"stage": "loading"},
        {"step": 1},
        {"step": 8},
        {"stage": "adapted on the new"},
    ],
)
def test_a_run_goes_on_from_wherever_it_died(options, straight, tmp_path, where):
    folder = crashed(tmp_path / "run", options, **where)
    fit(output=folder, resume=True)
    assert_same_run(folder, straight.output)


def test_a_run_that_died_in_its_evaluation_is_not_fitted_again(
    options, straight, tmp_path, monkeypatch
):
    folder = crashed(tmp_path / "run", options, stage="adapted on /")
    assert not (folder / FILE).exists()
    assert evaluate_run(folder) == straight.metrics  # it can be used already
    transcribed = []
    examples = scoring.transcribe_examples

    def transcribe(base, *args):
        transcribed.append(args)
        return examples(base, *args)

    monkeypatch.setattr(fits, "fit_guide", None)
    monkeypatch.setattr(scoring, "transcribe_examples", transcribe)
    run = fit(output=folder, resume=True)
    assert len(transcribed) == 1  # of four: the backward set, adapted
    assert run.history == straight.history
    assert_same_run(folder, straight.output)
    assert next(run.posterior.draws(1))


def test_damaged_transcripts_are_made_again(options, straight, tmp_path):
    folder = crashed(tmp_path / "run", options, stage="adapted on /")
    (folder / "transcripts-base.json").write_text("{")
    (folder / "transcripts-adapted.json").write_text('{"new_domain": ["a"]}')
    fit(output=folder, resume=True)
    assert_same_run(folder, straight.output)


def test_a_posterior_that_was_half_written_is_written_again(
    half_done, straight, options, monkeypatch
):
    def save(self, folder):
        folder.mkdir()
        (folder / "posterior.safetensors").write_bytes(b"half")
        (folder / ".tmpXYZ").write_bytes(b"half")
        (half_done / "adapter_config.json").write_bytes(b"half")
        os.rename(folder, folder.with_name("killed"))  # else it would be tidied up
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Posterior, "save", save)
        with pytest.raises(Crash):
            fit(output=half_done, resume=True)
    os.rename(half_done / "killed", half_done / "posterior.new")
    fit(output=half_done, resume=True)
    assert_same_run(half_done, straight.output)


def test_a_finished_run_is_returned(straight, tmp_path):
    shutil.copytree(straight.output, tmp_path / "run")
    (tmp_path / "run" / FILE).write_bytes(b"left by a process that was killed at the very end")
    listener = Crashing()
    run = fit(output=tmp_path / "run", resume=True, progress=listener)
    assert listener.stages == ["finished already: reading"]
    assert (run.config, run.history) == (straight.config, straight.history)
    assert run.metrics == straight.metrics
    assert_same_run(tmp_path / "run", straight.output)


def test_the_fits_own_options_may_be_given_again(half_done, options, straight):
    fit(FitConfig(**options, alpha=8.0, guide="normal"), half_done, resume=True)
    assert_same_run(half_done, straight.output)


@pytest.fixture(scope="module")
def turned(options, tones_folder) -> dict[str, Any]:
    """The same fit with every knob turned."""
    return {
        **options,
        "estimator": "flipout",
        "schedule": "linear",
        "warmup_steps": 2,
        "gradient_accumulation": 2,
        "gradient_checkpointing": True,
        "max_grad_norm": 0.5,
        "spec_augment": True,
        "dev": str(tones_folder / "test.jsonl"),
        "eval_every": 2,
        "patience": 3,
    }


def test_a_run_with_every_knob_turned_goes_on_too(turned, tmp_path):
    run = fit(FitConfig(**turned), tmp_path / "straight")
    assert len(run.dev["errors"]) > 3
    folder = crashed(tmp_path / "run", turned, step=5)
    with pytest.raises(Crash):
        fit(output=folder, resume=True, checkpoint_every=3, progress=Crashing(step=7))
    resumed = fit(FitConfig(eval_every=2, patience=3), folder, resume=True)
    assert (resumed.history, resumed.dev) == (run.history, run.dev)
    assert_same_run(folder, run.output)


def test_an_alarm_is_raised_in_the_same_step_after_a_kill(options, tones_folder, tmp_path):
    data = str(tones_folder / "de.jsonl")
    options = {**options, "data": data, "lr": 3.0, "steps": 12}
    run = fit(FitConfig(**options), tmp_path / "straight")
    folder = crashed(tmp_path / "run", options, step=2)
    resumed = fit(output=folder, resume=True)
    assert "alarm" in run.metrics and resumed.metrics["alarm"] == run.metrics["alarm"]
    assert_same_run(folder, run.output)


def test_so_does_a_regularised_and_averaged_one(options, tones_folder, tmp_path):
    options = {
        **options,
        "max_utterances": 1,
        "distillation": 1.0,
        "distillation_languages": ("en", "de"),
        "average_from": 0.3,
    }
    run = fit(FitConfig(**options), tmp_path / "straight")
    assert all(step.regularizer > 0 for step in run.history[2:])
    folder = crashed(tmp_path / "run", options, step=7)
    resumed = fit(output=folder, resume=True)
    assert resumed.history == run.history
    assert_same_run(folder, run.output)
    plain = fit(FitConfig(**{**options, "average_from": None}), evaluate=False)
    assert plain.history == run.history
    name = next(iter(run.posterior.mean))
    assert not torch.equal(plain.posterior.mean[name], run.posterior.mean[name])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"lr": 0.02}, "lr = 0.03, not 0.02"),
        ({"beta": "auto"}, "beta = 1e-05, not auto"),
        ({"prior": "laplace"}, "prior = normal, not laplace"),
    ],
)
def test_other_options_than_those_of_the_fit_are_refused(half_done, other, words):
    before = {path.name: path.read_bytes() for path in half_done.iterdir()}
    with pytest.raises(UserError, match=words) as caught:
        fit(FitConfig(**other), half_done, resume=True)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in half_done.iterdir()} == before


def test_resume_starts_a_fit_where_its_options_are_given_and_nothing_is_there(
    options, straight, tmp_path
):
    with pytest.raises(UserError, match="holds no fit to go on with"):
        fit(output=tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()
    fit(FitConfig(**options), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", straight.output)


def test_resume_needs_an_output_and_does_not_overwrite(options, half_done):
    with pytest.raises(UserError, match="no output"):
        fit(FitConfig(**options), resume=True)
    with pytest.raises(UserError, match="overwrite"):
        fit(output=half_done, resume=True, overwrite=True)


def test_an_unfinished_fit_is_not_written_over_unless_told(half_done, options, straight):
    with pytest.raises(UserError, match=r"unfinished fit; --resume"):
        fit(FitConfig(**options), half_done)
    assert read_checkpoint(half_done / FILE).step == 4
    fit(FitConfig(**options), half_done, overwrite=True)
    assert_same_run(half_done, straight.output)


def test_what_never_came_to_a_checkpoint_is_in_nobodys_way(options, straight, tmp_path):
    folder = crashed(tmp_path / "run", {**options, "data": "nowhere"}, stage="loading")
    with pytest.raises(UserError, match="nowhere"):
        fit(output=folder, resume=True)
    fit(FitConfig(**options), folder)
    assert_same_run(folder, straight.output)


def test_a_fit_that_was_killed_at_its_first_write_can_be_resumed_or_started(options, tmp_path):
    for number, how in enumerate(({"resume": True}, {})):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "run.json.new").write_text('{"state": "fit')
        with pytest.raises(Crash):
            fit(FitConfig(**options), folder, progress=Crashing(stage="loading"), **how)
        assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_two_fits_do_not_write_to_one_folder(options, tmp_path):
    refused = []

    class Second(Listener):
        def stage(self, name):
            for how in ({}, {"overwrite": True}, {"resume": True}):
                with pytest.raises(UserError, match="is being written by another process") as found:
                    fit(FitConfig(**options), tmp_path / "run", **how)
                refused.append(str(found.value))
            raise Crash

    with pytest.raises(Crash):
        fit(FitConfig(**options), tmp_path / "run", progress=Second())
    assert len(refused) == 3 and (tmp_path / "run" / "run.json").exists()
    crashed(tmp_path / "run", options, stage="loading")  # the lock went with the first
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_earlier_run_is_kept_until_the_new_one_is_loaded(straight, options, tmp_path):
    shutil.copytree(straight.output, tmp_path / "run")
    with pytest.raises(UserError, match="nowhere"):
        fit(FitConfig(**{**options, "data": "nowhere"}), tmp_path / "run", overwrite=True)
    error = KeyboardInterrupt  # what `Interrupted` is
    with pytest.raises(error):
        progress = Crashing(stage="loading", error=error)
        fit(FitConfig(**options), tmp_path / "run", overwrite=True, progress=progress)
    assert_same_run(tmp_path / "run", straight.output)
    folder = crashed(tmp_path / "run", options, overwrite=True, stage="base on")
    assert {path.name for path in folder.iterdir()} == {"run.json"}


def test_a_damaged_checkpoint_is_refused_and_can_be_deleted(half_done, straight):
    content = (half_done / FILE).read_bytes()
    (half_done / FILE).write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"damaged.*delete it") as caught:
        fit(output=half_done, resume=True)
    assert "\n" not in str(caught.value)
    (half_done / FILE).unlink()
    fit(output=half_done, resume=True)
    assert_same_run(half_done, straight.output)


def test_a_damaged_run_json_is_refused(half_done):
    for content in ("", "{", "[]", "{}", '{"options": {"rank": "x"}}'):
        (half_done / "run.json").write_text(content)
        with pytest.raises(UserError) as caught:
            fit(output=half_done, resume=True)
        assert "run.json" in str(caught.value) and "\n" not in str(caught.value)


def test_other_training_data_are_refused(options, tones_folder, tmp_path):
    data = shutil.copytree(tones_folder, tmp_path / "data")
    folder = crashed(tmp_path / "run", {**options, "data": str(data)}, step=6)
    manifest = (data / "train.jsonl").read_text(encoding="utf-8")
    (data / "train.jsonl").write_text("\n".join([manifest] * 2), encoding="utf-8")
    with pytest.raises(UserError, match="another fit: tokens was 22, now it is 44"):
        fit(output=folder, resume=True)
    (data / "train.jsonl").write_text(manifest, encoding="utf-8")
    assert len(fit(output=folder, resume=True).history) == 8


def test_a_prior_of_ones_own_is_run_only_where_it_is_named(options, tmp_path):
    code = tmp_path / "mine.py"
    code.write_text("from blora_pyro.guides.normal import Guide, Prior\nimport numpy\n")
    mine = {**options, "prior": str(code), "steps": 6}
    folder = crashed(tmp_path / "run", mine, step=5)
    with pytest.raises(UserError, match=r"the run names code as prior, .*mine\.py; name it"):
        fit(output=folder, resume=True)
    run = fit(FitConfig(prior=str(code)), folder, resume=True)
    assert next(run.posterior.draws(1))
    other = fit(FitConfig(**mine), tmp_path / "straight")
    assert run.history == other.history
    with pytest.raises(UserError, match=r"the run names code as prior"):
        fit(output=folder, resume=True)
    again = fit(output=folder, resume=True, trust_prior_file=True)
    assert next(again.posterior.draws(1))
    code.write_text("raise SystemExit('run')")
    for options, trust in (({"prior": str(code)}, False), ({}, True)):
        with pytest.raises(UserError, match=r"is not the file that the run was fitted with"):
            fit(FitConfig(**options), folder, resume=True, trust_prior_file=trust)


def test_pythons_and_numpys_random_numbers_go_on_too(options, tmp_path):
    code = tmp_path / "mine.py"
    code.write_text(
        "import random\nimport numpy as np\nfrom blora_pyro.guides import normal\n"
        "Prior = normal.Prior\n"
        "class Guide(normal.Guide):\n"
        "    def forward(self, *args):\n"
        "        draws = super().forward(*args)\n"
        "        self.means[next(iter(self.means))].data += 1e-3 * random.gauss(0, 1)\n"
        "        self.means[next(iter(self.means))].data += 1e-3 * np.random.standard_normal()\n"
        "        return draws\n"
    )
    mine = {**options, "prior": str(code), "steps": 6}
    folder = crashed(tmp_path / "run", mine, step=5)
    random.random()
    np.random.rand()  # noqa: NPY002
    fit(FitConfig(prior=str(code)), folder, resume=True)
    fit(FitConfig(**mine), tmp_path / "straight")
    assert_same_run(folder, tmp_path / "straight")


# ---- what ends a fit early


def full(*args, **kwargs):
    raise OSError(28, "No space left on device", "somewhere")


def test_a_full_disk_at_a_checkpoint(options, straight, tmp_path, monkeypatch):
    write, folder = checkpoints_module.write_checkpoint, tmp_path / "run"

    def write_two(path, checkpoint):
        if checkpoint.step > 3:
            raise OSError(28, "No space left on device", str(path))
        write(path, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_module, "write_checkpoint", write_two)
        with pytest.raises(UserError) as caught:
            fit(FitConfig(**options), folder, checkpoint_every=3)
    assert str(caught.value) == (
        f"{folder / FILE} can't be written (No space left on device); the checkpoint of step 3 is "
        f"safe in {folder}; put that right, then go on with: blora-pyro fit --resume --output "
        f"{folder}"
    )
    fit(output=folder, resume=True)
    assert_same_run(folder, straight.output)


@pytest.mark.parametrize(
    ("call", "safe"),
    [(1, None), (2, "no step is in"), (-3, "posterior"), (-1, "posterior")],
)
def test_a_full_disk_at_any_other_file(
    options, straight, written, tmp_path, monkeypatch, call, safe
):
    folder, replaced = tmp_path / "run", []
    replace = os.replace
    if call < 0:  # from behind
        call = len(written) + 1 + call

    def counted(source, target):
        if is_json_in(folder, target):
            replaced.append(target)
        if len(replaced) == call:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted)
        with pytest.raises(UserError, match="No space left on device") as caught:
            fit(FitConfig(**options), folder)
    assert "\n" not in str(caught.value)
    if safe is None:
        assert "give another" in str(caught.value)
        fit(FitConfig(**options), folder)
    else:
        assert safe in str(caught.value) and "--resume" in str(caught.value)
        fit(output=folder, resume=True)
    assert_same_run(folder, straight.output)


def test_a_posterior_that_finds_no_room(half_done, straight, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("blora_pyro.posterior.storage.save_file", full_in_rust)
        with pytest.raises(UserError, match=r"No space left.*the checkpoint of step 4 is safe"):
            fit(output=half_done, resume=True, checkpoint_every=4)
    fit(output=half_done, resume=True)
    assert_same_run(half_done, straight.output)


def full_in_rust(*args, **kwargs):
    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_is_one_line_that_says_what_is_safe(options, tmp_path, error):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=r"^out of memory; .*step 4 is safe.*--resume") as caught:
        fit(
            FitConfig(**options),
            folder,
            checkpoint_every=4,
            progress=Crashing(step=6, error=error),
        )
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_hidden(options, tmp_path):
    for number, error in enumerate((RuntimeError("ours"), OSError(5, "not ours", "elsewhere"))):
        with pytest.raises(type(error)) as caught:
            fit(
                FitConfig(**options), tmp_path / f"{number}", progress=Crashing(step=2, error=error)
            )
        assert caught.value is error


def test_an_output_that_cannot_be_written_is_refused(options, tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.touch", full)
    with pytest.raises(UserError, match=r"output '.*run' can't be written"):
        fit(FitConfig(**options), tmp_path / "run")


def test_a_diverging_run_says_what_is_safe(options, tmp_path):
    options = {**options, "lr": 1e14}
    with pytest.raises(FloatingPointError, match=r"in a row; no step is in .*run yet, and"):
        fit(FitConfig(**options), tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {
        "run.json",
        "transcripts-base.json",
    }
    with pytest.raises(FloatingPointError, match=r"in a row$"):
        fit(FitConfig(**options))


def test_skipped_steps_are_counted(options, tmp_path, monkeypatch):
    load = Loader.load

    def poisoned(loader, source, split, *args, **options):
        examples = load(loader, source, split, *args, **options)
        if split == "train":
            batch, calls = examples.batch, []

            def nan_now_and_then(indices):
                calls.append(0)
                one = batch(indices)
                if len(calls) in (4, 7):
                    one.input_features.fill_(math.nan)
                return one

            examples.batch = nan_now_and_then
        return examples

    monkeypatch.setattr(Loader, "load", poisoned)
    run = fit(FitConfig(**options), tmp_path / "run")
    assert len(run.history) == 6
    assert read_json(tmp_path / "run" / "run.json")["skipped_steps"] == 2


# ---- real processes


def command_line(line, signum):
    """A command that a signal comes to after step 7."""
    from blora_pyro.cli import app, progress

    step = progress.TerminalProgress.step

    def send(self, one):
        step(self, one)
        if one.step == 7:
            os.kill(os.getpid(), signum)

    progress.TerminalProgress.step = send
    app(line)


def test_a_run_that_is_killed_again_and_again(options, tmp_path):
    chance, folder, steps = random.Random(KILLS), tmp_path / "run", 25 * KILLS
    config = FitConfig(**{**options, "steps": steps})
    fit(config, tmp_path / "straight")
    request = {"resume": True, "checkpoint_every": 3}
    killed = []
    for goal in sorted(chance.sample(range(steps - 20), KILLS)):
        process = start(fit, config, folder, **request)
        while (stored_step(folder / FILE) or 0) < goal and process.is_alive():
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.1))  # anywhere
        killed.append(stored_step(folder / FILE))
        process.kill()
        assert ended(process) == [-signal.SIGKILL]
    print(f"killed at the checkpoints of steps {killed} of {steps}")
    fit(config, folder, **request)
    assert_same_run(folder, tmp_path / "straight")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_command_line(options, straight, tmp_path, signum, code):
    given = {**options, "backward": ",".join(options["backward"])}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    folder = tmp_path / "run"
    line, log = ["fit", *flags, f"--output={folder}"], tmp_path / "log"
    wide = {"COLUMNS": "200"}
    process = start(command_line, line, signum, streams=[None, log], variables=wide)
    assert ended(process) == [code]
    stderr = log.read_text(encoding="utf-8")
    assert stderr.splitlines()[-1] == (
        f"blora-pyro: interrupted; the checkpoint of step 7 is safe in {folder}; go on with: "
        f"blora-pyro fit --resume --output {folder}"
    )
    assert "Traceback" not in stderr
    fit(output=folder, resume=True)
    assert_same_run(folder, straight.output)
