import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from blora_pyro.posterior import Posterior
from blora_pyro.posterior.draws import traces

from .conftest import fitted


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    pyro.set_rng_seed(0)
    return fitted(scale=0.05)


# ---- traces


def test_traces_are_the_same_for_the_same_seed_and_independent_of_the_callers_state(posterior):
    first = [trace.nodes["A_4x4"]["value"] for trace in traces(posterior.guide, 3, seed=1)]
    torch.rand(5)
    again = [trace.nodes["A_4x4"]["value"] for trace in traces(posterior.guide, 3, seed=1)]
    other = [trace.nodes["A_4x4"]["value"] for trace in traces(posterior.guide, 3, seed=2)]
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])


def test_traces_taken_in_turn_are_those_taken_at_once(posterior):
    """The state is each iterator's own, and the caller may use its own meanwhile."""
    alone = [trace.nodes["A_4x4"]["value"] for trace in traces(posterior.guide, 3)]
    state = torch.get_rng_state()
    one, two = traces(posterior.guide, 3), traces(posterior.guide, 3)
    for value in alone:
        assert torch.equal(next(one).nodes["A_4x4"]["value"], value)
        assert torch.equal(torch.get_rng_state(), state)
        state = (torch.rand(1), torch.get_rng_state())[1]
        assert torch.equal(next(two).nodes["A_4x4"]["value"], value)


def untouched(action) -> None:
    """`action` leaves random state and parameter store of the caller as they were."""
    pyro.param("mine", torch.ones(2))
    state = torch.get_rng_state()
    action()
    assert torch.equal(torch.get_rng_state(), state)
    assert list(pyro.get_param_store()) == ["mine"]
    assert torch.equal(pyro.param("mine"), torch.ones(2))


@pytest.mark.parametrize(
    ("prior", "guide"), [("normal", None), ("horseshoe", None), ("normal", "auto-lowrank")]
)
def test_random_state_and_parameter_store_of_the_caller_are_left_alone(prior, guide):
    posterior = fitted(prior, guide)
    untouched(lambda: list(traces(posterior.guide, 2)))
    untouched(lambda: next(traces(posterior.guide, 2)))
    untouched(lambda: posterior.to_arviz(draws=2))


def test_any_pyro_program_can_be_traced():
    """`traces` asks for a Pyro program, and no more."""
    values = [
        t.nodes["z"]["value"].item() for t in traces(lambda: pyro.sample("z", dist.Normal(0, 1)), 3)
    ]
    assert len(set(values)) == 3


# ---- variance of the prior


@pytest.mark.parametrize(
    ("prior", "arguments", "variance"),
    [
        ("normal", {"scale": 0.03}, 0.03**2),
        ("a-only", {"scale": 0.03}, 0.03**2),
        ("laplace", {"scale": 0.03}, 2 * 0.03**2),
        ("student-t", {"scale": 0.03, "df": 5.0}, 0.03**2 * 5 / 3),
        (
            "scale-mixture",
            {"scale": 0.07, "spike_scale": 0.01, "slab": 0.3},
            0.3 * 0.07**2 + 0.7 * 0.01**2,
        ),
    ],
)
def test_the_variance_of_the_prior_is_that_of_its_family(prior, arguments, variance):
    for found in fitted(prior, **arguments).prior_variances().values():
        assert found.flatten().tolist() == pytest.approx([variance] * found.numel(), rel=1e-5)


def test_the_variance_of_pretrained_scale_is_each_layers_own():
    variances = fitted("pretrained-scale", scale=0.5).prior_variances()
    found = {name: value.mean((1, 2)) for name, value in variances.items()}
    assert found["B_4x4"].tolist() == pytest.approx([0.05**2, 0.1**2, 0.15**2])
    assert found["A_6x4"].tolist() == pytest.approx([0.2**2, 0.25**2])


def horseshoe_prior_variance(count=200_000, scale=0.05, global_scale=0.01):
    """E g² · scale² and its deviation over one draw of both scales, from Cauchy draws."""
    rng = np.random.default_rng(0)
    t2 = (global_scale * rng.standard_cauchy(count) * rng.standard_cauchy(count)) ** 2
    variances = scale**2 * t2 / (scale**2 + t2)
    return variances.mean(), variances.std()


@pytest.mark.parametrize("guide", ["horseshoe", "auto-normal"])
def test_the_variance_of_the_horseshoe_is_averaged_over_its_scales(guide):
    expected, deviation = horseshoe_prior_variance()
    assert 0.02 < expected / 0.05**2 < 0.5
    posterior = fitted("horseshoe", guide, scale=0.05, global_scale=0.01)
    for variances in posterior.prior_variances().values():
        assert (abs(variances - expected) < 4.5 * deviation / 64**0.5).all()
        assert len(set(variances.flatten().tolist())) == len(variances)  # lambda is the layer's own
