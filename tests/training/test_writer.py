from __future__ import annotations

import errno
import logging
import os
import threading

import pytest
import torch

from torchrl_sql.training import writer as writer_module
from torchrl_sql.training.checkpoint import checkpoint_path, checkpoint_step, list_checkpoints, load_checkpoint
from torchrl_sql.training.writer import MAX_FAILURES, CheckpointWriter, HostCopies


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
        assert may_write.wait(200)
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


MEGABYTE = {"w": torch.zeros(2**18)}


def steps(folder):
    return [checkpoint_step(path) for path in list_checkpoints(folder)]


@pytest.mark.parametrize(("milestone_interval", "kept"), [(None, [30, 40]), (10, [10, 20, 30])])
def test_the_oldest_checkpoint_makes_room_for_the_newest_on_a_full_disk(small_disk, caplog, milestone_interval, kept):
    folder = small_disk(3.5 * 2**20)  # three checkpoints, and not the fourth that is there while one is replaced
    writer = CheckpointWriter(folder, num_kept=3, milestone_interval=milestone_interval)
    for step in (10, 20, 30, 40):
        writer.save(step, MEGABYTE)
        writer.wait()
    writer.close()
    full = "step_000000010.pt is deleted to make room" if milestone_interval is None else "step 40 was not written"
    assert "DISK FULL: " in caplog.text and full in caplog.text
    assert steps(folder) == ([20, 30, 40] if milestone_interval is None else kept)
    assert all(torch.equal(load_checkpoint(path)["w"], MEGABYTE["w"]) for path in list_checkpoints(folder))


def test_the_newest_checkpoint_is_never_given_up_and_training_stops_when_nothing_can_be_saved(small_disk, caplog):
    folder = small_disk(1.5 * 2**20)
    writer = CheckpointWriter(folder, num_kept=3, milestone_interval=None)
    for step in range(1, 1 + MAX_FAILURES):
        writer.save(step, MEGABYTE)
        writer.wait()
    assert caplog.text.count("was not written") == MAX_FAILURES - 1
    writer.save(5, MEGABYTE)
    message = rf"{MAX_FAILURES} checkpoints in a row could not be written: training stops, make room, and the same"
    with pytest.raises(OSError, match=message) as caught:
        writer.wait()
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in folder.iterdir()] == ["step_000000001.pt"]
    writer.close()


def test_a_disk_that_has_room_again_ends_the_count_of_failures(small_disk):
    folder = small_disk(2.5 * 2**20)
    writer = CheckpointWriter(folder, num_kept=1, milestone_interval=None)
    for step in range(4 * MAX_FAILURES):
        filler = folder / "filler"
        if step % MAX_FAILURES:
            filler.write_bytes(bytes(2**20))
        else:
            filler.unlink(missing_ok=True)
        writer.save(step, MEGABYTE)
        writer.wait()
    assert steps(folder) == [3 * MAX_FAILURES]
    writer.close()


def test_other_failures_reach_the_training_loop(writer, monkeypatch):
    def failing(*args):
        raise PermissionError("not allowed")

    monkeypatch.setattr(writer_module, "save_checkpoint", failing)
    writer.save(1, {})
    writer._writing.exception(timeout=200)
    with pytest.raises(PermissionError, match="not allowed"):
        writer.check()


def test_what_a_killed_writer_left_behind_is_removed(tmp_path):
    (tmp_path / "step_000000007.4711.tmp").write_bytes(b"torn")
    CheckpointWriter(tmp_path, num_kept=1, milestone_interval=None).close()
    assert list(tmp_path.iterdir()) == []
