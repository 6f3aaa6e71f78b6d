"""Frames on disk to TensorDict batches: store, storage, sampler, replay buffer."""

from torchrl_sql.data.convert import convert
from torchrl_sql.data.damage import verify
from torchrl_sql.data.export import export_memmap
from torchrl_sql.data.growing import GrowingStore
from torchrl_sql.data.index import Subset
from torchrl_sql.data.recording import Recording
from torchrl_sql.data.replay import OfflineAtariReplay
from torchrl_sql.data.replay_log import export_dqn_replay
from torchrl_sql.data.sampler import GameMixtureSampler, GameMixtureSamplerWithoutReplacement
from torchrl_sql.data.sequences import AtariSequenceStorage
from torchrl_sql.data.storage import AtariFrameStorage
from torchrl_sql.data.store import FrameStore
from torchrl_sql.data.summary import mean_frame, summarise
from torchrl_sql.data.writer import RecordingWriter

__all__ = [
    "AtariFrameStorage",
    "AtariSequenceStorage",
    "FrameStore",
    "GameMixtureSampler",
    "GameMixtureSamplerWithoutReplacement",
    "GrowingStore",
    "OfflineAtariReplay",
    "Recording",
    "RecordingWriter",
    "Subset",
    "convert",
    "export_dqn_replay",
    "export_memmap",
    "mean_frame",
    "summarise",
    "verify",
]
