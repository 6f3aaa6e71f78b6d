from __future__ import annotations

import io
import time
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Categorical
from torchrl.modules import MLP, DistributionalQValueActor
from torchrl.objectives import HardUpdate

from torchrl_sql.objectives import DistributionalCQLLoss
from torchrl_sql.training import Trainer
from torchrl_sql.training.parallel import SingleProcess
from torchrl_sql.training.trainer import NonFiniteError


class ListReplay:
    """Delivers given batches in turn."""

    def __init__(self, batches):
        self.batches = batches
        self.position = 0

    def sample(self):
        batch = self.batches[self.position % len(self.batches)]
        self.position += 1
        return batch.clone()

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]

    def seek(self, step):
        self.position = step


def make_batch(seed, reward=None):
    generator = torch.Generator().manual_seed(seed)
    return TensorDict(
        observation=torch.randn(6, 4, generator=generator),
        action=torch.randint(3, (6,), generator=generator),
        next=TensorDict(
            observation=torch.randn(6, 4, generator=generator),
            reward=torch.randn(6, 1, generator=generator) if reward is None else torch.full((6, 1), reward),
            terminated=torch.zeros(6, 1, dtype=torch.bool),
            batch_size=6,
        ),
        batch_size=6,
    )


def make_trainer(batches=None, *, lr=0.1, optimizer=torch.optim.SGD, **kwargs):
    torch.manual_seed(0)
    network = MLP(in_features=4, out_features=(11, 3), num_cells=[16], activation_class=nn.ReLU)
    actor = DistributionalQValueActor(network, spec=Categorical(3), support=torch.linspace(-5, 5, 11))
    loss = DistributionalCQLLoss(actor)
    return Trainer(
        loss,
        ListReplay(batches or [make_batch(s) for s in range(5)]),
        optimizer(list(loss.parameters()), lr=lr),
        target_updater=HardUpdate(loss, value_network_update_interval=0),
        **kwargs,
    )


def weights(trainer, which="value_network_params"):
    return getattr(trainer.loss, which).data.flatten_keys().to_dict()


def test_a_state_given_to_another_trainer_is_not_shared_with_it():
    first, second = (make_trainer(optimizer=torch.optim.Adam) for _ in range(2))
    first.update(make_batch(0))
    second.load_state_dict(first.state_dict())
    first.update(make_batch(1))
    assert {int(state["step"]) for state in second.optimizer.state.values()} == {1}


def test_update_is_sgd_on_the_sum_of_losses():
    trainer = make_trainer(lr=0.1)
    batch = make_batch(0)
    losses = trainer.loss(batch.clone())
    (losses["loss_qvalue"] + losses["loss_cql"]).backward()
    name, parameter = next((n, p) for n, p in trainer.loss.named_parameters() if p.grad is not None and p.ndim == 2)
    expected = (parameter - 0.1 * parameter.grad).detach().clone()
    trainer.optimizer.zero_grad()
    metrics = trainer.update(batch)
    torch.testing.assert_close(dict(trainer.loss.named_parameters())[name], expected)
    assert metrics["objective"].item() == pytest.approx((losses["loss_qvalue"] + losses["loss_cql"]).item())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"precision": "bfloat16"}, "precision must be one of 'fp32', 'bf16', got 'bfloat16'"),
        ({"microbatch_size": 0}, "microbatch_size must be at least 1, got 0"),
        ({"max_grad_norm": -1.0}, r"max_grad_norm must be in \(0, inf\), got -1.0"),
        ({"max_grad_norm": float("nan")}, r"max_grad_norm must be in \(0, inf\), got nan"),
        ({"target_update_interval": 0}, "target_update_interval must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be_trained_with_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**setting)


def test_losses_that_are_no_means_or_have_no_entries_are_refused():
    trainer = make_trainer()
    with pytest.raises(ValueError, match="log_interval must be at least 1, got 0"):
        next(trainer.train(1, log_interval=0))
    trainer.loss.reduction = "sum"
    with pytest.raises(ValueError, match=r"the loss must have reduction='mean', .*, got 'sum'"):
        Trainer(trainer.loss, trainer.replay, trainer.optimizer)
    trainer.loss.reduction, trainer.loss.keep = "mean", ["features"]
    with pytest.raises(ValueError, match=r"the loss must give scalars, got keep=\['features'\]"):
        Trainer(trainer.loss, trainer.replay, trainer.optimizer)
    nothing = Trainer(trainer.loss.value_network, trainer.replay, trainer.optimizer)
    with pytest.raises(ValueError, match=r"the loss must have entries loss_\*, got \["):
        nothing.update(make_batch(0))


def test_target_is_copied_at_exactly_every_interval():
    trainer = make_trainer(target_update_interval=3)
    history = []
    for _ in trainer.train(6, log_interval=1):
        online, target = weights(trainer), weights(trainer, "target_value_network_params")
        history.append(all(torch.equal(online[key], target[key]) for key in online))
    assert history == [False, False, True, False, False, True]


def test_gradients_are_clipped_and_their_norm_reported_before():
    free, clipped = make_trainer(), make_trainer(max_grad_norm=1e-3)
    metrics = [trainer.update(make_batch(0)) for trainer in (free, clipped)]
    torch.testing.assert_close(metrics[0]["grad_norm"], metrics[1]["grad_norm"])
    norm = torch.stack([p.grad.norm() for p in clipped.loss.parameters() if p.grad is not None]).norm()
    assert metrics[0]["grad_norm"] > 1e-2 and norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_train_reports_means_of_each_interval_and_stops_where_told():
    stepped, looped = (make_trainer(target_update_interval=10) for _ in range(2))
    single = [stepped.update(make_batch(s % 5))["loss_qvalue"].item() for s in range(7)]
    results = list(looped.train(7, log_interval=3))
    expected = [sum(single[:3]) / 3, sum(single[3:6]) / 3, single[6]]
    assert [r["loss_qvalue"] for r in results] == pytest.approx(expected, rel=1e-5)
    assert looped.step == 7 and list(looped.train(7, log_interval=3)) == []


def test_resuming_from_a_state_is_exact():
    whole = make_trainer(target_update_interval=4)
    list(whole.train(11, log_interval=1))
    first = make_trainer(target_update_interval=4)
    list(first.train(6, log_interval=1))
    second = make_trainer(target_update_interval=4)
    second.load_state_dict(first.state_dict())
    list(second.train(11, log_interval=1))
    for which in ("value_network_params", "target_value_network_params"):
        ours, theirs = weights(second, which), weights(whole, which)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("layouts", [("channels_last", "contiguous_format"), ("contiguous_format", "channels_last")])
def test_a_state_continues_the_same_in_another_memory_layout(layouts):
    def make(layout):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(-3), nn.Linear(8 * 9, 33), nn.Unflatten(-1, (11, 3)))
        actor = DistributionalQValueActor(
            network.to(memory_format=getattr(torch, layout)), spec=Categorical(3), support=torch.linspace(-5, 5, 11)
        )
        loss = DistributionalCQLLoss(actor)
        return Trainer(loss, ListReplay(batches), torch.optim.Adam(list(loss.parameters()), lr=0.1, fused=True))

    batches = [make_batch(seed) for seed in range(5)]
    for seed, batch in enumerate(batches):
        for part in (batch, batch["next"]):
            part["observation"] = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(seed))
    first, same, other = make(layouts[0]), make(layouts[0]), make(layouts[1])
    list(first.train(4, log_interval=4))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)  # keeps strides
    for trainer in (same, other):
        file.seek(0)
        trainer.load_state_dict(torch.load(file, weights_only=True))
        for parameter, state in trainer.optimizer.state.items():
            assert state["exp_avg"].stride() == state["exp_avg_sq"].stride() == parameter.stride()
        trainer.update(batches[4])
    ours, theirs = weights(other), weights(same)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6)


def test_each_step_has_its_learning_rate_also_after_resuming_and_rewinding():
    trainer, resumed = (make_trainer(lr=0.5, schedule=lambda step: 1 / (1 + step)) for _ in range(2))

    def rate(trainer):
        return trainer.optimizer.param_groups[0]["lr"]

    assert rate(trainer) == 0.5
    results = list(trainer.train(3, log_interval=1))
    assert [result["learning_rate"] for result in results] == [0.5, 0.5 / 2, 0.5 / 3]
    resumed.load_state_dict(trainer.state_dict())
    assert rate(resumed) == 0.5 / 4
    resumed.rewind(1)
    assert (rate(resumed), resumed.replay.position) == (0.5 / 2, 1)


@pytest.mark.parametrize("step", [1, 3])
def test_non_finite_rewards_are_named_in_the_first_steps_after_a_start(step):
    trainer = make_trainer([*(make_batch(s) for s in range(step - 1)), make_batch(0, reward=float("nan"))])
    message = rf"\('next', 'reward'\) of the batch of gradient step {step} is not finite"
    with pytest.raises(NonFiniteError, match=message) as caught:
        list(trainer.train(10, log_interval=10))
    assert caught.value.step == step


def test_a_broken_gradient_of_the_first_steps_is_found_at_once():
    trainer = make_trainer()
    with torch.no_grad():
        next(trainer.loss.parameters()).fill_(torch.inf)
    message = r"the gradient of step 1 is not finite; means of gradient steps 1 to 1: .*objective=nan"
    with pytest.raises(NonFiniteError, match=message):
        list(trainer.train(10, log_interval=10))
    assert trainer.step == 1


@pytest.mark.parametrize("fused", [True, False])
def test_a_diverged_objective_stops_training_with_the_weights_before_it(fused):
    batches = [*(make_batch(s) for s in range(4)), make_batch(0, reward=float("nan")), make_batch(5)]
    optimizer = partial(torch.optim.Adam, fused=fused)
    trainer, healthy = (make_trainer(batches, optimizer=optimizer, target_update_interval=10) for _ in range(2))
    message = r"the gradient of step 5 is not finite; means of gradient steps 4 to 6: .*objective=nan"
    with pytest.raises(NonFiniteError, match=message) as caught:
        list(trainer.train(10, log_interval=3))
    assert caught.value.step == 5
    list(healthy.train(4, log_interval=1))
    ours, theirs = weights(trainer), weights(healthy)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs) == fused


@pytest.mark.parametrize("broken_step", [5, 6])
def test_a_target_is_not_updated_after_a_broken_step(broken_step):
    batches = [make_batch(s) for s in range(broken_step - 1)]
    broken, adam = make_batch(0, reward=float("nan")), partial(torch.optim.Adam, fused=True)
    trainer, healthy = (
        make_trainer([*batches, broken, *batches], optimizer=adam, target_update_interval=3) for _ in range(2)
    )
    with pytest.raises(NonFiniteError, match=f"the gradient of step {broken_step} is not finite"):
        list(trainer.train(10, log_interval=10))
    assert trainer.step == 6
    list(healthy.train(broken_step - 1, log_interval=10))
    for which in ("value_network_params", "target_value_network_params"):
        ours, theirs = weights(trainer, which), weights(healthy, which)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_an_infinite_objective_with_finite_gradients_breaks_its_step():
    class Overflowing(SingleProcess):
        num_calls = 0

        def __call__(self, batch, **kwargs):
            losses = super().__call__(batch, **kwargs)
            self.num_calls += torch.is_grad_enabled()
            if self.num_calls == 5:
                losses["loss_cql"] = losses["loss_cql"] + torch.inf
            return losses

    adam = partial(torch.optim.Adam, fused=True)
    trainer, healthy = (make_trainer(optimizer=adam, target_update_interval=10) for _ in range(2))
    trainer._call = Overflowing(trainer.loss)
    with pytest.raises(NonFiniteError, match=r"step 5 is not finite; means of gradient steps 4 to 6: .*objective=inf"):
        list(trainer.train(10, log_interval=3))
    list(healthy.train(4, log_interval=1))
    ours, theirs = weights(trainer), weights(healthy)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_microbatches_add_up_to_the_batch(size):
    whole, parts = make_trainer(max_grad_norm=0.5), make_trainer(max_grad_norm=0.5, microbatch_size=size)
    for seed in range(4):
        expected, metrics = whole.update(make_batch(seed)), parts.update(make_batch(seed))
        for key, value in expected.items():
            torch.testing.assert_close(metrics[key], value, rtol=1e-4, atol=1e-5)
    ours, theirs = weights(parts), weights(whole)
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-6)


def test_microbatches_must_divide_the_batch():
    with pytest.raises(ValueError, match="microbatch_size must divide the rank's batch of 6, got 4"):
        make_trainer(microbatch_size=4).update(make_batch(0))


def test_training_can_be_left_within_an_interval_without_losing_its_metrics():
    whole, parts = make_trainer(), make_trainer()
    expected = list(whole.train(6, log_interval=3))
    first = list(parts.train(6, log_interval=3, stop=lambda: parts.step == 4))
    continued = make_trainer()
    continued.load_state_dict(parts.state_dict())
    results = first + list(continued.train(6, log_interval=3))
    assert [r["objective"] for r in results] == [r["objective"] for r in expected]
    assert [r["td_error"] for r in results] == [r["td_error"] for r in expected]


def test_speeds_after_training_was_left_within_an_interval_are_of_the_time_since(monkeypatch):
    trainer = make_trainer()
    sample = trainer.replay.sample
    monkeypatch.setattr(trainer.replay, "sample", lambda: time.sleep(0.05) or sample())
    list(trainer.train(6, log_interval=6, stop=lambda: trainer.step == 5))
    (result,) = trainer.train(6, log_interval=6)
    assert result["data_wait_fraction"] <= 1
    assert result["samples_per_second"] <= 6 / 0.05


def test_bf16_stays_close_to_fp32():
    full, half = make_trainer(), make_trainer(precision="bf16")
    losses = [trainer.update(make_batch(0))["loss_qvalue"] for trainer in (full, half)]
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("settings", [{}, {"microbatch_size": 2, "max_grad_norm": 0.05}])
def test_a_recorded_step_is_the_step_also_after_resuming(settings):
    def make(**graph):
        return make_trainer(
            lr=0.01,
            optimizer=partial(torch.optim.Adam, fused=True),
            target_update_interval=3,
            schedule=lambda step: 1 / (1 + step),
            **settings,
            **graph,
        )

    plain, recorded, resumed = make(), make(graph=True), make(graph=True)
    expected = list(plain.train(8, log_interval=2))
    results = list(recorded.train(8, log_interval=2, stop=lambda: recorded.step == 5))
    state = recorded.state_dict()
    (group,) = state["optimizer"]["param_groups"]
    assert (group["lr"], group["capturable"]) == (0.01 * (1 / 6), False)  # a trainer without recorded steps reads it
    resumed.load_state_dict(state)
    results += list(resumed.train(8, log_interval=2))
    for result, other in zip(results, expected, strict=True):
        for key in ("objective", "grad_norm", "learning_rate", "q_target"):
            assert result[key] == pytest.approx(other[key], rel=1e-5)
    for which in ("value_network_params", "target_value_network_params"):
        ours, theirs = weights(resumed, which), weights(plain, which)
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-7)


def test_a_recorded_step_keeps_the_tensors_that_it_reads_and_writes():
    trainer = make_trainer(optimizer=partial(torch.optim.Adam, fused=True), max_grad_norm=0.1, graph=True)
    list(trainer.train(3, log_interval=1))
    (group,) = trainer.optimizer.param_groups

    def places():
        tensors = [*weights(trainer).values(), *weights(trainer, "target_value_network_params").values(), group["lr"]]
        tensors += [value for state in trainer.optimizer.state.values() for value in state.values()]
        return [value.data_ptr() for value in [*tensors, trainer._broken, trainer._num_broken_steps]]

    before = places()
    first = trainer.update(make_batch(3))
    objective = first["objective"].item()
    trainer.update(make_batch(4))
    assert places() == before and first["objective"].item() == objective


def test_recorded_steps_take_one_size_of_batch():
    trainer = make_trainer(graph=True)
    trainer.update(make_batch(0))
    for batch in (make_batch(0)[:5], make_batch(0).exclude("action")):
        with pytest.raises(ValueError, match=r"batches must have the size and entries of the first, \(\[6\], .*, got"):
            trainer.update(batch)


def test_a_recorded_step_with_a_gradient_that_is_not_finite_is_left_out():
    batches = [*(make_batch(s) for s in range(4)), make_batch(0, reward=float("nan")), make_batch(5)]
    adam = partial(torch.optim.Adam, fused=True)
    trainer, healthy = (make_trainer(batches, optimizer=adam, target_update_interval=10, graph=True) for _ in range(2))
    with pytest.raises(NonFiniteError, match=r"the gradient of step 5 is not finite; means of gradient steps 4 to 6"):
        list(trainer.train(10, log_interval=3))
    list(healthy.train(4, log_interval=1))
    ours, theirs = weights(trainer), weights(healthy)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_state_of_other_parameters_is_refused():
    trainer = make_trainer()
    state = trainer.state_dict()
    state["optimizer"]["param_groups"][0]["params"] = [0, 1]
    with pytest.raises(ValueError, match=r"expected the state of 4 parameters, got groups of \[\[0, 1\]\]"):
        make_trainer().load_state_dict(state)
