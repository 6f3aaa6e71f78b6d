from __future__ import annotations

import errno
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_sql.data import AtariFrameStorage, FrameStore, OfflineAtariReplay, convert, verify
from torchrl_sql.data.growing import GrowingStore

GAMES = ("Pong", "Freeway")
LEGAL = ([0, 3, 4], [0, 2, 5])


def growing(folder, **changes):
    options = {"source": "a test", "about": {"played_by": 1}, "labels": ["step"], "shard_frames": 40}
    return GrowingStore(folder / "store", GAMES, **options | changes)


def add(store, number):
    """An episode that follows from its number."""
    rng = np.random.default_rng(number)
    num_steps = int(rng.integers(1, 20))
    frames = rng.integers(0, 256, (num_steps, 84, 84)).astype(np.uint8)
    actions, rewards = rng.choice(LEGAL[number % 2], num_steps), rng.choice([0.0, 1.0], num_steps)
    store.add(GAMES[number % 2], frames, actions, rewards, terminated=True, labels={"step": number})


def contents(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def manifests(recordings):
    return {recording.game: recording.manifest.to_json() for recording in recordings}


@settings(max_examples=6, deadline=None)
@given(
    committed=st.sets(st.integers(2, 11)), kept=st.integers(2, 11), lost=st.integers(0, 9), loses_commit=st.booleans()
)
def test_a_store_taken_back_to_an_earlier_state_grows_as_if_nothing_had_been(
    tmp_path_factory, committed, kept, lost, loses_commit
):
    whole, parts = growing(tmp_path_factory.mktemp("whole")), growing(tmp_path_factory.mktemp("parts"))
    for store in (whole, parts):
        store.open()
    for number in range(12):
        add(whole, number)
    whole.commit()
    for number in range(kept):
        add(parts, number)
        if number in committed:
            parts.commit()
    state = manifests(parts.commit())
    for number in range(20, 20 + lost):  # another future
        add(parts, number)
    if loses_commit:
        parts.commit()
    parts.close()
    parts = growing(parts.store.path.parent)
    parts.open(state)
    for number in range(kept, 12):
        add(parts, number)
    parts.commit()
    for store in (whole, parts):
        store.close()
    assert contents(parts.store.path) == contents(whole.store.path)
    assert not list(verify(parts.store))


def test_labels_and_what_it_is_about_are_in_the_metadata(tmp_path):
    store = growing(tmp_path)
    store.open()
    for number in range(5):
        add(store, number)
    pong, freeway = store.commit()
    store.close()
    assert pong.manifest.metadata == {"played_by": 1, "labels": ["step"]}
    assert {name: values.tolist() for name, values in pong.labels.items()} == {"step": [0.0, 2.0, 4.0]}
    assert freeway.labels["step"].tolist() == [1.0, 3.0]
    assert store.num_episodes == 2


def bytes_written():
    """By all threads of this process, to files of any kind."""
    with open("/proc/self/io") as file:
        return int(dict(line.split(": ") for line in file)["wchar"])


def test_what_a_commit_writes_does_not_grow_with_the_store(tmp_path):
    """Each commit ends with as many frames in the last shard: after 8 episodes, and after 408."""
    store = growing(tmp_path, labels=["step", "other"])
    frames, zero = np.zeros((1, 84, 84), np.uint8), np.zeros(1)
    store.open()

    def commit_after(num_episodes):
        for number in range(num_episodes):
            for game in GAMES:
                labels = {"step": 10**6 + number, "other": 0.123456789}
                store.add(game, frames, zero.astype(int), zero, terminated=True, labels=labels)
        before = bytes_written()
        recordings = store.commit()
        return bytes_written() - before, [len(recording.manifest.to_json()) for recording in recordings]

    few, manifests_of_few = commit_after(8)
    commit_after(392)
    many, manifests_of_many = commit_after(8)
    store.close()
    assert store.store.recording("Pong").labels["other"].tolist() == [0.123456789] * 408
    digits = 200  # of counts and checksums
    assert max(manifests_of_many) < max(manifests_of_few) + digits
    assert few - digits * 10 < many < few + digits * 10


def test_a_store_of_before_there_was_a_file_of_labels_is_refused_and_left_as_it_is(tmp_path):
    store = FrameStore.create(tmp_path / "store", shard_frames=40)
    about = {"played_by": 1, "episodes": {"step": [0]}}
    with store.writer("Pong", source="a test", behaviours=["agent"], metadata=about) as writer:
        writer.add_episode(np.zeros((1, 84, 84), np.uint8), [0], [0.0], terminated=True)
    before = contents(tmp_path)
    for manifests in (None, {"Pong": store.recording("Pong").manifest.to_json()}):
        with pytest.raises(
            ValueError, match=r"must have labels\.f64 with \['step'\] .*, got none, as an older version"
        ):
            growing(tmp_path).open(manifests)
    assert contents(tmp_path) == before
    assert store.recording("Pong").labels == {}


def test_nothing_is_added_before_the_store_is_open_or_of_another_game(tmp_path):
    store = growing(tmp_path)
    for use in (lambda: add(store, 0), store.commit, lambda: store.num_episodes):
        with pytest.raises(RuntimeError, match=r"the store must be opened first: call open\(\)"):
            use()
    store.open()
    frames, zeros = np.zeros((1, 84, 84), np.uint8), np.zeros(1, int)
    with pytest.raises(ValueError, match=r"game must be one of the store's \(.*Pong.*\), got 'Qbert'"):
        store.add("Qbert", frames, zeros, zeros, terminated=True, labels={"step": 0})
    store.close()


def test_labels_must_be_those_of_the_store(tmp_path):
    store = growing(tmp_path)
    store.open()
    for labels in ({}, {"step": 1.0, "more": 2.0}, {"step": float("nan")}):
        with pytest.raises(ValueError, match=r"labels must be finite numbers named \['step'\], got "):
            store.add(
                "Pong", np.zeros((1, 84, 84), np.uint8), np.zeros(1, int), np.zeros(1), terminated=True, labels=labels
            )
    add(store, 0), add(store, 1)
    store.commit()
    store.close()
    with pytest.raises(ValueError, match=r"got \['step'\]: it can be trained on, but not be continued"):
        growing(tmp_path, labels=["step", "more"]).open()


def test_damaged_labels_are_found(tmp_path):
    store = growing(tmp_path)
    store.open()
    add(store, 0), add(store, 1)
    pong, _ = store.commit()
    store.close()
    file = pong.path / "labels.f64"
    file.write_bytes(np.array([7.0], "<f8").tobytes())
    with pytest.raises(ValueError, match=r"labels\.f64 is damaged: its CRC32 does not match"):
        _ = store.store.recording("Pong").labels
    (damage,) = verify(store.store)
    assert (damage.file, damage.reason) == (file, "the CRC32 does not match the manifest")
    file.unlink()
    with pytest.raises(ValueError, match=r"labels\.f64 is missing: 1 committed records need 8 bytes"):
        _ = store.store.recording("Pong").labels


def test_a_converted_store_has_the_labels(tmp_path):
    store = growing(tmp_path)
    store.open()
    for number in range(6):
        add(store, number)
    store.commit()
    store.close()
    for other in (convert(store.store, tmp_path / "lz4", codec="lz4"), store.store):
        assert other.recording("Freeway").labels["step"].tolist() == [1.0, 3.0, 5.0]


def test_a_store_begun_anew_is_empty(tmp_path):
    store = growing(tmp_path)
    store.open()
    add(store, 0), add(store, 1)
    store.commit()
    store.close()
    store = growing(tmp_path)
    store.open()
    assert store.num_episodes == 0
    add(store, 3), add(store, 4)
    store.commit()
    store.close()
    assert [recording.num_episodes for recording in FrameStore.open(tmp_path / "store").recordings] == [1, 1]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"about": {"played_by": 2}}, "played_by 2, not 1"),
        ({"about": {"played_by": {"seed": 1}}}, r"played_by \{'seed': 1\}, not 1"),
        ({"source": "another"}, "source 'another', not 'a test'"),
    ],
)
def test_what_others_recorded_is_not_written_to(tmp_path, change, difference):
    store = growing(tmp_path, **change)
    store.open()
    add(store, 0), add(store, 1)
    store.commit()
    store.close()
    before = contents(tmp_path)
    text = f"must hold nothing but what this run played, got {difference}; choose another folder"
    with pytest.raises(ValueError, match=text):
        growing(tmp_path).open()
    assert contents(tmp_path) == before


def test_a_store_with_other_recordings_of_the_game_is_refused(tmp_path):
    with FrameStore.create(tmp_path / "store").writer("Pong", source="a test", run="1") as writer:
        writer.add_episode(np.zeros((2, 84, 84), np.uint8), [0, 1], [0.0, 0.0], terminated=True)
    with pytest.raises(ValueError, match=r"Pong must hold nothing but what this run played, got the recording 1;"):
        growing(tmp_path).open()


def test_an_earlier_state_that_is_lost_is_named(tmp_path):
    store = growing(tmp_path)
    store.open()
    add(store, 0), add(store, 1)
    state = manifests(store.commit())
    store.close()
    with pytest.raises(FileNotFoundError, match=r"is not a store"):
        growing(tmp_path / "other").open(state)
    FrameStore.create(tmp_path / "other" / "store", shard_frames=40)
    with pytest.raises(ValueError, match=r"manifest\.json is missing: the recording that is to be continued was there"):
        growing(tmp_path / "other").open(state)


@pytest.mark.parametrize("change", ["older", "converted", "another life"])
def test_a_store_of_another_time_or_encoding_is_left_as_it_is(tmp_path, change):
    store = growing(tmp_path)
    store.open()
    for number in range(20):
        add(store, number)
    if change == "older":
        store.commit()
        shutil.copytree(tmp_path / "store", tmp_path / "copy")
        for number in range(20, 30):
            add(store, number)
    state = manifests(store.commit())
    store.close()
    if change == "converted":
        convert(store.store, tmp_path / "copy", codec="lz4")
    elif change == "another life":
        other = growing(tmp_path / "other")
        other.open()
        for number in range(60, 99):
            add(other, number)
        other.commit()
        other.close()
        (tmp_path / "other" / "store").rename(tmp_path / "copy")
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "copy").rename(tmp_path / "store")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"Pong must begin with the \d+ transitions that are to be continued, got \d+"):
        growing(tmp_path).open(state)
    assert contents(tmp_path) == before
    assert not list(verify(FrameStore.open(tmp_path / "store")))


def test_a_store_that_somebody_writes_is_left_as_it_is(tmp_path):
    writing = growing(tmp_path)
    writing.open()
    add(writing, 0), add(writing, 1)
    state = manifests(writing.commit())
    before = contents(tmp_path)
    for manifest in (None, state):
        with pytest.raises(BlockingIOError, match="is open in another writer"):
            growing(tmp_path).open(manifest)
    assert contents(tmp_path) == before
    writing.close()


def test_of_several_games_the_one_that_somebody_writes_is_named(tmp_path):
    store = growing(tmp_path)
    store.open()
    store.close()
    for game in GAMES:
        writing = store.store.writer(game, source="a test", behaviours=["agent"], labels=["step"])
        with writing, pytest.raises(BlockingIOError, match=f"store/{game}/.* is open in another writer"):
            growing(tmp_path).open()


def test_one_refusal_leaves_all_games_as_they_are(tmp_path):
    options = {"source": "a test", "labels": ["step"], "shard_frames": 40}
    ours = GrowingStore(tmp_path / "store", ["Pong"], about={"played_by": 1}, **options)
    theirs = GrowingStore(tmp_path / "store", ["Freeway"], about={"played_by": 2}, **options)
    for number, store in enumerate((ours, theirs)):
        store.open()
        add(store, number)
        store.commit()
        store.close()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"Freeway must hold nothing but what this run played"):
        growing(tmp_path).open()
    assert contents(tmp_path) == before


def test_only_what_a_start_may_have_left_is_dropped(tmp_path):
    store = growing(tmp_path)
    store.open()
    for number in range(4):
        add(store, number)  # the label "step" is the number
    store.commit()
    store.close()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"Freeway holds \d+ transitions, to step 3, of a run whose checkpoints"):
        growing(tmp_path).open(dropping={"step": 3})
    with pytest.raises(ValueError, match=r"dropping must name labels \(step\), got 'steps'"):
        growing(tmp_path).open(dropping={"steps": 3})
    assert contents(tmp_path) == before
    store.open(dropping={"step": 4})
    assert store.store.recording("Freeway").num_episodes == 0
    store.close()


def test_a_full_disk_leaves_what_was_committed(tmp_path, monkeypatch):
    store = growing(tmp_path)
    store.open()
    add(store, 0), add(store, 1)
    pong, freeway = store.commit()

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torchrl_sql.data.writer.write_text", full)
    add(store, 2), add(store, 3)
    with pytest.raises(OSError, match=rf"DISK FULL: what was committed stays.*{pong.num_steps} of Pong") as caught:
        store.commit()
    store.close()
    assert caught.value.errno == errno.ENOSPC
    assert manifests(FrameStore.open(tmp_path / "store").recordings) == manifests([freeway, pong])
    assert not list(verify(store.store))


@given(newest=st.integers(1, 60))
@settings(max_examples=10, deadline=None)
def test_the_newest_episodes_are_shown(tmp_path_factory, newest):
    folder = tmp_path_factory.mktemp("store")
    lengths = [5, 9, 3, 12, 7]
    with FrameStore.create(folder / "store").writer("Pong", source="a test") as writer:
        for length in lengths:
            frames, zeros = np.zeros((length, 84, 84), np.uint8), np.zeros(length)
            writer.add_episode(frames, zeros.astype(int), zeros, terminated=True)
    kept = max((k for k in range(1, 6) if sum(lengths[-k:]) <= newest), default=1)
    storage = AtariFrameStorage(folder / "store", newest_steps=newest)
    assert len(storage) == sum(lengths[-kept:])
    assert storage[:]["next", "done"].sum() == kept


@pytest.mark.parametrize("prefetch", [0, 3])
def test_batches_come_from_what_is_shown_at_their_step(tmp_path, prefetch):
    store = growing(tmp_path)
    store.open()
    for number in range(4):
        add(store, number)
    few = store.commit()
    for number in range(4, 20):
        add(store, number)
    many = store.commit()
    replay = OfflineAtariReplay(store.store, batch_size=8, games=GAMES, seed=5, prefetch=prefetch)
    replay.show(few, until=6)
    drawn = [replay.sample() for _ in range(6)]
    replay.show(many, until=9)
    drawn += [replay.sample() for _ in range(3)]
    for step, batch in enumerate(drawn):
        storage = AtariFrameStorage(store.store, GAMES)
        storage.show(few if step < 6 else many)
        index = replay.sampler.indices(storage, 8, step)
        assert batch["index"].tolist() == index.tolist()
        assert (batch["observation"] == storage[index]["observation"]).all()
    with pytest.raises(ValueError, match="recordings must be of"):
        replay.show(many[::-1], until=9)
    replay.shutdown()
    store.close()


def test_other_games_in_the_store_are_left_alone_and_deleted_ones_begun_anew(tmp_path):
    first, second = (
        growing(tmp_path),
        GrowingStore(tmp_path / "store", ["Breakout"], source="a test", about={}, labels=[]),
    )
    first.open()
    add(first, 0), add(first, 1)
    first.commit()
    before = contents(first.store.path / "Pong")
    second.open()
    second.add("Breakout", np.zeros((1, 84, 84), np.uint8), np.zeros(1, int), np.zeros(1), terminated=True, labels={})
    second.commit()
    second.close()
    first.close()
    assert contents(first.store.path / "Pong") == before
    shutil.rmtree(first.store.path / "Breakout")
    second.open()
    second.close()
    assert first.store.games == ("Freeway", "Pong")
