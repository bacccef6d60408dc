import os
import signal
import threading

import pytest

from blora_pyro.errors import Interrupted
from blora_pyro.fitting.interrupts import SIGNALS, Interrupts


@pytest.fixture(autouse=True)
def handlers():
    """Handlers of the test's own, which must be there again after it."""
    before = {one: signal.signal(one, ignore) for one in SIGNALS}
    yield
    found = {one: signal.signal(one, handler) for one, handler in before.items()}
    assert set(found.values()) == {ignore}


def ignore(signum, frame):
    """Stands for a handler of the program around us."""


def send(signum):
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_raised_at_once(signum, code):
    with pytest.raises(Interrupted) as caught, Interrupts():
        send(signum)
    assert caught.value.exit_code == code
    assert isinstance(caught.value, KeyboardInterrupt)


def test_a_deferred_signal_waits_for_the_end():
    done = []
    with pytest.raises(Interrupted), Interrupts() as interrupts, interrupts.deferred():
        assert interrupts.caught is None
        send(signal.SIGTERM)
        assert interrupts.caught == signal.SIGTERM
        done.append("all")
    assert done == ["all"]


def test_a_second_signal_does_not_wait():
    with pytest.raises(Interrupted) as caught, Interrupts() as interrupts, interrupts.deferred():
        send(signal.SIGTERM)
        send(signal.SIGINT)
        raise AssertionError("not interrupted")
    assert caught.value.signum == signal.SIGINT


def test_an_error_of_the_step_is_not_hidden_by_the_signal():
    with pytest.raises(ZeroDivisionError), Interrupts() as interrupts, interrupts.deferred():
        send(signal.SIGTERM)
        raise ZeroDivisionError


def test_after_the_deferral_signals_are_raised_at_once_again():
    with pytest.raises(Interrupted), Interrupts() as interrupts:
        with interrupts.deferred():
            pass
        interrupts.answer()  # nothing waits
        send(signal.SIGINT)


def test_inactive_or_in_another_thread_signals_are_left_alone():
    seen = []

    def look():
        with Interrupts():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    with Interrupts(active=False):
        seen.append(signal.getsignal(signal.SIGTERM))
    assert seen == [ignore, ignore]
