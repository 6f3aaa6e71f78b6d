from __future__ import annotations

import os
import signal
import threading

import pytest

from torchrl_sql.training.signals import Interrupted, StopSignals

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup, which ignores it


def receive(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("numbers", "requeue"),
    [
        ([signal.SIGTERM], False),
        ([signal.SIGINT], False),
        ([signal.SIGHUP], False),
        ([signal.SIGUSR2], True),
        ([signal.SIGTERM, signal.SIGUSR2], True),
        ([signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM], True),
    ],
)
def test_signals_only_set_flags(numbers, requeue, capfd):
    with StopSignals() as signals:
        assert (signals.stop, signals.requeue) == (False, False)
        for number in numbers:
            receive(number)
        assert (signals.stop, signals.requeue) == (True, requeue)
    said = capfd.readouterr().err
    assert said.count("stopping once all is saved") == 1 and said.strip().startswith(numbers[0].name)


def test_a_second_interrupt_raises_at_once(capfd):
    with StopSignals() as signals:
        receive(signal.SIGTERM)
        receive(signal.SIGINT)  # the first of its kind
        with pytest.raises(KeyboardInterrupt):
            receive(signal.SIGINT)
    assert signals.stop


def test_a_dead_terminal_does_not_keep_a_run_from_saving():
    reader, writer = os.pipe()
    stderr = os.dup(2)
    os.close(reader)
    os.dup2(writer, 2)  # as after the end of ``train 2>&1 | tee log``
    try:
        with StopSignals() as signals:
            receive(signal.SIGINT)
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(writer)
    assert signals.stop


def test_a_hang_up_stays_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            receive(signal.SIGHUP)
            assert not signals.stop
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_former_handlers_come_back():
    before = [signal.getsignal(number) for number in HANDLED]
    with StopSignals() as signals:
        assert all(signal.getsignal(number) == signals._receive for number in HANDLED)
    assert [signal.getsignal(number) for number in HANDLED] == before


def test_a_blocked_signal_that_came_before_is_delivered_on_installing(capfd):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)  # not os.kill: other threads do not block it
    with StopSignals() as signals:
        assert signals.requeue
        assert signal.SIGUSR2 not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def test_interrupted_says_whether_to_requeue():
    error = Interrupted("stopped", requeue=True)
    assert error.requeue and str(error) == "stopped" and isinstance(error, KeyboardInterrupt)
