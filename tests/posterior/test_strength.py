from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from blora_pyro.errors import UserError
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.spectra import spectra
from blora_pyro.posterior.strength import at_strength, parse_strengths

from .conftest import adapted, logits

SNR = "signal-to-noise"


@pytest.fixture
def posterior(uneven_posterior) -> Posterior:
    return uneven_posterior


def directions(posterior) -> int:
    return sum(group.rank * len(group.modules) for group in posterior.groups)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, 1.5])
def test_the_update_is_scaled(posterior, strength):
    scaled = dict(at_strength(posterior, strength).delta_weights())
    for name, delta in posterior.delta_weights():
        torch.testing.assert_close(scaled[name], strength * delta)


@pytest.mark.parametrize("by", ["scale", SNR])
def test_strength_0_is_the_base_and_1_the_fit(posterior, net, batch, by):
    base = logits(net, batch)
    fit = adapted(posterior, net, batch)
    assert not torch.allclose(fit, base, atol=0.1)
    none, all_of_it = at_strength(posterior, 0, by), at_strength(posterior, 1, by)
    assert torch.equal(adapted(none, net, batch), base)
    (draw,) = none.draws(1)
    assert torch.equal(adapted(none, net, batch, draw), base)
    assert torch.equal(adapted(all_of_it, net, batch), fit)
    none.merge(net)
    assert torch.equal(logits(net, batch), base)


def test_draws_are_scaled_as_the_mean_is(posterior, net, batch):
    half = at_strength(posterior, 0.5)
    (draw,), (whole,) = half.draws(1, seed=3), posterior.draws(1, seed=3)
    name = posterior.groups[0].B.name
    assert not torch.equal(draw[name], posterior.mean[name])
    halved = {n: value * (0.5 if n[0] == "B" else 1) for n, value in whole.items()}
    expected = adapted(posterior, net, batch, halved)
    torch.testing.assert_close(adapted(half, net, batch, draw), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("strength", "by"), [(0.0, "scale"), (0.4, "scale"), (0.9, SNR)])
def test_the_exported_adapter_and_the_merged_net_have_the_strength(
    posterior, net, batch, tmp_path, strength, by
):
    weaker = at_strength(posterior, strength, by)
    expected = adapted(weaker, net, batch)
    weaker.save(tmp_path)
    torch.testing.assert_close(
        adapted(Posterior.load(tmp_path), net, batch), expected, atol=0, rtol=0
    )
    peft = PeftModel.from_pretrained(net, str(tmp_path))
    torch.testing.assert_close(logits(peft.eval(), batch), expected, atol=1e-4, rtol=0)
    net = peft.unload()
    weaker.merge(net)
    torch.testing.assert_close(logits(net, batch), expected, atol=1e-4, rtol=0)


def test_the_surest_directions_stay_the_fewest_that_hold_the_share(posterior):
    pairs = sorted(
        (
            (float(value / stddev), float(value) ** 2)
            for spectrum in spectra(posterior).values()
            for value, stddev in zip(
                spectrum.values.flatten(), spectrum.stddevs.flatten(), strict=True
            )
        ),
        reverse=True,
    )
    total = sum(square for _, square in pairs)
    strengths = (0.05, 0.2, 0.5, 0.9, 0.999, 1.0)
    counts = []
    for strength in strengths:
        part = at_strength(posterior, strength, SNR)
        counts.append(directions(part))
        if strength < 1:
            held = sum(square for _, square in pairs[: counts[-1] - 1])
            assert held < strength * total <= held + pairs[counts[-1] - 1][1] * (1 + 1e-4)
        norms = sum(float(delta.square().sum()) for _, delta in part.delta_weights())
        assert norms == pytest.approx(sum(s for _, s in pairs[: counts[-1]]), rel=1e-4)
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == len(pairs)  # and they do differ


def test_a_rotation_of_a_and_b_changes_no_strength(posterior, net, batch):
    """The prior can't tell A -> RᵀA, B -> BR from A and B, for equal spread and orthogonal R."""
    q, _ = torch.linalg.qr(torch.randn(5, 5))
    flat = {name: torch.full_like(value, 0.05) for name, value in posterior.stddev.items()}
    turned = {
        name: q.mT @ value if name[0] == "A" else value @ q
        for name, value in posterior.mean.items()
    }
    one = replace(posterior, stddev=flat)
    other = replace(one, mean=turned)
    sides = [dict(at_strength(side, 0.6, SNR).delta_weights()) for side in (one, other)]
    assert sides[0].keys() == sides[1].keys()
    for name, delta in sides[0].items():
        torch.testing.assert_close(delta, sides[1][name], atol=1e-4, rtol=1e-3)


def test_a_posterior_without_an_update_is_the_base_at_every_strength(posterior, net, batch):
    zero = {name: torch.zeros_like(value) for name, value in posterior.mean.items()}
    empty = at_strength(replace(posterior, mean=zero), 0.5, SNR)
    assert torch.equal(adapted(empty, net, batch), logits(net, batch))


@pytest.mark.parametrize(
    ("strength", "by", "words"),
    [
        (-0.1, "scale", "strength is -0.1; give a number from 0 .the base. to 2"),
        (float("nan"), "scale", "strength is nan"),
        (float("inf"), "scale", "strength is inf"),
        (2.1, "scale", "to 2, where 1 is the fit"),
        (1.1, SNR, "to 1, where"),
        (0.5, "magic", "strength_by is 'magic'; give scale or signal-to-noise"),
    ],
)
def test_strengths_out_of_range_are_refused(posterior, strength, by, words):
    with pytest.raises(UserError, match=words):
        at_strength(posterior, strength, by)


def test_a_point_has_no_signal_to_noise_but_may_be_scaled(posterior):
    point = replace(
        posterior, stddev={name: torch.zeros_like(v) for name, v in posterior.stddev.items()}
    )
    with pytest.raises(UserError, match="a point estimate without spread; give scale"):
        at_strength(point, 0.5, SNR)
    assert at_strength(point, 0.5).scaling == point.scaling / 2


@pytest.mark.parametrize(
    ("text", "strengths"),
    [
        ("1", (1.0,)),
        ("0.5", (0.5,)),
        ("0, 0.5,1", (0.0, 0.5, 1.0)),
        ("0.5,0.5", (0.5,)),
        ("0:1:0.25", (0.0, 0.25, 0.5, 0.75, 1.0)),
        ("0:0.3:0.1", (0.0, 0.1, 0.2, 0.3)),
        ("0:1:0.4", (0.0, 0.4, 0.8)),
        ("0.5:0.5:1", (0.5,)),
        ("0:1:0.01", tuple(round(i / 100, 2) for i in range(101))),
    ],
)
def test_strengths_are_read(text, strengths):
    assert parse_strengths(text) == strengths


@pytest.mark.parametrize(
    "text", ["", "half", "0,", "0:1", "0:1:0", "0:1:-1", "1:0:0.1", "nan", "0:1:0.001", "1:2:3:4"]
)
def test_text_without_strengths_is_refused(text):
    with pytest.raises(UserError, match=f"strength is '{text}'"):
        parse_strengths(text)
