"""Runs compiled by Inductor, as users' are: the numbers of eager ones, in one process and in two.

One network of few kernels and one size of batch for all, so that they are compiled once: most of the time goes there.
"""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch

from torchrl_sql.files import KERNELS_VARIABLE
from torchrl_sql.modules import make_q_actor
from torchrl_sql.objectives import DistributionalCQLLoss
from torchrl_sql.training.checkpoint import list_checkpoints, load_checkpoint
from torchrl_sql.training.logs import read_scalars
from torchrl_sql.training.parallel import compiler_options

NAMES = ("off", "kernels", "graph", "kernels-of-two", "graph-of-two")


@pytest.fixture(scope="module")
def runs(tiny_overrides, run_ranks, tmp_path_factory):
    """The folder of the runs. Of one process they share kernels as a run's starts do, of two as the runs of a study."""
    folder = tmp_path_factory.mktemp("compiled")

    def job(name, *signals):
        (folder / name).mkdir(exist_ok=True)
        if not (folder / name / "compiled").exists() and not name.endswith("-of-two"):
            (folder / name / "compiled").symlink_to(folder / "shared", target_is_directory=True)
        settings = [
            "trainer.num_gradient_steps=8",
            "trainer.microbatch_size=4",
            "data.games=[Breakout]",
            "model.encoder=nature",
        ]
        overrides = [*tiny_overrides(folder / name), *settings, f"trainer.compile={name.split('-')[0]}"]
        return {"name": name, "overrides": overrides, "signals": list(signals)}

    (folder / "shared").mkdir()
    stopped = job("kernels", (5, 0, int(signal.SIGTERM)))
    phases = [
        (1, job("off"), stopped),
        (1, job("kernels"), job("graph")),
        (2, job("graph-of-two"), job("kernels-of-two")),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes of its own
        patch.delenv(KERNELS_VARIABLE, raising=False)
        groups = [{"name": str(n), "world_size": size, "jobs": jobs} for n, (size, *jobs) in enumerate(phases)]
        run_ranks(groups[:2], timeout=900)
        assert list((folder / "shared").rglob("*.so"))
        patch.setenv(KERNELS_VARIABLE, str(folder / "shared"))
        run_ranks(groups[2:], timeout=900)
    return folder


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_compiled_run_has_the_numbers_of_an_eager_one(runs, name):
    curves = [np.array([value for _, value in read_scalars(runs / run)["objective"]]) for run in (name, "off")]
    assert len(curves[1]) == 4 and np.ptp(curves[1]) > 1e-3
    np.testing.assert_allclose(*curves, rtol=2e-5)
    ours, theirs = (
        load_checkpoint(list_checkpoints(runs / run / "checkpoints")[-1])["trainer"] for run in (name, "off")
    )
    assert ours["loss"].keys() == theirs["loss"].keys()
    for key, value in theirs["loss"].items():
        torch.testing.assert_close(ours["loss"][key], value, rtol=1e-3, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_the_environment_says_where_kernels_are(runs):
    assert not (runs / "kernels-of-two" / "compiled").exists()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, on the way to a CPU's kernels
@pytest.mark.parametrize(
    ("device", "encoder", "options"),
    [
        ("cpu", "resnet_tiny", {"layout_optimization": False}),
        ("cuda", "resnet_tiny", {"triton.persistent_reductions": False}),
        ("cuda", "nature", {}),
    ],
)
def test_the_compiler_is_told_what_suits_device_and_network(device, encoder, options):
    loss = DistributionalCQLLoss(make_q_actor(("Pong",), encoder=encoder))
    assert compiler_options(loss, device) == options
    assert torch.compile(lambda x: x.sum(), options=options)(torch.ones(3)) == 3  # it knows their names
