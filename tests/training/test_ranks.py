"""What ranks tell one another, in two real processes; and under which address they meet."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from tests.training.conftest import free_port
from torchrl_sql.training.ranks import check_address

RANKS = """
import errno, json, os, sys
import torch
from torchrl_sql.launch.job import is_transient
from torchrl_sql.training.checkpoint import CheckpointError
from torchrl_sql.training.lock import RunFolderError
from torchrl_sql.training.ranks import process_group

child = os.fork()
os.environ.update(RANK=str(int(child == 0)), LOCAL_RANK="0")

def value():
    torch.manual_seed(0)
    return {
        0: [torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), None, "text", (0.9, 0.999)],
        "bits": torch.tensor([True, False]), "half": torch.rand(7, dtype=torch.bfloat16)[::2],
        "count": torch.tensor(3), "none": torch.empty(0, 2), "large": torch.arange(100_000),
    }

def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b

class Odd(Exception): ...

def fail(error):
    raise error

ERRORS = [
    CheckpointError("step_8.pt is damaged"), OSError(errno.ENOSPC, "No space left on device", "a/b"),
    FileNotFoundError(errno.ENOENT, "No such file", "x"), OSError("plain"), MemoryError("no room"),
    RuntimeError("torch says so"), Odd("something else"), RunFolderError("another process trains in it"), EOFError(),
]

with process_group(torch.device("cpu"), timeout_seconds=60) as ranks:
    shared = ranks.share(value() if ranks.is_main else None)
    said = {"rank": ranks.rank, "same": same(shared, value()), "pid": ranks.on_main(os.getpid)}
    said |= {"errors": [], "transient": []}
    said["nothing"] = ranks.on_main(lambda: None)
    for error in ERRORS:
        try:
            ranks.on_main(lambda: fail(error))
        except Exception as raised:
            said["errors"].append([type(raised).__name__, str(raised)])
            said["transient"].append(is_transient(raised, has_checkpoint=False))
    said["after"] = ranks.maximum(ranks.rank)  # nobody is a collective ahead
    os.write(1, (json.dumps(said) + "\\n").encode())
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def ranks():
    """What each of two ranks said."""
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANKS]
    done = subprocess.run(command, env=os.environ | where, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return sorted((json.loads(line) for line in done.stdout.splitlines()), key=lambda said: said["rank"])


def test_every_rank_gets_what_rank_0_has(ranks):
    assert [said["same"] for said in ranks] == [True, True]


def test_only_rank_0_works(ranks):
    assert ranks[0]["pid"] == ranks[1]["pid"]
    assert ranks[0]["nothing"] is ranks[1]["nothing"] is None


def test_what_rank_0_raises_every_rank_raises_in_the_same_words(ranks):
    kinds = ["CheckpointError", "OSError", "FileNotFoundError", "OSError", "MemoryError", "RuntimeError", "Odd"]
    assert [kind for kind, _ in ranks[0]["errors"]] == [*kinds, "RunFolderError", "EOFError"]
    told = ["ValueError", "OSError", "FileNotFoundError", "OSError", "MemoryError", "RuntimeError", "ValueError"]
    assert [kind for kind, _ in ranks[1]["errors"]] == [*told, "ValueError", "ValueError"]
    texts = [text for _, text in ranks[0]["errors"]]
    assert texts == [text for _, text in ranks[1]["errors"]] and "No space left on device: 'a/b'" in texts[1]
    assert [said["after"] for said in ranks] == [1, 1]


def test_whether_a_job_is_retried_is_for_rank_0_to_say(ranks):
    assert ranks[0]["transient"] == [False, True, False, True, False, False, False, True, True]
    assert ranks[1]["transient"] == [True] * 9  # leaves no word of its own


NODES = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "node1"}


def test_an_address_that_means_every_node_itself_is_refused():
    with pytest.raises(ValueError, match=r"resolves to 127.0.1.1 here, where .*environment.GLOO_SOCKET_IFNAME=ib0"):
        check_address(NODES, lambda host: "127.0.1.1")


def unknown(host):
    raise socket.gaierror(f"{host} is not known")


@pytest.mark.parametrize(
    ("changes", "resolve"),
    [
        ({}, lambda host: "10.1.2.3"),
        ({}, unknown),
        ({"GLOO_SOCKET_IFNAME": "ib0"}, lambda host: "127.0.1.1"),
        ({"LOCAL_WORLD_SIZE": "16"}, lambda host: "127.0.1.1"),
        ({"MASTER_ADDR": "127.0.0.1"}, lambda host: "127.0.1.1"),
    ],
)
def test_where_others_can_reach_this_host_or_need_not_it_is_not(changes, resolve):
    check_address(NODES | changes, resolve)
