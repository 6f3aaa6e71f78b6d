"""A report at paper scale, made up: 40 games, three sizes, three seeds, checkpoints."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.builders import calibration_point, episode, returns
from torchrl_sql.games import GAMES as ALL_GAMES
from torchrl_sql.games import TRAIN_40
from torchrl_sql.report import Agent, Clip, Curve, GameData, ReportData

SIZES = {"scaled_ql_resnet101": 79_456_000, "scaled_ql_resnet50": 60_123_000, "scaled_ql_resnet34": 31_210_000}


def paper_agents():
    return [
        *(
            Agent(agent=name, label=f"Scaled QL {size // 10**6}M", num_parameters=size, x=size, family="Scaled QL")
            for name, size in SIZES.items()
        ),
        Agent(agent="bc_resnet101", label="BC greedy", num_parameters=76_000_000),
        Agent(agent="bc_resnet101", label="BC sampled", decoding="sampled", num_parameters=76_000_000),
    ]


def gif(width=48, height=60, frames=8):
    images = []
    for number in range(frames):
        image = Image.new("P", (width, height), 0)
        ImageDraw.Draw(image).rectangle((4 * number, 20, 4 * number + 8, 28), fill=1)
        image.putpalette([20, 20, 20, 240, 240, 240])
        images.append(image)
    file = io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:])
    return file.getvalue()


def paper_episodes(generator, num_episodes, num_checkpoint_episodes, steps):
    """Returns whose means follow size, steps and game; a fifth of the episodes of one game is cut."""
    strength = {**dict(zip(SIZES, (0.75, 0.6, 0.42), strict=True)), "bc_resnet101": 0.35}
    ease = {game: float(np.exp(generator.normal(-0.1, 0.9))) for game in TRAIN_40}
    rows = []
    for agent in paper_agents():
        agent_steps = steps if agent.decoding == "greedy" else steps[-1:]
        for seed in range(3):
            for game in TRAIN_40:
                zero = ALL_GAMES[game].random_score
                one = ALL_GAMES[game].human_score or ALL_GAMES[game].dqn_score
                luck = generator.normal(1, 0.08)
                for step in agent_steps:
                    share = strength[agent.agent] * ease[game] * luck * (step / steps[-1]) ** 0.4
                    share *= 0.8 if agent.decoding == "sampled" else 1
                    count = num_episodes if step == steps[-1] else num_checkpoint_episodes
                    scores = zero + (one - zero) * share * generator.gamma(4, 1 / 4, count)
                    for number, value in enumerate(scores.round(1).tolist()):
                        cut = game == "Freeway" and number % 5 == 0
                        rows.append(
                            episode(
                                agent.agent, game, value, seed=seed, episode=number, episode_seed=number,
                                length_agent_steps=1200, terminated=not cut, truncated=cut, gradient_step=step,
                                decoding=agent.decoding, checkpoint=f"step_{step:09d}.pt sha256:{seed:016x}",
                            )
                        )  # fmt: skip
    return rows


def paper_calibration(generator, step):
    points = []
    for name in SIZES:
        for game in TRAIN_40[:-1]:  # none were recorded in the last game
            level, optimism = generator.uniform(0.5, 6), generator.normal(0.6, 0.5)
            for number in range(6):
                for t in range(0, 600, 50):
                    value = level * generator.gamma(6, 1 / 6)
                    points.append(
                        calibration_point(
                            name, game, gradient_step=step, episode_seed=number, agent_step=t,
                            predicted_value=value + optimism, discounted_return=value * generator.uniform(0.6, 1.3),
                            truncated=game == "Freeway" and number % 5 == 0,
                        )
                    )  # fmt: skip
    return points


def paper_report(*, num_episodes, num_checkpoint_episodes, num_logged, num_steps=5):
    generator = np.random.default_rng(0)
    steps = [6_250_000 * (k + 1) // num_steps for k in range(num_steps)]
    logged = np.linspace(0, steps[-1], num_logged)
    names = [*SIZES, "bc_resnet101"]
    labels = {agent.agent: agent.label.removesuffix(" sampled") for agent in reversed(paper_agents())}
    curves = [
        Curve(
            agent=name, label=labels[name], metric=metric, seed=seed, gradient_steps=logged,
            values=level * (1 + np.exp(-logged / 1e6)) + generator.normal(0, 0.02, num_logged),
        )
        for metric, level in (("TD loss (nats)", 1.5), ("Q of the data's actions", 3.0), ("Gradient norm", 0.4))
        for name in names
        for seed in range(3)
    ]  # fmt: skip
    data = [
        GameData(
            game=game, behaviour_text="DQN-Replay, run 1, checkpoints 0 to 9.", num_transitions=10_000_000,
            num_episodes=9_000, bytes_per_transition=180.0, behaviour=returns(20, 5, 9_000),
            behaviours={}, action_counts=list(range(18)), rewards="clipped",
        )
        for game in TRAIN_40
    ]  # fmt: skip
    settings = {f"section.setting_{k}": k for k in range(60)}
    return ReportData(
        title="Scaled Q-learning on 40 games (made up)",
        introduction=["Every number on this page is made up, to see what a page of this size looks like."],
        games=TRAIN_40,
        x="parameters",
        agents=paper_agents(),
        episodes=paper_episodes(generator, num_episodes, num_checkpoint_episodes, steps),
        calibration=paper_calibration(generator, steps[-1]),
        game_data=data,
        curves=curves,
        clips=[Clip(game=game, caption="First episode of seed 0, not selected.", data=gif()) for game in TRAIN_40],
        settings={label: settings for label in labels.values()},
        versions={"torch": "2.13.0", "python": "3.11.9"},
    )


@pytest.fixture(scope="session")
def paper_scale_report():
    """Small enough to be quick: 4 episodes per game, seed and final checkpoint, 2 at earlier ones."""
    return paper_report(num_episodes=4, num_checkpoint_episodes=2, num_logged=300)
