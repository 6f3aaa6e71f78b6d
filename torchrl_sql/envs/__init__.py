"""The emulator, and behaviour policies that collect data in it."""

from torchrl_sql.envs.atari import AtariEnv, AtariVector, Emulator, replay_episode
from torchrl_sql.envs.behaviours import SKILLS, Behaviour, SkillMixture, weak_skills
from torchrl_sql.envs.collector import collect
from torchrl_sql.envs.context import PolicyInputs, first_context, next_context
from torchrl_sql.envs.lockstep import EmulatorError, Lockstep, PlayedEpisode

__all__ = [
    "SKILLS",
    "AtariEnv",
    "AtariVector",
    "Behaviour",
    "Emulator",
    "EmulatorError",
    "Lockstep",
    "PlayedEpisode",
    "PolicyInputs",
    "SkillMixture",
    "collect",
    "first_context",
    "next_context",
    "replay_episode",
    "weak_skills",
]
