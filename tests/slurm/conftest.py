"""A two-node SLURM of plain processes under a private folder, and runs submitted to it by the project's launchers."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch

from torchrl_sql.cli import main
from torchrl_sql.collection import collect_data
from torchrl_sql.config import compose_run_config
from torchrl_sql.launch.group import Group, find_groups
from torchrl_sql.launch.slurm import job_states
from torchrl_sql.launch.status import task_states
from torchrl_sql.training.checkpoint import load_checkpoint
from torchrl_sql.training.logs import read_scalars
from torchrl_sql.training.policy import find_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=0,bf_interval=1
KillWait=3
SlurmdTimeout=10
MinJobAge=86400
BatchStartTimeout=60
MessageTimeout=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]},{ports[2]} CPUs=8 RealMemory=8000
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 DefMemPerCPU=500
PartitionName=nograce Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 DefMemPerCPU=500
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF DefMemPerCPU=500
"""


def wait_for(what, seconds, message):
    """Polls until ``what()`` is true and returns it; ``message`` may be a function."""
    end = time.monotonic() + seconds
    while True:
        value = what()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {message() if callable(message) else message}")
        time.sleep(0.1)


def process_name(pid):
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def free_ports(count):
    """Ports below the ephemeral ones, free now."""
    found = []
    for port in range(18_000 + os.getpid() % 5_000, 32_000):
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")


class MiniSlurm:
    """munge, a controller and two nodes, all of them processes of this user on this host."""

    nodes = ("n1", "n2")
    wait_for = staticmethod(wait_for)
    root = ROOT

    def __init__(self, folder):
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.environment = os.environ | {"SLURM_CONF": str(self.conf)}

    def start(self):
        host = socket.gethostname().split(".")[0]
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        (self.folder / "state").mkdir()
        self.conf.write_text(CONF.format(host=host, user=user, folder=self.folder, ports=free_ports(3)))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        munge = ["munged", "--force", f"--key-file={key}", f"--socket={self.folder}/munge.sock"]
        munge += [f"--{name}-file={self.folder}/munged.{name}" for name in ("pid", "log", "seed")]
        subprocess.run(munge, check=True)
        subprocess.run(["slurmctld", "-c"], env=self.environment, check=True)
        for node in self.nodes:
            self.start_node(node)
        wait_for(lambda: self.node_states() == {"IDLE"}, 20, "both nodes idle")

    def start_node(self, node):
        # Jobs inherit the niceness: the controller answers in time however busy the host is.
        subprocess.run(["nice", "-n", "5", "slurmd", "-N", node], env=self.environment, check=True)

    def node_states(self):
        text = self.scontrol("-o", "show", "node")
        return set(re.findall(r" State=(\S+)", text))

    def scontrol(self, *arguments):
        done = subprocess.run(["scontrol", *arguments], env=self.environment, capture_output=True, text=True)
        return done.stdout + done.stderr

    def job_state(self, job):
        """SLURM's own word for a job."""
        (state,) = job_states(job).values()
        return state.state

    def kill_node(self, node):
        """slurmd dies at once; what it started lives on."""
        pid = int((self.folder / f"slurmd-{node}.pid").read_text())
        assert process_name(pid) == "slurmd"
        os.kill(pid, signal.SIGKILL)

    def stop(self):
        subprocess.run(["scancel", "--user", str(os.getuid())], env=self.environment, capture_output=True)
        try:
            wait_for(lambda: self.scontrol("-o", "show", "job").count("JobState=RUNNING") == 0, 20, "jobs ended")
        finally:
            for name in [*(f"slurmd-{node}" for node in self.nodes), "slurmctld", "munged"]:
                self._end(self.folder / f"{name}.pid", name.split("-")[0])
            for pid in self.processes():
                with suppress(ProcessLookupError):  # it may end by itself just now
                    os.kill(pid, signal.SIGKILL)

    def _end(self, file, name):
        if not file.is_file():
            return
        pid = int(file.read_text())
        if process_name(pid) == name:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            wait_for(lambda: process_name(pid) != name, 10, f"{name} ended")

    def processes(self):
        """Processes with this SLURM's folder in their environment or command line; not this one and its children."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                text = (path / "environ").read_bytes() + (path / "cmdline").read_bytes()
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if str(self.folder).encode() in text and os.getpid() not in (int(path.name), parent):
                found.append(int(path.name))
        return found

    def task_processes(self, job, *, rank=None):
        """Process ids of a job's Python processes, by its environment; ``job`` as in ``12`` or ``12_1``."""
        wanted = {b"SLURM_JOB_ID=" + job.encode()}
        if "_" in job:
            array, _, task = job.partition("_")
            wanted = {b"SLURM_ARRAY_JOB_ID=" + array.encode(), b"SLURM_ARRAY_TASK_ID=" + task.encode()}
        if rank is not None:
            wanted.add(b"SLURM_PROCID=%d" % rank)
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                environment = set((path / "environ").read_bytes().split(b"\0"))
                name = (path / "comm").read_text()
            except OSError:
                continue
            if (
                name.startswith("python")
                and wanted <= environment
                and any(variable.startswith(b"TORCHRL_SQL_ATTEMPT=") for variable in environment)
            ):
                found.append(int(path.name))
        return found


@pytest.fixture(scope="session")
def slurm():
    """The cluster, for the whole session; SLURM_CONF points to it."""
    before = dict(os.environ)
    os.environ["PATH"] += ":/usr/sbin"
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        pytest.fail(f"{', '.join(missing)} must be on PATH; make test-slurm installs them")
    folder = Path(tempfile.mkdtemp(prefix="sql-slurm-", dir="/tmp"))
    cluster = MiniSlurm(folder)
    os.environ["SLURM_CONF"] = str(cluster.conf)
    ended = signal.signal(signal.SIGTERM, signal.default_int_handler)  # who is told to end still cleans up
    try:
        cluster.start()
        yield cluster
    finally:
        signal.signal(signal.SIGTERM, ended)
        os.environ.clear()
        os.environ.update(before)
        try:
            cluster.stop()
            wait_for(lambda: not cluster.processes(), 10, "no process left")
        finally:
            shutil.rmtree(folder)


@pytest.fixture(scope="session")
def profile(slurm):
    """A profile of this cluster: two nodes, a process on each."""
    file = slurm.folder / "profile.yaml"
    file.write_text(
        f"partition: low\nnodes: 2\nmemory: 1500M\ntimeout_minutes: 5\nsignal_delay_seconds: 20\n"
        f"setup: ['export PYTHONPATH={ROOT}']\nenvironment: {{OMP_NUM_THREADS: '1'}}\n"
    )
    return file


@pytest.fixture(scope="session")
def settings(slurm):
    """Settings of a small training run over a small store of real transitions."""
    store = slurm.folder / "store"
    tiny = ["scale=cpu", "data.store=store", "data.games=[Breakout,Freeway]", f"data.store={store}"]
    collection = ["collection.num_agent_steps_per_game=400", "collection.max_env_frames_per_episode=800"]
    collect_data(compose_run_config([*tiny, *collection]))
    trainer = {
        "num_gradient_steps": 240,
        "log_interval_gradient_steps": 10,
        "checkpoint_interval_gradient_steps": 40,
        "target_update_interval_gradient_steps": 30,
        "loggers": "[csv]",
    }
    return [
        *tiny,
        "data.batch_size=8",
        "optim.warmup_gradient_steps=2",
        *(f"trainer.{key}={value}" for key, value in trainer.items()),
    ]


class Run:
    """A launched training run under test; of several, one element."""

    def __init__(self, slurm, group, index=0):
        self.slurm = slurm
        self.group = group
        self.index = index
        self.task = group.task_folder(index)
        self.folder = Path(group.tasks[index].run_dir or group.folder)

    @property
    def job(self):
        return Group.load(self.group.folder).last_submission(self.index).job_of(self.index)

    @property
    def state(self):
        return task_states(Group.load(self.group.folder))[self.index].state

    @property
    def restarts(self):
        return self.task.newest_attempt().restart

    def step(self):
        """The gradient step that was logged last."""
        rows = read_scalars(self.folder).get("objective", [])
        return rows[-1][0] if rows else 0

    def wait_for_step(self, step, seconds=300):
        wait_for(lambda: self.step() >= step, seconds, lambda: f"{self.folder} at step {step}: {self.log()}")

    def wait_for_end(self, seconds=300):
        """Until nothing happens any more without anybody's doing; returns the state."""
        since = time.monotonic()

        def ended():
            nonlocal since
            state = task_states(Group.load(self.group.folder))[self.index]
            if state.is_alive:
                since = time.monotonic()
            # While a job is requeued, SLURM's states pass through failures.
            over = state.state == "COMPLETED" or time.monotonic() - since > 4
            return over and state.state

        return wait_for(ended, seconds, lambda: f"the end of {self.folder}: {self.log()}")

    def signal(self, number, *, rank=None):
        """Sends a signal to one rank, or to all."""
        processes = wait_for(lambda: self.slurm.task_processes(self.job, rank=rank), 20, f"processes of {self.job}")
        for process in processes:
            os.kill(process, number)

    def pause_until_second(self, second):
        """Stops its processes until its job has run so long, or was requeued for what it had been told before."""

        def is_over():
            (found,) = re.findall(r"RunTime=00:(\d\d):(\d\d)", self.slurm.scontrol("show", "job", self.job))
            return self.restarts > 0 or 60 * int(found[0]) + int(found[1]) >= second

        self.signal(signal.SIGSTOP)
        wait_for(is_over, second + 60, lambda: f"{second} s of {self.folder}: {self.log()}")
        for process in self.slurm.task_processes(self.job):
            os.kill(process, signal.SIGCONT)

    def log(self):
        """What its processes and SLURM say, for messages."""
        files = [*sorted(self.group.folder.glob("*.out")), self.slurm.folder / "slurmctld.log"]
        return "\n".join([self.slurm.scontrol("show", "job"), *(path.read_text()[-20_000:] for path in files)])

    def result(self):
        """What a finished run leaves: weights, optimizer and sampler state, and the steps that were logged."""
        content = load_checkpoint(find_checkpoint(self.folder))
        logged = {name: [step for step, _ in rows] for name, rows in read_scalars(self.folder).items()}
        assert logged
        return {"step": content["trainer"]["step"], "state": content["trainer"], "logged": logged}


def assert_same(found, expected, where="result"):
    """Exact equality of nested values; tensors bit for bit."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{number}]")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


@pytest.fixture(scope="session")
def same():
    """Compares results exactly."""
    return assert_same


@pytest.fixture(scope="session")
def make_run(slurm):
    """Watches over a group's first task."""
    return lambda group: Run(slurm, group)


@pytest.fixture(scope="session")
def launch(slurm, profile, settings):
    """Launches a training run, or several, by the command line."""
    numbers = itertools.count()
    lock = threading.Lock()  # Hydra composes one configuration at a time

    def launch(*words):
        with lock:
            root = slurm.folder / "runs" / f"{next(numbers)}"
            assert main(["launch", "train", *settings, f"cluster={profile}", "--into", str(root), *words]) == 0
        (group,) = find_groups(root)
        runs = [Run(slurm, group, index) for index in range(len(group.tasks))]
        return runs if len(runs) > 1 else runs[0]

    return launch


@pytest.fixture(scope="session")
def uninterrupted(launch):
    """What the run leaves if nothing happens to it."""
    run = launch()
    assert run.wait_for_end() == "COMPLETED", run.log()
    assert run.restarts == 0
    return run.result()
