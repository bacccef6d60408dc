import re

import pyro
import pytest
import torch

from blora_pyro.errors import UserError
from blora_pyro.guides import check_family, checks

FLAT = """
import pyro.distributions as dist
import torch
from torch import nn
from torch.nn.functional import softplus

from blora_pyro.guides import normal


class Prior:
    def __call__(self, site):
        return dist.Normal(0.0, 0.05).expand(site.shape).to_event(2)


class Guide(normal.Guide):
    pass
"""
ZERO_A = """
    def __init__(self, model):
        super().__init__(model)
        for mean in self.means.values():
            mean.data.zero_()
"""
MOVED_B = ZERO_A.replace("zero_()", "fill_(0.1)")
WIDE = """
    def stddev(self):
        return {name: 2 * value for name, value in super().stddev().items()}
"""
SHIFTED = """
    def mean(self):
        return {name: value + (value != 0) for name, value in super().mean().items()}
"""
HALF = """
    def mean(self):
        return {name: value[:1] for name, value in super().mean().items()}
"""
GRADIENT = """
    def mean(self):
        return dict(self.means.items())
"""
FORGETFUL = """
    def __init__(self, model):
        super().__init__(model)
        self.factors = torch.rand(2)

    def stddev(self):
        return {name: value * self.factors[0] for name, value in super().stddev().items()}

    def distribution(self, site):
        sigma = softplus(self.rhos[site.name]) * self.factors[0]
        return dist.Normal(self.means[site.name], sigma).to_event(2)
"""
WRONG_KL = """
    def distribution(self, site):
        return Skewed(self.means[site.name], softplus(self.rhos[site.name])).to_event(2)


class Skewed(dist.Normal):
    def log_prob(self, value):
        return super().log_prob(value) + 1.0
"""
FROZEN = """
    def distribution(self, site):
        sigma = softplus(self.rhos[site.name])
        return dist.Normal(self.means[site.name].detach(), sigma).to_event(2)
"""


@pytest.fixture
def failed(tmp_path):
    """Returns the failed checks of a file, by name."""

    def failed(code):
        path = tmp_path / "mine.py"
        path.write_text(code, encoding="utf-8")
        report = check_family(str(path))
        assert report.family == str(path)
        wrong = {one.name: one.message for one in report.checks if not one.passed}
        assert report.passed == (not wrong)
        assert not any("\n" in message for message in wrong.values())
        return wrong

    return failed


def test_a_users_family_that_is_right_passes(failed):
    assert failed(FLAT) == {}


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        (FLAT.replace(".to_event(2)", ""), "the prior has the sites' shapes", r"batch shape"),
        (FLAT.replace("0.05", "1e-30"), "finite densities", "not finite"),
        (FLAT.replace("dist.Normal(0.0", "dist.Nrmal(0.0"), "prior", r"line 12: AttributeError"),
        (
            FLAT.replace(
                "        return dist.Normal(0.0, 0.05)",
                "        pyro = __import__('pyro')\n"
                "        s = pyro.sample(site.name + '_s', dist.Gamma(2.0, 20.0))\n"
                "        return dist.Normal(0.0, s)",
            ),
            "sample the same sites",
            "_s",
        ),
        (FLAT + HALF, "have the sites' shapes", "mean"),
        (FLAT + GRADIENT, "have the sites' shapes", "detach"),
        (FLAT + ZERO_A, "the start is the base", "saddle"),
        (FLAT + MOVED_B, "the start is the base", "not 0 at the start"),
        (FLAT + WIDE, "draws have the moments", "stddev"),
        (FLAT + SHIFTED, "draws have the moments", "mean"),
        (FLAT + WRONG_KL, "Monte Carlo", "nats"),
        (FLAT + FORGETFUL, "state_dict", "stddev"),
        (FLAT + FROZEN, "small fit", "gradient"),
    ],
)
def test_what_is_wrong_with_a_family_fails_its_check(failed, code, name, message, monkeypatch):
    monkeypatch.setattr(checks, "DRAWS", 50)  # enough for what is so wrong
    found = [text for key, text in failed(code).items() if name in key]
    assert len(found) == 1
    assert re.search(message, found[0])


def test_an_unknown_family_is_refused():
    with pytest.raises(UserError, match="is none of normal"):
        check_family("no-such-family")


def test_checking_leaves_random_numbers_and_parameters_alone():
    mine, state = pyro.param("mine", torch.tensor(2.0)), torch.get_rng_state()
    check_family("normal", scale=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(pyro.get_param_store().keys()) == ["mine"] and pyro.param("mine") is mine
