from __future__ import annotations

import errno
import math
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(1, 30), rest=st.binary(max_size=20))
def test_a_continued_run_logs_again_what_a_crash_left_unfinished(tmp_path, cut, rest):
    run_dir = Path(tempfile.mkdtemp(dir=tmp_path))
    with closing(RunLog(run_dir / "logs", ["csv"], run_name="run", first_step=0, num_steps=9)) as log:
        for step in (1, 2, 3):
            log.result(step, METRICS)
    (path,) = run_dir.glob("logs/csv/scalars/train/objective.csv")
    text = path.read_bytes()
    path.write_bytes(text[: max(len(text) - cut, 0)] + rest)  # a power cut leaves zeros or old bytes
    assert set(read_scalars(run_dir)["objective"]) >= {(step, 1.0) for step in range(1, 4 - -(-cut // 6))}
    with closing(RunLog(run_dir / "logs", ["csv"], run_name="run", first_step=2, num_steps=9)) as log:
        log.result(3, METRICS)
    assert read_scalars(run_dir)["objective"][-1] == (3, 1.0)
    assert [step for step, _ in read_scalars(run_dir)["samples_per_second"]] == [1, 2, 3]


@pytest.mark.parametrize("value", [0.0, -1.5, 1e-5, 1e22, -2.5e-300, float("inf"), float("-inf")])
def test_every_value_is_read_as_it_was_logged(log, tmp_path, value):
    log.result(1, METRICS | {"objective": value})
    assert read_scalars(tmp_path)["objective"] == [(1, value)]


def test_a_metric_that_is_not_a_number_is_read_as_such(log, tmp_path):
    log.result(1, METRICS | {"objective": float("nan")})
    ((step, value),) = read_scalars(tmp_path)["objective"]
    assert step == 1 and math.isnan(value)
