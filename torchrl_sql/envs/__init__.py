"""The emulator, and behaviour policies that collect data in it."""

from torchrl_sql.envs.atari import AtariEnv, AtariVector, replay
from torchrl_sql.envs.behaviour import SKILLS, WEAK_SKILLS, Component, SkillMixture
from torchrl_sql.envs.collect import collect

__all__ = ["SKILLS", "WEAK_SKILLS", "AtariEnv", "AtariVector", "Component", "SkillMixture", "collect", "replay"]
