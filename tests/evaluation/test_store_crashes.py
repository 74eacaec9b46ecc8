import os
import random
import signal
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.evaluation import store_worker
from tests.evaluation.stores import (
    begin,
    begun,
    check_integrity,
    go,
    kill,
    sample,
    start,
)
from trl_kd.evaluation import store_database
from trl_kd.evaluation.store import ResultStore
from trl_kd.evaluation.store_database import Database


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.sqlite"


@pytest.fixture
def store(path):
    return ResultStore(path)


def test_kill_in_the_middle_of_a_write_keeps_the_earlier_transaction(path):
    process = start("middle", path, "killed")
    go(process)
    assert begun(process) == (1, False)
    assert process.stdout.readline() == "middle\n"
    assert Path(f"{path}-wal").stat().st_size > 1e6  # part of the second batch is on the disk
    assert ResultStore(path).samples(1, "student", 0) == store_worker.batch(1)
    kill(process)
    check_integrity(path)
    store = ResultStore(path)
    with store_worker.begin(store, "killed") as run:
        assert (run.id, run.resumed) == (1, True)
        assert run.samples("student", 0) == store_worker.batch(1)
        run.add_samples("student", 0, store_worker.batch(3))
    assert store.samples(1, "student", 0) == store_worker.batch(3)


def test_kills_at_random_moments_lose_nothing_that_was_reported(path):
    moments = random.Random(7)
    last = 0
    for turn in range(12):
        process = start(10_000, path, "killed")
        go(process)
        assert begun(process) == (1, turn > 0)
        time.sleep(moments.uniform(0, 0.15))
        reported = [0, *map(int, kill(process).split())][-1]
        store = ResultStore(path)
        check_integrity(path)
        samples = store.samples(1, "student", 0)
        generations = {s.values["generation"][0] for s in samples}
        assert len(generations) <= 1 and len(samples) in {store_worker.PROMPTS, store_worker.PROMPTS if last else 0}
        # Each process counts from 1: it may have been killed before its first write
        if reported or generations:
            (generation,) = generations
            assert generation in (reported, reported + 1) or (reported == 0 and generation == last)
            assert samples == store_worker.batch(int(generation))
            last = generation
        results = {row["seed"]: row["value"] for row in store.history()}
        assert all(results.get(seed) == seed for seed in range(1, reported + 1))
    assert last > 0


def test_two_processes_writing_at_once_lose_nothing(path):
    processes = [start(40, path, name) for name in ("left", "right")]
    for process in processes:
        go(process)
    ids = [begun(process)[0] for process in processes]
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert sorted(ids) == [1, 2]
    check_integrity(path)
    store = ResultStore(path)
    for run_id in ids:
        assert store.run(run_id).finished
        assert store.samples(run_id, "student", 0) == store_worker.batch(40)
        rows = [row for row in store.history() if row["run_id"] == run_id]
        assert [(row["seed"], row["value"]) for row in rows] == [(seed, seed) for seed in range(1, 41)]
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name]


def test_begins_at_once_give_runs_of_their_own_and_kills_give_them_back(path):
    """The store is made by all of them at once, too."""
    for resumed in (False, True):
        processes = [start("begin", path, "same") for _ in range(4)]
        for process in processes:
            go(process)
        assert sorted(begun(process) for process in processes) == [(run_id, resumed) for run_id in (1, 2, 3, 4)]
        for process in processes:
            kill(process)
    check_integrity(path)
    assert len(ResultStore(path).runs()) == 4


def test_store_made_by_another_process_meanwhile_is_used_as_it_is(store, path, monkeypatch):
    with begin(store):
        monkeypatch.setattr(Database, "_is_empty", lambda self: True)  # as it was a moment ago
        assert len(ResultStore(path).runs()) == 1


def test_reader_does_not_wait_for_a_writer_and_sees_the_store_before_it(store, monkeypatch):
    monkeypatch.setattr(store_database, "BUSY_SECONDS", 0.0)
    with begin(store) as run:
        run.add_samples("student", 0, [sample(0, "old")])
        with Database(store.path).write() as connection:
            connection.execute("UPDATE samples SET completion = 'new'")
            assert [s.completion for s in store.samples(1, "student", 0)] == ["old"]
        assert [s.completion for s in store.samples(1, "student", 0)] == ["new"]


def test_reader_sees_one_moment_in_all_its_queries(store):
    with begin(store) as run, Database(store.path).read() as connection:
        for _ in range(2):
            assert connection.execute("SELECT count(*) FROM results").fetchone()[0] == 0
            run.add_results("student", 0, {"x": 1.0})
    assert len(store.history()) == 1


def test_writer_waits_for_another(store):
    with begin(store) as run:
        entered, left = threading.Event(), []

        def hold():
            with Database(store.path).write():
                entered.set()
                time.sleep(0.5)
                left.append(True)

        thread = threading.Thread(target=hold)
        thread.start()
        entered.wait()
        run.add_results("student", 0, {"x": 1.0})
        assert left == [True]
        thread.join()
    assert len(store.history()) == 1


def test_writer_that_waits_too_long_is_a_clear_error(store, monkeypatch):
    monkeypatch.setattr(store_database, "BUSY_SECONDS", 0.1)
    with begin(store) as run, Database(store.path).write():
        with pytest.raises(TimeoutError, match=r"held by another process \(database is locked\).* Stop that process"):
            run.add_results("student", 0, {"x": 1.0})
    assert store.history() == []


def test_store_without_a_write_ahead_log_works(path, monkeypatch):
    # SQLite's other way of locking files has no shared memory, as some network drives have none
    uri = Database._uri
    monkeypatch.setattr(Database, "_uri", lambda self, options: uri(self, f"{options}&vfs=unix-dotfile"))
    store = ResultStore(path)
    with begin(store) as run:
        run.add_results("student", 0, {"x": 1.0})
    with closing(sqlite3.connect(f"{path.as_uri()}?vfs=unix-dotfile", uri=True)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    with begin(store) as run:
        assert run.resumed
    assert [row["value"] for row in store.history()] == [1.0]


def test_store_has_a_write_ahead_log_where_it_can(store):
    with closing(sqlite3.connect(store.path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_process_forked_from_a_killed_one_does_not_keep_its_run(path):
    process = start("fork", path, "forked")
    go(process)
    assert begun(process) == (1, False)
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdin.close()
    with store_worker.begin(ResultStore(path), "forked") as run:
        assert (run.id, run.resumed) == (1, True)
        os.kill(child, signal.SIGKILL)  # was alive
    process.stdout.close()
