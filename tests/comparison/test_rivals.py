import json
import signal
import threading

import pyro
import pytest
import torch

from blora_pyro.comparison.methods import FULL, PEFT
from blora_pyro.comparison.rivals import (
    Weights,
    fit_rival,
    full_net,
    peft_net,
    peft_posterior,
    plain_program,
    train_net,
)
from blora_pyro.errors import Interrupted, UserError
from blora_pyro.fitting import fit_guide
from blora_pyro.fitting.objective import Objective
from blora_pyro.guides import build_guide, build_prior, with_prior_arguments
from blora_pyro.models import BLoRA, build_estimator
from blora_pyro.options import FitConfig, FittingOptions
from blora_pyro.posterior import Posterior
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.loading import load_examples


@pytest.fixture
def config(fit_options):
    return FitConfig(**{**fit_options, "steps": 6, "beta": 0.0, "guide": "point", "lr": 0.01})


@pytest.fixture
def train(fluent_base, fit_options):
    return load_examples(fluent_base, fit_options["data"], "train")


def resolved(config, train):
    return with_prior_arguments(config).resolved(train.num_tokens, len(train))


def weights_of(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_without_latent_sites_the_loss_is_that_of_whisper_itself(fluent_base, train):
    batch = train.batch([0, 1])
    net = full_net(fluent_base)
    objective = Objective(
        plain_program(net), Weights(net), beta=0.0, estimator=build_estimator("shared")
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
    names = "lr", "steps", "batch_size", "warmup_steps", "seed"
    given = {name: getattr(config, name) for name in names}
    ours = fit_guide(model, guide, train, FittingOptions(beta=0.0, **given))

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


@pytest.mark.parametrize("kind", [FULL, PEFT])
def test_a_rival_learns_and_leaves_its_base_alone(kind, fluent_base, config, tmp_path):
    before = weights_of(fluent_base.net)
    grads = [one.requires_grad for one in fluent_base.net.parameters()]
    history = fit_rival(
        kind, tmp_path / "fit", with_prior_arguments(config), fluent_base, Listener()
    )
    assert [step.step for step in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1].loss < history[0].loss
    assert same(weights_of(fluent_base.net), before)
    assert [one.requires_grad for one in fluent_base.net.parameters()] == grads


def test_full_fine_tuning_trains_every_weight_but_the_sines(fluent_base):
    net = full_net(fluent_base)
    fixed = {name for name, one in net.named_parameters() if not one.requires_grad}
    assert fixed == {"model.encoder.embed_positions.weight"}


def test_pefts_folder_holds_a_posterior_that_is_a_point(fluent_base, config, tmp_path):
    fit_rival(PEFT, tmp_path, with_prior_arguments(config), fluent_base, Listener())
    posterior = Posterior.load(tmp_path)
    assert posterior.family.guide == "point"
    assert not any(value.any() for value in posterior.stddev.values())
    draw = next(iter(posterior.draws(1)))
    assert all(torch.equal(draw[name], value) for name, value in posterior.mean.items())


def test_a_finished_rival_is_read(fluent_base, config, tmp_path):
    first = fit_rival(FULL, tmp_path, with_prior_arguments(config), fluent_base, Listener())
    file = tmp_path / "net.safetensors"
    changed = file.stat().st_mtime_ns
    assert fit_rival(FULL, tmp_path, with_prior_arguments(config), fluent_base, Listener()) == first
    assert file.stat().st_mtime_ns == changed
    assert {path.name for path in tmp_path.iterdir()} == {"net.safetensors", "run.json"}


def test_a_rival_that_is_stopped_goes_on_to_the_same_end(fluent_base, config, tmp_path):
    config = with_prior_arguments(config)

    class Stop(Listener):
        def step(self, step):
            if step.step == 3:
                signal.raise_signal(signal.SIGINT)

    assert threading.current_thread() is threading.main_thread()
    whole = fit_rival(FULL, tmp_path / "whole", config, fluent_base, Listener())
    with pytest.raises(Interrupted):
        fit_rival(FULL, tmp_path / "part", config, fluent_base, Stop())
    assert json.loads((tmp_path / "part" / "run.json").read_text())["state"] == "fitting"
    assert fit_rival(FULL, tmp_path / "part", config, fluent_base, Listener()) == whole
    files = [(tmp_path / name / "net.safetensors").read_bytes() for name in ("whole", "part")]
    assert files[0] == files[1]


def test_a_folder_that_cant_be_written_is_told_in_one_line(fluent_base, config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        fit_rival(FULL, tmp_path / "file" / "fit", config, fluent_base, Listener())
