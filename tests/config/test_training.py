import math

import pytest

from blora_pyro.config import FitConfig
from blora_pyro.config.training import COUNTS
from blora_pyro.errors import UserError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "step"}, "^schedule is 'step'; give one of cosine, linear, constant$"),
        ({"steps": 50, "warmup_steps": 51}, "^warmup_steps is 51; .* 0 to the steps .*, 50$"),
        ({"warmup_steps": -1}, "^warmup_steps is -1; give a whole number from 0"),
        ({"batch_size": 4, "gradient_accumulation": 5}, "^gradient_accumulation is 5, .* 4 "),
        ({"patience": 3}, "^patience is given, but no eval_every; give both$"),
        ({"dev": "de"}, "^dev is given, but no eval_every; give both$"),
        ({"distillation": -1.0}, "^distillation is -1.0; give a number >= 0$"),
        ({"distillation": 1.0, "backward": {"a": "de"}}, "name the languages in distillation_lang"),
        ({"ewc": math.nan}, "^ewc is nan; give a number >= 0$"),
        ({"ewc": 1.0, "backward": ()}, "^ewc is given, but no backward set"),
        ({"average_from": 1.0}, "^average_from is 1.0; give a share of the steps below 1$"),
        ({"average_from": 0.5, "eval_every": 5}, "^average_from and eval_every both choose"),
    ],
)
def test_what_the_loop_cannot_do_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        FitConfig(**options)


@pytest.mark.parametrize("bad", [0, -1, -0.5, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [*COUNTS, "alpha", "prior_scale", "lr", "epochs", "max_grad_norm"])
def test_what_must_be_positive_is_refused_by_name(name, bad):
    with pytest.raises(UserError, match=f"^{name} is {bad}"):
        FitConfig(**{name: bad})


@pytest.mark.parametrize("bad", [-1e-9, -1, math.nan, math.inf, "often", "1e-4"])
def test_a_bad_beta_is_refused_by_name(bad):
    with pytest.raises(UserError, match=f"^beta is '?{bad}.*'auto'"):
        FitConfig(beta=bad)


@pytest.mark.parametrize("name", [*COUNTS, "warmup_steps"])
def test_what_is_counted_must_be_whole(name):
    with pytest.raises(UserError, match=f"^{name} is 2.5"):
        FitConfig(**{name: 2.5})


@pytest.mark.parametrize("bad", [-1, 2**32])  # numpy takes no more than 32 bits
def test_a_seed_that_pyro_cannot_take_is_refused_by_name(bad):
    with pytest.raises(UserError, match=f"^seed is {bad}"):
        FitConfig(seed=bad)


@pytest.mark.parametrize("bad", ["fp16", "", "FP32", "bfloat16"])
def test_an_unknown_precision_is_refused_by_name(bad):
    with pytest.raises(UserError, match=f"^precision is '{bad}'.*fp32.*bf16"):
        FitConfig(precision=bad)
