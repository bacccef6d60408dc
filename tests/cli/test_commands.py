import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import blora_pyro
from blora_pyro.checking import checks
from blora_pyro.checking.findings import DataCheck
from blora_pyro.cli import app
from blora_pyro.errors import UserError
from blora_pyro.guides import FAMILIES
from blora_pyro.runs import diagnosis, finished, fits

COMMANDS = (
    "fit",
    "sweep",
    "compare",
    "evaluate",
    "errors",
    "diagnose",
    "prune",
    "combine",
    "priors",
    "transcribe",
    "merge",
    "push-to-hub",
    "data",
)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def well(*arguments):
    """The standard output of a command that must succeed."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def complaint(result, exit_code=2) -> str:
    """The one line that a command died with; stages that had begun ("loading ...") may precede."""
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("blora-pyro: ")
    return lines[0]


def parsed(text):
    """JSON as every parser reads it: without NaN and Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def short(fluent_folder, tones_folder) -> list[str]:
    """Arguments of a fit in two steps."""
    return [
        *("fit", "--base", fluent_folder, "--data", tones_folder, "--backward", "none"),
        *("--rank", 2, "--steps", 2, "--batch-size", 2),
    ]


# ---- fit


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


# ---- priors, diagnose


def test_priors_are_listed():
    out = well("priors")
    for words in ("horseshoe", "global_scale", "0.01", "--prior-arg"):
        assert words in out


def test_priors_with_json():
    families = parsed(well("priors", "--json"))
    assert [family["name"] for family in families] == list(FAMILIES)
    (student,) = [family for family in families if family["name"] == "student-t"]
    assert [one["name"] for one in student["arguments"]] == ["scale", "df"]
    assert all(one["description"] for family in families for one in family["arguments"])
    assert all(family["summary"] for family in families)


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(diagnosis, "all_plots", lambda *args: {})


@pytest.mark.usefixtures("no_plots")
def test_diagnose_prints_tables_and_words(finished_run, tmp_path):
    out = well("diagnose", finished_run.output, "--output", tmp_path, "--draws", 30)
    for words in ("KL(q || p)", "cross out", "How this prior shrinks.", "30 draws, 2 of 2"):
        assert words in out


@pytest.mark.usefixtures("no_plots")
def test_diagnose_with_json_prints_json_alone(finished_run, tmp_path):
    result = run("diagnose", finished_run.output, "--output", tmp_path, "--no-khat", "--json")
    content = parsed(result.stdout)
    assert content["summary"]["prior"] == "normal"
    assert len(content["kinds"]) == 16
    assert content["khat"]["value"] is None
    assert "figures ..." in result.stderr


def test_diagnose_hands_every_option_on(monkeypatch, tmp_path):
    seen = {}

    def diagnose(*args, **options):
        seen.update(options, args=args)
        raise UserError("enough")

    monkeypatch.setattr(diagnosis, "diagnose", diagnose)
    options = ["--output", tmp_path, "--prior", "p.py", "--no-khat", "--draws", 50]
    assert "enough" in complaint(run("diagnose", "r", *options, "--device", "cuda:1"))
    del seen["on_stage"]
    assert seen == {
        "args": (Path("r"), tmp_path),
        "prior": "p.py",
        "khat": False,
        "draws": 50,
        "device": "cuda:1",
    }


def test_diagnose_refuses_in_one_line(finished_run, tmp_path):
    assert "gone" in complaint(run("diagnose", tmp_path / "gone"))
    draws = run("diagnose", finished_run.output, "--draws", 3)
    assert "draws is 3" in complaint(draws)
    prior = run("diagnose", finished_run.output, "--prior", tmp_path / "p.py")
    assert "leave --prior out" in complaint(prior)


# ---- evaluate, transcribe, merge


def test_evaluate_prints_the_table_of_the_fit(finished_run):
    out = well("evaluate", finished_run.output)
    for words in ("new domain", "WER", "backward average", "forgetting:"):
        assert words in out


def test_evaluate_with_json_prints_the_metrics_of_the_fit(finished_run):
    assert parsed(well("evaluate", finished_run.output, "--json")) == finished_run.metrics


def test_evaluate_takes_other_data(finished_run, tones_folder):
    data = tones_folder / "de.jsonl"
    metrics = parsed(well("evaluate", finished_run.output, "--data", data, "--json"))
    assert metrics["new_domain"]["name"] == str(data)
    assert metrics["backward"] == {}


def test_evaluate_takes_another_normalizer_and_writes_utterances(
    finished_run, tones_folder, tmp_path
):
    shutil.copytree(tones_folder, tmp_path / "data")
    lines = (tones_folder / "de.jsonl").read_text(encoding="utf-8")
    manifest = tmp_path / "data" / "upper.jsonl"
    manifest.write_text(lines.replace("das rote", "Das Rote!"), encoding="utf-8")
    file = tmp_path / "u.jsonl"
    command = ("evaluate", finished_run.output, "--data", manifest, "--output", file)
    out = well(*command, "--normalizer", "none")
    assert "normalizer: none" in out
    assert f"utterances: {file}" in out
    assert parsed(file.read_text().splitlines()[0])["reference"] == "Das Rote!"
    assert "there already" in complaint(run(*command))
    found = parsed(well(*command, "--overwrite", "--json"))
    assert found["normalizer"] == "whisper"
    rates = found["new_domain"]["base"]["wer"]
    assert (rates["rate"], rates["raw"]["rate"]) == (0, 0.5)
    assert parsed(file.read_text().splitlines()[0])["reference"] == "das rote"


@pytest.mark.parametrize("place", ["", "nowhere/u.jsonl"])
def test_an_output_that_cannot_be_written_is_refused_before_anything(finished_run, tmp_path, place):
    result = run("evaluate", finished_run.output, "--output", tmp_path / place)
    assert "can't be written" in complaint(result)
    assert "..." not in result.stderr


def test_an_unknown_normalizer_is_refused(finished_run, short):
    for command in (["evaluate", finished_run.output], short):
        assert "give one of whisper, basic" in complaint(run(*command, "--normalizer", "english"))


def test_errors_shows_the_worst_utterances(finished_run, tmp_path):
    out = well("errors", finished_run.output, "--state", "base", "--set", "new_domain", "--top", 1)
    assert "base: errors in 2 of 2 utterances; the worst 1:" in out
    assert "REF" in out
    assert "PIER" in out
    assert well("errors", finished_run.output, "--set", "new_domain") == (
        "no errors in 2 utterances\n"
    )
    rows = parsed(well("errors", finished_run.output, "--state", "base", "--json"))
    assert [row["set"] for row in rows] == ["new_domain"] * 2
    assert rows[0]["edits"] >= rows[1]["edits"] > 0
    file = tmp_path / "u.jsonl"
    shutil.copy(finished_run.output / "utterances.jsonl", file)
    assert parsed(well("errors", file, "--state", "base", "--json")) == rows


def test_errors_of_what_is_not_there(finished_run, tmp_path):
    assert "can't be read" in complaint(run("errors", tmp_path))
    assert "no set 'x'" in complaint(run("errors", finished_run.output, "--set", "x"))
    assert "top is 0" in complaint(run("errors", finished_run.output, "--top", 0))


def test_transcribe_prints_a_line_a_file(finished_run, tones_folder):
    one, two = tones_folder / "test4.wav", tones_folder / "test5.wav"
    adapter = ["--adapter", finished_run.output]
    assert well("transcribe", one, *adapter) == "das red\n"
    assert well("transcribe", one, two, *adapter) == f"{one}: das red\n{two}: ein bicycle\n"
    rows = parsed(well("transcribe", one, two, *adapter, "--json"))
    assert rows == parsed(well("transcribe", one, two, *adapter, "--format", "json"))
    assert [row["audio"] for row in rows] == [str(one), str(two)]
    assert rows[0] == {
        "audio": str(one),
        "language": "de-en",
        "duration": 0.5,
        "text": "das red",
        "segments": [{"start": 0.0, "end": 0.5, "text": "das red"}],
    }


def test_transcribe_writes_word_confidences(finished_run, tones_folder):
    audio, adapter = tones_folder / "test4.wav", ["--adapter", finished_run.output]
    draws = ["--json", "--samples", 2, "--seed", 3]
    (row,) = parsed(well("transcribe", audio, *adapter, *draws))
    words = row["segments"][0]["words"]
    assert [word["text"] for word in words] == ["das", "red"]
    assert all(set(word) == {"text", "agreement", "log_prob", "confidence"} for word in words)
    assert all(0 <= word["confidence"] <= 1 for word in words)


def test_transcribe_prints_subtitles_of_one_file(finished_run, tones_folder):
    audio, adapter = tones_folder / "test4.wav", ["--adapter", finished_run.output]
    out = well("transcribe", audio, *adapter, "--format", "srt")
    assert out == "1\n00:00:00,000 --> 00:00:00,500\ndas red\n\n"
    assert well("transcribe", audio, *adapter, "--format", "vtt").startswith("WEBVTT\n\n00:00")
    two = run("transcribe", audio, audio, *adapter, "--format", "srt")
    assert "srt is a file an input, and there are 2; give --output" in complaint(two)


@pytest.mark.parametrize(
    ("form", "suffix"), [("text", "txt"), ("json", "json"), ("srt", "srt"), ("vtt", "vtt")]
)
def test_transcribe_writes_a_file_an_input(
    fluent_folder, tones_folder, tmp_path, monkeypatch, form, suffix
):
    (tmp_path / "audio" / "deep").mkdir(parents=True)
    shutil.copy(tones_folder / "en0.wav", tmp_path / "audio" / "one.wav")
    shutil.copy(tones_folder / "de2.wav", tmp_path / "audio" / "deep" / "two.wav")
    base = ["--base", fluent_folder, "--format", form, "--output", tmp_path / "out"]
    out = well("transcribe", tmp_path / "audio", *base)
    assert out == f"2 written to {tmp_path / 'out'}\n"
    one, two = tmp_path / "out" / f"one.{suffix}", tmp_path / "out" / "deep" / f"two.{suffix}"
    assert "the red" in one.read_text() and "das rote" in two.read_text()
    if form == "json":
        assert parsed(one.read_text())["text"] == "the red"
    assert "there already" in complaint(run("transcribe", tmp_path / "audio", *base))
    one.write_text("mine")
    two.unlink()
    assert well("transcribe", tmp_path / "audio", *base, "--resume").startswith("1 written")
    assert one.read_text() == "mine" and two.exists()
    assert well("transcribe", tmp_path / "audio", *base, "--overwrite").startswith("2 written")
    assert "the red" in one.read_text()


@pytest.mark.parametrize("form", ["text", "json"])
def test_transcribe_tells_of_a_bad_file_and_transcribes_the_others(
    fluent_folder, tones_folder, tmp_path, form
):
    (tmp_path / "bad.wav").write_text("no audio")
    files = [tones_folder / "en0.wav", tmp_path / "bad.wav", tones_folder / "de2.wav"]
    options = ["--base", fluent_folder, "--format", form]
    result = run("transcribe", *files, *options)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("blora-pyro: cannot read") and "bad.wav" in line
    if form == "text":
        assert result.stdout == f"{files[0]}: the red\n{files[2]}: das rote\n"
    else:
        assert [row["text"] for row in parsed(result.stdout)] == ["the red", "das rote"]
    result = run("transcribe", *files, *options, "--output", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, f"2 written to {tmp_path / 'out'}\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "doc"], "format is 'doc'; choose from text, json, srt, vtt"),
        (["--format", "srt", "--json"], "--json and --format srt"),
        (["--samples", "4"], "text has no room for it; add --json"),
        (["--samples", "4", "--json"], "no adapter"),
        (["--samples", "-4", "--json"], "samples is -4"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--task", "sing"], "'sing'"),
        (["--resume"], "give --output"),
        (["--overwrite"], "give --output"),
    ],
)
def test_transcribe_refuses_in_one_line(fluent_folder, tones_folder, options, message):
    audio = tones_folder / "en0.wav"
    assert message in complaint(run("transcribe", audio, "--base", fluent_folder, *options))


def test_transcribe_refuses_a_folder_without_audio(tmp_path):
    assert "no audio file" in complaint(run("transcribe", tmp_path))


def test_transcribe_hands_every_option_on(monkeypatch, tmp_path):
    seen = {}

    def transcribe(audio, *given, on_transcript, on_error, **options):
        seen.update(options, audio=audio, given=given)
        return []

    monkeypatch.setattr(finished, "transcribe", transcribe)
    flags = ["--adapter", "run", "--base", "b", "--language", "de-en", "--device", "cuda:1"]
    flags += ["--task", "translate", "--samples", 4, "--batch-size", 5, "--seed", 6, "--json"]
    flags += ["--dtype", "bfloat16", "--revision", "v1", "--local-files-only"]
    flags += ["--strength", 0.5, "--strength-by", "signal-to-noise", "--domain", "court"]
    assert well("transcribe", "a.wav", *flags, "--prior", "mine.py") == ""
    assert seen == {
        "audio": [Path("a.wav")],
        "given": (Path("run"), "b", "de-en", "cuda:1"),
        "dtype": "bfloat16",
        "revision": "v1",
        "local_files_only": True,
        "prior": "mine.py",
        "task": "translate",
        "strength": 0.5,
        "strength_by": "signal-to-noise",
        "domain": "court",
        "timestamps": False,
        "samples": 4,
        "batch_size": 5,
        "seed": 6,
    }
    well("transcribe", "a.wav", "--format", "vtt")
    assert seen["timestamps"] is True


def test_transcribe_with_the_base_alone(fluent_folder, tones_folder):
    base = ["--base", fluent_folder]
    assert well("transcribe", tones_folder / "en0.wav", *base) == "the red\n"
    options = ["--dtype", "bfloat16", "--local-files-only"]
    assert well("transcribe", tones_folder / "en0.wav", *base, *options) == "the red\n"
    revised = run("transcribe", tones_folder / "en0.wav", *base, "--revision", "v1")
    assert "revision 'v1' is given with a local folder" in complaint(revised)
    spanish = run("transcribe", tones_folder / "en0.wav", *base, "--language", "es")
    assert "'es'" in complaint(spanish)


def test_evaluate_hands_strength_and_split_on(monkeypatch):
    seen = {}

    def evaluate_run(*given, **options):
        seen.update(options)
        raise UserError("enough")

    monkeypatch.setattr(finished, "evaluate_run", evaluate_run)
    options = ["--strength", 0.25, "--strength-by", "signal-to-noise", "--split", "dev"]
    assert "enough" in complaint(run("evaluate", "r", *options))
    assert (seen["strength"], seen["strength_by"]) == (0.25, "signal-to-noise")
    assert seen["split"] == "dev"
    assert seen["domain"] is None


def test_evaluate_at_strength_0_is_the_base(finished_run):
    metrics = parsed(well("evaluate", finished_run.output, "--strength", 0, "--json"))
    assert metrics["new_domain"]["adapted"] == metrics["new_domain"]["base"]


def test_evaluate_at_several_strengths_draws_the_curve(finished_run, tmp_path):
    file = tmp_path / "curve.svg"
    command = ("evaluate", finished_run.output, "--strength", "0:1:0.5", "--plot", file)
    out = well(*command)
    for words in ("base 0", "0.5", "fit 1", "forgetting", "test sets", "by scale", str(file)):
        assert words in out
    assert file.read_bytes().startswith(b"<?xml")
    assert "is there already" in complaint(run(*command))
    curve = parsed(well(*command, "--overwrite", "--json", "--strength-by", "signal-to-noise"))
    assert [point["strength"] for point in curve["points"]] == [0, 0.5, 1]
    assert curve["strength_by"] == "signal-to-noise"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--strength", "much"], "strength is 'much'; give a number"),
        (["--strength", "3"], "strength is 3; give a number from 0"),
        (["--strength", "0,3"], "strength is 3; give a number from 0"),
        (["--strength", "0,1", "--split", "train"], "split is 'train'; give test or dev"),
        (["--split", "dev"], "has no dev split; give a set that has one"),
        (["--strength", "0,1", "--output", "u.jsonl"], "--output are for a single strength"),
        (["--strength", "0,1", "--data", "de"], "--data, --domain and --output are for a single"),
        (["--strength", "0,1", "--domain", "a"], "--data, --domain and --output are for a single"),
        (["--strength", "0,1", "--plot", "x.doc"], "plot is 'x.doc'; give a file that ends in"),
        (["--plot", "x.png"], "there is one strength; give several"),
    ],
)
def test_evaluate_refuses_strengths_and_splits_in_one_line(finished_run, options, words):
    assert words in complaint(run("evaluate", finished_run.output, *options))


def test_merge_and_transcribe_take_a_strength(finished_run, tones_folder, tmp_path):
    audio, adapter = tones_folder / "test4.wav", ("--adapter", finished_run.output)
    whole = well("transcribe", audio, *adapter)
    base = well("transcribe", audio, *adapter, "--strength", 0)
    assert whole != base
    well("merge", finished_run.output, tmp_path / "out", "--strength", 0)
    merged = ("--base", tmp_path / "out", "--language", "de-en")
    assert well("transcribe", audio, *merged) == base
    assert "there is no adapter" in complaint(run("transcribe", audio, "--strength", 0.5))
    other = ("--strength-by", "magic")
    gone = tmp_path / "none"
    assert "strength_by is 'magic'" in complaint(run("merge", finished_run.output, gone, *other))
    assert not gone.exists()


def test_merge_writes_a_base_that_says_what_the_run_says(finished_run, tones_folder, tmp_path):
    assert str(tmp_path / "out") in well("merge", finished_run.output, tmp_path / "out")
    audio = tones_folder / "test4.wav"
    out = well("transcribe", audio, "--base", tmp_path / "out", "--language", "de-en")
    assert out == "das red\n"
    assert "not empty" in complaint(run("merge", finished_run.output, tmp_path / "out"))
    well("merge", finished_run.output, tmp_path / "out", "--overwrite", "--dtype", "float16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float16"


def test_a_missing_run_is_refused_in_one_line(tones_folder, tmp_path):
    gone = tmp_path / "gone"
    assert str(gone) in complaint(run("evaluate", gone))
    assert str(gone) in complaint(run("merge", gone, tmp_path / "out"))
    audio = tones_folder / "en0.wav"
    assert str(gone) in complaint(run("transcribe", audio, "--adapter", gone))


def test_a_missing_audio_file_is_refused_in_one_line(fluent_folder, finished_run):
    base = run("transcribe", "/nowhere.wav", "--base", fluent_folder)
    assert "/nowhere.wav" in complaint(base)
    adapted = run("transcribe", "/nowhere.wav", "--adapter", finished_run.output)
    assert "/nowhere.wav" in complaint(adapted)


@pytest.mark.parametrize("command", ["evaluate", "transcribe"])
def test_an_unknown_device_is_refused_in_one_line(
    fluent_folder, finished_run, tones_folder, command
):
    arguments = {
        "evaluate": [finished_run.output],
        "transcribe": [tones_folder / "en0.wav", "--base", fluent_folder],
    }
    result = run(command, *arguments[command], "--device", "toaster")
    assert "toaster" in complaint(result)


# ---- the command line itself


def test_data_check_exits_with_1_if_a_fit_would_refuse(fluent_folder, tones_folder, tmp_path):
    base = ("--base", fluent_folder)
    out = well("data", "check", tones_folder, tones_folder / "de.jsonl", *base)
    assert "a fit would take every row" in out
    (tmp_path / "train.jsonl").write_text("?", encoding="utf-8")
    result = run("data", "check", tmp_path, *base)
    assert result.exit_code == 1 and "not JSON: '?'" in result.stdout
    result = run("data", "check", tmp_path, "--json", *base)
    assert result.exit_code == 1 and parsed(result.stdout)["sets"][0]["refused"] == {"row": 1}
    assert "no data at" in complaint(run("data", "check", tmp_path / "gone", *base))
    assert "no dev.jsonl" in complaint(run("data", "check", tmp_path, "--split", "dev", *base))


def test_data_check_hands_every_option_on(monkeypatch):
    seen = []

    def check(*arguments):
        seen.append(arguments)
        return DataCheck("b", 30, [])

    monkeypatch.setattr(checks, "check_data", check)
    options = ["--base", "b", "--split", "s", "--language", "German", "--revision", "v1"]
    well("data", "check", "x", "y", *options, "--local-files-only")
    assert seen[0][:4] == (["x", "y"], "b", "s", "German")
    assert seen[0][5:] == ("v1", True)


@pytest.mark.parametrize("command", [[], ["data", "check"], *([name] for name in COMMANDS)])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_has_help(command, flag):
    out = well(*command, flag)
    assert "Usage:" in out
    if not command:
        assert all(name in out for name in COMMANDS)


def test_version():
    assert well("--version") == f"blora-pyro {blora_pyro.__version__}\n"


@pytest.mark.parametrize("arguments", [["evaluate"], ["fit", "--rank", "many"], ["dance"], []])
def test_usage_errors_exit_with_2_and_no_traceback(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


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


def test_help_and_version_load_no_heavy_library():
    code = """
import sys
from typer.testing import CliRunner
from blora_pyro.cli import app
helps = (["--help"], ["fit", "--help"], ["sweep", "-h"], ["compare", "-h"], ["data", "check", "-h"])
for arguments in (*helps, ["--version"]):
    assert CliRunner().invoke(app, arguments).exit_code == 0
heavy = {"torch", "transformers", "pyro", "peft", "datasets", "numpy", "jiwer"}
heavy |= {"arviz", "matplotlib", "optuna"}
print(sorted(heavy & set(sys.modules)))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout == "[]\n"


def test_prune_prints_what_is_left_and_what_it_costs(finished_run, tmp_path):
    out = well("prune", finished_run.output, tmp_path / "small", "--rank", 1)
    for words in ("full", "pruned", "new domain", "backward average", "75.0% pruned", "run folder"):
        assert words in out
    found = parsed(well("prune", finished_run.output, tmp_path / "json", "--snr", 20, "--json"))
    assert found["size"]["pruned"]["directions"] < found["size"]["full"]["directions"]


def test_prune_without_evaluation_tells_the_size_alone(finished_run, tmp_path):
    out = well("prune", finished_run.output, tmp_path / "small", "--rank", 2, "--no-evaluate")
    assert "50.0% pruned" in out and "error" not in out


def test_prune_asks_for_one_bar(finished_run, tmp_path):
    assert "either rank or snr" in complaint(run("prune", finished_run.output, tmp_path / "small"))


def test_a_pruned_run_is_evaluated_but_not_diagnosed(finished_run, tmp_path):
    well("prune", finished_run.output, tmp_path / "small", "--rank", 1, "--no-evaluate")
    assert "new domain" in well("evaluate", tmp_path / "small")
    message = complaint(run("diagnose", tmp_path / "small"))
    assert f"diagnose {finished_run.output}" in message


# ---- combine


def test_combine_says_what_is_kept_and_writes_a_run(finished_run, tones_folder, tmp_path):
    two = [finished_run.output, finished_run.output]
    out = well("combine", *two, "--output", tmp_path / "both", "--rank", 4)
    assert "mean of 2 runs at rank 4" in out and "100.00% of the Frobenius norm" in out
    assert out.splitlines()[-1] == f"run folder: {tmp_path / 'both'}"
    weighted = ["--method", "weighted", "--weights", "0.5,0.5", "--output", tmp_path / "json"]
    found = parsed(well("combine", *two, *weighted, "--json"))
    assert (found["method"], found["weights"], found["rank"]) == ("weighted", [0.5, 0.5], 8)
    audio = tones_folder / "train4.wav"
    said = well("transcribe", audio, "--adapter", finished_run.output)
    assert well("transcribe", audio, "--adapter", tmp_path / "both") == said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--weights", "a,b", "--method", "weighted"), "weights is 'a,b'; give numbers"),
        (("--method", "sum"), "method is 'sum'; give one of product, mean, weighted"),
        (("--rank", 99), "rank is 99; give a number from 1 to 16"),
    ],
)
def test_combine_refuses_in_one_line(finished_run, tmp_path, options, words):
    two = [finished_run.output, finished_run.output]
    assert words in complaint(run("combine", *two, "--output", tmp_path / "out", *options))
    one = run("combine", finished_run.output, "--output", tmp_path / "out")
    assert "1 run is given; give two or more" in complaint(one)
    assert not (tmp_path / "out").exists()
