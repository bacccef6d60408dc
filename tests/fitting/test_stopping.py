import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blora_pyro.errors import UserError
from blora_pyro.fitting.history import DevError
from blora_pyro.fitting.stopping import Average, EarlyStopping

quick = settings(deadline=None, max_examples=100)
some_errors = st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4]), min_size=1, max_size=12)


class Number(nn.Module):
    """A guide of one number."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(0.0))

    def set(self, value):
        self.value.data.fill_(value)


def measured(errors, patience=None, **options):
    """What has seen these errors, after steps 1, 2, ..., until it stops; and the guide."""
    rest, guide = iter(errors), Number()
    stopping = EarlyStopping(lambda: next(rest), 1, patience, **options)
    for step in range(1, len(errors) + 1):
        if not stopping.stops:
            guide.set(step)
            stopping.check(step, guide)
    return stopping, guide


@quick
@given(some_errors, st.integers(1, 4))
def test_it_stops_after_so_many_errors_that_are_no_better(errors, patience):
    stopping, _ = measured(errors, patience)
    seen = [one.error for one in stopping.errors]
    assert seen == errors[: len(seen)]
    for end in range(1, len(seen) + 1):
        since = end - 1 - seen.index(min(seen[:end]))
        assert (since >= patience) == (stopping.stops and end == len(seen))
    assert stopping.stops or len(seen) == len(errors)


@quick
@given(some_errors)
def test_the_first_of_the_lowest_errors_is_restored(errors):
    stopping, guide = measured(errors)
    assert not stopping.stops  # without patience it never does
    stopping.restore(guide)
    best = errors.index(min(errors)) + 1
    assert stopping.best == DevError(best, min(errors))
    assert guide.value.item() == best
    assert stopping.to_json()["best_step"] == best


def test_with_a_contract_the_error_that_is_expected_within_it_counts():
    errors, within = [0.7, 0.57, 0.3, 0.2], iter([0.7, 0.57, 0.8, 0.83])
    stopping, guide = measured(errors, forgetting=lambda error: [error / 2, next(within)])
    assert [(one.forgetting, one.within_contract) for one in stopping.errors][:2] == [
        (0.35, 0.7),
        (0.285, 0.57),
    ]
    assert stopping.best.step == 2
    stopping.restore(guide)
    assert guide.value.item() == 2


@quick
@given(some_errors, some_errors, st.integers(1, 3))
def test_it_goes_on_from_its_state(errors, rest, patience):
    stopping, guide = measured(errors, patience)
    best, history = stopping.state()
    other = EarlyStopping(lambda: 0.0, 1, patience)
    other.load_state(best, json.loads(json.dumps(history)))
    assert other.errors == stopping.errors
    assert other.stops == stopping.stops
    guide.set(-1)
    other.restore(guide)
    assert guide.value.item() == stopping.best.step


def test_what_is_kept_is_a_copy():
    stopping, guide = measured([0.3])
    guide.set(7)
    stopping.restore(guide)
    assert guide.value.item() == 1


def test_it_is_due_every_so_often_and_at_the_end_but_once():
    guide, due = Number(), []
    stopping = EarlyStopping(lambda: 0.5, every=4)
    for step in (0, *range(1, 11), 10):
        if stopping.due(step, steps=10):
            due.append(step)
            stopping.check(step, guide)
    assert due == [4, 8, 10]


def test_every_error_is_told_with_the_best():
    told = []
    measured([0.3, 0.2, 0.2], on_error=lambda *pair: told.append(pair))
    first, second, third = (DevError(step, error) for step, error in ((1, 0.3), (2, 0.2), (3, 0.2)))
    assert told == [(first, first), (second, second), (third, second)]


def test_json_tells_why_the_fit_ended():
    assert measured([0.3, 0.2, 0.2], 1)[0].to_json() == {
        "errors": [
            {"step": 1, "error": 0.3},
            {"step": 2, "error": 0.2},
            {"step": 3, "error": 0.2},
        ],
        "best_step": 2,
        "ended_by": "patience",
    }
    assert measured([0.3, 0.2], 1)[0].to_json()["ended_by"] == "steps"


def test_a_dev_set_without_words_is_refused():
    with pytest.raises(UserError, match="no words"):
        measured([math.nan])


def test_nothing_measured_restores_nothing():
    guide = Number()
    guide.set(3)
    EarlyStopping(lambda: 0.0, 1).restore(guide)
    assert guide.value.item() == 3


# ---- the average of the last steps


def walk(average, values, start=1):
    guide = nn.Linear(1, 1, bias=False)
    for step, value in enumerate(values, start):
        nn.init.constant_(guide.weight, value)
        average.update(step, guide)
    return guide


def test_the_average_is_that_of_the_steps_after_the_start():
    average = Average(2)
    guide = walk(average, [100.0, 100.0, 1.0, 2.0, 6.0])
    average.restore(guide)
    assert average.count == 3
    assert guide.weight.item() == pytest.approx(3.0)


def test_the_average_goes_on_from_its_state():
    first, second = Average(0), Average(0)
    walk(first, [1.0, 2.0])
    second.load_state(*first.state())
    guide = walk(second, [6.0], start=3)
    walk(first, [50.0], start=3)  # its state was a copy's source, and stays apart
    second.restore(guide)
    assert guide.weight.item() == pytest.approx(3.0)


def test_where_nothing_is_averaged_the_guide_stays():
    average = Average(10)
    guide = walk(average, [1.0, 7.0])
    average.restore(guide)
    assert guide.weight.item() == 7.0
