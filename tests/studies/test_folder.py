"""A study's folder: continuing, doing again what changed, and deleting only what is its own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from torchrl_sql.cli import main
from torchrl_sql.config import ConfigError
from torchrl_sql.config.study import find_study, load_study
from torchrl_sql.files import KERNELS_VARIABLE
from torchrl_sql.studies.folder import check_reuse, format_tasks, owned, prepare_folder, reusable, task_environment
from torchrl_sql.studies.plan import plan_study


def allow(what):
    allow.asked.append(what)
    return True


@pytest.fixture(autouse=True)
def asked():
    allow.asked = []
    return allow.asked


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "s"


def make(task, *, done=True):
    """Does as if a task had run."""
    task.write_record(seconds=1.0 if done else None)
    for path in task.makes:
        file = task.record_file.parents[1] / path
        if file.suffix:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(path)
        else:
            file.mkdir(parents=True, exist_ok=True)
            (file / "inside").write_text(path)


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def finished(make_study, folder):
    """Plans the study again, with changes; at first all of it has run."""

    def plan(*changes):
        study = make_study(*changes)
        return study, plan_study(study, folder)

    study, tasks = plan()
    prepare_folder(study, tasks, folder, confirm=allow)
    for task in tasks:
        make(task)
    return plan


def test_what_is_done_stays_done(finished, folder, asked):
    before = names(folder)
    study, tasks = finished()
    prepare_folder(study, tasks, folder, confirm=allow)
    assert names(folder) == before and not asked
    assert [task.name for task in tasks if not task.is_done()] == ["report"]
    assert load_study(folder / "study.yaml") == study


def test_a_task_is_not_done_before_its_record_says_so(finished, folder):
    _, tasks = finished()
    trained = next(task for task in tasks if task.kind == "train")
    trained.write_record(seconds=None)
    assert not trained.is_done() and trained.change() is None
    assert f"{trained.name}: started" in format_tasks(tasks)


def test_a_task_whose_files_are_gone_is_done_again(finished, folder):
    _, tasks = finished()
    trained = next(task for task in tasks if task.name == "train-q-seed0")
    (folder / "q" / "seed0" / "checkpoints" / "inside").unlink()
    (folder / "q" / "seed0" / "checkpoints").rmdir()
    assert not trained.is_done()


def test_what_shares_a_table_that_is_gone_is_done_again_too(finished, folder, asked):
    (folder / "bc" / "seed1" / "scores.csv").unlink()
    study, tasks = finished()
    prepare_folder(study, tasks, folder, confirm=allow)
    greedy, sampled = (task for task in tasks if task.name.startswith("evaluate-bc"))
    make(greedy)
    assert greedy.is_done() and not sampled.is_done() and not asked


def test_only_what_changed_is_done_again_and_it_says_why(finished, folder, asked):
    before = names(folder)
    (folder / "q" / "seed0" / "my notes.txt").write_text("keep")
    study, tasks = finished(("cql_alpha=0.3", "cql_alpha=0.4"))
    assert "train-q-seed0: to do again: method.cql_alpha 0.3 -> 0.4" in format_tasks(tasks)
    prepare_folder(study, tasks, folder, confirm=allow)
    gone = before - names(folder)
    assert gone and all(path.startswith(("q/", "tasks/train-q", "tasks/evaluate-q")) for path in gone)
    assert (folder / "q" / "seed0" / "my notes.txt").read_text() == "keep"
    assert "train-q-seed0 is to be done again: method.cql_alpha 0.3 -> 0.4" in asked[0]
    assert str(folder / "q" / "seed1" / "checkpoints") in asked[0]


def test_more_seeds_leave_the_others_alone(finished, folder, asked):
    before = names(folder)
    study, tasks = finished(("seeds: [0, 1]", "seeds: [0, 1, 2]"))
    prepare_folder(study, tasks, folder, confirm=allow)
    assert before == names(folder) and not asked
    to_do = [task.name for task in tasks if not task.is_done()]
    assert to_do == ["train-q-seed2", "evaluate-q-seed2-greedy", "report"]


def test_nothing_is_deleted_without_consent(finished, folder):
    before = names(folder)
    for fresh, changes in ((True, []), (False, [("cql_alpha=0.3", "cql_alpha=0.4")])):
        study, tasks = finished(*changes)
        with pytest.raises(ValueError, match="nothing was deleted"):
            prepare_folder(study, tasks, folder, fresh=fresh, confirm=lambda what: False)
        assert names(folder) == before


def test_fresh_deletes_what_tasks_recorded_and_nothing_else(finished, folder, asked):
    (folder / "bc" / "my_thesis_run.txt").write_text("keep")
    study, tasks = finished(("seeds: [0, 1]", "seeds: [1]"))  # what seed 0 made is the study's own too
    prepare_folder(study, tasks, folder, fresh=True, confirm=allow)
    assert names(folder) == {"bc/my_thesis_run.txt", "study.yaml"}
    assert not (folder / "q").exists() and "--fresh deletes" in asked[0]


def test_files_of_others_are_never_taken_for_the_study_s(make_study, folder):
    study = make_study()
    tasks = plan_study(study, folder)
    (folder / "store").mkdir(parents=True)
    (folder / "store" / "store.json").write_text("an imported store")
    for fresh in (False, True):
        with pytest.raises(ValueError, match="store is there, but no task of this study made it"):
            prepare_folder(study, tasks, folder, fresh=fresh, confirm=allow)
    assert (folder / "store" / "store.json").read_text() == "an imported store" and not allow.asked


def test_tasks_and_studies_of_others_are_left_alone(make_study, folder):
    study = make_study()
    tasks = plan_study(study, folder)
    (folder / "tasks").mkdir(parents=True)
    (folder / "tasks" / "notes.txt").write_text("keep")
    prepare_folder(study, tasks, folder, fresh=True, confirm=allow)
    prepare_folder(study, tasks, folder, fresh=True, confirm=allow)  # over the study.yaml of before
    assert (folder / "tasks" / "notes.txt").read_text() == "keep" and not allow.asked
    written = "# by hand\n" + (folder / "study.yaml").read_text()
    (folder / "study.yaml").write_text(written)
    for fresh in (False, True):
        with pytest.raises(ValueError, match=r"study.yaml is there, but no study wrote it"):
            prepare_folder(study, tasks, folder, fresh=fresh, confirm=allow)
    assert (folder / "study.yaml").read_text() == written


def test_an_interrupted_first_task_is_known_as_the_study_s(make_study, folder):
    study = make_study()
    tasks = plan_study(study, folder)
    make(tasks[0], done=False)
    prepare_folder(study, tasks, folder, confirm=allow)
    assert not tasks[0].is_done() and (folder / "store" / "inside").exists()


def other_study(make_study, tmp_path):
    """One with a further run."""
    study = make_study(("runs:\n  q: {}", "runs:\n  q: {}\n  steeper: {set: [method.cql_alpha=0.4]}"))
    other = tmp_path / "runs" / "other"
    return study, plan_study(study, other), other


def give_runs_configurations(make_study, folder):
    for task in plan_study(make_study(), folder):
        if task.config is not None:
            (Path(task.run_dir) / "config.yaml").write_text(task.config)


def test_data_and_runs_that_another_study_made_of_the_same_settings_are_copied(
    finished, make_study, folder, tmp_path, asked
):
    study, tasks, other = other_study(make_study, tmp_path)
    give_runs_configurations(make_study, folder)
    assert f"train-q-seed0: to be copied from {folder}" in format_tasks(tasks, reuse=folder)
    prepare_folder(study, tasks, other, reuse=folder, confirm=allow)
    done = [task.name for task in tasks if task.is_done()]
    assert done == ["collect", "train-q-seed0", "train-q-seed1", "train-bc-seed1"]
    assert (other / "q" / "seed0" / "checkpoints" / "inside").read_text() == "q/seed0/checkpoints"
    assert not (other / "q" / "seed0" / "scores.csv").exists()  # tables hold what other tasks made, too
    for task in tasks:
        if task.config is not None and task.is_done():  # its places are here
            assert (Path(task.run_dir) / "config.yaml").read_text() == task.config
    assert f"train-q-seed0: done in 0:01, copied from {folder}" in format_tasks(tasks)
    assert not asked and not (other / ".copying").exists()


@pytest.mark.parametrize(
    "what", ["changed", "not done", "its files are gone", "its data is other", "its data is made here"]
)
def test_nothing_else_is_copied(finished, make_study, folder, tmp_path, what):
    study = make_study(*{
        "changed": [("cql_alpha=0.3", "cql_alpha=0.4")],
        "its data is other": [("method.cql_alpha=0.3", "method.cql_alpha=0.3, collection.seed=7")],
    }.get(what, []))  # fmt: skip
    tasks = plan_study(study, tmp_path / "other")
    if what == "not done":
        record = folder / "tasks" / "train-q-seed0.json"
        record.write_text(json.dumps(json.loads(record.read_text()) | {"seconds": None}))
    elif what == "its files are gone":
        (folder / "q" / "seed0" / "checkpoints").rename(tmp_path / "elsewhere")
    elif what == "its data is made here":
        (folder / "tasks" / "collect.json").unlink()
    assert not {"train-q-seed0", "evaluate-q-seed0-greedy", "report"} & reusable(tasks, folder).keys()


def test_agents_that_share_a_store_are_not_copied(tmp_path):
    tasks = plan_study(load_study(find_study("dqn_replay_mini")), tmp_path / "one")
    for task in tasks:
        make(task)
    assert not reusable(plan_study(load_study(find_study("dqn_replay_mini")), tmp_path / "two"), tmp_path / "one")


def test_a_study_that_was_begun_continues_with_what_it_has(finished, make_study, folder, tmp_path):
    study, tasks, other = other_study(make_study, tmp_path)
    make(tasks[0], done=False)
    before = names(other)
    assert "to be copied" not in format_tasks(tasks, reuse=folder)
    said = []
    prepare_folder(study, tasks, other, reuse=folder, confirm=allow, say=said.append)
    assert names(other) == before | {"study.yaml"} and not tasks[0].is_done()
    assert said == [f"Nothing is copied from {folder}: this study was begun already, or nothing there is the same"]
    assert "collect: to be copied" in format_tasks(tasks, fresh=True, reuse=folder)


@pytest.mark.parametrize("interrupted", ["shutil.copytree", "Path.rename"])
def test_an_interrupted_copy_leaves_nothing_that_a_task_would_take_for_its_own(
    finished, make_study, folder, tmp_path, monkeypatch, interrupted
):
    study, tasks, other = other_study(make_study, tmp_path)
    give_runs_configurations(make_study, folder)
    calls = []
    unharmed = Path.rename if interrupted == "Path.rename" else shutil.copytree

    def interrupt(source, path, **options):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return unharmed(source, path, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"torchrl_sql.studies.folder.{interrupted}", interrupt)
        prepare_folder(study, tasks, other, reuse=folder, confirm=allow)
    assert not (other / ".copying").exists() and not [task for task in tasks if task.record() is not None]
    if interrupted == "shutil.copytree":
        prepare_folder(study, tasks, other, confirm=allow)
        assert names(other) == {"study.yaml"}
    else:
        with pytest.raises(ValueError, match="is there, but no task of this study made it: move it"):
            prepare_folder(study, tasks, other, confirm=allow)


def test_what_cannot_be_reused_costs_nothing(finished, make_study, folder, tmp_path):
    study, tasks, other = other_study(make_study, tmp_path)
    for task in tasks:
        make(task)
    before = names(other)

    def refused(error, message):
        with pytest.raises(error, match=message):
            prepare_folder(study, tasks, other, fresh=True, reuse=folder, confirm=allow)
        assert names(other) == before

    with owned(folder):
        refused(ValueError, "is in use by process")
    refused(ConfigError, r"s/q/seed0/config.yaml must hold a run's configuration")  # and not the copy's
    (folder / "tasks" / "train-q-seed0.json").write_text('{"makes": 3}')
    refused(ValueError, r"train-q-seed0.json must be the record of a task")


@pytest.mark.parametrize("launch", [False, True])
def test_a_folder_that_cannot_be_reused_is_refused_before_anything_is_touched(tmp_path, monkeypatch, capsys, launch):
    monkeypatch.chdir(tmp_path)
    words = ["study", "quickstart", "--reuse"]
    words = (
        ["launch", "--into", "new", *words, "nowhere", "cluster=cpu"]
        if launch
        else [*words, "nowhere", "--out", "new", "--fresh"]
    )
    for dry in ([], ["--dry-run"]):
        assert main([*words, *dry]) == 1
        assert "--reuse must be the folder of a study, but nowhere/study.yaml is not there" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_study_reuses_only_others(finished, folder):
    with pytest.raises(ValueError, match="must be the folder of another study"):
        check_reuse(folder / ".." / folder.name, folder)


def test_records_cannot_lead_out_of_the_folder(finished, folder, tmp_path):
    (tmp_path / "mine").write_text("keep")
    record = folder / "tasks" / "constant.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"makes": ["../../mine"]}))
    study, tasks = finished()
    with pytest.raises(ValueError, match=r"constant.json must name paths in"):
        prepare_folder(study, tasks, folder, fresh=True, confirm=allow)
    assert (tmp_path / "mine").read_text() == "keep"


def test_a_damaged_record_is_named(finished, folder):
    (folder / "tasks" / "constant.json").write_text("{")
    study, tasks = finished()
    with pytest.raises(ValueError, match=r"constant.json must be the record of a task"):
        prepare_folder(study, tasks, folder, confirm=allow)


def test_the_contributor_s_recipe_is_a_study(tmp_path, monkeypatch, capsys):
    recipes = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8").split("### A study")[1]
    (text,) = re.findall(r"```yaml\n(.*?)```", recipes.split("###")[0], flags=re.S)
    monkeypatch.chdir(tmp_path)
    Path("penalty.yaml").write_text(text)
    assert main(["study", "penalty.yaml", "scale=cpu", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.count("torchrl-sql train scale=cpu") == 6 == out.count("torchrl-sql evaluate runs/penalty/")
    assert out.count("method.cql_alpha=0 ") == 3 and "torchrl-sql report runs/penalty\n" in out
    assert [path.name for path in tmp_path.iterdir()] == ["penalty.yaml"]


def test_one_process_at_a_time(folder):
    with owned(folder), pytest.raises(ValueError, match="is in use by process"), owned(folder):
        pass
    with owned(folder):
        pass


def test_tasks_share_their_compiled_kernels_unless_the_environment_says_where(folder, monkeypatch):
    monkeypatch.delenv(KERNELS_VARIABLE, raising=False)
    assert task_environment(folder)[KERNELS_VARIABLE] == str(folder / ".compiled")
    monkeypatch.setenv(KERNELS_VARIABLE, "/elsewhere")
    assert task_environment(folder)[KERNELS_VARIABLE] == "/elsewhere"
