"""Signals: the first is noted, the second acts as always, and what is ignored stays so."""

import os
import signal
import threading

import pytest

from tat_jax.signals import StopSignals


@pytest.fixture
def acts():
    """Let a signal only count how often it acts; as a function of its number."""
    before = {}

    def replace(number):
        acted = []
        before[number] = signal.signal(number, lambda *_: acted.append(1))
        return acted

    yield replace
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def number(request, acts):
    """Return each signal that stops a run, and how often it acts."""
    return request.param, acts(request.param)


def test_before_the_loop_listens_a_signal_acts_as_always(number):
    number, acted = number
    with StopSignals() as signals:
        os.kill(os.getpid(), number)
    assert (signals.received, acted) == (0, [1])


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_acts_as_always(number, second, acts, capfd):
    number, acted = number
    acted_second = acted if second == number else acts(second)
    with StopSignals() as signals:
        signals.listen()
        os.kill(os.getpid(), number)
        assert (signals.received, acted) == (number, [])
        os.kill(os.getpid(), second)
        assert acted_second == [1]
    assert "stopping after this step; once more stops at once" in capfd.readouterr().err


@pytest.mark.parametrize("first", [signal.SIGHUP, signal.SIGTERM])
def test_a_terminal_that_closes_asks_once_however_often_it_says_so(first, acts):
    acted = acts(signal.SIGHUP)
    acts(signal.SIGTERM)
    with StopSignals() as signals:
        signals.listen()
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGHUP)  # while the last checkpoint is written
    assert (signals.received, acted) == (first, [])


def test_what_is_ignored_stays_ignored(number):
    number, _ = number
    signal.signal(number, signal.SIG_IGN)
    with StopSignals() as signals:
        signals.listen()
        os.kill(os.getpid(), number)
    assert (signals.received, signal.getsignal(number)) == (0, signal.SIG_IGN)


def test_afterwards_signals_act_as_before(number):
    number, acted = number
    with StopSignals() as signals:
        signals.listen()
    os.kill(os.getpid(), number)
    assert (signals.received, acted) == (0, [1])


def test_a_terminal_that_is_gone_cannot_be_told(number):
    number, _ = number
    stderr = os.dup(2)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 2)
    try:
        with StopSignals() as signals:
            signals.listen()
            os.kill(os.getpid(), number)
    finally:
        os.dup2(stderr, 2)
        os.close(full)
        os.close(stderr)
    assert signals.received == number


def test_a_thread_beside_the_main_one_takes_no_signals():
    listened = []

    def listen():
        with StopSignals() as signals:
            signals.listen()
            listened.append(signals.received)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert listened == [0]
