"""Where a process stands among a job's: torchrun's environment variables, from SLURM's."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping

from submitit.slurm.slurm import SlurmJobEnvironment

PORT_RANGE = (12_000, 32_000)
"""Below Linux's ephemeral ports (32,768 to 60,999), which any outgoing connection of the node may hold."""


def rendezvous_port(job_id: int, restart: int) -> int:
    """The port of an attempt's rendezvous: the same on every rank, another one after each restart, for a process of
    the attempt before may still hold the old one.
    """
    low, high = PORT_RANGE
    return low + (job_id * 101 + restart * 7) % (high - low)


def rendezvous_address(node: str) -> str:
    """A node's address: its name where that resolves, else what SLURM knows it by.

    Raises:
        OSError: if neither works.
    """
    try:
        socket.getaddrinfo(node, None)
        return node
    except socket.gaierror as error:
        done = subprocess.run(["scontrol", "-o", "show", "node", node], capture_output=True, text=True)
        found = re.search(r"\bNodeAddr=(\S+)", done.stdout)
        if done.returncode != 0 or found is None:
            problem = done.stderr.strip() or done.stdout.strip()
            raise OSError(f"node {node} does not resolve ({error}) and scontrol does not know it: {problem}") from None
        return found[1]


def torchrun_environment(environment: Mapping[str, str], *, restart: int) -> dict[str, str]:
    """Variables of torchrun for this process of a SLURM step; empty where torchrun started it, or nothing did.

    Args:
        environment (mapping): e.g. ``os.environ``.

    Keyword Args:
        restart (int): restarts of the job.
    """
    if "SLURM_PROCID" not in environment or "TORCHELASTIC_RUN_ID" in environment:
        return {}
    num_tasks = int(environment["SLURM_NTASKS"])
    num_nodes = int(environment["SLURM_NNODES"])
    address = "127.0.0.1" if num_nodes == 1 else rendezvous_address(SlurmJobEnvironment().hostnames[0])
    port = rendezvous_port(int(environment["SLURM_JOB_ID"]), restart)
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(num_tasks),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(num_tasks // num_nodes),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def outside_jobs(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what SLURM says of the job, or allocation, that it is in: for another job, or processes of
    none. What selects the cluster stays.
    """
    kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
    return {
        name: value for name, value in environment.items() if name.startswith(kept) or not name.startswith("SLURM_")
    }


def rank() -> int:
    """This process's rank: torchrun's, SLURM's, or 0 for a process alone."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def num_ranks() -> int:
    """Processes of the job, as torchrun's variables say; 1 for a process alone."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_first_of_node() -> bool:
    """Whether this process is the first on its node, or alone."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0) == 0
