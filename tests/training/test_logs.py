from __future__ import annotations

import errno

import pytest
from torchrl.record.loggers import CSVLogger

from torchrl_sql.training.logs import RunLog, read_scalars

METRICS = {"objective": 1.0, "samples_per_second": 2.0, "data_wait_fraction": 0.0}


def failing(number):
    def log_scalar(*args, **kwargs):
        raise OSError(number, "no room")

    return log_scalar


@pytest.fixture
def log(tmp_path):
    log = RunLog(tmp_path / "logs", ["csv"], run_name="run", first_step=0, num_steps=9)
    yield log
    log.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_costs_metrics_and_says_so(log, tmp_path, monkeypatch, caplog, number):
    log.result(1, METRICS)
    with monkeypatch.context() as patch:
        patch.setattr(CSVLogger, "log_scalar", failing(number))
        log.result(2, METRICS)
    log.result(3, METRICS)
    assert "DISK FULL: metrics of gradient step 2 may be missing in csv" in caplog.text
    assert [step for step, _ in read_scalars(tmp_path)["objective"]] == [1, 3]


def test_other_failures_end_the_run(log, monkeypatch):
    monkeypatch.setattr(CSVLogger, "log_scalar", failing(errno.EACCES))
    with pytest.raises(OSError, match="no room"):
        log.result(1, METRICS)


def test_tensorboard_outlives_a_full_disk_to_the_end(tmp_path, monkeypatch, caplog):
    log = RunLog(tmp_path / "logs", ["tensorboard"], run_name="run", first_step=0, num_steps=9)
    log.result(1, METRICS)
    (writer,) = log._loggers
    file_writer = writer.experiment._get_file_writer()
    with monkeypatch.context() as patch:
        patch.setattr(file_writer, "close", failing(errno.ENOSPC))
        log.close()
    assert "may be missing in tensorboard" in caplog.text
    file_writer.close()
