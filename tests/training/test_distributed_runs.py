"""Whole runs in 1, 2 and 4 processes: they train the same network, wherever they are stopped and continued."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch

from torchrl_sql.config import compose_run_config
from torchrl_sql.data import OfflineAtariReplay
from torchrl_sql.evaluation.episodes import read_episodes
from torchrl_sql.training import train
from torchrl_sql.training.checkpoint import list_checkpoints, load_checkpoint
from torchrl_sql.training.logs import read_scalars

NUM_STEPS = 8
PLAYED = [
    "trainer.evaluation_interval_gradient_steps=4",
    "evaluation.num_episodes_per_game=2",
    "evaluation.max_env_frames_per_episode=80",
]
KILLED_AFTER = 5  # one step after a checkpoint, in the middle of a log interval


class Runs:
    """Runs in folders of their own, some trained by this process, some by several."""

    def __init__(self, tiny_overrides, run_ranks, folder):
        self.tiny_overrides, self.run_ranks, self.folder = tiny_overrides, run_ranks, folder
        self.outcomes, self.codes = {}, []

    def overrides(self, name, *changes):
        return [*self.tiny_overrides(self.folder / name), f"trainer.num_gradient_steps={NUM_STEPS}", *changes]

    def here(self, name, *changes):
        train(compose_run_config(self.overrides(name, *changes)))

    def job(self, name, *changes, signals=()):
        return {"name": name, "overrides": self.overrides(name, *changes), "signals": list(signals)}

    def run(self, *phases):
        numbered = [
            {"name": str(number), "world_size": world_size, "jobs": list(jobs)}
            for number, (world_size, *jobs) in enumerate(phases)
        ]
        for line in self.run_ranks(numbered):
            if "phase" in line:
                self.codes.append(line["codes"])
            else:
                self.outcomes.setdefault((line["job"], line["rank"]), []).append(line["outcome"])

    def curve(self, name):
        return np.array([value for _, value in read_scalars(self.folder / name)["objective"]])

    def state(self, name):
        return load_checkpoint(list_checkpoints(self.folder / name / "checkpoints")[-1])["trainer"]


@pytest.fixture(scope="module")
def runs(tiny_overrides, run_ranks, tmp_path_factory):
    runs = Runs(tiny_overrides, run_ranks, tmp_path_factory.mktemp("ranks"))
    micro = ["trainer.microbatch_size=2"]
    adamw = [*micro, "optim.name=adamw", "optim.weight_decay=0.1", "optim.max_grad_norm=0.05"]
    runs.here("one")
    runs.here("one-adamw", *adamw, "trainer.microbatch_size=null")
    usr2, term, kill = int(signal.SIGUSR2), int(signal.SIGTERM), int(signal.SIGKILL)
    runs.run(
        (
            2,
            runs.job("two", *micro),
            runs.job("two-adamw", *adamw),
            runs.job("two-stopped", *micro, signals=[(4, 1, usr2)]),
            runs.job("two-stopped", *micro),
            runs.job("moving", signals=[(2, 0, term)]),
            runs.job("two-played", *micro, *PLAYED, signals=[(4, 1, usr2)]),
            runs.job("two-played", *micro, *PLAYED),
        ),
        (1, runs.job("moving", signals=[(5, 0, term)])),
        (
            4,
            runs.job("four"),
            runs.job("moving"),
            runs.job("four-stopped", signals=[(4, 3, usr2)]),
            runs.job("four-stopped"),
        ),
        (2, runs.job("two-killed", *micro, signals=[(KILLED_AFTER, 1, kill)])),
        (2, runs.job("two-killed", *micro)),
    )
    return runs


@pytest.mark.parametrize(
    ("name", "reference"), [("two", "one"), ("four", "one"), ("moving", "one"), ("two-adamw", "one-adamw")]
)
def test_the_global_batch_decides_the_curve_and_the_weights(runs, name, reference):
    curve, expected = runs.curve(name), runs.curve(reference)
    assert len(expected) == NUM_STEPS // 2 and np.ptp(expected) > 1e-3
    np.testing.assert_allclose(curve, expected, rtol=2e-5)
    ours, theirs = runs.state(name), runs.state(reference)
    for key, value in theirs["loss"].items():
        torch.testing.assert_close(ours["loss"][key], value, rtol=1e-3, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")
    assert ours["optimizer"]["state"].keys() == theirs["optimizer"]["state"].keys()
    for index, moments in theirs["optimizer"]["state"].items():
        torch.testing.assert_close(ours["optimizer"]["state"][index], moments, rtol=1e-2, atol=1e-6)


def test_some_slices_lacked_a_game(store):
    lacking = 0
    for rank in range(4):
        replay = OfflineAtariReplay(store, batch_size=8, games=["Breakout", "Freeway"], rank=rank, world_size=4)
        lacking += sum(len(replay.sample()["game_id"].unique()) < 2 for _ in range(NUM_STEPS))
        replay.shutdown()
    assert lacking > 0


@pytest.mark.parametrize(
    ("name", "whole"),
    [("two-stopped", "two"), ("two-played", "two"), ("four-stopped", "four"), ("two-killed", "two")],
)
def test_a_run_continues_bit_for_bit(runs, name, whole):
    ours, theirs = runs.state(name)["loss"], runs.state(whole)["loss"]
    assert ours.keys() == theirs.keys()
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
    assert [step for step, _ in read_scalars(runs.folder / name)["objective"]] == [2, 4, 6, 8]


def test_processes_end_as_they_should(runs):
    assert runs.codes == [[0, 0], [0], [0, 0, 0, 0], [1, -signal.SIGKILL], [0, 0]]


def test_all_ranks_stop_at_the_step_after_the_signal_and_agree_whether_to_requeue(runs):
    for rank in range(2):
        stopped = "stopped at gradient step 5 of 8; the same command continues, requeue=True"
        assert runs.outcomes["two-stopped", rank] == [stopped, "trained"]
    assert runs.outcomes["moving", 1][0] == "stopped at gradient step 3 of 8; the same command continues, requeue=False"


def test_a_signal_to_a_rank_that_waits_stops_the_evaluation_of_rank_0(runs):
    for rank in range(2):
        stopped = "stopped at gradient step 4 of 8; the same command continues, requeue=True"
        assert runs.outcomes["two-played", rank] == [stopped, "trained"]
    rows = read_episodes(runs.folder / "two-played" / "scores.csv")
    assert [row.gradient_step for row in rows] == [4] * 4 + [8] * 4


def test_random_states_of_every_rank_are_kept_and_differ(runs):
    assert [len(runs.state(name)["rng"]) for name in ("one", "two", "four")] == [1, 2, 4]
    assert len({state.numpy().tobytes() for state in runs.state("four")["rng"]}) == 4


def test_damaged_checkpoints_stop_every_rank_with_the_same_words(runs):
    folder = runs.folder / "damaged" / "checkpoints"
    folder.mkdir(parents=True)
    content = bytearray(list_checkpoints(runs.folder / "two" / "checkpoints")[-1].read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "step_000000004.pt").write_bytes(content)
    runs.run((2, runs.job("damaged")))
    expected = f"none of the 1 checkpoints in {folder} can be read"
    assert [runs.outcomes["damaged", rank] for rank in range(2)] == [[expected], [expected]]
    assert runs.codes.pop() == [0, 0]
