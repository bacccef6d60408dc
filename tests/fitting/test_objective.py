import copy
import gc
import math
import weakref

import pyro
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO

from blora_pyro.data import Batch
from blora_pyro.families import FAMILIES, GUIDES
from blora_pyro.fitting.checkpoints import RandomState
from blora_pyro.fitting.objective import Objective
from blora_pyro.guides import build_guide, build_prior
from blora_pyro.models import ESTIMATORS, BLoRA, build_estimator
from blora_pyro.models.estimators import Flipout

from ..conftest import inform

pytestmark = pytest.mark.filterwarnings("ignore:Encountered NaN")
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def start(net, batch, name="normal", estimator="shared", accumulation=1, beta=1e-3, **options):
    """An objective of a guide that has left the saddle B = 0."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    prior = build_prior(name if name in FAMILIES else "normal")
    model = BLoRA(net, prior, rank=4, alpha=8.0, **options)
    inform(prior, model.groups)
    guide = build_guide(name, model)
    guide(batch)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    kind = build_estimator(estimator)
    return Objective(model, guide, beta=beta, estimator=kind, accumulation=accumulation)


def gradients(objective, batch, seed=2, **options):
    """Loss, NLL and the gradient by name, always of the same draw."""
    pyro.set_rng_seed(seed)
    values = objective.gradients(batch, **options)
    objective.model.adapters.clear()  # another model may sit on the same net
    parameters = objective.guide.named_parameters()
    return *values, {name: parameter.grad.clone() for name, parameter in parameters}


def cosine(one, other):
    one, other = (torch.cat([value.flatten() for value in each.values()]) for each in (one, other))
    return torch.cosine_similarity(one, other, dim=0).item()


def assert_same(found, expected, tolerance=1e-3):
    """Of each parameter's gradient the difference is this small, relative to its norm."""
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert math.isclose(one, other, rel_tol=1e-5)
    assert found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        assert gradient.norm() > 0
        assert (found[2][name] - gradient).norm() < tolerance * gradient.norm(), name


# ---- the ELBO


@pytest.mark.parametrize("beta", [1e-3, 0.0])
@pytest.mark.parametrize("name", sorted({*FAMILIES, *GUIDES}))
def test_the_loss_is_that_of_pyros_own_elbo_to_the_bit(net, batch, name, beta):
    objective = start(net, batch, name, beta=beta)
    pyro.set_rng_seed(2)
    loss, _ = objective.gradients(batch)
    found = {name: one.grad for name, one in objective.guide.named_parameters()}
    objective.guide.zero_grad()
    pyro.set_rng_seed(2)
    programs = objective.temper(objective.model), objective.temper(objective.guide)
    expected = TraceMeanField_ELBO().differentiable_loss(*programs, batch)
    expected.backward()
    assert loss == expected.item()
    for name, parameter in objective.guide.named_parameters():
        if parameter.grad is None:  # of a scale, where there is no KL
            assert found[name] is None
        else:
            assert torch.equal(found[name], parameter.grad)


def test_the_observed_terms_of_a_loss_are_recorded_as_the_elbo_weighs_them(net, batch):
    objective = start(net, batch, beta=0.0, penalty=lambda factors: torch.tensor(0.25))
    loss, nll = objective.gradients(batch)
    assert objective.regularizer == 0.25
    assert loss == pytest.approx(nll + 0.25, rel=1e-6)


# ---- gradient accumulation


@pytest.mark.parametrize("guide", GUIDES)
def test_accumulation_gives_the_gradient_of_the_batch(net, batch, guide):
    whole = gradients(start(net, batch, guide), batch)
    parts = start(net, batch, guide, accumulation=2)  # of two utterances and of one
    assert_same(gradients(parts, batch), whole)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("guide", ["normal", "horseshoe"])
def test_so_it_does_where_every_utterance_has_the_same_noise_in_the_layers(
    net, batch, guide, estimator, monkeypatch
):
    def signs(self, x):
        return 1.0 - 2.0 * (torch.arange(x.shape[-1]) % 2)

    monkeypatch.setattr(Flipout, "_signs", signs)
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    whole = gradients(start(net, batch, guide, estimator), batch)
    assert_same(gradients(start(net, batch, guide, estimator, accumulation=3), batch), whole)


def test_without_a_kl_too(net, batch):
    whole, parts = (start(net, batch, accumulation=count, beta=0.0) for count in (1, 2))
    assert_same(gradients(parts, batch), gradients(whole, batch))


def test_utterances_of_different_micro_batches_have_different_signs(net, batch, monkeypatch):
    drawn, draw = [], Flipout._signs

    def signs(self, x):
        drawn.append(draw(self, x))
        return drawn[-1]

    monkeypatch.setattr(Flipout, "_signs", signs)
    start(net, batch, "normal", "flipout", accumulation=3).gradients(batch)
    each = len(drawn) // 3
    first, second, third = (
        torch.cat([one.flatten() for one in drawn[part * each : (part + 1) * each]])
        for part in range(3)
    )
    assert len(first) == len(second) == len(third)
    assert not torch.equal(first, second) and not torch.equal(second, third)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_activations_of_one_micro_batch_are_gone_before_those_of_the_next(net, batch, estimator):
    seen, living = [], []

    def look(module, inputs, output):
        living.append(sum(one() is not None for one in seen))
        seen.append(weakref.ref(output))

    objective = start(net, batch, "normal", estimator, accumulation=3)
    objective.gradients(batch)  # whatever is made once
    net.model.decoder.layers[0].fc1.register_forward_hook(look)
    gc.disable()  # a GPU's memory does not wait for it
    try:
        objective.gradients(batch)
    finally:
        gc.enable()
    assert living == [0, 0, 0]


def test_a_micro_batch_without_a_finite_loss_is_told_as_the_batchs(net, batch):
    batch.input_features[1] = math.nan
    loss, _ = start(net, batch, accumulation=3).gradients(batch)
    assert not math.isfinite(loss)


# ---- clipping


def test_gradients_are_clipped_to_a_norm_of_them_all(net, batch):
    *values, free = gradients(start(net, batch), batch)
    norm = torch.stack([one.norm() for one in free.values()]).norm().item()
    *same, clipped = gradients(start(net, batch), batch, max_norm=norm / 10)
    assert same == values
    for name, gradient in free.items():
        torch.testing.assert_close(clipped[name], gradient / 10, rtol=1e-4, atol=1e-9)
    *_, loose = gradients(start(net, batch), batch, max_norm=norm * 2)
    assert all(torch.equal(loose[name], gradient) for name, gradient in free.items())


# ---- a base in half precision


@HALF
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_half_precision_base_has_nearly_the_gradient_of_float32(net, batch, dtype, estimator):
    half = copy.deepcopy(net).to(dtype)
    exact = gradients(start(half.float(), batch, "normal", estimator, beta=0.0), batch)
    objective = start(half.to(dtype), batch, "normal", estimator, beta=0.0)
    rough = gradients(objective, batch)
    assert objective.model.net.dtype is dtype
    assert math.isclose(rough[0], exact[0], rel_tol=0.02)
    assert rough[0] != exact[0]  # it did compute in half precision
    if estimator in ("shared", "local"):  # signs in half precision are other random numbers
        assert cosine(rough[2], exact[2]) > (0.98 if dtype is torch.bfloat16 else 0.999)
    assert all(one.dtype is torch.float32 for one in rough[2].values())


@HALF
def test_draws_logits_and_kl_are_in_float32(net, batch, dtype):
    exact = start(net, batch, beta=1.0)
    loss, nll, _ = gradients(exact, batch)
    objective = start(net.to(dtype), batch, beta=1.0)
    half_loss, half_nll, _ = gradients(objective, batch)
    assert math.isclose(half_loss - half_nll, loss - nll, rel_tol=1e-6)
    pyro.set_rng_seed(2)
    trace = pyro.poutine.trace(objective.model).get_trace(batch)
    assert trace.nodes["_RETURN"]["value"].dtype is torch.float32
    for site in objective.model.sites:
        assert trace.nodes[site.name]["value"].dtype is torch.float32


@pytest.fixture
def faint(net):
    """Activations whose gradients float16 has no numbers for: a tiny output layer."""
    with torch.no_grad():
        net.proj_out.weight.mul_(3e-5)
    return net.half()


def test_the_loss_is_scaled_lest_small_gradients_vanish(faint, batch):
    exact = gradients(start(copy.deepcopy(faint).float(), batch, beta=0.0), batch)
    objective = start(faint, batch, beta=0.0)
    assert objective.scale == 2**16
    scaled = gradients(objective, batch)
    objective.scale = 1.0
    plain = gradients(objective, batch)
    assert cosine(scaled[2], exact[2]) > 0.995
    assert cosine(plain[2], exact[2]) < 0.9
    norms = [
        torch.stack([one.norm() for one in each[2].values()]).norm() for each in (scaled, exact)
    ]
    assert math.isclose(*norms, rel_tol=0.02)


def test_other_bases_need_no_scale(net, batch):
    assert start(net, batch).scale == 1
    assert start(net.bfloat16(), batch).scale == 1


def test_a_scale_that_overflows_is_halved_and_the_same_draw_taken_again(net, batch):
    objective = start(net.half(), batch)
    objective.scale = 1.0
    expected = gradients(objective, batch)
    state = RandomState.now(torch.device("cpu"))
    objective.scale, objective.steps_at_scale = 2.0**30, 7
    found = gradients(objective, batch)
    assert 1 < objective.scale < 2**26
    assert objective.steps_at_scale == 0
    assert found[:2] == expected[:2]
    assert cosine(found[2], expected[2]) > 0.999
    now = RandomState.now(torch.device("cpu"))
    assert torch.equal(now.tensors["random.cpu"], state.tensors["random.cpu"])


def test_a_scale_grows_after_many_steps_without_an_overflow(net, batch, monkeypatch):
    monkeypatch.setattr(Objective, "GROWTH_STEPS", 2)
    monkeypatch.setattr(Objective, "LARGEST_SCALE", 8.0)
    objective = start(net.half(), batch)
    objective.scale, scales = 2.0, []
    for _ in range(6):
        objective.gradients(batch)
        scales.append(objective.scale)
    assert scales == [2, 4, 4, 8, 8, 8]


def test_what_no_scale_makes_finite_leaves_the_scale_alone(net, batch):
    objective = start(net.half(), batch)
    hook = next(objective.guide.parameters()).register_hook(lambda grad: grad * math.inf)
    value, nll = objective.gradients(batch)
    assert not math.isfinite(value) and math.isfinite(nll)
    assert objective.scale == 2**16
    hook.remove()
    bad = Batch(batch.input_features * math.nan, batch.decoder_input_ids, batch.labels)
    assert math.isnan(objective.gradients(bad)[0])
    assert (objective.scale, objective.steps_at_scale) == (2**16, 0)
