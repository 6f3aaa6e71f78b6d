"""What only a CUDA device can show."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives import HardUpdate

from torchrl_sql.modules import make_q_actor
from torchrl_sql.objectives import DistributionalCQLLoss
from torchrl_sql.training import Trainer
from torchrl_sql.training.parallel import SingleProcess
from torchrl_sql.training.ranks import process_group
from torchrl_sql.training.trainer import NonFiniteError
from torchrl_sql.training.writer import HostCopies

pytestmark = [
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.filterwarnings("ignore:torch._dynamo.config.inline_inbuilt:FutureWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # torch's own, as inductor is imported
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@contextmanager
def no_call_may_wait():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class NoReplay:
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def make_batch(batch_size: int, num_games: int) -> TensorDict:
    def observation() -> torch.Tensor:
        return torch.randint(256, (batch_size, 4, 84, 84), dtype=torch.uint8)

    source = {
        "observation": observation(),
        "game_id": torch.randint(num_games, (batch_size,)),
        "action": torch.randint(18, (batch_size,)),
        "steps_to_next_obs": torch.ones(batch_size, 1, dtype=torch.int64),
        "next": {
            "observation": observation(),
            "reward": torch.randn(batch_size, 1),
            "terminated": torch.rand(batch_size, 1) < 0.1,
        },
    }
    return TensorDict(source, [batch_size]).to("cuda")


# 16 samples of 8 games take one path through the heads, 96 the other.
@pytest.mark.parametrize("batch_size", [16, 96])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("target", "double_q"), [("c51", False), ("c51", True), ("hl_gauss", False), ("mse", True)])
def test_the_update_never_waits_for_the_device(batch_size, precision, target, double_q):
    num_atoms = None if target == "mse" else 51
    actor = make_q_actor(8, encoder="resnet_small", num_atoms=num_atoms, memory_format=torch.channels_last).to("cuda")
    loss = DistributionalCQLLoss(actor, target=target, double_q=double_q)
    optimizer = torch.optim.Adam(loss.parameters(), fused=True)
    updater = HardUpdate(loss, value_network_update_interval=0)
    trainer = Trainer(
        loss,
        None,
        optimizer,
        schedule=lambda step: 1.0,
        max_grad_norm=10.0,
        precision=precision,
    )
    batch = make_batch(batch_size, num_games=8)
    trainer.update(batch)  # optimizer state is made in the first step
    with no_call_may_wait():
        for _ in range(4):
            metrics = trainer.update(batch)
            updater.step()
    assert torch.isfinite(metrics["objective"])


@pytest.mark.parametrize("index", [0, 1])
def test_any_gpu_saves_what_it_holds_and_continues(index):
    if torch.cuda.device_count() <= index:
        pytest.skip(f"needs {index + 1} CUDA devices")
    device = torch.device("cuda", index)

    def make():
        torch.manual_seed(0)
        loss = DistributionalCQLLoss(make_q_actor(8, encoder="resnet_small", memory_format=torch.channels_last)).to(
            device
        )
        return Trainer(loss, NoReplay(), torch.optim.Adam(loss.parameters(), fused=True))

    with process_group(device) as ranks:
        assert ranks.device == device and torch.cuda.current_device() == index
        first, second = make(), make()
        batch = make_batch(16, num_games=8).to(device)
        first.update(batch)
        torch.cuda._sleep(100_000_000)  # the copy must wait for what is still queued on this device
        first.update(batch)
        torch.rand(3, device=device)
        state = HostCopies().copy(first.state_dict())
        second.load_state_dict(state)
        assert torch.equal(torch.cuda.get_rng_state(device), state["cuda_rng"][0])
        for ours, theirs in zip(second.loss.parameters(), first.loss.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_a_checkpoint_of_a_gpu_continues_on_the_cpu_and_back(monkeypatch):
    for backend in (torch.backends.cudnn, torch.backends.cuda.matmul):  # TF32 is further from the CPU than asked here
        monkeypatch.setattr(backend, "allow_tf32", False)

    def make(device, memory_format):
        torch.manual_seed(0)
        loss = DistributionalCQLLoss(make_q_actor(8, encoder="resnet_small", memory_format=memory_format)).to(device)
        return Trainer(loss, NoReplay(), torch.optim.Adam(loss.parameters(), fused=True))

    gpu = make("cuda", torch.channels_last)
    cpu = make("cpu", torch.contiguous_format)
    again = make("cuda", torch.channels_last)
    batches = [make_batch(16, num_games=8) for _ in range(4)]
    for batch in batches[:3]:
        gpu.update(batch)
    cpu.load_state_dict(HostCopies().copy(gpu.state_dict()))
    again.load_state_dict(cpu.state_dict())
    for trainer in (gpu, cpu, again):
        trainer.update(batches[3].to(trainer.device))
    for one, two, three in zip(*(trainer.loss.parameters() for trainer in (gpu, cpu, again)), strict=True):
        torch.testing.assert_close(one, three)
        torch.testing.assert_close(one.cpu(), two, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_recorded_step_is_the_step_also_after_a_checkpoint_and_never_waits(precision, compile):
    def make(**graph):
        torch.manual_seed(0)
        loss = DistributionalCQLLoss(make_q_actor(8, encoder="resnet_small", memory_format=torch.channels_last))
        loss = loss.to("cuda")
        updater = HardUpdate(loss, value_network_update_interval=0)
        return updater, Trainer(
            loss,
            NoReplay(),
            torch.optim.Adam(loss.parameters(), lr=1e-3, fused=True),
            schedule=lambda step: 1 / (1 + step),
            max_grad_norm=1.0,
            precision=precision,
            call=SingleProcess(loss, compile=compile),
            **graph,
        )

    batches = [make_batch(16, num_games=8) for _ in range(9)]
    norms = []
    for graph in (False, True):
        updater, trainer = make(graph=graph)
        norms.append([])
        for index, batch in enumerate(batches):
            if index == 6 and graph:  # two recorded steps behind
                state = HostCopies().copy(trainer.state_dict())
                updater, trainer = make(graph=True)
                trainer.load_state_dict(state)
            with no_call_may_wait() if index == 5 else nullcontext():
                norms[-1].append(trainer.update(batch)["grad_norm"])
            if index == 4:
                updater.step()
    torch.testing.assert_close(
        *(torch.stack(each) for each in norms), rtol=0.1 if precision == "bf16" else 0.02, atol=0
    )


def test_a_recorded_step_leaves_out_a_broken_gradient():
    torch.manual_seed(0)
    loss = DistributionalCQLLoss(make_q_actor(8, encoder="resnet_small")).to("cuda")
    HardUpdate(loss, value_network_update_interval=0)
    trainer = Trainer(loss, NoReplay(), torch.optim.Adam(loss.parameters(), fused=True), graph=True)
    batch = make_batch(16, num_games=8)
    for _ in range(5):
        trainer.update(batch)
    before = [parameter.clone() for parameter in loss.parameters()]
    batch["next", "reward"][0] = torch.nan
    trainer.update(batch)
    with pytest.raises(NonFiniteError, match="the gradient of step 6 is not finite"):
        trainer.check_gradients()
    assert all(torch.equal(parameter, old) for parameter, old in zip(loss.parameters(), before, strict=True))
