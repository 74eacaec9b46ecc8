"""Stores for the tests, and processes that write into them and are killed."""

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from tests.evaluation import store_worker
from trl_kd.evaluation.store import ModelEntry, ResultStore, Sample


WORKER = Path(store_worker.__file__)
TEACHER = ModelEntry("teacher", "teacher", "big", "aa", "tt", 1000, 4000)
STUDENT = ModelEntry("student", "student", "small", "bb", "tt")
SETTINGS = {"temperature": 1.0, "seeds": [10, 20], "stop": None, "generation": {"top_p": 0.9}}
VERSIONS = {"torch": "2.6", "trl_kd": "0.1"}


def begin(store, **changes):
    given = {"kind": "eval", "name": "first", "settings": SETTINGS, "data": "d1", "dataset": "stories"}
    given |= {"models": [TEACHER, STUDENT], "versions": VERSIONS}
    return store.begin(**given | changes)


def sample(index, completion="x", **values):
    return Sample(index, f"prompt {index}", ["a", "b"], completion, [completion], [0.5], True, values, [7])


def filled(path):
    store = ResultStore(path)
    with begin(store) as run:
        run.add_samples("student", 0, [sample(index, "long answer " * 100, x=(1.0, 1.0)) for index in range(50)])
        run.add_results("student", 0, {"x": 1.0})
        run.finish()
    return store


def listing(folder):
    return sorted(file.name for file in Path(folder).iterdir())


def start(*arguments):
    process = subprocess.Popen(
        [sys.executable, str(WORKER), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=WORKER.parents[2],
        env={**os.environ, "PYTHONPATH": str(WORKER.parents[2])},
    )
    assert process.stdout.readline() == "ready\n"
    return process


def go(process):
    process.stdin.write("\n")
    process.stdin.flush()


def begun(process):
    """The number of the run that a worker has begun, and whether it goes on with an earlier one."""
    run_id, resumed = process.stdout.readline().split()
    return int(run_id), resumed == "True"


def kill(process):
    process.send_signal(signal.SIGKILL)
    rest = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL
    return rest


def check_integrity(path):
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
