import json

import pytest
import torch
from torch import nn

from blora_pyro.fitting.alarms import EVERY, NLL_REST, Alarms, dev_alarm, norm_alarm
from blora_pyro.fitting.history import DevError, Step


class Number(nn.Module):
    """A guide of one number, the step that it was last changed in."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(0.0))


def steps(nlls, norms=None):
    norms = norms or [1.0] * len(nlls)
    pairs = zip(nlls, norms, strict=True)
    return [Step(i, nll, nll, None, 1e-3, 50, 0.0, norm) for i, (nll, norm) in enumerate(pairs, 1)]


def watched(nlls, starts, errors=(), norms=None):
    """What has seen these NLLs until an alarm; the guide; and the steps in which it looked."""
    alarms, guide, looks, history = Alarms(), Number(), [], steps(nlls, norms)
    alarms.start(guide)
    for count, start in enumerate(starts, 1):
        guide.value.data.fill_(count)

        def at_start(count=count, start=start):
            looks.append(count)
            return start

        alarms.check(history[:count], [one for one in errors if one.step <= count], guide, at_start)
        if alarms.ended:
            break
    return alarms, guide, looks


def test_tokens_half_as_likely_in_two_steps_running_end_the_fit_with_its_start():
    nlls = [9.0, 9.5, 14.9, 17.0, 9.0]  # whisper-base at a learning rate of 5e-3
    alarms, guide, looks = watched(nlls, [9.0] * 5)
    assert looks == [3, 4]
    assert alarms.ended["step"] == 4 and alarms.ended["kept_step"] == 0
    assert "14.9 in place of 9 and 17 in place of 9" in alarms.ended["reason"]
    assert "--lr" in alarms.ended["reason"]
    alarms.restore(guide)
    assert guide.value == 0


def test_a_first_batch_that_was_easy_raises_no_alarm_and_is_looked_into_now_and_then():
    nlls = [0.2, *[1.0] * 40]
    alarms, _, looks = watched(nlls, [1.1] * 41)
    assert alarms.ended is None
    assert looks == [*range(2, 42, NLL_REST)]


def test_one_high_step_raises_no_alarm():
    alarms, _, looks = watched([5, 5.5, 9, 5.6, 5.4, 5.2], [5, 5, 5, 5, 5, 5])
    assert alarms.ended is None and looks == [3]


def test_where_the_nll_falls_nothing_is_computed():
    alarms, _, looks = watched([5 - i / 10 for i in range(30)], [1.0] * 30)
    assert alarms.ended is None and looks == []


def test_the_parameters_of_the_lowest_nll_are_kept():
    nlls = [5 - i / 10 for i in range(25)] + [9.0] * 10
    alarms, guide, _ = watched(nlls, [5.0] * 35)
    assert alarms.ended["step"] == 27
    assert alarms.ended["kept_step"] == 2 * EVERY
    alarms.restore(guide)
    assert guide.value == 2 * EVERY


@pytest.mark.parametrize(
    ("norms", "is_wrong"),
    [
        ([1.0] * 9 + [11.0] * 3, True),
        ([1.0] * 9 + [9.0] * 3, False),
        ([1.0] * 9 + [99.0, 1.0, 99.0], True),
        ([1.0] * 9 + [99.0, 1.0, 1.0], False),
        ([15.6, 56.7, 36.4, 52.1, 9.3, 17.7, 5.1, 7.4, 11.2], False),
        ([1.0] * 5 + [99.0] * 3, False),  # too early to tell
        ([None] * 9 + [99.0] * 3, False),
    ],
)
def test_norms_far_above_their_median_are_wrong(norms, is_wrong):
    found = norm_alarm(steps([1.0] * len(norms), norms))
    assert (found is not None) == is_wrong
    if found:
        assert "--max-grad-norm" in found


@pytest.mark.parametrize(
    ("errors", "is_wrong"),
    [
        ([0.2, 0.3, 0.7, 0.8], True),
        ([0.2, 0.3, 0.8, 0.3], False),
        ([0.2, 0.3, 0.35, 0.39], False),
        ([0.9, 0.9], False),
        ([0.0, 0.05, 0.05, 0.09], False),
    ],
)
def test_a_dev_error_that_stays_far_above_its_best_is_wrong(errors, is_wrong):
    found = dev_alarm([DevError(i, one) for i, one in enumerate(errors)])
    assert (found is not None) == is_wrong


@pytest.mark.parametrize(
    ("forgetting", "is_wrong"),
    [
        ([0.31, 0.35], True),
        ([0.5, 0.29], False),
        ([0.4], False),
        ([None, 0.4], False),
        ([None, None], False),
    ],
)
def test_backward_sets_that_stay_far_above_the_base_are_wrong(forgetting, is_wrong):
    found = dev_alarm([DevError(i, 0.2, one) for i, one in enumerate(forgetting)])
    assert (found is not None) == is_wrong
    assert not found or "is 31.0 points above the base's" in found


def test_a_checkpoint_keeps_all_that_the_next_alarm_depends_on():
    nlls = [5 - i / 10 for i in range(25)] + [9.0] * 10
    whole, guide, _ = watched(nlls, [5.0] * 35)
    earlier, _, _ = watched(nlls[:26], [5.0] * 26)
    parameters, about = earlier.state()
    again = Alarms()
    again.start(guide)
    again.load_state(parameters, json.loads(json.dumps(about)))
    again.check(steps(nlls)[:27], [], guide, lambda: 5.0)
    assert again.ended == whole.ended
