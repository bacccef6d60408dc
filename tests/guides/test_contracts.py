import pytest
import torch

from blora_pyro import FitConfig, Posterior, fit
from blora_pyro.errors import Interrupted, UserError
from blora_pyro.families import FAMILIES
from blora_pyro.guides import build_guide, build_prior
from blora_pyro.guides.contracts import PreparedPrior, TensorPrior, prior_scale, shrinkage_of
from blora_pyro.models import BLoRA
from blora_pyro.posterior.pruning import prune
from blora_pyro.runs.listeners import Listener

from ..conftest import inform

PREPARED = """
import pyro.distributions as dist
import torch

from blora_pyro.guides.normal import Guide


class Prior:
    tensors = {}

    def prepare(self, base, batches):
        sizes = torch.tensor([len(batch.decoder_input_ids) for batch in batches])
        noise = torch.rand(())
        return {"width": 0.05 + 0.01 * noise, "sizes": sizes, "bias": base.model.encoder.conv1.bias}

    def __call__(self, site):
        return dist.Normal(0.0, self.tensors["width"]).expand(site.shape).to_event(2)
"""


@pytest.fixture
def prepared(tmp_path):
    path = tmp_path / "prepared.py"
    path.write_text(PREPARED, encoding="utf-8")
    return str(path)


@pytest.fixture
def options(fit_options):
    return {**fit_options, "steps": 4}


class Kill(Listener):
    def step(self, step):
        if step.step == 2:
            raise Interrupted(2)


def test_what_a_prior_prepares_is_stored_with_the_posterior(prepared, options, tmp_path):
    run = fit(FitConfig(prior=prepared, **options), tmp_path / "run", evaluate=False)
    tensors = run.posterior.prior_tensors
    assert tensors["sizes"].tolist() == [2]  # all training data once, in batches of two
    loaded = Posterior.load(tmp_path / "run", prior=prepared)
    assert loaded.prior_tensors.keys() == {"width", "sizes", "bias"}
    site = loaded.groups[0].A
    assert loaded.prior.prior(site).stddev.flatten()[0] == tensors["width"]
    assert loaded.prior_variances()[site.name].flatten()[0] == tensors["width"] ** 2


def test_a_resumed_fit_prepares_the_same_bits(prepared, options, tmp_path):
    config = FitConfig(prior=prepared, **options)
    straight = fit(config, tmp_path / "straight", evaluate=False)
    with pytest.raises(Interrupted):
        fit(config, tmp_path / "run", progress=Kill(), checkpoint_every=1, evaluate=False)
    resumed = fit(FitConfig(prior=prepared), tmp_path / "run", resume=True, evaluate=False)
    assert resumed.history == straight.history
    for name, tensor in straight.posterior.prior_tensors.items():
        assert torch.equal(resumed.posterior.prior_tensors[name], tensor)


def test_a_pruned_posterior_has_lost_what_its_prior_prepared(prepared, options, tmp_path):
    run = fit(FitConfig(prior=prepared, **options), tmp_path / "run", evaluate=False)
    with pytest.raises(UserError, match="turned away from its prior"):
        _ = prune(run.posterior, rank=2).prior


def test_what_prepare_does_wrong_is_told_in_one_line(prepared, options, tmp_path):
    path = tmp_path / "wrong.py"
    for old, new, reason in (
        ("torch.rand(())", "1 / 0", "line 13: ZeroDivisionError"),
        ("return {", "return 3; {", "give a dict of tensors"),
    ):
        path.write_text(PREPARED.replace(old, new), encoding="utf-8")
        with pytest.raises(UserError, match=rf"wrong.py.*prepare.*{reason}"):
            fit(FitConfig(prior=str(path), **options))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_built_in_prior_has_a_width_and_one_prepares_itself(name):
    prior = build_prior(name)
    assert prior_scale(prior) == prior.scale > 0
    assert isinstance(prior, TensorPrior | PreparedPrior) == (name == "base-informed")


def test_only_the_horseshoe_switches_ranks_off(net):
    for name in FAMILIES:
        model = BLoRA(net, build_prior(name), rank=2, target_modules="fc1")
        inform(model.prior, model.groups)
        guide = build_guide(name, model)
        assert bool(shrinkage_of(guide)) == (name == "horseshoe")


def test_a_guide_of_scales_needs_a_prior_with_a_width(net):
    class Wide:
        def __call__(self, site):
            return build_prior("normal")(site)

    model = BLoRA(net, Wide(), rank=2)
    for guide in ("horseshoe", "learned-scale"):
        with pytest.raises(UserError, match="no attribute scale"):
            build_guide(guide, model)
