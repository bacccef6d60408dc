import pytest
import torch
from torch.nn import functional

from blora_pyro.adapters import Adapters, Group
from blora_pyro.low_rank import add_low_rank_update

SCALING = 1.7


def written_out(x, weight, bias, a, b):
    update = functional.linear(functional.linear(x, a.to(x.dtype)), b.to(x.dtype))
    return functional.linear(x, weight, bias) + SCALING * update


def fused(x, weight, bias, a, b):
    return add_low_rank_update(functional.linear(x, weight, bias), x, weight, a, b, SCALING)


@pytest.fixture
def tensors():
    """x (2, 3, 5), weight (4, 5), bias (4,), a (2, 5), b (4, 2), in double precision."""
    shapes = (2, 3, 5), (4, 5), (4,), (2, 5), (4, 2)
    x, weight, bias, a, b = (torch.randn(shape, dtype=torch.double) for shape in shapes)
    return x.requires_grad_(), weight, bias, a.requires_grad_(), b.requires_grad_()


def test_its_gradients_are_those_of_finite_differences(tensors):
    x, weight, bias, a, b = tensors
    assert torch.autograd.gradcheck(
        lambda *some: fused(some[0], weight, bias, *some[1:]), (x, a, b)
    )


@pytest.mark.parametrize("asked", [(0, 3, 4), (0,), (3,), (4,)])
def test_it_is_the_formula_whichever_gradients_are_asked_for(tensors, asked):
    tensors = [one.detach().requires_grad_(place in asked) for place, one in enumerate(tensors)]
    wanted = [tensors[place] for place in asked]
    check_gradients(fused(*tensors), written_out(*tensors), wanted)


@pytest.mark.parametrize("shape", [(5,), (6, 5), (2, 2, 3, 5)])
def test_inputs_of_any_shape(tensors, shape):
    x = torch.randn(shape, dtype=torch.double)
    torch.testing.assert_close(fused(x, *tensors[1:]), written_out(x, *tensors[1:]))


def test_an_input_that_is_not_contiguous(tensors):
    x = torch.randn(3, 2, 5, dtype=torch.double).transpose(0, 1)
    torch.testing.assert_close(fused(x, *tensors[1:]), written_out(x, *tensors[1:]))


def test_under_autocast_the_factors_gradients_are_in_their_own_dtype(tensors):
    x, weight, bias, a, b = (one.detach().float() for one in tensors)
    for one in (x, a, b):
        one.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = fused(x, weight, bias, a, b)
    expected = written_out(x, weight, bias, a, b)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    pull = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, (x, a, b), pull.bfloat16())
    for one, other in zip(gradients, torch.autograd.grad(expected, (x, a, b), pull), strict=True):
        assert one.dtype is torch.float32
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.1)


GROUP = Group(("0",), 4, 5, 2)


def factors(a, b):
    return {GROUP.A.name: a[None], GROUP.B.name: b[None]}


def layer_of(weight, bias):
    layer = torch.nn.Linear(5, 4, dtype=torch.double)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return torch.nn.Sequential(layer).requires_grad_(False)


def test_a_layer_with_two_updates_has_the_gradients_of_both(tensors):
    x, weight, bias, a, b = tensors
    net = layer_of(weight, bias)
    one, other = (Adapters(net, (GROUP,), alpha=2 * SCALING) for _ in range(2))
    more = [torch.randn_like(part).requires_grad_() for part in (a, b)]
    with one.using(factors(a, b)), other.using(factors(*more)):
        found = net(x)
    expected = written_out(x, weight, bias, a, b) + written_out(x, weight, None, *more)
    expected = expected - functional.linear(x, weight)
    check_gradients(found, expected, (x, a, b, *more))


def test_a_layer_whose_output_a_hook_changes_keeps_the_hooks_gradient(tensors):
    x, weight, bias, a, b = tensors
    net, gain = layer_of(weight, bias), torch.tensor(3.0, dtype=torch.double, requires_grad=True)
    net[0].register_forward_hook(lambda _, inputs, output: gain * output)
    with Adapters(net, (GROUP,), alpha=2 * SCALING).using(factors(a, b)):
        found = net(x)
    expected = (gain - 1) * functional.linear(x, weight, bias) + written_out(x, weight, bias, a, b)
    check_gradients(found, expected, (x, a, b, gain))


def test_a_layer_that_is_not_frozen_keeps_its_gradient(tensors):
    x, weight, bias, a, b = tensors
    net = layer_of(weight, bias).requires_grad_(True)
    with Adapters(net, (GROUP,), alpha=2 * SCALING).using(factors(a, b)):
        found = net(x)
    expected = written_out(x, net[0].weight, net[0].bias, a, b)
    check_gradients(found, expected, (x, a, b, net[0].weight, net[0].bias))


def check_gradients(found, expected, inputs):
    torch.testing.assert_close(found, expected)
    pull = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, inputs, pull),
        torch.autograd.grad(expected, inputs, pull),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
