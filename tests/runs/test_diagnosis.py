import copy
import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from blora_pyro import fit
from blora_pyro.adapters import find_targets, group_by_shape
from blora_pyro.data import IGNORED
from blora_pyro.diagnostics import summarise
from blora_pyro.diagnostics.plots import trace_plot
from blora_pyro.errors import UserError
from blora_pyro.fitting.svi import Step
from blora_pyro.guides import build_prior, latent_sites
from blora_pyro.models import FactorPrior
from blora_pyro.options import FitConfig
from blora_pyro.posterior.draws import traces
from blora_pyro.posterior.inference_data import MIN_RATIOS
from blora_pyro.runs import diagnosis
from blora_pyro.runs.diagnosis import (
    diagnose,
    error_rate,
    measure_khat,
    predict_prior,
    prediction_tables,
)
from blora_pyro.runs.loading import load_examples
from blora_pyro.tables import report_text

DRAWS = MIN_RATIOS


@pytest.fixture
def no_plots(monkeypatch):
    """Plots are tested on their own, and take seconds."""
    monkeypatch.setattr(diagnosis, "all_plots", lambda *args: {})


@pytest.fixture(scope="module")
def found(finished_run, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagnosis, "all_plots", lambda *args: {})
        return diagnose(
            finished_run.output, tmp_path_factory.mktemp("plots"), khat=True, draws=DRAWS
        )


def fitted(fit_options, folder=None, **changes):
    return fit(FitConfig(**{**fit_options, "steps": 1, **changes}), folder, evaluate=False)


def test_a_run_is_diagnosed_from_its_folder(found, finished_run):
    assert found.run == finished_run.output
    assert found.beta == finished_run.config.beta
    assert found.num_weights == finished_run.posterior.num_weights
    assert found.summary.kl == pytest.approx(summarise(finished_run.posterior).kl, rel=1e-5)
    assert found.explanation.startswith("A Normal prior")


def test_khat_says_what_it_was_computed_on(found):
    khat = found.khat
    assert math.isfinite(khat.value) or khat.value == math.inf
    assert (khat.draws, khat.utterances, khat.of_utterances) == (DRAWS, 2, 2)
    assert khat.meaning
    assert khat.loo.elpd < 0 < khat.loo.se
    assert khat.loo.temperature == pytest.approx(found.beta * khat.loo.tokens)


def test_json_is_valid_and_holds_every_layer(found):
    content = found.to_json()
    text = json.dumps(content, allow_nan=False)
    assert len(content["summary"]["factors"]) == 2 * len(content["summary"]["updates"]) == 64
    assert json.loads(text)["summary"]["kl"] == found.summary.kl
    odd = dataclasses.replace(found, khat=dataclasses.replace(found.khat, value=math.inf))
    assert odd.to_json()["khat"]["value"] is None


@pytest.mark.usefixtures("no_plots")
def test_every_stage_is_announced(finished_run, tmp_path):
    stages = []
    early = {"on_stage": stages.append, "on_figures": lambda found: stages.append(found.khat.value)}
    diagnose(finished_run.output, tmp_path, khat=True, draws=DRAWS, **early)
    assert stages == ["figures", None, "plots", "k-hat"]
    stages.clear()
    found = diagnose(finished_run.output, tmp_path, **early)
    assert stages == ["figures", None, "plots"]
    assert found.khat.value is None


def test_plots_go_into_the_run_s_folder(fit_options, tmp_path, monkeypatch):
    fitted(fit_options, tmp_path / "run")
    trace = trace_plot([Step(1, 2.0, 2.0, 1000.0, 1e-3, 10)], 1e-3)
    monkeypatch.setattr(diagnosis, "all_plots", lambda *args: {"trace": trace})
    for _ in range(2):  # over its own files, too
        found = diagnose(tmp_path / "run")
    folder = tmp_path / "run" / "diagnostics"
    assert found.plots == (folder / "trace.png", folder / "trace.pdf")
    assert set(folder.iterdir()) == set(found.plots)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"beta": 0.0}, "beta = 0"), ({"guide": "point"}, "points"), ({"prior": "a-only"}, "points")],
)
def test_where_khat_means_nothing_it_is_not_computed(fit_options, changes, reason):
    run = fitted(fit_options, **changes)
    khat = measure_khat(run.posterior, summarise(run.posterior), run.config, DRAWS)
    assert khat.value is None
    assert reason in khat.meaning


@pytest.mark.parametrize("regularizer", ["distillation", "ewc"])
def test_where_more_than_the_posterior_is_fitted_there_is_no_khat(finished_run, regularizer):
    names = {"backward": {"de": "somewhere"}, regularizer: 1.0}
    config = dataclasses.replace(finished_run.config, **names)
    summary = summarise(finished_run.posterior)
    khat = measure_khat(finished_run.posterior, summary, config, DRAWS)
    assert (khat.value, khat.meaning.partition(",")[0]) == (
        None,
        f"not computed: the fit had {regularizer}",
    )


def test_without_training_data_there_is_no_khat_and_no_error(finished_run):
    config = dataclasses.replace(finished_run.config, data="/gone")
    khat = measure_khat(finished_run.posterior, summarise(finished_run.posterior), config, DRAWS)
    assert khat.value is None
    assert "/gone" in khat.meaning


def test_too_few_draws_for_khat_are_refused(finished_run, tmp_path):
    with pytest.raises(UserError, match="draws is 29; k-hat needs 30"):
        diagnose(finished_run.output, tmp_path, draws=29)


def copied(run, tmp_path) -> Path:
    return Path(shutil.copytree(run.output, tmp_path / "copy"))


def test_no_run_and_damaged_runs_are_refused(finished_run, tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        diagnose(tmp_path / "gone")
    folder = copied(finished_run, tmp_path)
    (folder / "run.json").write_text("{}")
    with pytest.raises(UserError, match="missing or damaged"):
        diagnose(folder)


def test_a_damaged_history_is_refused(finished_run, tmp_path):
    folder = copied(finished_run, tmp_path)
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**about, "history": [{"nll": 1}]}))
    with pytest.raises(UserError, match=r"run\.json is missing or damaged"):
        diagnose(folder)


@pytest.mark.usefixtures("no_plots")
def test_a_prior_of_ones_own_is_run_only_where_it_is_named(fit_options, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("from blora_pyro.guides.normal import Guide, Prior\n")
    fitted(fit_options, tmp_path / "run", prior=str(mine))
    with pytest.raises(UserError, match="name it with --prior"):
        diagnose(tmp_path / "run")
    found = diagnose(tmp_path / "run", prior=str(mine))
    assert found.explanation.startswith("The prior is your own code")
    assert found.summary.kl > 0


def test_an_output_that_can_t_be_written_is_refused(finished_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        diagnose(finished_run.output, tmp_path / "file")


# ---- a prior, before there are data


@pytest.fixture
def config(fit_options):
    options = {name: fit_options[name] for name in ("base", "data", "target_modules")}
    return FitConfig(**options, rank=2, alpha=5.0, prior_scale=0.3, seed=3)


def next_tokens(net, examples):
    """Distributions at the targets of all utterances."""
    batch = examples.batch(range(len(examples)))
    with torch.no_grad():
        logits = net(
            input_features=batch.input_features, decoder_input_ids=batch.decoder_input_ids
        ).logits
    return Categorical(logits=logits[batch.labels != IGNORED])


def test_draws_move_the_base_as_if_they_were_merged(config, fluent_base):
    found = predict_prior(config, draws=3)
    net = fluent_base.net
    examples = load_examples(fluent_base, config.data, "train")
    groups = group_by_shape(find_targets(net, "all-linear"), 2)
    prior = FactorPrior(groups, build_prior("normal", scale=0.3), torch.device("cpu"))
    before = next_tokens(net, examples)
    assert found.base_rate == pytest.approx(error_rate(fluent_base, examples, "unicode"))
    for move, trace in zip(found.draws, traces(prior, 3, seed=3), strict=True):
        draw, merged = latent_sites(trace), copy.deepcopy(net)
        with torch.no_grad():
            for group in groups:
                a, b = (draw[site.name]["value"] for site in group.sites)
                for i, name in enumerate(group.modules):
                    merged.get_submodule(name).weight += 2.5 * b[i] @ a[i]
        kl = kl_divergence(before, next_tokens(merged, examples)).mean().item()
        assert move.kl == pytest.approx(kl, rel=1e-3)
        rate = error_rate(dataclasses.replace(fluent_base, net=merged), examples, "unicode")
        assert move.rate == pytest.approx(rate)
    assert (found.utterances, found.tokens, found.metric) == (2, examples.num_tokens, "wer")
    assert (found.prior_args, found.rank, found.alpha) == ({"scale": 0.3}, 2, 5.0)


def test_a_wider_prior_moves_the_base_further(config):
    narrow, usual, wide = (
        predict_prior(config.with_options(prior_scale=scale), draws=4) for scale in (1e-3, 0.2, 1.0)
    )
    assert all(move.kl < 1e-6 and move.rate == narrow.base_rate for move in narrow.draws)
    assert max(move.kl for move in usual.draws) < min(move.kl for move in wide.draws)


def test_a_prior_that_asks_the_base_is_prepared(config):
    informed = {"prior": "base-informed", "prior_scale": None}
    found = predict_prior(config.with_options(**informed, prior_args={"languages": "de"}), draws=2)
    assert found.prior_args["languages"] == "de"
    assert all(move.kl > 0 for move in found.draws)


def test_the_table_shows_base_and_draws(config):
    found = predict_prior(config.with_options(max_utterances=1), draws=2)
    assert found.utterances == 1
    text = report_text(prediction_tables(found))
    assert "2 draws of prior normal (scale 0.3), rank 2, alpha 5, on 1 utterances" in text
    least, most = sorted(move.kl for move in found.draws)
    for name, kl in (("least", least), ("median", (least + most) / 2), ("most", most)):
        (line,) = [line for line in text.splitlines() if f"a draw, {name}" in line]
        assert f"{kl:.3g}" in line


def test_no_draws_are_refused(config):
    with pytest.raises(UserError, match="draws is 0"):
        predict_prior(config, draws=0)
