import json

import pyro
import pytest
import torch
from rivals import (
    FULL,
    PEFT,
    TrainedWeights,
    fit_rival,
    full_net,
    peft_net,
    peft_posterior,
    plain_program,
    train_net,
)

from blora_pyro.fitting import fit_guide
from blora_pyro.fitting.objective import Objective
from blora_pyro.guides import build_guide, build_prior, with_prior_arguments
from blora_pyro.models import BLoRA, build_estimator
from blora_pyro.options import FitConfig
from blora_pyro.posterior import Posterior
from blora_pyro.runs.loading import load_examples


@pytest.fixture
def config(fit_options):
    return FitConfig(**{**fit_options, "steps": 6, "beta": 0.0, "guide": "point", "lr": 0.01})


@pytest.fixture
def train(fluent_base, fit_options):
    return load_examples(fluent_base, fit_options["data"], "train")


def resolved(config, train):
    return with_prior_arguments(config).resolved(train.num_tokens, len(train))


def test_without_latent_sites_the_loss_is_that_of_whisper_itself(fluent_base, train):
    batch = train.batch([0, 1])
    net = full_net(fluent_base)
    objective = Objective(
        plain_program(net), TrainedWeights(net), beta=0.0, estimator=build_estimator("shared")
    )
    with pyro.get_param_store().scope():
        loss, nll = objective.gradients(batch)
    logits = fluent_base.net(
        input_features=batch.input_features, decoder_input_ids=batch.decoder_input_ids
    ).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    assert loss == nll == pytest.approx(expected.item(), rel=1e-5)


def test_stock_peft_is_the_program_with_a_point_guide(fluent_base, train, config):
    config = resolved(config, train)
    net = peft_net(fluent_base, config)
    start = peft_posterior(fluent_base, config, net)
    history = train_net(net, train, config)
    fitted = peft_posterior(fluent_base, config, net)

    model = BLoRA(fluent_base.net, build_prior("normal"), config.rank, float(config.alpha))
    guide = build_guide("point", model)
    for name, value in start.mean.items():
        guide.means[name].data.copy_(value)
    ours = fit_guide(model, guide, train, config)

    losses = [step.loss for step in history]
    assert losses == pytest.approx([step.loss for step in ours], rel=1e-4)
    assert losses[-1] < losses[0]
    for name, value in guide.mean().items():
        assert not torch.equal(value, start.mean[name])
        assert torch.allclose(fitted.mean[name], value, atol=1e-4), name


def test_pefts_net_computes_what_its_posterior_does(fluent_base, train, config):
    config = resolved(config, train)
    net = peft_net(fluent_base, config)
    train_net(net, train, config)
    batch = train.batch([0, 1])
    inputs = {"input_features": batch.input_features, "decoder_input_ids": batch.decoder_input_ids}
    with torch.no_grad(), peft_posterior(fluent_base, config, net).applied(fluent_base.net):
        adapted, theirs = fluent_base.net(**inputs).logits, net(**inputs).logits
    assert torch.allclose(adapted, theirs, atol=1e-4)


def test_pefts_start_is_kaiming_uniform_and_zero(fluent_base, config):
    start = peft_posterior(fluent_base, config, peft_net(fluent_base, config))
    for name, value in start.mean.items():
        if name.startswith("B"):
            assert not value.any()
        else:
            bound = value.shape[-1] ** -0.5
            assert 0.9 * bound < value.abs().max() <= bound


def test_full_fine_tuning_trains_every_weight_but_the_sines(fluent_base):
    net = full_net(fluent_base)
    fixed = {name for name, one in net.named_parameters() if not one.requires_grad}
    assert fixed == {"model.encoder.embed_positions.weight"}


@pytest.mark.parametrize("kind", [FULL, PEFT])
def test_a_rival_learns_and_leaves_the_folder_of_a_fit(kind, tmp_path, config):
    fit_rival(kind, tmp_path, with_prior_arguments(config))
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["state"] == "finished"
    assert len(about["history"]) == 6
    assert about["history"][-1]["loss"] < about["history"][0]["loss"]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {"new_domain", "backward", "sparsity"} <= metrics.keys()
    rows = [json.loads(line) for line in (tmp_path / "utterances.jsonl").read_text().splitlines()]
    assert {row["state"] for row in rows} == {"base", "adapted"}


def test_pefts_folder_holds_a_posterior_that_is_a_point(config, tmp_path):
    fit_rival(PEFT, tmp_path, with_prior_arguments(config))
    posterior = Posterior.load(tmp_path)
    assert posterior.family.guide == "point"
    assert not any(value.any() for value in posterior.stddev.values())
