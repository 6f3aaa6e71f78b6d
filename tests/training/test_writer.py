from __future__ import annotations

import logging
import os
import threading

import pytest
import torch

from torchrl_sql.training import writer as writer_module
from torchrl_sql.training.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint
from torchrl_sql.training.writer import CheckpointWriter, HostCopies


@pytest.fixture
def writer(tmp_path):
    writer = CheckpointWriter(tmp_path, num_kept=2, milestone_interval=None)
    yield writer
    writer.close()


def fill_disk(folder, step):
    """Makes the next write of this checkpoint meet a device without space."""
    path = checkpoint_path(folder, step)
    path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.tmp").symlink_to("/dev/full")


def test_copies_do_not_follow_the_originals_and_reuse_their_buffers():
    copies = HostCopies()
    content = {"a": torch.zeros(3), "b": [torch.ones(2), "text", {"c": torch.zeros((), dtype=torch.int64)}], "n": None}
    first = copies.copy(content)
    content["a"] += 5
    assert first["a"].tolist() == [0, 0, 0] and first["b"][1:] == ["text", {"c": torch.tensor(0)}]
    second = copies.copy(content)
    assert second["a"].tolist() == [5, 5, 5] and second["a"].data_ptr() == first["a"].data_ptr()


def test_training_goes_on_while_a_checkpoint_is_written(writer, tmp_path, monkeypatch):
    may_write, save = threading.Event(), writer_module.save_checkpoint

    def slow(*args):
        assert may_write.wait(20)
        return save(*args)

    monkeypatch.setattr(writer_module, "save_checkpoint", slow)
    weights = torch.zeros(4)
    writer.save(1, {"w": weights})
    weights += 1  # the next step, before anything is on disk
    assert list_checkpoints(tmp_path) == [] and writer.newest_step is None
    may_write.set()
    writer.finish(1)
    assert load_checkpoint(checkpoint_path(tmp_path, 1))["w"].tolist() == [0, 0, 0, 0]


def test_at_most_one_write_at_a_time(writer, monkeypatch):
    active, most = 0, 0
    save = writer_module.save_checkpoint

    def counting(*args):
        nonlocal active, most
        active += 1
        most = max(most, active)
        save(*args)
        active -= 1

    monkeypatch.setattr(writer_module, "save_checkpoint", counting)
    for step in range(5):
        writer.save(step, {"w": torch.full((10_000,), float(step))})
    writer.finish(4)
    assert (most, writer.num_written) == (1, 5)
    assert [load_checkpoint(path)["w"][0].item() for path in list_checkpoints(writer.folder)] == [3, 4]


def test_a_full_disk_keeps_the_last_good_checkpoint_and_says_so(writer, tmp_path, caplog):
    writer.save(1, {"w": torch.zeros(100_000)})
    writer.wait()
    fill_disk(tmp_path, 2)
    with caplog.at_level(logging.ERROR):
        writer.save(2, {"w": torch.zeros(100_000)})
        writer.wait()
    assert "DISK FULL: the checkpoint of gradient step 2 was not written" in caplog.text
    assert "No space left on device" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000001.pt"]
    with pytest.raises(OSError, match="gradient step 2, the last one, could not be written"):
        writer.finish(2)
    writer.save(3, {"w": torch.zeros(100_000)})
    writer.finish(3)


def test_other_failures_reach_the_training_loop(writer, monkeypatch):
    def failing(*args):
        raise PermissionError("not allowed")

    monkeypatch.setattr(writer_module, "save_checkpoint", failing)
    writer.save(1, {})
    writer._writing.exception(timeout=20)
    with pytest.raises(PermissionError, match="not allowed"):
        writer.check()


def test_what_a_killed_writer_left_behind_is_removed(tmp_path):
    (tmp_path / "step_000000007.4711.tmp").write_bytes(b"torn")
    CheckpointWriter(tmp_path, num_kept=1, milestone_interval=None).close()
    assert list(tmp_path.iterdir()) == []
