from __future__ import annotations

import logging
import time

from torchrl_sql.training.stall import StallWatch


def wait_until(condition):
    deadline = time.monotonic() + 300
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_a_stall_is_reported_once_with_the_stack_of_the_waiting_thread(caplog):
    with caplog.at_level(logging.WARNING), StallWatch(0.1) as watch:
        wait_until(lambda: "STALL" in caplog.text)
        time.sleep(0.3)
        assert caplog.text.count("STALL: no gradient step for") == 1
        assert "test_a_stall_is_reported_once" in caplog.text  # the stack
        watch.beat()
        assert "training goes on after" in caplog.text
        wait_until(lambda: caplog.text.count("STALL") == 2)


def test_beats_keep_it_silent(caplog):
    with caplog.at_level(logging.WARNING), StallWatch(5) as watch:
        for _ in range(20):
            watch.beat()
            time.sleep(0.01)
    assert caplog.text == ""
    assert not watch._thread.is_alive()
