"""Whole runs of several domains: the fit, what it tells, and what can be done with it."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import WhisperForConditionalGeneration
from typer.testing import CliRunner

from blora_pyro.cli import app
from blora_pyro.errors import UserError
from blora_pyro.models import load_base
from blora_pyro.options import FitConfig, fit_command
from blora_pyro.posterior import Posterior
from blora_pyro.runs.finished import evaluate_run, merge_run, transcribe
from blora_pyro.runs.fits import Run, fit
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.report import fit_tables
from blora_pyro.studies.search import sweep


class Crash(Exception):
    """Stands for the end of the process."""


class Crashing(Listener):
    """Dies at a step."""

    def __init__(self, step):
        self.at = step

    def step(self, step):
        if step.step == self.at:
            raise Crash


@pytest.fixture(scope="module")
def german(tmp_path_factory, tones_folder):
    """A second domain, of one language."""
    folder = tmp_path_factory.mktemp("german")
    for split in ("train", "test"):
        shutil.copy(tones_folder / "de.jsonl", folder / f"{split}.jsonl")
    for wav in tones_folder.glob("de*.wav"):
        shutil.copy(wav, folder)
    return folder


@pytest.fixture(scope="module")
def options(fit_options, german, tones_folder):
    data = {"mixed": fit_options["data"], "german": str(german)}
    backward = {"English": str(tones_folder / "en.jsonl")}
    return {**fit_options, "data": data, "backward": backward, "batch_size": 4}


@pytest.fixture(scope="module")
def hierarchical(options, tmp_path_factory) -> Run:
    """Read it, and leave it as it is."""
    torch.set_num_threads(1)
    return fit(
        FitConfig(pooling="hierarchical", **options), tmp_path_factory.mktemp("runs") / "run"
    )


@pytest.fixture(scope="module")
def apart(options, tmp_path_factory) -> Run:
    """Without pooling, and a few steps. Read it, and leave it as it is."""
    torch.set_num_threads(1)
    options = {**options, "steps": 3}
    return fit(FitConfig(pooling="none", **options), tmp_path_factory.mktemp("runs") / "apart")


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def complaint(*arguments):
    """The one line that a command died with."""
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if not line.endswith(" ...")]
    return line


# ---- the fit


def test_names_change_nothing_where_all_is_pooled(options, fit_options, german):
    """`complete` is what several --data are without names."""
    short = {**options, "steps": 3}
    named = fit(FitConfig(pooling="complete", **short), evaluate=False)
    plain = fit(FitConfig(**{**short, "data": (fit_options["data"], str(german))}), evaluate=False)
    assert named.posterior.pooling is None
    assert [step.loss for step in named.history] == [step.loss for step in plain.history]
    for name, mean in plain.posterior.mean.items():
        assert torch.equal(named.posterior.mean[name], mean)


def test_every_domain_is_scored_with_its_own_factors(hierarchical):
    metrics = read_json(hierarchical.output / "metrics.json")
    assert set(metrics["domains"]) == {"mixed", "german"}
    assert set(metrics["backward"]) == {"English"}
    assert "new_domain" not in metrics
    mixed, base = (metrics["domains"]["mixed"][state] for state in ("adapted", "base"))
    assert mixed[mixed["metric"]]["rate"] < base[base["metric"]]["rate"]
    about = read_json(hierarchical.output / "run.json")
    assert about["config"]["pooling_scale"] == 0.5
    assert about["domain_languages"] == {"mixed": "de-en", "german": "de"}
    table = fit_tables(metrics)[0]
    names = [cells[0] for cells, _ in table.filled_rows]
    assert [name for name in names if name.startswith(("domain", "backward"))] == [
        "domain mixed",
        "domain german",
        "backward English",
        "backward average",
    ]


def test_without_pooling_every_adapter_is_scored_on_the_backward_sets(apart):
    assert set(apart.metrics["backward"]) == {"English (mixed)", "English (german)"}
    assert set(apart.metrics["domains"]) == {"mixed", "german"}


def test_evaluate_scores_as_the_fit_did(hierarchical, apart):
    for run in (hierarchical, apart):
        assert evaluate_run(run.output) == read_json(run.output / "metrics.json")


def test_evaluate_scores_one_domains_adapter(hierarchical, german):
    whole = hierarchical.metrics
    metrics = evaluate_run(hierarchical.output, domain="german")
    assert metrics["new_domain"]["name"] == str(german)
    assert metrics["new_domain"]["adapted"] == whole["domains"]["german"]["adapted"]
    assert set(metrics["backward"]) == {"English"}
    other = evaluate_run(hierarchical.output, data=str(german), domain="german")
    assert other["new_domain"]["adapted"] == metrics["new_domain"]["adapted"]
    unseen = evaluate_run(hierarchical.output, data=str(german))
    assert unseen["new_domain"]["base"] == metrics["new_domain"]["base"]
    assert evaluate_run(hierarchical.output, strength=0.0)["strength"] == 0


@pytest.mark.parametrize(
    "more",
    [
        {"distillation": 0.1, "distillation_languages": ("en",), "gradient_accumulation": 2},
        {"gradient_checkpointing": True, "spec_augment": True, "average_from": 0.5},
        {"precision": "bf16", "data_weights": (3.0, 1.0), "guide": "point"},
    ],
    ids=lambda one: next(iter(one)),
)
def test_what_else_a_fit_can_do_it_can_do_with_domains(options, more):
    run = fit(FitConfig(pooling="hierarchical", **{**options, "steps": 2, **more}), evaluate=False)
    assert len(run.history) == 2
    assert run.posterior.for_domain("german").num_weights * 3 == run.posterior.num_weights


def test_a_killed_fit_goes_on_bit_by_bit(options, hierarchical, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Crash):
        fit(
            FitConfig(pooling="hierarchical", **options),
            folder,
            checkpoint_every=4,
            progress=Crashing(10),
        )
    resumed = fit(output=folder, resume=True)
    assert resumed.history == hierarchical.history
    for name, mean in hierarchical.posterior.mean.items():
        assert torch.equal(resumed.posterior.mean[name], mean)
    assert resumed.metrics == hierarchical.metrics


# ---- the posterior


def test_a_posterior_comes_back_from_its_file(hierarchical):
    loaded = Posterior.load(hierarchical.output)
    assert loaded.pooling == hierarchical.posterior.pooling
    assert loaded.groups == hierarchical.posterior.groups
    draws = [loaded.pooling.factors(d["A_16x16"], torch.tensor([1]))[0] for d in loaded.draws(400)]
    german = loaded.for_domain("german")
    stddev = german.stddev["A_16x16"]
    z = (torch.stack(draws).mean(0) - german.mean["A_16x16"]) / (stddev / 20)
    assert z.abs().mean() < 1  # 0.8 of a standard normal
    assert (torch.stack(draws).std(0) / stddev).mean() == pytest.approx(1, abs=0.02)
    own = [draw["A_16x16"] for draw in german.draws(400)]
    assert (torch.stack(own).std(0) / stddev).mean() == pytest.approx(1, abs=0.02)


def test_it_is_told_that_several_domains_are_no_adapter(hierarchical, fluent_base):
    posterior = hierarchical.posterior
    with (
        pytest.raises(UserError, match=r"several domains \(mixed, german\); choose by for_domain"),
        posterior.applied(fluent_base.net),
    ):
        pass
    with pytest.raises(UserError, match="for_domain"):
        posterior.merge(fluent_base.net)
    with pytest.raises(UserError, match="no prior"):
        posterior.for_domain("mixed").prior  # noqa: B018
    assert posterior.for_domain("mixed").for_domain() is not None


def test_a_file_of_other_layers_is_damaged(hierarchical, tmp_path):
    shutil.copytree(hierarchical.output, tmp_path / "run")
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "run" / "posterior.safetensors"
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["blora_pyro"])
    about["pooling"]["domains"] = ["mixed"]
    save_file(load_file(path), path, metadata={"blora_pyro": json.dumps(about)})
    with pytest.raises(UserError, match="not those of its domains"):
        Posterior.load(tmp_path / "run")


@pytest.mark.parametrize("domain", [None, "german"])
def test_the_folder_holds_a_stock_adapter_of_each_domain_and_of_what_they_share(
    hierarchical, fluent_folder, domain
):
    folder = hierarchical.output
    folder = folder if domain is None else folder / "domains" / domain
    whisper = WhisperForConditionalGeneration.from_pretrained(fluent_folder)
    merged = PeftModel.from_pretrained(whisper, folder).merge_and_unload()
    base = load_base(str(fluent_folder))
    hierarchical.posterior.for_domain(domain).merge(base.net)
    for name, weight in base.net.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], weight, rtol=1e-4, atol=1e-5)


def test_without_pooling_there_is_no_shared_adapter(apart):
    assert not (apart.output / "adapter_model.safetensors").exists()
    names = {path.name for path in (apart.output / "domains").iterdir()}
    assert names == {"mixed", "german"}


# ---- what is done with it


def test_transcribe_takes_a_domain_and_its_language(hierarchical, apart, german):
    audio = [german / "de2.wav"]
    (own,) = transcribe(audio, hierarchical.output, domain="german", samples=2)
    assert own.language == "de"
    (shared,) = transcribe(audio, hierarchical.output)
    assert shared.language in ("de", "de-en")
    with pytest.raises(UserError, match=r"domains \(mixed, german\) has an adapter of its own"):
        transcribe(audio, apart.output)
    with pytest.raises(UserError, match="domain is 'x'; give one of: mixed, german"):
        transcribe(audio, hierarchical.output, domain="x")
    with pytest.raises(UserError, match="no adapter"):
        transcribe(audio, domain="german")


def test_merge_takes_a_domain(hierarchical, fluent_folder, tmp_path):
    merge_run(hierarchical.output, tmp_path / "merged", domain="german")
    base = load_base(str(fluent_folder))
    hierarchical.posterior.for_domain("german").merge(base.net)
    merged = load_base(str(tmp_path / "merged")).net.state_dict()
    for name, weight in base.net.state_dict().items():
        torch.testing.assert_close(merged[name], weight)


def test_a_run_of_one_adapter_has_no_domains(finished_run):
    with pytest.raises(UserError, match="one adapter for all its data; leave domain out"):
        evaluate_run(finished_run.output, domain="german")


@pytest.mark.parametrize(
    "command",
    [
        ("prune", "RUN", "OUT", "--rank", "1"),
        ("diagnose", "RUN"),
        ("combine", "RUN", "RUN", "--output", "OUT"),
        ("fit", "--prior-from", "RUN", "--output", "OUT"),
        ("evaluate", "RUN", "--strength", "0:1:0.5"),
    ],
    ids=lambda one: one[0],
)
def test_what_can_not_take_domains_says_so(hierarchical, tmp_path, command):
    places = {"RUN": hierarchical.output, "OUT": tmp_path / "out"}
    line = complaint(*(places.get(word, word) for word in command))
    assert "was fitted with pooling hierarchical" in line
    assert "give a run with pooling complete" in line


def test_the_surest_directions_are_those_of_one_domain(hierarchical):
    how = {"strength": 0.5, "strength_by": "signal-to-noise"}
    with pytest.raises(UserError, match="several domains; give one as domain"):
        evaluate_run(hierarchical.output, **how)
    assert evaluate_run(hierarchical.output, domain="mixed", **how)["strength"] == 0.5


# ---- the command line, and options


def test_the_command_line(options, german, tmp_path):
    sources = [f"{name}={source}" for name, source in options["data"].items()]
    words = ["fit", "--base", options["base"], "--data", sources[0], "--data", sources[1]]
    words += ["--pooling", "hierarchical", "--pooling-scale", "0.2", "--steps", "2", "--rank", "2"]
    words += ["--backward", "none", "--output", str(tmp_path / "run")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "domain mixed" in result.stdout and "domain german" in result.stdout
    posterior = Posterior.load(tmp_path / "run")
    assert posterior.pooling.domains == ("mixed", "german")
    assert posterior.pooling.scale == 0.2
    again = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run"), "--domain", "german"])
    assert again.exit_code == 0 and "new domain" in again.stdout
    words = ["merge", str(tmp_path / "run"), str(tmp_path / "merged"), "--domain", "x"]
    assert "give one of: mixed, german" in complaint(*words)


def test_the_command_of_a_fit_names_its_domains():
    options = {"data": {"a": "de-en", "es-en": "es-en"}, "pooling": "none"}
    words = fit_command(FitConfig(**options))
    assert words == "blora-pyro fit --data a=de-en --data es-en --pooling none"


def test_a_sweep_is_of_one_domain(tmp_path):
    with pytest.raises(UserError, match="a sweep looks at the error of one domain"):
        sweep({"data": ("de-en", "es-en"), "pooling": "none"}, tmp_path)
