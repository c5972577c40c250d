"""Signals: the first is noted, the second acts as always."""

import os
import signal

import pytest

from tat_jax.signals import StopSignals


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def number(request):
    """Return a signal that only counts how often it acts."""
    acted = []
    before = signal.signal(request.param, lambda *_: acted.append(1))
    yield request.param, acted
    signal.signal(request.param, before)


def test_before_the_loop_listens_a_signal_acts_as_always(number):
    number, acted = number
    with StopSignals() as signals:
        os.kill(os.getpid(), number)
    assert (signals.received, acted) == (0, [1])


def test_the_first_signal_is_noted_and_the_second_acts_as_always(number, capfd):
    number, acted = number
    with StopSignals() as signals:
        signals.listen()
        os.kill(os.getpid(), number)
        assert (signals.received, acted) == (number, [])
        os.kill(os.getpid(), number)
        assert acted == [1]
    assert "stopping after this step; once more stops at once" in capfd.readouterr().err


def test_afterwards_signals_act_as_before(number):
    number, acted = number
    with StopSignals() as signals:
        signals.listen()
    os.kill(os.getpid(), number)
    assert (signals.received, acted) == (0, [1])
