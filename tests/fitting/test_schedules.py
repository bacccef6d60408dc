import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blora_pyro.fitting.schedules import SCHEDULES, default_warmup_steps, learning_rate

quick = settings(deadline=None, max_examples=60)
fits = st.tuples(st.integers(1, 2000), st.floats(1e-6, 1e2))


@quick
@given(fits, st.sampled_from(SCHEDULES), st.one_of(st.none(), st.integers(0, 3000)))
def test_the_rate_warms_up_linearly_to_its_peak_and_never_rises_again(fit, schedule, warmup):
    steps, peak = fit
    warm_up = default_warmup_steps(steps) if warmup is None else warmup
    rates = [learning_rate(step, steps, peak, schedule, warmup) for step in range(steps)]
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates)
    for step, rate in enumerate(rates[:warm_up]):
        assert math.isclose(rate, peak * (step + 1) / warm_up)
    if warm_up < steps:
        assert math.isclose(rates[warm_up], peak)  # where the schedule begins
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(rates[warm_up:]))


@quick
@given(fits)
def test_the_cosine_ends_near_zero(fit):
    steps, peak = fit
    falling = steps - default_warmup_steps(steps)
    if falling > 1:
        last = learning_rate(steps - 1, steps, peak)
        assert last <= peak * (math.pi / (2 * falling)) ** 2
        assert learning_rate(steps, steps, peak) <= 1e-12 * peak


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("cosine", [0.5, 1, 1, 0.75, 0.25]),
        ("linear", [0.5, 1, 1, 2 / 3, 1 / 3]),
        ("constant", [0.5, 1, 1, 1, 1]),
    ],
)
def test_what_comes_after_the_warm_up(schedule, rates):
    found = [learning_rate(step, 5, 3.0, schedule, 2) for step in range(5)]
    assert found == pytest.approx([3 * rate for rate in rates])


def test_without_a_warm_up_the_first_rate_is_the_peak():
    assert all(learning_rate(0, 10, 0.3, schedule, 0) == 0.3 for schedule in SCHEDULES)


def test_a_tenth_of_the_steps_warms_up_unless_told():
    assert [default_warmup_steps(steps) for steps in (1, 4, 15, 400)] == [1, 1, 2, 40]
