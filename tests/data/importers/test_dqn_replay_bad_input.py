"""Arguments, files and folders that an import of DQN-Replay refuses."""

from __future__ import annotations

import gzip
import importlib
import os
import resource
import shutil
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_sql.data import FrameStore
from torchrl_sql.data.importers import ImportFailedError, dqn_replay, import_dqn_replay
from torchrl_sql.data.importers.job import ImportJob
from torchrl_sql.data.importers.pool import run_imports


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"games": "Pongg"}, "did you mean Pong"),
        ({"checkpoints": "9-0"}, "checkpoints must be ascending numbers"),
        ({"checkpoints": "0-x"}, "checkpoints must be like '0-9' or '0-3,5', got '0-x'"),
        ({"checkpoints": ""}, "checkpoints must be like"),
        ({"checkpoints": [3, 3]}, "checkpoints must be ascending"),
        ({"checkpoints": [-1]}, "checkpoints must be ascending"),
        ({"run": 0}, "run must be >= 1, got 0"),
        ({"workers": 0}, "workers must be >= 1, got 0"),
        ({"max_episode_steps": 0}, "max_episode_steps must be >= 1, got 0"),
    ],
)
def test_bad_arguments(log, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        import_dqn_replay(tmp_path / "dqn", tmp_path / "store", **{"games": "Pong", **arguments})
    assert not (tmp_path / "store").exists()


def test_missing_source(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        import_dqn_replay(tmp_path / "nowhere", tmp_path / "store", games="Pong")
    assert not (tmp_path / "store").exists()


def rewrite(change):
    """A damage that changes one array and writes it again."""

    def damage(path: Path) -> None:
        with gzip.open(path) as file:
            array = np.load(file)
        with gzip.open(path, "wb") as file:
            np.save(file, change(array), allow_pickle=True)

    return damage


def put(row, value):
    def change(array):
        array[row] = value
        return array

    return rewrite(change)


def rezip(change):
    return lambda path: path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))


OBSERVATION, ACTION = "$store$_observation_ckpt.1.gz", "$store$_action_ckpt.1.gz"
REWARD, TERMINAL = "$store$_reward_ckpt.1.gz", "$store$_terminal_ckpt.1.gz"
DAMAGES = [
    (OBSERVATION, os.unlink, r"lacks \$store\$_observation_ckpt\.1\.gz; checkpoints that are there: 0, 1"),
    ("invalid_range_ckpt.1.gz", os.unlink, r"lacks invalid_range_ckpt\.1\.gz; checkpoints that"),
    (OBSERVATION, lambda p: os.truncate(p, p.stat().st_size - 20), "is truncated: Compressed file ended"),
    (OBSERVATION, lambda p: os.truncate(p, 40), "is (truncated|damaged)"),
    (OBSERVATION, lambda p: os.truncate(p, 0), "is (truncated|damaged)"),
    (OBSERVATION, lambda p: p.write_bytes(b"not gzip at all"), "is damaged: Not a gzipped file"),
    (OBSERVATION, lambda p: p.write_bytes(p.read_bytes() + b"tail"), "is (truncated|damaged)"),
    (OBSERVATION, lambda p: p.write_bytes(p.read_bytes()[:-8] + bytes(8)), "is damaged: CRC check failed"),
    (OBSERVATION, rezip(lambda data: data[:-10]), "is damaged: it ends before the array"),
    (OBSERVATION, rezip(lambda data: data + b"x"), "is damaged: it goes on after the array"),
    (OBSERVATION, rezip(lambda data: b"PK" + data), "is damaged: the magic string is not correct"),
    (OBSERVATION, rezip(lambda data: data[:6] + b"\x03" + data[7:]), r"is damaged: it has \.npy version \(3, 0\)"),
    (ACTION, rezip(lambda data: data[:-4]), "is damaged: it ends before the array"),
    (OBSERVATION, rewrite(lambda a: a[:, :, :80]), r"must be uint8 \[10, 84, 84\], got uint8 \[10, 84, 80\]"),
    (OBSERVATION, rewrite(lambda a: a.astype(np.float32)), r"must be uint8 \[10, 84, 84\], got float32"),
    (OBSERVATION, rewrite(lambda a: a[:9]), r"got uint8 \[9, 84, 84\]"),
    (OBSERVATION, rewrite(np.asfortranarray), "Fortran order"),
    (ACTION, rewrite(lambda a: a.astype(np.int64)), r"must be int32 \[10\], got int64 \[10\]"),
    (ACTION, rewrite(lambda a: a.astype(object)), "is damaged: it holds Python objects"),
    (REWARD, rewrite(lambda a: a[:, None]), r"must be float32 \[10\], got float32 \[10, 1\]"),
    (TERMINAL, rewrite(lambda a: a[:5]), r"must be uint8 \[10\], got uint8 \[5\]"),
    (ACTION, put(3, 6), r"row 3 must be in 0\.\.5, the minimal actions of Pong, got 6"),
    (ACTION, put(9, -1), r"row 9 must be in 0\.\.5, the minimal actions of Pong, got -1"),
    (REWARD, put(2, 7.0), r"row 2 must be clipped to \[-1, 1\], got 7\.0"),
    (REWARD, put(2, np.nan), r"row 2 must be clipped to \[-1, 1\], got nan"),
    (TERMINAL, put(0, 2), "row 0 must be 0 or 1, got 2"),
    (TERMINAL, put(5, 1), "row 5 must be padding .* but ends one"),
    (TERMINAL, put(3, 0), "an episode has more than 9 steps .it starts at row 4 of .*_ckpt.0.gz."),
    (OBSERVATION, put(5, 1), "row 5 must be padding"),
    (ACTION, put(5, 1), "row 5 must be padding"),
    (REWARD, put(5, 1), "row 5 must be padding"),
    ("add_count_ckpt.1.gz", rewrite(lambda a: a[None]), r"must be one integer, got int64 \[1\]"),
    ("add_count_ckpt.1.gz", rewrite(lambda a: -a), r"add_count must be >= 0, got -19"),
    ("add_count_ckpt.1.gz", rewrite(lambda a: a - 1), r"cursor at row 8, but invalid_range is \[8, 9, 0, 1, 2\]"),
    ("invalid_range_ckpt.1.gz", rewrite(lambda a: a[:4]), "but invalid_range is"),
    ("invalid_range_ckpt.1.gz", rewrite(lambda a: a * 1.0), r"must be integers \[horizon \+ 4\], got float64"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES)
def test_damaged_files_are_named_and_other_games_go_on(
    dopamine, log, tmp_path, small_store, lab, name, damage, message
):
    other = dopamine.new_log(tmp_path / "dqn", game="Breakout", capacity=10)
    for num_steps in (3, 4, 3, 8, 2):
        other.play(num_steps)
    with small_store.writer("Pong", run="mine", source="test") as writer:
        lab.add(writer, lab.make_episodes([(5, True, False)]))
    before = lab.tree(small_store.path)
    shutil.copytree(log.folder, tmp_path / "good")
    damage(log.folder / name)
    arguments = {"games": "Pong,Breakout", "checkpoints": "0-1", "max_episode_steps": 9}
    with pytest.raises(ImportFailedError, match=message) as error:
        import_dqn_replay(tmp_path / "dqn", small_store.path, **arguments)
    assert set(error.value.failures) == {"Pong"}
    assert name in str(error.value) or f"_ckpt.{name[-4]}.gz" in str(error.value)
    assert [s.game for s in error.value.summaries] == ["Breakout"]
    assert [(run.game, run.name) for run in small_store.recordings] == [("Breakout", "1"), ("Pong", "mine")]
    after = lab.tree(small_store.path)
    assert before.pop("recordings.txt") in after.pop("recordings.txt")  # Breakout is listed, too.
    assert {path: after[path] for path in before} == before
    dopamine.check_same(dopamine.stored(small_store, "Breakout"), dopamine.expected(other, "Breakout", [0, 1]))

    shutil.rmtree(log.folder)
    shutil.copytree(tmp_path / "good", log.folder)  # Downloaded again: the import goes on and completes.
    assert len(import_dqn_replay(tmp_path / "dqn", small_store.path, **arguments)) == 2
    dopamine.check_same(dopamine.stored(small_store, "Pong"), dopamine.expected(log, "Pong", [0, 1]))


@pytest.mark.parametrize("damage", [d for d in DAMAGES if d[0] == OBSERVATION and "damaged" in d[2]])
def test_gzip_damages_without_zlib_ng(log, monkeypatch, damage):
    monkeypatch.setattr(dqn_replay, "_open_gzip", gzip.GzipFile)
    monkeypatch.setattr(dqn_replay, "_damage_errors", (ValueError, gzip.BadGzipFile, zlib.error))
    name, damage_file, message = damage
    damage_file(log.folder / name)
    folder = dqn_replay._Folder(str(log.folder))
    with pytest.raises(ValueError, match=message), dqn_replay._open_array(folder, name) as array:
        array.read_all()


def test_checkpoints_in_the_wrong_order(log, tmp_path, small_store):
    rewrite(lambda a: a - 10)(log.folder / "add_count_ckpt.2.gz")
    with pytest.raises(ImportFailedError, match=r"_ckpt\.2\.gz: by its add_count 19 it holds 10 rows .* they differ"):
        import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-2")
    rewrite(lambda a: a + 20)(log.folder / "add_count_ckpt.1.gz")
    with pytest.raises(ImportFailedError, match=r"_ckpt\.2\.gz: add_count 19 is not after that of .*_ckpt\.1\.gz"):
        import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-2")


def test_padding_in_the_oldest_row(dopamine, tmp_path, small_store):
    """B's first padding row is row 9 of checkpoint 1: its scalars are checked at once, its frame at the end."""
    log = dopamine.new_log(tmp_path / "dqn")
    log.play(6)
    log.play(12)
    assert log.logged == [(0, 9), (9, 19)]
    for member in ("observation", "action"):
        name = f"$store$_{member}_ckpt.1.gz"
        good = (log.folder / name).read_bytes()
        put(9, 1)(log.folder / name)
        with pytest.raises(ImportFailedError, match=rf"{member}_ckpt\.1\.gz: row 9 must be padding"):
            import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-1")
        (log.folder / name).write_bytes(good)
    import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-1")
    dopamine.check_same(dopamine.stored(small_store, "Pong"), dopamine.expected(log, "Pong", [0, 1]))


def test_no_pickle_is_ever_loaded(log, tmp_path, small_store):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was loaded",))

    rewrite(lambda a: np.array(Bomb(), dtype=object))(log.folder / "add_count_ckpt.1.gz")
    with pytest.raises(ImportFailedError, match="it holds Python objects"):
        import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-1")


def test_missing_game_folder(log, tmp_path, small_store):
    with pytest.raises(ImportFailedError, match=r"No such file or directory: .*Seaquest/1/replay_logs") as error:
        import_dqn_replay(tmp_path / "dqn", small_store.path, games="Seaquest,Pong", checkpoints="0-1")
    assert [s.game for s in error.value.summaries] == ["Pong"]


def test_runs_in_the_way_are_left_alone(log, tmp_path, small_store, lab):
    with small_store.writer("Pong", run="1", source="my own agent") as writer:
        lab.add(writer, lab.make_episodes([(5, True, False)]))
    before = lab.tree(small_store.path)
    with pytest.raises(ImportFailedError, match="Pong/1 is there already, from my own agent"):
        import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-1")
    assert lab.tree(small_store.path) == before
    (small_store.path / "Pong" / "1" / "manifest.json").unlink()
    with pytest.raises(ImportFailedError, match="Pong/1 is in the way: it has files but no manifest"):
        import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-1")


def test_full_disk_leaves_the_old_store(dopamine, log, tmp_path, small_store, lab):
    with small_store.writer("Pong", run="mine", source="test") as writer:
        lab.add(writer, lab.make_episodes([(5, True, False)]))
    before = lab.tree(small_store.path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(ImportFailedError, match=r"(?i)Pong: .*(file too large|file size limit)"):
            import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-3")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path: data for path, data in lab.tree(small_store.path).items() if ".importing" not in path} == before
    import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-3")
    dopamine.check_same(dopamine.stored(small_store, "Pong"), dopamine.expected(log, "Pong", range(4)))


def test_no_permission(dopamine, lab, public_folder, read_only):
    log = dopamine.new_log(public_folder / "dqn")
    while not log.logged:
        log.play(4)
    store = FrameStore.create(public_folder / "store", chunk_frames=2, shard_frames=8)
    lab.write(store, "Breakout", lab.make_episodes([(5, True, False)]))
    before = lab.tree(store.path)
    with read_only(store.path), pytest.raises(ImportFailedError, match=r"Pong: .*Permission denied: .*/store/"):
        import_dqn_replay(public_folder / "dqn", store.path, games="Pong", checkpoints="0")
    assert lab.tree(store.path) == before


def test_other_checkpoints_of_a_finished_or_unfinished_import(log, tmp_path, small_store):
    os.rename(log.folder / OBSERVATION, tmp_path / "away")
    (log.folder / OBSERVATION).write_bytes(b"")
    with pytest.raises(ImportFailedError):
        import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-1")
    with pytest.raises(
        ImportFailedError, match=r"unfinished import of DQN-Replay, Pong run 1, checkpoints 0-1: finish"
    ):
        import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0")
    os.rename(tmp_path / "away", log.folder / OBSERVATION)
    done = import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-1")
    assert import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-1") == done
    with pytest.raises(ImportFailedError, match="is there already, from DQN-Replay, Pong run 1, checkpoints 0-1"):
        import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-2")
    shutil.rmtree(tmp_path / "dqn" / "Pong")  # Whether the store holds what SOURCE holds cannot be told.
    with pytest.raises(ImportFailedError, match="No such file or directory"):
        import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-1")


# One broken file, whatever it leads to


def header(change):
    """A damage of the .npy header only."""
    return rezip(lambda data: change(data[:128]) + data[128:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (header(lambda h: h.replace(b"}", b" ")), "is damaged: "),  # tokenize.TokenError in NumPy
        (header(lambda h: h.replace(b"(5,)", b"(9" + b"9" * 30 + b",)")[:128]), "is damaged|must be integers"),
        (header(lambda h: h.replace(b"(5,)", b"(-5,)")), "is damaged: its shape is"),
        (header(lambda h: h.replace(b"(5,), }     ", b"(10**9,), } ")), "is damaged: "),
        (rewrite(lambda a: np.zeros(1001, int)), r"must be integers \[horizon \+ 4\], got int64 \[1001\]"),
    ],
)
def test_broken_headers_are_named(log, tmp_path, small_store, damage, message):
    damage(log.folder / "invalid_range_ckpt.1.gz")
    with pytest.raises(ImportFailedError, match=rf"invalid_range_ckpt\.1\.gz ({message})"):
        import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-1")


ODD_SOURCES = """
import numpy as np
from torchrl_sql.data.importers.job import Episode, EpisodeSource, Position

class OddError(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")

class Source(EpisodeSource):
    rewards, request, description = "raw", {}, "made up"
    def __init__(self, game):
        self.game = game
    def count_rows(self):
        return 2
    def read(self, state):
        if self.game == "Pong":
            raise OddError("this error", "its pickle do not fit")
        yield Episode(np.ones((2, 84, 84), "u1"), np.zeros(2, int), np.zeros(2), "terminated", 2)
        yield Position(None, {}, [])
    def digest(self, part):
        return ""
"""


@pytest.mark.slow
def test_an_error_that_cannot_travel_between_processes_costs_its_game_only(tmp_path, monkeypatch):
    (tmp_path / "odd_sources.py").write_text(ODD_SOURCES)
    monkeypatch.syspath_prepend(tmp_path)
    odd_sources = importlib.import_module("odd_sources")
    jobs = [ImportJob(odd_sources.Source(game), tmp_path / "store", "0") for game in ("Pong", "Breakout", "Boxing")]
    with pytest.raises(ImportFailedError, match=r"1 of 3 games could not be imported:\n  Pong: .*OddError"):
        run_imports(jobs, workers=2)
    assert FrameStore.open(tmp_path / "store").games == ("Boxing", "Breakout")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damaged_header_is_named_and_the_other_game_is_imported(dopamine, data):
    with tempfile.TemporaryDirectory() as folder:
        root, store = Path(folder) / "dqn", FrameStore.create(Path(folder) / "store", chunk_frames=2, shard_frames=8)
        logs = {game: dopamine.new_log(root, game=game, capacity=10) for game in ("Pong", "Breakout")}
        for log in logs.values():
            log.play(6)
            log.play(3)
        file = data.draw(st.sampled_from(sorted(logs["Pong"].folder.glob("*_ckpt.0.gz"))))
        contents = bytearray(gzip.decompress(file.read_bytes()))
        for _ in range(data.draw(st.integers(1, 3))):
            contents[data.draw(st.integers(0, 127))] = data.draw(st.integers(0, 255))
        file.write_bytes(gzip.compress(bytes(contents), 1))
        try:
            import_dqn_replay(root, store.path, games="Pong,Breakout", checkpoints="0")
        except ImportFailedError as error:
            assert set(error.failures) == {"Pong"} and "_ckpt.0.gz" in str(error)
        assert "Breakout" in store.games
        for game in store.games:  # What the damage did not touch is right.
            dopamine.check_same(dopamine.stored(store, game), dopamine.expected(logs[game], game, [0]))
