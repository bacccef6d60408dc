import pytest
from torch import nn

from blora_pyro.fitting.averaging import Average


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


def test_it_goes_on_from_its_state():
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
