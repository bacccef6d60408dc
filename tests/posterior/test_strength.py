import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file

from blora_pyro.errors import UserError
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.pruning import prune
from blora_pyro.posterior.spectra import spectra
from blora_pyro.posterior.storage import POSTERIOR_FILE
from blora_pyro.posterior.strength import RIDGE, Directions, at_strength, parse_strengths

from .conftest import adapted, fitted, logits

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


@pytest.mark.parametrize("by", ["scale", SNR, "base"])
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
        (1.1, "base", "to 1, where"),
        (0.5, "base", "strength_by is base, which asks the base .*; give scale, or what keep"),
        (0.5, "magic", "strength_by is 'magic'; give scale, signal-to-noise or base"),
    ],
)
def test_strengths_out_of_range_are_refused(posterior, strength, by, words):
    with pytest.raises(UserError, match=words):
        at_strength(posterior, strength, by)


# ---- by what the base hears


def moment(n, seed, rank=None):
    """Second moment of inputs of `n` features that span `rank` directions."""
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(40, rank or n, generator=draws) @ torch.randn(rank or n, n, generator=draws)
    return x.mT @ x / 40


def dense(new, old, strength):
    """C_new (C_new + kappa C_old)^-1 with the ridge on both."""
    ridge = RIDGE * new.diagonal().mean() * torch.eye(len(new))
    new, old, kappa = (new + ridge).double(), (old + ridge).double(), (1 - strength) / strength
    return (new @ torch.linalg.inv(new + kappa * old)).float()


def heard(posterior):
    """Moments of all layers, new and old, and their directions."""
    sizes = {name: group.in_features for group in posterior.groups for name in group.modules}
    moments = {
        name: (moment(size, 2 * i), moment(size, 2 * i + 1))
        for i, (name, size) in enumerate(sizes.items())
    }
    return moments, {name: Directions.of(*both) for name, both in moments.items()}


@pytest.mark.parametrize("strength", [0.01, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("rank", [None, 3])
def test_one_decomposition_gives_the_dense_formula_at_every_strength(strength, rank):
    a, new, old = torch.randn(2, 7), moment(7, 1, rank), moment(7, 2, rank)
    found = Directions.of(new, old).weaken(a, strength)
    torch.testing.assert_close(found, a @ dense(new, old, strength), rtol=1e-3, atol=1e-3)


def test_what_both_hear_is_scaled_and_what_one_hears_stays_or_goes():
    a, both = torch.randn(2, 6), moment(6, 1)
    torch.testing.assert_close(Directions.of(both, both).weaken(a, 0.3), 0.3 * a)
    new, old = torch.diag(torch.tensor([1.0, 1, 0, 0])), torch.diag(torch.tensor([1.0, 0, 1, 0]))
    shares = Directions.of(new, old).weaken(torch.ones(1, 4), 0.5)[0]
    torch.testing.assert_close(shares, torch.tensor([0.5, 1.0, 0.0, 0.5]), rtol=0, atol=2e-3)
    silent = Directions.of(torch.zeros(3, 3), torch.zeros(3, 3)).weaken(torch.ones(1, 3), 0.5)
    torch.testing.assert_close(silent, torch.full((1, 3), 0.5))


def test_by_base_a_changes_and_its_variances_follow(posterior):
    moments, directions = heard(posterior)
    weaker = at_strength(posterior, 0.4, "base", directions)
    for group in posterior.groups:
        assert torch.equal(weaker.mean[group.B.name], posterior.mean[group.B.name])
        for i, name in enumerate(group.modules):
            m = dense(*moments[name], 0.4)
            a, spread = (part[group.A.name][i] for part in (posterior.mean, posterior.stddev))
            found, deviations = (part[group.A.name][i] for part in (weaker.mean, weaker.stddev))
            torch.testing.assert_close(found, a @ m, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(deviations**2, spread**2 @ m**2, rtol=1e-2, atol=1e-5)
    (draw,) = weaker.draws(1)
    assert draw.keys() == weaker.mean.keys()
    point = replace(
        posterior, stddev={name: torch.zeros_like(v) for name, v in posterior.stddev.items()}
    )
    assert not any(v.any() for v in at_strength(point, 0.4, "base", directions).stddev.values())


def test_where_rows_depend_on_one_another_so_do_their_variances():
    own = fitted("base-informed")
    _, directions = heard(own)
    weaker, group = at_strength(own, 0.4, "base", directions), own.groups[0]
    draws = torch.stack([draw[group.A.name] for draw in own.draws(2000)])
    for i, name in enumerate(group.modules):
        spread = torch.stack([directions[name].weaken(a, 0.4) for a in draws[:, i]]).std(0)
        torch.testing.assert_close(weaker.stddev[group.A.name][i], spread, rtol=0.15, atol=0)


def test_the_fit_is_kept_beside_its_weaker_factors(net, batch, posterior, tmp_path):
    _, directions = heard(posterior)
    weaker = at_strength(posterior, 0.4, "base", directions)
    weaker.save(tmp_path)
    stored = Posterior.load(tmp_path)
    for one in (weaker, stored):
        assert one.strength == 0.4
        assert at_strength(one, None) is one
        assert at_strength(one, 1).fingerprint == posterior.fingerprint != one.fingerprint
        again = at_strength(one, 0.4, "base", directions)  # and no less of it
        assert again.fingerprint == weaker.fingerprint == one.fingerprint
        assert at_strength(one, 0.5).fingerprint == at_strength(posterior, 0.5).fingerprint
        assert prune(one, sparsity=0.1).strength == prune(one, rank=2).strength == 1
    expected = adapted(weaker, net, batch)
    peft = PeftModel.from_pretrained(net, str(tmp_path))
    torch.testing.assert_close(logits(peft.eval(), batch), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change", ["weaker", "strength"])
def test_a_weaker_factor_that_cannot_be_is_refused_as_it_is_read(posterior, tmp_path, change):
    _, directions = heard(posterior)
    at_strength(posterior, 0.4, "base", directions).save(tmp_path)
    file = tmp_path / POSTERIOR_FILE
    with safe_open(file, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        about = json.loads(stored.metadata()["blora_pyro"])
    if change == "weaker":
        tensors.pop(next(name for name in tensors if name.startswith("weaker.")))
    else:
        about["strength_by_base"] = 1.5
    save_file(tensors, file, metadata={"blora_pyro": json.dumps(about)})
    with pytest.raises(UserError, match="is damaged or of another version"):
        Posterior.load(tmp_path)


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
