"""Tasks in the foreground of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from torchrl_sql.launch import local

TOLD = """
import signal, sys, time
from pathlib import Path
from torchrl_sql.launch.local import _run
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup, which ignores it
child = (
    "import os, signal, time\\n"
    "def end(*_): os.write(1, b'saved\\\\n'); time.sleep(0.2); os.write(1, b'not lost\\\\n'); os._exit(130)\\n"
    "signal.signal(signal.SIGTERM, end);"
    "print('ready', flush=True); time.sleep(60)"
)
print(_run([sys.executable, "-c", child], {}, Path(sys.argv[1])), flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_and_the_task_waited_for(tmp_path, number):
    command = [sys.executable, "-c", TOLD, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.read() == "saved\nnot lost\n(130, True)\n"
    assert process.returncode == 0 and (tmp_path / "log").read_text() == "ready\nsaved\nnot lost\n"


def test_a_task_saves_though_the_terminal_is_gone(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", TOLD, str(tmp_path / "log")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.stdout.close()
        process.send_signal(signal.SIGHUP)
        process.stderr.read()
    assert (tmp_path / "log").read_text() == "ready\nsaved\nnot lost\n"


def test_without_a_signal(tmp_path, capfdbinary):
    before = signal.getsignal(signal.SIGTERM)
    assert local._run([sys.executable, "-c", "print(1); exit(3)"], dict(os.environ), tmp_path / "log") == (3, False)
    assert capfdbinary.readouterr().out == b"1\n" and signal.getsignal(signal.SIGTERM) == before
