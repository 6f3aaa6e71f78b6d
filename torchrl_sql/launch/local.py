"""The same tasks without SLURM: in the foreground of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from torchrl_sql.launch.group import Stage
from torchrl_sql.launch.job import EXIT_STOPPED
from torchrl_sql.launch.slurm import resources
from torchrl_sql.launch.task import LIFE_VARIABLE, Life

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_local(stage: Stage, tasks: Sequence[int]) -> None:
    """Runs tasks one after the other, each training run in as many processes as its cluster's profile says.

    Output goes to the terminal and to the stage's folder. Nothing is retried: who sees an error decides.

    Raises:
        KeyboardInterrupt: if it was interrupted; a training run has saved.
        OSError: if a task fails.
    """
    assert stage.cluster is not None
    life = Life(len(stage.submissions), 0)
    stage.add_submission("local", tasks)
    num_processes = resources(stage.cluster, stage.kind).num_tasks
    start = [sys.executable, "-m"]
    if num_processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}", "-m"]
    environment = os.environ | stage.cluster.environment | {LIFE_VARIABLE: str(life)}
    for index in tasks:
        command = [*start, "torchrl_sql.launch.job", str(stage.folder), str(index)]
        log = stage.folder / f"local{life.submission}_{index}_0_log.out"
        code, told = _run(command, environment, log)
        if told or (code != 0 and not stage.task_folder(index).done):
            if told or code in (EXIT_STOPPED, -signal.SIGINT) or stage.task_folder(index).text("stopped") == str(life):
                raise KeyboardInterrupt(f"stopped; torchrl-sql resume {stage.folder.parents[1]} --local continues")
            raise OSError(f"{' '.join(stage.tasks[index].arguments)} failed with code {code}; its log is {log}")


def _run(command: Sequence[str], environment: dict[str, str], log: Path) -> tuple[int, bool]:
    """Runs a command, copying its output; returns its code, and whether this process was told to end meanwhile.

    Ctrl-C reaches the command from the terminal, and is for it to handle; SIGTERM is passed on, SIGHUP as SIGTERM.
    """
    told = False

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
        if number != signal.SIGINT:
            process.terminate()

    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    # Who ignores SIGHUP (nohup) goes on doing so.
    handled = [number for number in _PASSED_ON if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, receive) for number in handled}
    try:
        with log.open("ab") as file, process:
            assert process.stdout is not None
            while chunk := os.read(process.stdout.fileno(), 65_536):
                file.write(chunk)
                file.flush()
                try:
                    sys.stdout.buffer.write(chunk)
                    sys.stdout.flush()
                except OSError:
                    if not told:  # else the terminal is gone: the command still saves, and its log says so
                        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return process.returncode, told
