"""Every fault in the middle of a real two-node training run: the weights of an uninterrupted run, or a right refusal.

``TORCHRL_SQL_SLURM_RECORD=FILE`` adds a JSON line for each to FILE; ``benchmarks/slurm_faults.py`` repeats and counts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from torchrl_sql.cli import main

pytestmark = pytest.mark.slurm

RECORD = os.environ.get("TORCHRL_SQL_SLURM_RECORD")
AT = 80
"""Gradient step, of 240, after which a fault hits; checkpoints are 40 steps apart."""


def completes(run, *, restarts=1):
    """Waits for a run that had a fault to complete in a later attempt."""
    assert run.wait_for_end() == "COMPLETED", run.log()
    assert run.restarts == restarts, run.log()
    return run


def command(*words):
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stderr}"


# Each fault takes launch and the cluster, and returns the runs that must have the uninterrupted result.


def signalled(launch, slurm):
    run = launch()
    run.wait_for_step(AT)
    command("scancel", "--signal=USR2", run.job)
    return [completes(run)]


def signalled_while_importing(launch, slurm):
    run = launch()
    run.signal(signal.SIGUSR2)
    return [completes(run)]


def time_limit(launch, slurm):
    """SLURM says so 20 to 50 s before the minute is over, which is too long for this run: let its time pass."""
    run = launch("cluster.timeout_minutes=1")
    run.wait_for_step(20)
    run.pause_until_second(45)
    assert run.wait_for_end() == "COMPLETED", run.log()
    assert run.restarts >= 1 and "told to stop; requeued" in run.log()
    return [run]


def preempted_with_grace(launch, slurm):
    run = launch()
    run.wait_for_step(AT)
    command("srun", "--partition=high", "--nodes=2", "--exclusive", "sleep", "1")
    return [completes(run)]


def preempted_without_grace(launch, slurm):
    run = launch("cluster.partition=nograce")
    run.wait_for_step(AT)
    command("srun", "--partition=high", "--nodes=2", "--exclusive", "sleep", "1")
    return [completes(run)]


def requeued_by_somebody(launch, slurm):
    run = launch()
    run.wait_for_step(AT)
    command("scontrol", "requeue", run.job)
    return [completes(run)]


def killed_rank_0(launch, slurm):
    return [killed(launch, 0)]


def killed_rank_1(launch, slurm):
    return [killed(launch, 1)]


def killed(launch, rank):
    run = launch()
    run.wait_for_step(AT)
    run.signal(signal.SIGKILL, rank=rank)
    return completes(run)


def stopped_rank_0(launch, slurm):
    return [stopped(launch, 0)]


def stopped_rank_1(launch, slurm):
    return [stopped(launch, 1)]


def stopped(launch, rank):
    """A rank hangs, and SLURM warns: the others wait in a collective, where no signal handler of theirs runs."""
    run = launch()
    run.wait_for_step(AT)
    run.signal(signal.SIGSTOP, rank=rank)
    time.sleep(0.5)
    command("scancel", "--signal=USR2", run.job)
    return completes(run)


def node_down(launch, slurm):
    run = launch()
    run.wait_for_step(AT)
    command("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    slurm.wait_for(lambda: slurm.job_state(run.job) != "RUNNING", 60, "the job is taken off the node")

    def is_back():  # resumed, or by itself: a node that registers returns to service
        slurm.scontrol("update", "NodeName=n2", "State=RESUME")
        return "DOWN" not in slurm.scontrol("-o", "show", "node", "n2")

    slurm.wait_for(is_back, 60, "the node is back")
    return [completes(run)]


def slurmd_killed_first_node(launch, slurm):
    return [slurmd_killed(launch, slurm, "n1")]


def slurmd_killed_second_node(launch, slurm):
    return [slurmd_killed(launch, slurm, "n2")]


def slurmd_killed(launch, slurm, node):
    """SLURM loses sight of a node on which the job lives on, and starts it again: the orphans must not write."""
    run = launch()
    run.wait_for_step(AT)
    slurm.kill_node(node)
    run.signal(signal.SIGSTOP)  # the run is short: it must not end before SLURM notices
    slurm.wait_for(lambda: run.state == "PENDING", 60, "SLURM notices")
    run.signal(signal.SIGCONT)
    slurm.start_node(node)
    return completes(run)


def cancelled(launch, slurm):
    run = launch()
    run.wait_for_step(AT)
    assert main(["cancel", str(run.folder)]) == 0
    return [resumed(run, slurm)]


def cancelled_with_signal_pending(launch, slurm):
    """A cancelled job must stay so, though it was about to be queued again."""
    run = launch()
    run.wait_for_step(AT)
    command("scancel", "--signal=USR2", run.job)
    command("scancel", run.job)
    return [resumed(run, slurm)]


def resumed(run, slurm):
    assert run.wait_for_end() == "CANCELLED", run.log()
    time.sleep(8)  # longer than a requeue takes
    assert run.state == "CANCELLED", run.log()
    assert not run.task.done and run.restarts == 0
    assert main(["resume", str(run.folder)]) == 0
    assert run.wait_for_end() == "COMPLETED", run.log()
    return run


def deterministic_error(launch, slurm):
    """Refused at once, with its reason, and not retried."""
    run = launch("data.games=[Breakout,Pong]")
    assert run.wait_for_end() == "FAILED", run.log()
    assert "Pong" in run.task.text("FATAL")
    assert run.restarts == 0 and not run.task.done
    return []


def crash_loop(launch, slurm):
    """A job that cannot even start Python is given up after cluster.max_crashes."""
    run = launch("cluster.python=/bin/false", "cluster.max_crashes=2")
    assert run.wait_for_end() == "FAILED", run.log()
    assert len(run.task.text("crashes").splitlines()) == 2
    return []


def array_element(launch, slurm):
    """One of two elements crashes, the other is left alone."""
    runs = launch("name=one,other")
    runs[0].wait_for_step(AT)
    runs[0].signal(signal.SIGKILL, rank=1)
    return [completes(runs[0]), completes(runs[1], restarts=0)]


def requeued_when_done(launch, slurm):
    """Somebody requeues a job as it ends: there is nothing to do again."""
    run = launch()
    assert run.wait_for_end() == "COMPLETED"
    files = [path for path in run.folder.rglob("*") if path.is_file() and path.suffix != ".out"]
    before = {path: path.stat().st_mtime_ns for path in files}
    command("scontrol", "requeue", run.job)
    slurm.wait_for(lambda: "is done already" in run.log(), 60, "the second attempt")
    slurm.wait_for(lambda: slurm.job_state(run.job) == "COMPLETED", 20, "its end")
    after = {path: path.stat().st_mtime_ns for path in before}
    changed = {path.name for path in files if after[path] != before[path]}
    assert not changed
    return [run]


ALONE = [  # these hit every job of the cluster
    preempted_with_grace,
    preempted_without_grace,
    node_down,
    slurmd_killed_first_node,
    slurmd_killed_second_node,
]
TOGETHER = [
    time_limit,
    signalled,
    signalled_while_importing,
    requeued_by_somebody,
    killed_rank_0,
    killed_rank_1,
    stopped_rank_0,
    stopped_rank_1,
    cancelled,
    cancelled_with_signal_pending,
    deterministic_error,
    crash_loop,
    array_element,
    requeued_when_done,
]


def inject(fault, launch, slurm, uninterrupted, same):
    """One fault; the runs it leaves must have the uninterrupted result."""
    start = time.monotonic()
    outcome = "failed"
    try:
        for run in fault(launch, slurm):
            same(run.result(), uninterrupted)
        outcome = "right refusal" if fault in (deterministic_error, crash_loop) else "same weights"
    finally:
        if RECORD is not None:
            line = {"fault": fault.__name__, "outcome": outcome, "seconds": round(time.monotonic() - start, 1)}
            with open(RECORD, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


@pytest.mark.parametrize("fault", ALONE)
def test_fault_that_hits_the_cluster(fault, launch, slurm, uninterrupted, same):
    inject(fault, launch, slurm, uninterrupted, same)


@pytest.fixture(scope="module")
def injected(request, launch, slurm, uninterrupted, same):
    """The chosen faults, several at a time: most of what they take is waiting."""
    items = [item for item in request.session.items if getattr(item, "originalname", "") == "test_fault_of_a_job"]
    pool = ThreadPoolExecutor(max_workers=3)
    faults = [item.callspec.params["fault"] for item in items]
    yield {fault: pool.submit(inject, fault, launch, slurm, uninterrupted, same) for fault in faults}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("fault", TOGETHER)
def test_fault_of_a_job(fault, injected):
    injected[fault].result()
