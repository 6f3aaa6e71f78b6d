"""The examples, at sizes that take seconds, judged by what they end in."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
# Importing TorchRL's collectors warns about TorchRL's own classes.
pytestmark = pytest.mark.filterwarnings("ignore:Creating .* inherits from WeightUpdaterBase:DeprecationWarning")


@pytest.fixture(autouse=True)
def _one_thread():
    """Networks this small are no faster with two."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def load(name: str) -> ModuleType:
    (path,) = (path for path in EXAMPLES if path.stem == name)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_fits_on_a_screen(path):
    assert len(path.read_text().splitlines()) <= 60


def test_offline_cartpole_is_better_than_its_data():
    """Healthy runs end at 5 to 20 times the data's return. Without bootstrapping, without the TD term, without
    ``terminated`` or with one head for both, at least one pole stays at 0.4 to 1.5 times."""
    for behaviour, learned in load("offline_cartpole").main(episodes=4):
        assert 15 < behaviour < 30  # a random policy's
        assert learned > 3 * behaviour


def test_discrete_cql_learns_from_our_replay(tmp_path):
    history = load("torchrl_discrete_cql").main(tmp_path / "store", steps=4_000, gradient_steps=150)
    assert all(map(math.isfinite, history["loss_qvalue"]))
    assert history["loss_cql"][0] > math.log(12)
    # It has found the seven of the 18 actions that are ever played, and which of them are played more.
    assert mean(history["loss_cql"][-30:]) < math.log(7)


def test_online_atari_learns_what_its_policy_is_worth():
    log = load("online_atari").main(agent_steps=1_600)
    reward = mean([row["reward"] for row in log])
    assert 0.01 < reward < 0.1
    # Five steps' rewards alone would be worth at most 5 * reward; the rest is bootstrapped.
    assert mean([row["q_data"] for row in log[-3:]]) > 10 * reward
    assert log[-1]["epsilon"] < 0.2 < log[0]["epsilon"]
