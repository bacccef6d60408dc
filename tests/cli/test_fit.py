import json
import os
import signal
from pathlib import Path

import pytest

import blora_pyro
from blora_pyro.errors import UserError
from blora_pyro.runs import fits

from .conftest import complaint, parsed, run, well


def test_fit_prints_the_table_and_the_run_folder(short, tones_folder, tmp_path):
    german, english = tones_folder / "de.jsonl", tones_folder / "en.jsonl"
    result = run(*short, "--backward", f"{german}, {english}", "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    for words in ("new domain", "WER", "PIER", "backward average", "forgetting:", "sparsity"):
        assert words in result.stdout
    assert result.stdout.splitlines()[-1] == f"run folder: {tmp_path / 'run'}"
    assert "T = beta · N" in " ".join(result.stderr.split())
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert config["backward"] == {str(german): str(german), str(english): str(english)}
    assert (config["rank"], config["steps"], config["alpha"]) == (2, 2, 4.0)


def test_fit_with_json_prints_json_alone_on_stdout(short, tmp_path):
    result = run(*short, "--output", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.output
    metrics = parsed(result.stdout)
    assert metrics == json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["new_domain"]["base"]["metric"] == "wer"
    assert "loading ..." in result.stderr


def test_fit_carries_a_run_on_with_what_is_given_and_no_more(monkeypatch):
    seen = {}

    def fit(folder, **options):
        seen.update(options, folder=folder)
        raise UserError("enough")

    monkeypatch.setattr(fits, "fit", fit)
    more = ["--prior-inflation", 2, "--data", "es-en", "--seed", 3]
    assert "enough" in complaint(run("fit", "--prior-from", "runs/first", *more))
    for name in ("overwrite", "resume", "checkpoint_every", "progress"):
        del seen[name]
    assert seen == {
        "folder": Path("runs/es-en-after-first-seed3"),
        "prior_from": "runs/first",
        "prior_inflation": 2.0,
        "data": ("es-en",),
        "seed": 3,
    }


def test_fit_carries_a_run_on_or_says_why_not(finished_run, tones_folder, tmp_path):
    start = ["fit", "--prior-from", finished_run.output, "--data", tones_folder / "de.jsonl"]
    start += ["--test", tones_folder / "de.jsonl", "--backward", "none", "--steps", 1]
    out = well(*start, "--output", tmp_path / "second")
    assert f"run folder: {tmp_path / 'second'}" in out
    message = complaint(run(*start, "--output", tmp_path / "third", "--rank", 16))
    assert f"rank is 16, and that of {finished_run.output} is 4; leave rank out" in message
    message = complaint(run(*start, "--output", tmp_path / "third", "--prior", "normal"))
    assert "prior is 'normal' and prior_from is" in message and "give one" in message


def test_fit_hands_every_option_on(monkeypatch, tmp_path):
    seen = {}

    def fit(folder, **options):
        seen.update(options, folder=folder)
        return fits.Run(None, None, [], {"backward": {}, "sparsity": {}})

    monkeypatch.setattr(fits, "fit", fit)
    options = {
        "base": "b",
        "dtype": "float16",
        "revision": "v1",
        "data": "d",
        "data-weights": "3",
        "pooling": "hierarchical",
        "pooling-scale": 0.2,
        "max-utterances": 12,
        "shuffle-buffer": 50,
        "test": "t",
        "backward": "x, y",
        "language": "German",
        "task": "translate",
        "on-bad-row": "skip",
        "prior": "p",
        "guide": "g",
        "beta": "2e-3",
        "prior-arg": "df=3",
        "prior-scale": 0.25,
        "rank": 3,
        "alpha": 5.0,
        "target-modules": "fc1",
        "lr": 0.125,
        "steps": 11,
        "epochs": 1.5,
        "batch-size": 7,
        "dev": "v",
        "schedule": "linear",
        "warmup-steps": 2,
        "gradient-accumulation": 3,
        "max-grad-norm": 0.5,
        "distillation": 0.5,
        "distillation-languages": "de,tr",
        "ewc": 2.0,
        "average-from": 0.25,
        "eval-every": 5,
        "patience": 4,
        "estimator": "local",
        "precision": "bf16",
        "normalizer": "basic",
        "seed": 9,
        "device": "cuda:1",
        "track": "tensorboard,wandb",
        "output": tmp_path,
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    switches = ["gradient-checkpointing", "spec-augment", "local-files-only", "overwrite"]
    switches += ["cache-encoder", "trim-audio", "streaming"]
    well("fit", *flags, *(f"--{name}" for name in switches), "--checkpoint-every", 5)
    del seen["progress"]
    del options["output"], options["prior-arg"]
    assert seen == {
        **{name.replace("-", "_"): value for name, value in options.items()},
        "prior_args": {"df": "3"},
        "prior_from": None,
        "prior_inflation": None,
        "data": ("d",),
        "data_weights": (3.0,),
        "distillation_languages": ("de", "tr"),
        "backward": ("x", "y"),
        "beta": 2e-3,
        "gradient_checkpointing": True,
        "spec_augment": True,
        "cache_encoder": True,
        "trim_audio": True,
        "streaming": True,
        "local_files_only": True,
        "overwrite": True,
        "resume": False,
        "checkpoint_every": 5,
        "folder": tmp_path,
    }


def test_several_sources_and_named_sets_are_handed_on(monkeypatch, tmp_path):
    seen = {}

    def fit(folder, **options):
        seen.update(options, folder=folder)
        return fits.Run(None, None, [], {"backward": {}, "sparsity": {}})

    monkeypatch.setattr(fits, "fit", fit)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").mkdir()
    data = ["--data", "de-en", "--data", "corpora/mine.csv", "--data-weights", "3, 1"]
    backward = ["--backward", "de,en", "--backward", "mine=a", "--backward", "a,b"]
    well("fit", *data, *backward)
    assert seen["data"] == ("de-en", "corpora/mine.csv")
    assert seen["data_weights"] == (3, 1)
    assert seen["backward"] == ("de", "en", "mine=a", "a,b")
    assert seen["folder"] == Path("runs") / "de-en+mine-normal-seed0"


def test_fit_with_resume_hands_on_what_was_given_alone(monkeypatch, tmp_path):
    seen = {}

    def fit(folder, **options):
        seen.update(options, folder=folder)
        return fits.Run(None, None, [], {"backward": {}, "sparsity": {}})

    monkeypatch.setattr(fits, "fit", fit)
    given = ["--lr", "5e-3", "--prior-arg", "df=3", "--backward", "none", "--beta", "auto"]
    well("fit", "--resume", "--output", tmp_path, *given)
    del seen["progress"]
    assert seen == {
        "folder": tmp_path,
        "resume": True,
        "overwrite": False,
        "checkpoint_every": None,
        "lr": 5e-3,  # given, though it is the default
        "prior_args": {"df": "3"},
        "backward": (),
        "beta": "auto",
    }


def test_the_defaults_of_fit_are_those_of_the_library(monkeypatch):
    seen = {}

    def fit(folder, *, overwrite, resume, checkpoint_every, progress, **options):
        assert not resume and not overwrite and checkpoint_every is None
        seen.update(options)
        return fits.Run(None, None, [], {"backward": {}, "sparsity": {}})

    monkeypatch.setattr(fits, "fit", fit)
    well("fit")
    assert vars(blora_pyro.FitConfig(**seen)) == vars(blora_pyro.FitConfig())


def test_the_run_folder_is_named_after_data_prior_and_seed(
    short, tones_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    well(*short, "--seed", 3)
    assert (tmp_path / "runs" / f"{tones_folder.name}-normal-seed3" / "run.json").is_file()


def test_a_fit_with_a_dev_set_tells_its_errors_and_its_end(short, tones_folder, tmp_path):
    dev = ("--dev", tones_folder / "test.jsonl", "--eval-every", 1, "--patience", 1)
    still = ("--lr", 1e-9, "--steps", 9)  # which changes no word
    result = run(*short, *dev, *still, "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    rate = json.loads((tmp_path / "run" / "run.json").read_text())["dev"]["errors"][0]["error"]
    said = " ".join(result.stderr.split())
    assert f"step 1: dev error {rate:.1%} (the best so far)" in said
    assert f"step 2: dev error {rate:.1%} ({rate:.1%} at step 1)" in said
    assert result.stdout.splitlines()[-2] == (
        f"dev error {rate:.1%} after step 1, the best; stopped early, after 2 steps"
    )


def test_fit_does_not_write_over_a_run_unless_told(short, finished_run, tmp_path):
    before = (finished_run.output / "run.json").read_bytes()
    assert "--overwrite" in complaint(run(*short, "--output", finished_run.output))
    assert (finished_run.output / "run.json").read_bytes() == before
    well(*short, "--output", tmp_path / "run")
    well(*short, "--output", tmp_path / "run", "--overwrite")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "nowhere"], "'nowhere'"),
        (["--data-weights", "often"], "data-weights is 'often'"),
        (["--data-weights", "1,2"], "data_weights is 1.0, 2.0 for 1 source"),
        (["--test", "nowhere"], "'nowhere'"),
        (["--backward", "nowhere"], "'nowhere'"),
        (["--base", "/nowhere"], "/nowhere"),
        (["--prior", "uniform"], "uniform"),
        (["--prior-arg", "df"], "prior-arg is 'df'; give key=value"),
        (["--prior-arg", "=3"], "prior-arg is '=3'"),
        (["--prior-arg", "scale="], "prior-arg is 'scale='"),
        (["--prior-arg", "df=3"], "takes no 'df'"),
        (["--prior-arg", "scale=wide"], "'wide'"),
        (["--prior-arg", "scale=-1"], "scale is -1"),
        (["--prior-arg", "scale=1", "--prior-arg", "scale=2"], "twice"),
        (["--prior-arg", "scale=1", "--prior-scale", "2"], "by one"),
        (["--guide", "tour"], "tour"),
        (["--beta", "often"], "beta is 'often'"),
        (["--beta", "-1"], "beta is -1"),
        (["--beta", "nan"], "beta is nan"),
        (["--target-modules", "nothing"], "nothing"),
        (["--target-modules", "(["], "(["),
        (["--rank", "0"], "rank is 0"),
        (["--rank", "1000"], "rank 1000"),
        (["--steps", "0"], "steps is 0"),
        (["--epochs", "-1"], "epochs is -1"),
        (["--lr", "0"], "lr is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--precision", "fp8"], "fp8"),
        (["--device", "toaster"], "toaster"),
        (["--checkpoint-every", "0"], "checkpoint_every is 0"),
        (["--schedule", "step"], "schedule is 'step'; give one of cosine, linear, constant"),
        (["--warmup-steps", "3"], "warmup_steps is 3; give a whole number from 0 to the steps"),
        (["--epochs", "1", "--warmup-steps", "9"], "warmup_steps is 9"),
        (["--gradient-accumulation", "3"], "more than the 2 utterances of a step"),
        (["--max-grad-norm", "0"], "max_grad_norm is 0"),
        (["--eval-every", "0"], "eval_every is 0"),
        (["--patience", "2"], "patience is given, but no eval_every"),
        (["--dev", "de"], "dev is given, but no eval_every"),
        (["--eval-every", "1"], "has no dev split, and eval_every is 1"),
        (["--eval-every", "1", "--dev", "nowhere"], "'nowhere'"),
        (["--resume", "--overwrite"], "overwrite"),
    ],
)
def test_fit_refuses_bad_options_in_one_line(short, tmp_path, options, words):
    assert words in complaint(run(*short, "--output", tmp_path / "run", *options))


def test_a_fit_that_diverges_ends_in_one_line(short, tmp_path):
    result = run(*short, "--output", tmp_path / "run", "--lr", "1e30", "--steps", 5)
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr and "Warning" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("blora-pyro: the loss or its gradient is nan at step 5, ")
    assert line.endswith("; try a smaller --lr")


def test_a_stopped_fit_goes_on_with_resume_and_nothing_else(short, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("blora_pyro.reports.progress.TerminalProgress.step", interrupt)
        line = complaint_at_the_end(run(*short, "--output", tmp_path / "run"), 143)
    assert line == (
        f"blora-pyro: interrupted; the checkpoint of step 1 is safe in {tmp_path / 'run'}; go on "
        f"with: blora-pyro fit --resume --output {tmp_path / 'run'}"
    )
    assert "unfinished fit; --resume" in complaint(run(*short, "--output", tmp_path / "run"))
    assert "is not finished" in complaint(run("evaluate", tmp_path / "run"))
    other = run("fit", "--resume", "--output", tmp_path / "run", "--rank", 3)
    assert "has rank = 2, not 3" in complaint(other)
    result = run("fit", "--resume", "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "new domain" in result.stdout and "going on from step 1" in result.stderr
    again = run("fit", "--resume", "--output", tmp_path / "run", "--json")
    assert "finished already" in again.stderr
    assert parsed(again.stdout) == json.loads((tmp_path / "run" / "metrics.json").read_text())


def interrupt(self, step):
    os.kill(os.getpid(), signal.SIGTERM)


def complaint_at_the_end(result, exit_code) -> str:
    """The last line on stderr of a command that showed its progress before."""
    assert result.exit_code == exit_code, result.output
    assert result.stdout == "" and "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]


def test_there_is_nothing_to_resume_in_an_empty_folder(tmp_path):
    line = complaint(run("fit", "--resume", "--output", tmp_path / "run"))
    assert "holds no fit to go on with; start it without --resume" in line


def test_arguments_of_the_prior_reach_the_run(short, tmp_path):
    arguments = ["--prior-arg", "scale=0.02", "--prior-arg", "df = 5"]
    well(*short, "--prior", "student-t", *arguments, "--output", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert config["prior_args"] == {"scale": 0.02, "df": 5.0}
