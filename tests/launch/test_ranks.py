"""Where a process meets the others of its job."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrl_sql.launch import ranks
from torchrl_sql.launch.ranks import PORT_RANGE, rendezvous_address, rendezvous_port, torchrun_environment

STEP = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_NNODES": "2",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "node[3-4]",
}


def test_torchrun_variables(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NODELIST", STEP["SLURM_JOB_NODELIST"])
    monkeypatch.setattr(ranks, "rendezvous_address", lambda node: f"address of {node}")
    assert torchrun_environment(STEP, restart=2) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "address of node3",
        "MASTER_PORT": str(12_000 + 7 * 101 + 2 * 7),
    }


def test_one_node_meets_at_home():
    assert torchrun_environment(STEP | {"SLURM_NNODES": "1"}, restart=0)["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize("environment", [{}, STEP | {"TORCHELASTIC_RUN_ID": "x"}])
def test_torchrun_or_nobody_started_it(environment):
    assert torchrun_environment(environment, restart=0) == {}


@given(st.integers(1, 2**26), st.integers(0, 1000))
def test_ports_are_below_the_ephemeral_ones_and_differ_after_a_restart(job, restart):
    port = rendezvous_port(job, restart)
    assert PORT_RANGE[0] <= port < PORT_RANGE[1] <= 32_768
    assert rendezvous_port(job, restart + 1) != port


@pytest.fixture
def unresolvable(monkeypatch):
    def fail(node, port):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """Puts a stand-in of scontrol that prints a text on PATH."""

    def install(text, code=0):
        program = tmp_path / "scontrol"
        program.write_text(f"#!/bin/sh\necho '{text}'\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return install


def test_a_node_whose_name_does_not_resolve_has_the_address_slurm_knows(unresolvable, scontrol):
    scontrol("NodeName=n1 Arch=x86_64 NodeAddr=10.1.2.3 NodeHostName=vm")
    assert rendezvous_address("n1") == "10.1.2.3"


def test_a_node_nobody_knows(unresolvable, scontrol):
    scontrol("Node n1 not found", code=1)
    with pytest.raises(OSError, match=r"node n1 does not resolve .* Node n1 not found"):
        rendezvous_address("n1")


def test_a_name_that_resolves_is_used():
    assert rendezvous_address("localhost") == "localhost"
