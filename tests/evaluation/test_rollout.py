from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

from torchrl_sql.envs import AtariVector, Emulator
from torchrl_sql.evaluation.policies import ConstantPolicy, RandomPolicy
from torchrl_sql.evaluation.rollout import episode_seed, rollout
from torchrl_sql.modules import NetworkPolicy, make_q_actor

SHORT = Emulator(max_env_frames=240)
GAMES = ["Breakout", "Freeway"]
EPISODES = [(game, episode) for episode in range(3) for game in GAMES]


def key(result):
    return (result.game, result.episode, result.episode_seed, tuple(result.rewards), tuple(result.predictions))


def play(policy, episodes=EPISODES, **settings):
    return {key(r) for r in rollout(policy, GAMES, episodes, SHORT, **settings)}


def small_network():
    torch.manual_seed(0)
    return NetworkPolicy(make_q_actor(GAMES, encoder="resnet_small").eval(), GAMES)


def test_constant_policy_plays_as_the_emulator_does_alone():
    (result,) = rollout(
        ConstantPolicy(2), ["Freeway"], [("Freeway", 3)], SHORT, epsilon=0.0, seed=5, record=lambda *_: True
    )
    vector = AtariVector("Freeway", 1, SHORT)
    vector.reset(np.array([episode_seed(5, "Freeway", 3)]))
    rewards = []
    truncated = np.array([False])
    while not truncated[0]:
        _, reward, _, truncated = vector.step(np.array([2]))
        rewards.append(float(reward[0]))
    assert result.rewards == rewards and len(rewards) == result.length_agent_steps == 60
    assert result.episode_return == sum(rewards) > 0
    assert result.truncated and not result.terminated
    assert result.actions == [2] * 60 and not result.action_values and not result.predictions


def test_values_are_kept_at_the_first_and_every_fiftieth_step():
    (result,) = rollout(small_network(), GAMES, [("Freeway", 0)], SHORT, epsilon=1.0, record=lambda *_: True)
    assert len(set(result.actions)) == 3  # exploring: not the greedy actions only
    assert result.predictions == [(step, float(result.action_values[step][result.actions[step]])) for step in (0, 50)]


@pytest.mark.parametrize("kind", ["random", "network"])
def test_an_episode_does_not_depend_on_what_else_is_played(kind):
    policy = RandomPolicy(GAMES) if kind == "random" else small_network()
    parallel = play(policy, epsilon=0.2)
    assert len(parallel) == 6
    assert play(policy, epsilon=0.2, num_parallel=1) == parallel
    assert play(policy, epsilon=0.2, num_parallel=3) == parallel
    assert play(policy, epsilon=0.2, episodes=EPISODES[::-1]) == parallel
    assert play(policy, epsilon=0.2, episodes=[("Freeway", 2)]) < parallel
    assert play(policy, epsilon=0.2, seed=1).isdisjoint(parallel)


def test_more_episodes_than_places_and_several_forwards_a_group():
    policy = small_network()
    episodes = [("Breakout", episode) for episode in range(7)]
    few = play(policy, episodes=episodes, rows_per_forward=2, num_parallel=5)
    assert len(few) == 7 and few == play(policy, episodes=episodes[::-1], rows_per_forward=2, num_parallel=2)


def test_the_first_episodes_are_over_before_the_last_begin():
    begun, over_when_begun = [], []

    def begin(game, episode):
        begun.append(episode)
        over_when_begun.append(len(over))
        return False

    over = []
    episodes = [("Freeway", episode) for episode in range(12)]
    for result in rollout(ConstantPolicy(2), GAMES, episodes, SHORT, rows_per_forward=2, record=begin):
        over.append(result.episode)
    assert begun == list(range(12)) and sorted(over) == begun
    assert over_when_begun[:4] == [0] * 4 and over_when_begun[4:] == sorted(over_when_begun[4:])
    assert all(number - finished <= 4 for number, finished in enumerate(over_when_begun, start=1))


def test_what_is_raised_at_a_decision_ends_a_rollout():
    decisions = []

    def stop():
        decisions.append(1)
        if len(decisions) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(rollout(RandomPolicy(GAMES), GAMES, EPISODES, SHORT, on_decision=stop))
    assert len(decisions) == 5 and len(play(RandomPolicy(GAMES))) == 6  # the emulators it left in mid-step serve


def test_rows_of_a_forward_do_not_depend_on_the_others():
    torch.manual_seed(1)
    batch = TensorDict(
        observation=torch.randint(256, (16, 4, 84, 84), dtype=torch.uint8),
        game_id=torch.arange(16) % 2,
        uniform=torch.rand(16, dtype=torch.float64),
        batch_size=16,
    )
    policy, order = small_network(), torch.randperm(16)
    value = policy(batch.clone())["action_value"]
    assert torch.equal(policy(batch[order])["action_value"], value[order])
    batch["observation"][4:] = 0
    assert torch.equal(policy(batch)["action_value"][:4], value[:4])


@pytest.mark.parametrize(("has_parameters", "rows"), [(True, 16), (False, 4)])
def test_every_forward_has_the_same_shape(has_parameters, rows):
    seen = []

    def spy(game_id):
        seen.append(len(game_id))
        return torch.zeros_like(game_id)

    policy = TensorDictModule(spy, ["game_id"], ["action"])
    if has_parameters:
        policy.weight = torch.nn.Parameter(torch.zeros(1))
    assert len(play(policy)) == 6
    assert set(seen) == {rows}  # whatever is left to play


def test_exploration_is_uniform_over_the_legal_actions():
    (result,) = rollout(
        ConstantPolicy(0), ["Freeway"], [("Freeway", 0)], Emulator(max_env_frames=4_000), epsilon=0.5,
        record=lambda *_: True,
    )  # fmt: skip
    share = np.bincount(result.actions, minlength=18) / len(result.actions)
    np.testing.assert_allclose(share[[0, 2, 5]], [2 / 3, 1 / 6, 1 / 6], atol=0.05)  # NOOP, UP, DOWN
    assert share.sum() == pytest.approx(share[[0, 2, 5]].sum())


def test_any_stochastic_torchrl_policy_plays():
    from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, set_interaction_type
    from tensordict.nn.probabilistic import InteractionType

    policy = ProbabilisticTensorDictSequential(
        TensorDictModule(lambda observation: torch.zeros(len(observation), 18), ["observation"], ["logits"]),
        ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=torch.distributions.Categorical),
    )
    torch.manual_seed(0)
    with set_interaction_type(InteractionType.RANDOM):
        (result,) = rollout(policy, ["Pong"], [("Pong", 0)], SHORT, epsilon=0.0, record=lambda *_: True)
    assert len(set(result.actions)) > 10


def module(function, *outputs):
    return TensorDictModule(function, ["game_id"], list(outputs))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (module(lambda g: g + 18, "action"), r"action must be in 0..17, got 18..18"),
        (module(lambda g: g.float(), "action"), r"action must be integers \[4\], got torch.float32 \(4,\)"),
        (module(lambda g: g.unsqueeze(-1), "action"), r"action must be integers \[4\], got torch.int64 \(4, 1\)"),
        (
            module(lambda g: (g, torch.zeros(len(g), 4)), "action", "action_value"),
            "must have 18 actions, got action_value",
        ),
    ],
)
def test_policies_of_other_actions_are_refused(policy, message):
    with pytest.raises(ValueError, match=message):
        next(rollout(policy, ["Pong"], [("Pong", 0)]))


def test_bad_settings_are_refused_before_playing():
    with pytest.raises(ValueError, match=r"epsilon must be in \[0, 1\], got 2"):
        next(rollout(RandomPolicy(["Pong"]), ["Pong"], [("Pong", 0)], epsilon=2))
    for name in ("num_parallel", "rows_per_forward"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got -1"):
            next(rollout(RandomPolicy(["Pong"]), ["Pong"], [("Pong", 0)], **{name: -1}))
    with pytest.raises(ValueError, match=r"policy's games \(Pong\) or variations of them, got Breakout"):
        next(rollout(RandomPolicy(["Pong"]), ["Pong"], [("Breakout", 0)]))
