from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from torchrl_sql.collection import collect_data
from torchrl_sql.config import compose_run_config

TINY = [
    "scale=cpu",
    "data.store=store",
    "collection.num_agent_steps_per_game=600",
    "collection.max_env_frames_per_episode=800",
    "data.games=[Breakout,Freeway]",
    "data.n_steps=10",
    "data.batch_size=8",
    "trainer.num_gradient_steps=12",
    "trainer.target_update_interval_gradient_steps=3",
    "trainer.log_interval_gradient_steps=2",
    "trainer.checkpoint_interval_gradient_steps=4",
    "trainer.loggers=[csv]",
    "optim.warmup_gradient_steps=2",
]


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """A store of some 600 real transitions of Breakout and of Freeway each."""
    path = tmp_path_factory.mktemp("data") / "store"
    collect_data(compose_run_config([*TINY, f"data.store={path}"]))
    return path


@pytest.fixture(scope="session")
def tiny_overrides(store):
    """Settings of a tiny run over the store, by its folder."""
    return lambda run_dir: [*TINY, f"data.store={store}", f"run_dir={run_dir}"]


@pytest.fixture
def make_config(tiny_overrides, tmp_path):
    """Composes a tiny run over the store; each ``name`` has a folder of its own."""

    def make(*overrides, name="run"):
        return compose_run_config([*tiny_overrides(tmp_path / name), *overrides])

    return make


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of so many bytes, which can really be full."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a file system")
    folders = []

    def mount(num_bytes):
        folder = tmp_path / f"disk{len(folders)}"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(num_bytes)}", "tmpfs", str(folder)], check=True)
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def free_port():
    """A port that only a server takes: ephemeral ones (from 32768 on) may be gone when the ranks meet."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as server, suppress(OSError):
            server.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port among 100")


@pytest.fixture(scope="session")
def run_ranks():
    """Trains ``[{name, world_size, jobs: [{name, overrides, signals: [(step, rank, signal), ...]}, ...]}, ...]``.

    Returns what was said, in turn: ``{job, rank, outcome}`` by each rank, ``{phase, codes}`` at the end of each phase.
    """
    return _run_ranks


def _run_ranks(phases, *, timeout=300):
    for phase in phases:
        for job in phase["jobs"]:
            job["port"] = free_port()
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "rank_worker.py"), json.dumps(phases)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, errors[-3000:]
    said = [json.loads(line) for line in output.splitlines()]
    print(errors)  # shown by pytest where a test fails
    return said
