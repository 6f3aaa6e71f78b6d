from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from tests.training.conftest import free_port
from torchrl_sql.bench import measure, read_bytes_per_transition, time_reads, time_steps
from torchrl_sql.cli import main
from torchrl_sql.config import compose_run_config
from torchrl_sql.data import FrameStore
from torchrl_sql.training.build import build_trainer
from torchrl_sql.training.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = FrameStore.create(tmp_path_factory.mktemp("data") / "store", chunk_frames=4, shard_frames=8)
    with store.writer("Pong", source="noise") as writer:
        frames = np.random.default_rng(0).integers(256, size=(41, 84, 84), dtype=np.uint8)
        writer.add_episode(frames, actions=[0] * 40, rewards=[0.0] * 40, terminated=False)
    return store


@pytest.fixture
def settings(store):
    return ["scale=cpu", "data.store=store", f"data.store={store.path}", "data.games=[Pong]", "data.batch_size=8"]


def test_measures_what_a_plan_needs(settings):
    config = compose_run_config(settings)
    measured = measure(config, ALONE, samples_per_gpu=[8, 2], num_repeats=2)
    assert list(measured.step_seconds) == [2, 8]
    assert all(0 < seconds < 60 for seconds in measured.step_seconds.values())
    assert all(measured.start_seconds[n] > measured.step_seconds[n] for n in (2, 8))
    assert measured.read_transitions_per_second > 0
    assert measured.num_parameters > 100_000
    assert measured.node_bytes_per_second is measured.network_bytes_per_second is None


@pytest.mark.parametrize("samples", [0, 9])
def test_batches_larger_than_the_runs_are_refused(settings, samples):
    with pytest.raises(ValueError, match=rf"samples_per_gpu must be within 1 and data.batch_size=8, got {samples}"):
        measure(compose_run_config(settings), ALONE, samples_per_gpu=[4, samples], num_repeats=1)


@pytest.mark.parametrize(("microbatch_size", "samples"), [(4, [8, 4, 1]), (8, [2, 8])])
def test_a_batch_is_split_as_training_splits_it(settings, microbatch_size, samples):
    config = compose_run_config([*settings, f"trainer.microbatch_size={microbatch_size}"])
    assert sorted(measure(config, ALONE, samples_per_gpu=samples, num_repeats=1).step_seconds) == sorted(samples)
    if microbatch_size == 4:
        with pytest.raises(ValueError, match=r"samples_per_gpu must be multiples of trainer.microbatch_size=4, got 6"):
            measure(config, ALONE, samples_per_gpu=[6], num_repeats=1)


def test_each_size_is_the_program_of_a_run_with_that_batch(settings, monkeypatch):
    built, shapes = [], []

    def build(config, ranks):
        trainer = build_trainer(config, ranks)
        update = trainer.update
        monkeypatch.setattr(trainer, "update", lambda batch: shapes.append(batch.shape[0]) or update(batch))
        built.append((config.data.batch_size, config.trainer.microbatch_size, ranks.world_size))
        return trainer

    monkeypatch.setattr("torchrl_sql.bench.build_trainer", build)
    config = compose_run_config([*settings, "trainer.microbatch_size=4"])
    measure(config, ALONE, samples_per_gpu=[8, 2], num_repeats=5)
    assert built == [(2, 2, 1), (8, 4, 1)]
    # 4 first steps, 4 to warm up, 5 rounds of one.
    assert shapes == [2] * 13 + [8] * 13


RANKS = """
import json, os, sys
from dataclasses import asdict
import torch
from torchrl_sql.bench import measure
from torchrl_sql.config import compose_run_config
from torchrl_sql.training.ranks import process_group
child = os.fork()
os.environ.update(RANK=str(int(child == 0)), LOCAL_RANK=str(int(child == 0)))
with process_group(torch.device("cpu")) as ranks:
    measured = measure(compose_run_config(sys.argv[1:]), ranks, samples_per_gpu=[4], num_repeats=1)
os.write(1, (json.dumps(asdict(measured)) + "\\n").encode())
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


def test_ranks_agree_on_the_slowest_and_measure_the_link_between_them(settings):
    where = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", RANKS, *settings]
    done = subprocess.run(command, env=os.environ | where, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert first == second
    assert first["node_bytes_per_second"] > 0 and first["network_bytes_per_second"] is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_on_a_gpu_say_what_memory_they_take(settings):
    config = compose_run_config([*settings, "trainer.device=cuda"])
    trainer = build_trainer(config)
    times = time_steps(trainer, num_repeats=5)
    trainer.replay.shutdown()
    parameters = sum(p.nbytes for p in trainer.loss.parameters())
    assert times.peak_bytes > 4 * parameters  # with gradients and two moments


@pytest.mark.parametrize(
    ("n_steps", "chunks"),
    [(1, 2.0), (4, 2.75), (20, 3.5)],
    # Chunks of 4 frames, starting at phase 0..3. 5 frames: 2 chunks at any phase. 8 frames: 2, 3, 3, 3.
    # Two stacks far apart: twice 1, 2, 2, 2.
)
def test_bytes_fetched_by_hand(store, n_steps, chunks):
    frame_bytes = sum(path.stat().st_size for path in (store.path / "Pong").rglob("*") if path.is_file()) / 40
    assert read_bytes_per_transition(store, n_steps=n_steps) == pytest.approx(frame_bytes * 4 * chunks)


def test_command_prints_measurements_and_a_plan(settings, tmp_path, capsys):
    file = tmp_path / "new" / "measured.json"
    assert main(["bench", *settings, "--samples", "8,4", "--repeats", "1", "--gpus", "1,2", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "step of 8 samples per device" in printed and "the first 4 took" in printed
    assert "no plan for 2 GPUs: network_bytes_per_second must be known" in printed
    assert "4,000 gradient steps of 8 transitions" in printed
    assert json.loads(file.read_text())["step_seconds"].keys() == {"4", "8"}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--samples", "few", "--samples must be whole numbers separated by commas, got 'few'"),
        ("--gpus", "all", "--gpus must be whole numbers separated by commas, got 'all'"),
        ("--repeats", "0", "--repeats must be at least 1, got 0"),
        ("--gpus", "1,0", "--gpus must be numbers of at least 1, got '1,0'"),
        ("--json", ".", "--json must be a file, got the folder ."),
    ],
)
def test_command_refuses_bad_numbers_before_it_measures(settings, capsys, monkeypatch, option, value, message):
    monkeypatch.setattr("torchrl_sql.bench.measure", None)
    assert main(["bench", *settings, option, value]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("num_readers", [0, 2, 8])
def test_batches_that_were_read_before_are_not_counted(settings, monkeypatch, num_readers):
    trainer = build_trainer(compose_run_config([*settings, f"data.prefetch={num_readers}"]))
    get = type(trainer.replay.storage).get

    def slow(storage, index):
        time.sleep(0.02)
        return get(storage, index)

    monkeypatch.setattr(type(trainer.replay.storage), "get", slow)
    try:
        trainer.replay.sample()
        time.sleep(0.2)  # as while steps are timed: the readers fill their queue
        assert time_reads(trainer, num_ahead=num_readers, num_repeats=5) > 0.02 / max(num_readers, 1)
    finally:
        trainer.replay.shutdown()
