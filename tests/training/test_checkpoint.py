from __future__ import annotations

import pickle

import pytest
import torch

from torchrl_sql.training.checkpoint import (
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    load_latest_checkpoint,
    save_checkpoint,
)


def save(folder, step, num_kept=10):
    return save_checkpoint(folder, step, {"step": step, "weights": {"w": torch.arange(1000.0)}}, num_kept=num_kept)


def test_round_trip(tmp_path):
    path = save(tmp_path, 5)
    content = load_checkpoint(path)
    assert content["step"] == 5 and torch.equal(content["weights"]["w"], torch.arange(1000.0))


def test_only_the_newest_are_kept(tmp_path):
    for step in (9, 10, 100, 1000):
        save(tmp_path, step, num_kept=2)
    assert [load_checkpoint(path)["step"] for path in list_checkpoints(tmp_path)] == [100, 1000]


def test_a_failed_write_leaves_the_old_checkpoints_alone(tmp_path):
    save(tmp_path, 1)
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        save_checkpoint(tmp_path, 2, {"bad": lambda: None}, num_kept=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000001.pt"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_a_damaged_file_is_named_and_the_one_before_is_used(tmp_path, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(
        {"truncated": bytes(data[:-100]), "flipped": bytes(data), "empty": b"", "text": b"not a checkpoint"}[damage]
    )
    with pytest.raises(CheckpointError, match=r"step_000000002\.pt"):
        load_checkpoint(path)
    warnings = []
    found = load_latest_checkpoint(tmp_path, warn=warnings.append)
    assert found is not None and found[1]["step"] == 1
    assert len(warnings) == 1 and "step_000000002.pt" in warnings[0]
    list_checkpoints(tmp_path)[0].write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        load_latest_checkpoint(tmp_path, warn=warnings.append)


def test_pickled_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    path = tmp_path / "step_000000001.pt"
    torch.save({"format": Evil()}, path)
    with pytest.raises(CheckpointError, match="fails to load"):
        load_checkpoint(path)


def test_another_format_is_refused(tmp_path):
    path = tmp_path / "step_000000001.pt"
    torch.save({"format": "other 2"}, path)
    with pytest.raises(CheckpointError, match="must be of format 'torchrl_sql checkpoint 1', got 'other 2'"):
        load_checkpoint(path)


def test_no_checkpoint(tmp_path):
    assert load_latest_checkpoint(tmp_path, warn=print) is None
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "step_000000001.pt")
