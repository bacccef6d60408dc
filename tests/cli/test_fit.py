import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blora_pyro.cli.fit import default_folder
from blora_pyro.declarations import declarations, flag_of
from blora_pyro.options import FitConfig, OutputOptions, fit_command
from blora_pyro.runs import fits
from blora_pyro.runs.record import RunRecord

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


@pytest.fixture
def handed_on(monkeypatch):
    """What `fit` is called with, in place of a fit: `config`, `folder`, and how."""
    seen = {}

    def fit(config, folder, **how):
        seen.update(how, config=config, folder=folder)
        return fits.Run(None, None, [], {"backward": {}, "sparsity": {}})

    monkeypatch.setattr(fits, "fit", fit)
    return seen


def test_what_is_given_is_known_where_a_run_is_continued(handed_on):
    well(
        "fit", "--prior-from", "runs/first", "--prior-inflation", 2, "--data", "es-en", "--seed", 3
    )
    assert re.fullmatch(r"runs/es-en-after-first-seed3-\w{8}", str(handed_on["folder"]))
    assert handed_on["config"].given_options == {
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


COMMANDS = [
    {},
    {"beta": 3.210987654321e-05, "prior_scale": 0.123456789, "lr": 1e-2},
    {"beta": "auto", "prior": "horseshoe", "prior_args": {"global_scale": "0.01"}},
    {"data": ("de-en", "my corpus/a.csv"), "data_weights": (3, 1), "language": "de-en"},
    {"distillation": 0.3, "distillation_languages": ("de", "en"), "max_utterances": 150},
    {"backward": {"German": "my de.csv", "en": "en"}, "base": "owner/whisper"},
    {"backward": ()},
    {"base": "owner/whisper", "lr": 5e-3, "cache_encoder": False, "steps": 400},
    {"data": {"a": "my a.csv", "es-en": "es-en"}, "pooling": "hierarchical"},
    {"data": {"a": "de-en", "b": "es-en"}, "pooling": "complete", "pooling_scale": None},
    {"prior_from": "runs/my first", "prior_inflation": 1.5, "rank": 8},
    {"spec_augment": True, "gradient_checkpointing": True, "target_modules": "q_proj,v_proj"},
    {"track": ("tensorboard", "wandb")},
    {"keep": {"average": 1.0, "each": 2.5}, "strength_by": "base"},
    {"dev": "de", "eval_every": 5, "patience": 2, "epochs": 1.5, "dtype": "bfloat16"},
]

EVERY_OPTION = {
    "base": ("b", "b"),
    "dtype": ("float16", "float16"),
    "revision": ("v1", "v1"),
    "data": ("d", ("d",)),
    "data-weights": ("3", (3.0,)),
    "max-utterances": ("12", 12),
    "test": ("t", "t"),
    "backward": ("x, y", {"x": "x", "y": "y"}),
    "language": ("German", "de"),
    "task": ("translate", "translate"),
    "column": ("text=said", {"text": "said"}),
    "on-bad-row": ("skip", "skip"),
    "prior": ("student-t", "student-t"),
    "guide": ("normal", "normal"),
    "beta": ("2e-3", 2e-3),
    "prior-arg": ("df=3", {"df": "3"}),
    "prior-scale": ("0.25", 0.25),
    "rank": ("3", 3),
    "alpha": ("5", 5.0),
    "target-modules": ("fc1", "fc1"),
    "lr": ("0.125", 0.125),
    "optimizer": ("natural-gradient", "natural-gradient"),
    "steps": ("11", 11),
    "epochs": ("1.5", 1.5),
    "batch-size": ("7", 7),
    "dev": ("v", "v"),
    "keep": ("1,x=2", {"average": 1.0, "x": 2.0}),
    "strength-by": ("base", "base"),
    "schedule": ("linear", "linear"),
    "warmup-steps": ("2", 2),
    "gradient-accumulation": ("3", 3),
    "max-grad-norm": ("0.5", 0.5),
    "distillation": ("0.5", 0.5),
    "distillation-languages": ("de,tr", ("de", "tr")),
    "ewc": ("2", 2.0),
    "eval-every": ("5", 5),
    "patience": ("4", 4),
    "estimator": ("local", "local"),
    "precision": ("bf16", "bf16"),
    "normalizer": ("basic", "basic"),
    "max-eval-utterances": ("9", 9),
    "language-map": ("qu=mi", {"qu": "mi"}),
    "exclude-modules": ("fc1", "fc1"),
    "layers": ("3,1", (1, 3)),
    "rank-pattern": ("fc2=3", {"fc2": 3}),
    "seed": ("9", 9),
    "device": ("cuda:1", "cuda:1"),
    "track": ("tensorboard,wandb", ("tensorboard", "wandb")),
}
SWITCHES = (
    *("gradient-checkpointing", "spec-augment", "local-files-only", "trim-audio"),
    "use-rslora",
)


def test_every_option_reaches_the_configuration(handed_on, tmp_path):
    flags = [word for name, (text, _) in EVERY_OPTION.items() for word in (f"--{name}", text)]
    how = ["--output", tmp_path, "--overwrite", "--checkpoint-every", 5]
    well("fit", *flags, *(f"--{name}" for name in SWITCHES), *how)
    expected = {name.replace("-", "_"): value for name, (_, value) in EVERY_OPTION.items()}
    expected["prior_args"] = expected.pop("prior_arg")
    expected["layers_to_transform"] = expected.pop("layers")
    expected |= {name.replace("-", "_"): True for name in SWITCHES}
    assert handed_on["config"].given_options == expected
    assert handed_on["folder"] == tmp_path
    assert (handed_on["overwrite"], handed_on["resume"]) == (True, False)
    assert handed_on["checkpoint_every"] == 5


def test_other_options_reach_the_configuration(handed_on):
    more = ["--streaming", "--shuffle-buffer", 50, "--cache-encoder", "--average-from", 0.25]
    complaint(run("fit", *more))  # a stream takes no cache
    well("fit", *(one for one in more if one != "--cache-encoder"))
    config = handed_on["config"]
    assert (config.streaming, config.shuffle_buffer, config.average_from) == (True, 50, 0.25)
    assert config.alarms
    well("fit", "--no-alarms")
    assert not handed_on["config"].alarms
    data = ["--data", "a=de-en", "--data", "b=es-en"]
    well("fit", *data, "--pooling", "hierarchical", "--pooling-scale", 0.2, "--cache-encoder")
    config = handed_on["config"]
    assert (config.pooling, config.pooling_scale, config.cache_encoder) == (
        "hierarchical",
        0.2,
        True,
    )
    folder = str(handed_on["folder"])
    assert re.fullmatch(r"runs/de-en\+es-en-normal-hierarchical-seed0-\w{8}", folder)


def test_folders_of_fits_that_differ_differ_by_name(tmp_path):
    options = [
        *({}, {"beta": 1e-5}, {"beta": "auto"}, {"beta": 0}, {"steps": 3}, {"steps": 4}),
        *({"seed": 1}, {"data": "es-en"}, {"data": {"a": "de-en"}}, {"data": {"b": "de-en"}}),
        *({"data": str(tmp_path / "de-en")}, {"prior": "laplace"}, {"prior": "x/laplace.py"}),
        *({"prior_from": "a/r"}, {"prior_from": "b/r"}, {"pooling": "none", "data": ["a", "b"]}),
    ]
    folders = [default_folder(FitConfig(**one)) for one in options]
    assert len({*folders}) == len(options)
    assert folders[0] == Path("runs/de-en-normal-seed0")
    assert folders[1] == Path("runs/de-en-normal-beta1e-05-seed0")
    machine = FitConfig(device="cuda", track="tensorboard", local_files_only=True)
    assert default_folder(machine) == folders[0]


def test_no_option_is_left_out_of_these_tests():
    tested = {name.replace("-", "_") for name in (*EVERY_OPTION, *SWITCHES)} | {"prior_args"}
    tested |= {"streaming", "shuffle_buffer", "average_from", "pooling", "pooling_scale"}
    tested |= {"alarms", "cache_encoder", "prior_from", "prior_inflation", "layers_to_transform"}
    assert set(declarations(FitConfig)) <= tested


def test_several_sources_and_named_sets_reach_the_configuration(handed_on, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").mkdir()
    data = ["--data", "de-en", "--data", "corpora/mine.csv", "--data-weights", "3, 1"]
    backward = ["--backward", "de,en", "--backward", "mine=a", "--backward", "a,b"]
    well("fit", *data, *backward)
    config = handed_on["config"]
    assert config.data == ("de-en", "corpora/mine.csv")
    assert config.data_weights == (3, 1)
    assert config.backward == {"de": "de", "en": "en", "mine": "a", "a,b": "a,b"}
    assert handed_on["folder"].name.startswith("de-en+mine-normal-seed0-")


def test_an_option_given_at_its_default_counts_as_given(handed_on, tmp_path):
    given = ["--lr", "5e-3", "--prior-arg", "scale=3", "--backward", "none", "--beta", "auto"]
    well("fit", "--resume", "--output", tmp_path, *given)
    assert handed_on["config"].given_options == {
        "lr": 5e-3,
        "prior_args": {"scale": "3"},
        "backward": {},
        "beta": "auto",
    }
    assert handed_on["resume"] and not handed_on["overwrite"]


def test_without_options_the_fit_is_that_of_the_defaults(handed_on):
    well("fit")
    assert handed_on["config"] == FitConfig()
    assert handed_on["config"].given == set()
    assert handed_on["checkpoint_every"] is None


@pytest.mark.parametrize("options", COMMANDS, ids=str)
def test_a_command_made_of_a_configuration_makes_the_same_configuration(handed_on, options):
    program, *words = shlex.split(fit_command(FitConfig(**options)))
    assert program == "blora-pyro"
    well(*words)
    assert handed_on["config"] == FitConfig(**options)


# ---- options of a file


def test_a_file_gives_options_and_the_command_line_wins(handed_on, tmp_path):
    file = tmp_path / "fit.toml"
    file.write_text(
        'prior-scale = 0.1\nsteps = 7\nbackward = ["de", "mine=a.csv"]\nbeta = "auto"\n'
    )
    well("fit", "--config", file, "--steps", 9)
    config = handed_on["config"]
    assert (config.prior_scale, config.steps, config.beta) == (0.1, 9, "auto")
    assert config.backward == {"de": "de", "mine": "a.csv"}
    assert config.given == {"prior_scale", "steps", "beta", "backward"}


def test_the_run_json_of_a_fit_gives_its_options(handed_on, finished_run):
    well("fit", "--config", finished_run.output / "run.json", "--seed", 5)
    given = json.loads((finished_run.output / "run.json").read_text())["options"]
    assert handed_on["config"] == FitConfig(**{**given, "seed": 5})


def test_what_a_dry_run_prints_is_a_file_of_the_same_options(handed_on, tmp_path):
    options = ["--prior", "laplace", "--backward", "German=de", "--steps", 20, "--beta", "auto"]
    text = well("fit", *options, "--dry-run")
    assert not handed_on
    assert "warmup_steps = 2\n" in text and 'prior_args = {"scale" = 0.05}\n' in text
    (tmp_path / "same.toml").write_text(text)
    well("fit", "--config", tmp_path / "same.toml")
    same = handed_on["config"]
    assert (same.prior, same.backward, same.beta, same.alpha) == (
        "laplace",
        {"German": "de"},
        "auto",
        32,
    )
    assert parsed(well("fit", *options, "--dry-run", "--json"))["warmup_steps"] == 2


def test_an_estimate_is_printed_and_nothing_is_written(handed_on, short, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = parsed(well(*short, "--estimate", "--json"))
    assert [one["count"] for one in found["work"]] == [2, 2, 2, 2]
    assert not handed_on and not [*tmp_path.iterdir()]
    for other in ("--resume", "--dry-run"):
        message = complaint(run(*short, "--estimate", other, "--output", tmp_path / "run"))
        assert "estimate is given with" in message and "give one of them" in message


def test_code_that_only_a_file_names_is_not_run(handed_on, tmp_path):
    code, file = tmp_path / "mine.py", tmp_path / "fit.toml"
    code.write_text("raise SystemExit('run')")
    file.write_text(f'prior = "{code}/"\n')
    message = complaint(run("fit", "--config", file))
    assert f"names code as prior, {code}/; name it with --prior to run it" in message
    content = FitConfig().to_json() | {"guide": str(code)}
    (tmp_path / "run.json").write_text(json.dumps({"config": content}))
    for more in ([], ["--prior", "normal"]):
        message = complaint(run("fit", "--config", tmp_path / "run.json", *more))
        assert f"names code as guide, {code}; name it with --guide to run it" in message
    assert not handed_on


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepz = 3\n", "has no option 'stepz'; did you mean 'steps'?"),
        ("steps = -3\n", "steps is -3; give a whole number from 1"),
        ("steps = \n", "can't be read"),
        ("spec_augment = 1\n", "spec_augment is 1; give true or false"),
    ],
)
def test_a_bad_file_of_options_is_refused_in_one_line(tmp_path, text, words):
    (tmp_path / "fit.toml").write_text(text)
    assert words in complaint(run("fit", "--config", tmp_path / "fit.toml"))
    assert "can't be read" in complaint(run("fit", "--config", tmp_path / "none.toml"))


@pytest.mark.parametrize("line", [["--steps", "-5"], ["--prior", "norml"], ["--lr", "x"]])
def test_bad_options_are_refused_before_anything_heavy_is_imported(line):
    code = (
        "import sys; from blora_pyro.cli import app\n"
        f"try:\n    app(['fit', *{line}])\n"
        "except SystemExit as end:\n"
        "    print(end.code, [m for m in ('torch', 'transformers', 'datasets', 'optuna')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "2 []\n", done.stderr


def test_help_shows_every_option_whole_in_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    text = well("fit", "--help")
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    for group in (FitConfig, OutputOptions):
        for name in declarations(group):
            assert f" {flag_of(group, name)} " in text


def test_the_run_folder_is_named_after_data_prior_and_seed(
    short, tones_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    well(*short, "--seed", 3)
    (file,) = tmp_path.glob(f"runs/{tones_folder.name}-normal-*seed3-*/run.json")
    assert RunRecord.read(file.parent).options["seed"] == 3


def test_a_fit_with_a_dev_set_tells_its_errors_and_its_end(short, tones_folder, tmp_path):
    dev = ("--dev", tones_folder / "test.jsonl", "--eval-every", 1, "--patience", 1)
    still = ("--lr", 1e-9, "--steps", 9)  # which changes no word
    result = run(*short, *dev, *still, "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    rate = json.loads((tmp_path / "run" / "run.json").read_text())["dev"]["errors"][0]["error"]
    said = " ".join(result.stderr.split())
    assert f"step 1: dev error {rate:.1%} (the best so far)" in said
    assert f"step 2: dev error {rate:.1%} ({rate:.1%} at step 1)" in said
    assert result.stdout.splitlines()[-3] == (
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
        (["--test", "nowhere"], "'nowhere'"),
        (["--backward", "nowhere"], "'nowhere'"),
        (["--base", "/nowhere"], "/nowhere"),
        (["--prior-arg", "df=3"], "takes no 'df'"),
        (["--prior-arg", "scale=wide"], "'wide'"),
        (["--prior-arg", "scale=-1"], "scale is -1"),
        (["--target-modules", "nothing"], "nothing"),
        (["--rank", "1000"], "rank 1000"),
        (["--device", "toaster"], "toaster"),
        (["--checkpoint-every", "x"], "checkpoint_every is 'x'; give a whole number from 1"),
        (["--eval-every", "1"], "has no dev split, and eval_every is 1"),
        (["--resume", "--overwrite"], "overwrite"),
    ],
)
def test_fit_refuses_bad_options_in_one_line(short, tmp_path, options, words):
    assert words in complaint(run(*short, "--output", tmp_path / "run", *options))


def test_a_fit_that_diverges_ends_in_one_line(short, tmp_path):
    result = run(*short, "--output", tmp_path / "run", "--lr", "1e14", "--steps", 5)
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr and "Warning" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("blora-pyro: the loss or its gradient is nan at step 5, ")
    assert line.endswith("; try a smaller --lr")


def test_a_stopped_fit_goes_on_with_resume_and_nothing_else(short, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("blora_pyro.cli.progress.TerminalProgress.step", interrupt)
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


def test_a_dry_run_of_a_fit_that_goes_on_refuses_what_the_fit_refuses(finished_run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    content = json.loads((finished_run.output / "run.json").read_text())
    code = tmp_path / "mine.py"
    code.write_text("raise SystemExit('run')")
    stored = {"state": "fitting", "options": {**content["options"], "prior": str(code)}}
    (folder / "run.json").write_text(json.dumps(stored))
    line = ["fit", "--resume", "--output", folder, "--dry-run"]
    assert "name it with --prior to run it" in complaint(run(*line))
    other = ["fit", "--resume", "--output", finished_run.output, "--dry-run", "--rank", 3]
    assert "has rank = 4, not 3" in complaint(run(*other))


def test_a_file_of_options_gives_them_also_at_their_defaults(handed_on, tmp_path):
    (tmp_path / "fit.toml").write_text("rank = 16\n")
    well("fit", "--config", tmp_path / "fit.toml")
    assert handed_on["config"].given == {"rank"}
