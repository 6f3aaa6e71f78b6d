from __future__ import annotations

import errno
import pickle
import zipfile

import pytest
import torch

from torchrl_sql.training.checkpoint import (
    CheckpointError,
    best_step,
    checkpoint_path,
    checkpoint_step,
    delete_superfluous,
    list_checkpoints,
    load_checkpoint,
    load_latest_checkpoint,
    mark_best,
    save_checkpoint,
    wrong_content,
)


def save(folder, step):
    return save_checkpoint(folder, step, {"step": step, "weights": {"w": torch.arange(1000.0)}})


def test_round_trip(tmp_path):
    path = save(tmp_path, 5)
    content = load_checkpoint(path)
    assert content["step"] == 5 and torch.equal(content["weights"]["w"], torch.arange(1000.0))


def test_the_newest_the_milestones_and_the_best_are_kept(tmp_path):
    folder = tmp_path / "checkpoints"

    def kept(**kwargs):
        delete_superfluous(folder, **{"num_kept": 2, "milestone_interval": None, **kwargs})
        return [checkpoint_step(path) for path in list_checkpoints(folder)]

    for step in (10, 20, 30, 40, 50, 100, 1000):
        save(folder, step)
    assert mark_best(tmp_path, 30, 0.5)
    assert not mark_best(tmp_path, 40, 0.4)
    assert best_step(folder) == 30
    assert kept(num_kept=5, milestone_interval=20) == [20, 30, 40, 50, 100, 1000]
    assert kept(milestone_interval=50) == [30, 50, 100, 1000]
    assert not mark_best(tmp_path, 40, 0.9)  # no longer there
    assert mark_best(tmp_path, 100, 0.6)
    assert kept() == [100, 1000]
    save(folder, 2000)
    assert kept() == [100, 1000, 2000]


def test_a_damaged_note_of_the_best_is_named_and_nothing_is_deleted(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "best.json").write_text('{"step": 2}')
    with pytest.raises(CheckpointError, match=r"best.json must hold a step and a score"):
        delete_superfluous(tmp_path, num_kept=1, milestone_interval=None)
    assert len(list_checkpoints(tmp_path)) == 3


def test_a_failed_write_leaves_the_old_checkpoints_alone(tmp_path):
    save(tmp_path, 1)
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        save_checkpoint(tmp_path, 2, {"bad": lambda: None})
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000001.pt", "step_000000002.pt.damaged"]


def test_a_damaged_newest_checkpoint_costs_no_good_one(tmp_path):
    for step in (40, 80):
        save(tmp_path, step)
    checkpoint_path(tmp_path, 80).write_bytes(b"torn")
    assert load_latest_checkpoint(tmp_path, warn=lambda text: None) is not None
    save(tmp_path, 60)
    delete_superfluous(tmp_path, num_kept=1, milestone_interval=None)
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [60]


def test_if_all_checkpoints_are_damaged_they_stay_and_say_so_again(tmp_path):
    for step in (1, 2):
        save(tmp_path, step).write_bytes(b"")
    for _ in range(2):  # renamed, the second start would begin anew
        with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
            load_latest_checkpoint(tmp_path, warn=lambda text: None)


def test_a_file_that_does_not_fit_into_memory_is_not_called_damaged(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: torch.empty(2**60))
    with pytest.raises(MemoryError, match=r"step_000000001\.pt does not fit into memory"):
        load_latest_checkpoint(tmp_path, warn=pytest.fail)
    assert len(list_checkpoints(tmp_path)) == 1
    with pytest.raises(RuntimeError, match="can't allocate memory"), wrong_content(tmp_path / "step_000000001.pt"):
        torch.empty(2**60)


@pytest.mark.parametrize("error", [OSError(errno.ESTALE, "stale"), OSError(errno.EMFILE, "files"), MemoryError()])
def test_a_file_that_cannot_be_read_at_present_is_not_called_damaged(tmp_path, monkeypatch, error):
    save(tmp_path, 1), save(tmp_path, 2)

    def failing(*args, **kwargs):
        raise error

    for module, name in ((torch, "load"), (zipfile.ZipFile, "testzip")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing)
            with pytest.raises(type(error)):
                load_latest_checkpoint(tmp_path, warn=pytest.fail)
    assert len(list_checkpoints(tmp_path)) == 2


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
    with pytest.raises(CheckpointError, match="must be of format 'torchrl_sql checkpoint 3', got 'other 2'"):
        load_checkpoint(path)


@pytest.mark.parametrize(("number", "when"), [(2, "an earlier"), (4, "a later")])
def test_another_version_of_the_format_says_what_to_do(tmp_path, number, when):
    path = tmp_path / "step_000000001.pt"
    torch.save({"format": f"torchrl_sql checkpoint {number}"}, path)
    with pytest.raises(
        CheckpointError, match=rf"was written by {when} version of torchrl_sql .*: use that version, or"
    ):
        load_checkpoint(path)


@pytest.mark.parametrize("number", [2, 4])
def test_a_checkpoint_of_another_version_is_not_taken_for_a_damaged_one(tmp_path, number):
    save(tmp_path, 1)
    torch.save({"format": f"torchrl_sql checkpoint {number}"}, checkpoint_path(tmp_path, 2))
    save(tmp_path, 3).write_bytes(b"torn")
    names = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"step_000000002\.pt was written by .* version of torchrl_sql"):
        load_latest_checkpoint(tmp_path, warn=lambda text: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_no_checkpoint(tmp_path):
    assert load_latest_checkpoint(tmp_path, warn=print) is None
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "step_000000001.pt")
