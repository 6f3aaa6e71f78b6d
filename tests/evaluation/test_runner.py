from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensordict.nn import TensorDictModule, TensorDictSequential

from torchrl_sql.envs import AtariVector, Emulator
from torchrl_sql.evaluation.episodes import EpisodeResult, read_calibration, read_episodes
from torchrl_sql.evaluation.policies import ConstantPolicy, RandomPolicy
from torchrl_sql.evaluation.protocol import AgentId, Protocol, Share
from torchrl_sql.evaluation.rollout import Rollout
from torchrl_sql.evaluation.runner import _calibration_points, evaluate
from torchrl_sql.evaluation.tables import TableWriter
from torchrl_sql.modules import NetworkPolicy, make_q_actor
from torchrl_sql.provenance import software_versions

GAMES = ("Breakout", "Freeway")
AGENT = AgentId(name="a", gradient_step=7)
SHORT = Protocol(emulator=Emulator(max_env_frames=240), num_episodes=1)


def test_calibration_by_hand():
    row = EpisodeResult(
        agent="a", seed=1, game="Pong", episode=0, episode_seed=5, episode_return=100.0, length_agent_steps=4,
        terminated=True, truncated=False, gradient_step=7, epsilon=0.0, sticky=0.25, max_env_frames=100,
        decoding="greedy",
    )  # fmt: skip
    played = Rollout("Pong", 0, 5, rewards=[0.0, 50.0, -3.0, 1.0], predictions=[(0, 0.5), (2, 0.25)])
    first, second = _calibration_points(row, played, gamma=0.5)
    # 0 + 0.5 * 1 + 0.25 * (-1) + 0.125 * 1, and -1 + 0.5 * 1
    assert (first.agent_step, first.predicted_value, first.discounted_return) == (0, 0.5, 0.375)
    assert (second.agent_step, second.predicted_value, second.discounted_return) == (2, 0.25, -0.5)
    assert (first.agent, first.seed, first.game, first.episode_seed, first.truncated) == ("a", 1, "Pong", 5, False)


def test_without_a_folder_only_the_result_is_returned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = evaluate(
        ConstantPolicy(2), "Freeway", Protocol(emulator=Emulator(max_env_frames=400), epsilon=0, num_episodes=2)
    )
    assert [(row.game, row.episode, row.length_agent_steps, row.truncated) for row in rows] == [
        ("Freeway", 0, 100, True),
        ("Freeway", 1, 100, True),
    ]
    assert all(row.episode_return > 0 for row in rows) and not list(tmp_path.iterdir())


def network():
    torch.manual_seed(0)
    return NetworkPolicy(make_q_actor(GAMES, encoder="resnet_small").eval(), GAMES)


def test_shares_and_interruptions_end_in_the_same_tables(tmp_path, monkeypatch):
    settings = {"protocol": replace(SHORT, num_episodes=3, epsilon=0.3), "gamma": 0.99, "agent": AGENT}
    whole = evaluate(network(), GAMES, folder=tmp_path / "whole", **settings)
    assert whole == read_episodes(tmp_path / "whole" / "scores.csv") and len(whole) == 6
    predicted = read_calibration(tmp_path / "whole" / "calibration.csv")
    assert [point.agent_step for point in predicted] == [0, 50] * 6
    assert all(point.truncated for point in predicted)

    parts = tmp_path / "parts"
    for index in range(2):
        mine = evaluate(network(), GAMES, folder=parts, share=Share(index, 2), **settings)
        assert len(mine) == 3
    assert sorted(path.name for path in parts.glob("*.csv")) == [
        f"{name}.part-{number}-of-2.csv" for name in ("calibration", "scores") for number in (1, 2)
    ]
    versions = [json.loads(path.read_text()) for path in parts.glob("evaluation_versions*.json")]
    assert versions == [[software_versions()]] * 2
    for path in parts.glob("evaluation_versions*.json"):
        path.unlink()
    assert read_episodes(parts / "scores.csv") == whole
    assert read_calibration(parts / "calibration.csv") == predicted

    interrupted = tmp_path / "interrupted"
    append = TableWriter.append

    def killed(self, rows):
        if "scores" in self._file.name and len(read_episodes(interrupted / "scores.csv")) == 2:
            raise KeyboardInterrupt
        append(self, rows)

    monkeypatch.setattr(TableWriter, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(network(), GAMES, folder=interrupted, **settings)
    monkeypatch.undo()
    kept = read_episodes(interrupted / "scores.csv")
    assert len(kept) == 2 and set(kept) < set(whole)
    # Continued in another split, over what a lone process left.
    for index in range(3):
        evaluate(network(), GAMES, folder=interrupted, share=Share(index, 3), **settings)
    assert read_episodes(interrupted / "scores.csv") == whole
    assert read_calibration(interrupted / "calibration.csv") == predicted
    files = {path: path.read_bytes() for path in interrupted.iterdir()}
    assert evaluate(network(), GAMES, folder=interrupted, **settings) == whole
    assert all(path.read_bytes() == content for path, content in files.items())


def test_several_agents_and_steps_share_a_table_and_an_episode_is_recorded_again_on_request(tmp_path):
    for step in (1, 2):
        evaluate(RandomPolicy(GAMES), GAMES, SHORT, folder=tmp_path, agent=replace(AGENT, gradient_step=step))
    recorded = []
    evaluate(
        RandomPolicy(GAMES), GAMES, replace(SHORT, num_episodes=2), folder=tmp_path, agent=AGENT,
        recorded=[("Freeway", 0)], on_recorded=recorded.append,
    )  # fmt: skip
    rows = read_episodes(tmp_path / "scores.csv")
    assert [(row.gradient_step, row.game, row.episode) for row in rows] == [
        (1, "Breakout", 0), (1, "Freeway", 0), (2, "Breakout", 0), (2, "Freeway", 0),
        (7, "Breakout", 0), (7, "Breakout", 1), (7, "Freeway", 0), (7, "Freeway", 1),
    ]  # fmt: skip
    assert [(episode.game, episode.episode, len(episode.actions)) for episode in recorded] == [("Freeway", 0, 60)]
    assert not (tmp_path / "calibration.csv").exists()


def test_other_weights_in_one_folder_are_refused_and_a_policy_without_any_needs_a_name(tmp_path):
    settings = {"protocol": SHORT, "folder": tmp_path}
    (row,) = evaluate(network(), "Breakout", **settings)
    assert row.agent == "policy" and row.checkpoint.startswith("sha256:")
    other = network()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(ValueError, match=r"holds episodes of policy .* choose another folder"):
        evaluate(other, "Breakout", **settings)
    with pytest.raises(ValueError, match="agent must be given with a folder for a policy without parameters"):
        evaluate(ConstantPolicy(2), "Breakout", **settings)


def test_an_episode_that_ends_otherwise_when_played_again_is_refused(tmp_path):
    settings = {"protocol": SHORT, "folder": tmp_path, "agent": AGENT}
    (row,) = evaluate(RandomPolicy(["Breakout"]), "Breakout", **settings)
    (tmp_path / "scores.csv").unlink()
    with TableWriter(tmp_path / "scores.csv", EpisodeResult) as writer:
        writer.append([replace(row, episode_return=123.0)])
    recorded = []
    again = {"recorded": [("Breakout", 0)], "on_recorded": recorded.append}
    with pytest.raises(ValueError, match=r"must end as the table says, .*return=123.0.*, got .*return=[01]\.0"):
        evaluate(RandomPolicy(["Breakout"]), "Breakout", **settings, **again)
    assert not recorded


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"protocol": replace(SHORT, epsilon=0.5)},
            r"holds episodes at epsilon 0.001, sticky 0.25, frame limit 240, wanted epsilon 0.5, sticky 0.25",
        ),
        (
            {"protocol": replace(SHORT, emulator=Emulator(sticky_action_probability=0.0, max_env_frames=240))},
            "wanted epsilon 0.001, sticky 0, frame limit 240: scores of different protocols",
        ),
        (
            {"protocol": replace(SHORT, emulator=Emulator(max_env_frames=80)), "agent": AgentId(name="b")},
            "wanted epsilon 0.001, sticky 0.25, frame limit 80",
        ),
        (
            {"agent": replace(AGENT, checkpoint="sha256:ff")},
            r"holds episodes of a .* from checkpoint 'none' .* wanted checkpoint 'sha256:ff'",
        ),
        ({"protocol": replace(SHORT, seed=1)}, r"with evaluation seed 0, wanted .* seed 1"),
        (
            {"policy_games": ["Freeway"]},
            r"games must be among those the policy has \(Freeway\) or variations of them, got \['Breakout'\]",
        ),
        ({"games": "Breakut"}, "did you mean Breakout"),
    ],
)
def test_conflicts_leave_the_table_as_it_was(tmp_path, change, message):
    settings = {"games": "Breakout", "protocol": SHORT, "folder": tmp_path, "agent": AGENT}
    evaluate(RandomPolicy(["Breakout"]), **settings)
    before = (tmp_path / "scores.csv").read_bytes()
    with pytest.raises(ValueError, match=message):
        evaluate(RandomPolicy(["Breakout"]), **settings | change)
    assert (tmp_path / "scores.csv").read_bytes() == before


def test_table_of_another_version_is_refused(tmp_path):
    (row,) = evaluate(RandomPolicy(["Breakout"]), "Breakout", SHORT, folder=tmp_path, agent=AGENT)
    (tmp_path / "scores.csv").unlink()
    with TableWriter(tmp_path / "scores.csv", EpisodeResult) as writer:
        writer.append([replace(row, episode_seed=row.episode_seed + 1)])
    with pytest.raises(ValueError, match="was written by another version"):
        evaluate(RandomPolicy(["Breakout"]), "Breakout", replace(SHORT, num_episodes=2), folder=tmp_path, agent=AGENT)


def test_two_processes_cannot_write_one_part(tmp_path):
    with (
        TableWriter(tmp_path / "scores.csv", EpisodeResult),
        pytest.raises(BlockingIOError, match="another evaluation"),
    ):
        evaluate(RandomPolicy(["Breakout"]), "Breakout", SHORT, folder=tmp_path, agent=AGENT)


def test_a_policy_plays_each_game_as_its_own():
    torch.manual_seed(0)
    actor = make_q_actor(GAMES, encoder="resnet_small").eval()
    actor.module[0].module.heads.bias.data[1, 2::18] += torch.arange(51.0)  # Freeway's head alone goes up
    policy = NetworkPolicy(actor, GAMES)
    protocol = Protocol(emulator=Emulator(max_env_frames=400), epsilon=0, num_episodes=1)
    (row,) = evaluate(policy, "Freeway", protocol)
    assert (row,) == tuple(evaluate(ConstantPolicy(2), "Freeway", protocol)) and row.episode_return > 0
    assert [row.game for row in evaluate(policy, "Freeway-m1", protocol)] == ["Freeway-m1"]
    assert (row,) == tuple(evaluate(TensorDictSequential(policy), "Freeway", protocol))
    with pytest.raises(ValueError, match=r"the policy has \(Breakout, Freeway\) or variations of them, got \['Pong'\]"):
        evaluate(policy, ["Pong", "Freeway"], protocol)


def test_a_failing_emulator_ends_the_evaluation_with_its_error(monkeypatch):
    def broken(self, seeds):
        raise RuntimeError("no such ROM")

    monkeypatch.setattr(AtariVector, "reset", broken)
    with pytest.raises(RuntimeError, match="no such ROM"):
        evaluate(RandomPolicy(["Breakout"]), "Breakout", SHORT)


def test_a_plain_tensordict_module_is_a_policy():
    policy = TensorDictModule(lambda observation: torch.full((len(observation),), 2), ["observation"], ["action"])
    policy.games = 2  # of its own, whatever it counts
    assert evaluate(policy, "Freeway", SHORT) == evaluate(ConstantPolicy(2), "Freeway", SHORT)


def test_the_example_of_the_documentation_runs(capsys):
    page = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    exec(compile(code, str(page), "exec"), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["Freeway", "Freeway"]
