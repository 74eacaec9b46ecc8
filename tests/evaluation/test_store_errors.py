import errno
import json
import os
import random
import shutil
import sqlite3
import tempfile
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.evaluation import store_worker
from tests.evaluation.stores import (
    STUDENT,
    TEACHER,
    begin,
    begun,
    filled,
    go,
    kill,
    listing,
    sample,
    start,
)
from trl_kd.evaluation.store import ResultStore
from trl_kd.evaluation.store_database import APPLICATION_ID, SCHEMA_VERSION


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.sqlite"


@pytest.fixture
def store(path):
    return ResultStore(path)


@pytest.mark.parametrize("create", [True, False])
def test_store_in_a_missing_folder_names_it(tmp_path, create):
    with pytest.raises(FileNotFoundError, match=r"folder `.*missing` of the .*`r.sqlite` does not exist.* Make the"):
        ResultStore(tmp_path / "missing" / "r.sqlite", create=create)
    assert listing(tmp_path) == []


def test_store_below_a_file_names_it(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"folder `.*file` of the .*`r.sqlite` is not a folder"):
        ResultStore(tmp_path / "file" / "r.sqlite")


def test_store_where_a_folder_is_says_so(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"is a folder, but a store is one SQLite file\. Name a file"):
        ResultStore(tmp_path)
    with pytest.raises(IsADirectoryError, match=r"`/dev/null` is no regular file"):
        ResultStore("/dev/null")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs Linux' /proc")
def test_store_where_no_file_can_be_made_says_why():
    with pytest.raises(OSError, match=r"`/proc/r.sqlite` cannot be made \(.+\), so no result .* Name a store in"):
        ResultStore("/proc/r.sqlite")


def test_store_that_is_only_read_is_not_made(path):
    with pytest.raises(FileNotFoundError, match=r"There is no results store `.*`, so there are no runs to read"):
        ResultStore(path, create=False)
    assert not path.exists()
    ResultStore(path)
    assert ResultStore(path, create=False).runs() == []


def test_store_path_may_be_relative_linked_and_of_odd_characters(tmp_path, monkeypatch):
    folder = tmp_path / "a %20 ?#é"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder / "r.sqlite")
    monkeypatch.chdir(folder)
    store = ResultStore("r.sqlite")
    monkeypatch.chdir(tmp_path)
    linked = ResultStore("link")
    assert linked.path == store.path == folder / "r.sqlite"
    with begin(store), begin(linked) as second:
        assert second.id == 2
    assert listing(tmp_path) == [folder.name, "link"]


@pytest.mark.parametrize(
    "content", [b"metric,value\nrouge_l,1\n", b"x" * 5000, bytes(5000)], ids=["csv", "long", "zeros"]
)
def test_file_that_is_no_database_is_left_as_it_was(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is no results store: it is not an SQLite database .* Name another file"):
        ResultStore(path)
    assert path.read_bytes() == content and listing(path.parent) == [path.name]


def test_empty_file_becomes_a_store(path):
    path.touch()
    with begin(ResultStore(path)) as run:
        assert run.id == 1


def test_database_of_another_program_is_left_as_it_was(path):
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE runs (id)")
        connection.commit()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="SQLite database of another program .*application id 0, expected"):
        ResultStore(path)
    assert path.read_bytes() == before


def test_store_of_a_newer_release_is_not_touched(store, path):
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(ValueError, match=rf"has version {SCHEMA_VERSION + 1}, but .* up to {SCHEMA_VERSION}\. It was"):
        ResultStore(path)


@pytest.mark.parametrize("left", [0.9, 0.5, 0.05])
def test_store_cut_short_is_damaged(path, left):
    filled(path)
    os.truncate(path, int(path.stat().st_size * left))
    with pytest.raises(ValueError, match=r"is damaged \(.*\): part of the file .* Restore it from a copy"):
        ResultStore(path)


def test_store_with_pages_overwritten_is_damaged(path):
    store = filled(path)
    content = bytearray(path.read_bytes())
    content[3 * 4096 :] = random.Random(0).randbytes(len(content) - 3 * 4096)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged \(.*\): part of the file"):
        store.values(1, "student", "x")
        store.history()


@pytest.mark.parametrize(
    ("table", "column", "read"),
    [
        ("samples", "references", lambda store: store.samples(1, "student", 0)),
        ("samples", "tokens", lambda store: store.samples(1, "student", 0)),
        ("runs", "settings", lambda store: store.runs()),
        ("runs", "versions", lambda store: store.history()),
    ],
)
def test_store_with_broken_json_is_damaged(path, table, column, read):
    store = filled(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"""UPDATE {table} SET "{column}" = '{{"x": [1'""")
        connection.commit()
    with pytest.raises(ValueError, match=r"is damaged \(`\{\"x\": \[1` is no JSON\)"):
        read(store)


def test_store_without_its_tables_is_damaged(path):
    store = filled(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE details")
        connection.commit()
    with pytest.raises(ValueError, match=r"is damaged \(no such table: details\)"):
        store.details(1, "student", "cost")


def test_full_disk_is_a_clear_error_and_the_run_goes_on(path):
    process = start("full", path, "full")
    go(process)
    assert begun(process) == (1, False)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "cannot be used (" in rest and "What was written before is kept." in rest
    store = ResultStore(path)
    assert store.samples(1, "student", 0) == store_worker.batch(1)
    assert [row["metric"] for row in store.history()] == ["after"]


# Stores that cannot be written


@pytest.fixture
def shared_folder():
    """A folder that users other than the one who runs the tests can enter, which pytest's own is not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


@contextmanager
def without_permissions(folder, mode=0o555, file_mode=0o444):
    """As a user who may read the folder and its files but not write them; permission bits do not stop root."""
    for file in folder.iterdir():
        file.chmod(file_mode)
    folder.chmod(mode)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        if not os.access(folder.parent, os.X_OK, effective_ids=True):
            pytest.skip("the folder for temporary files is closed to other users")
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.mark.parametrize("file_mode", [0o444, 0o666])
def test_store_in_a_folder_that_cannot_be_written_is_read(shared_folder, file_mode):
    written = filled(shared_folder / "r.sqlite")
    samples = written.samples(1, "student", 0)
    with without_permissions(shared_folder, file_mode=file_mode):
        store = ResultStore(shared_folder / "r.sqlite")
        assert store.samples(1, "student", 0) == samples and len(store.history()) == 1
        assert store.run("latest").id == 1
        with pytest.raises(PermissionError, match=r"cannot be written \(.*\): this user may not .* copy the store"):
            begin(store)
    assert listing(shared_folder) == ["r.sqlite"]


def test_store_file_that_cannot_be_written_is_read(shared_folder):
    filled(shared_folder / "r.sqlite")
    with without_permissions(shared_folder, mode=0o777):
        store = ResultStore(shared_folder / "r.sqlite")
        assert store.values(1, "student", "x")[1].sum() == 50
        with pytest.raises(PermissionError, match=r"cannot be written \(.*readonly.*\): this user may not"):
            begin(store)


def test_store_that_cannot_be_made_says_why(shared_folder):
    with without_permissions(shared_folder):
        with pytest.raises(PermissionError, match=r"`.*r.sqlite` cannot be made \(Permission denied\)"):
            ResultStore(shared_folder / "r.sqlite")
    with without_permissions(shared_folder, mode=0o000):
        with pytest.raises(PermissionError, match=r"`.*r.sqlite` cannot be "):
            ResultStore(shared_folder / "r.sqlite")


def test_store_with_unmerged_writes_in_a_folder_that_cannot_be_written_is_read_whole_or_refused(shared_folder):
    path = shared_folder / "r.sqlite"
    process = start("begin", path, "killed")
    go(process)
    assert begun(process) == (1, False)
    filled(path)
    with closing(sqlite3.connect(path)) as connection:
        # The last transaction is in the log alone, as after a kill
        connection.execute("SELECT * FROM runs").fetchone()
        with store_worker.begin(ResultStore(path), "later") as run:
            run.add_results("student", 0, {"last": 1.0})
        copy = shared_folder / "copy"
        copy.mkdir()
        for suffix in ("", "-wal"):
            shutil.copy(f"{path}{suffix}", copy)
    kill(process)
    with without_permissions(copy):
        with pytest.raises(PermissionError, match="Its last writes lie in the log beside it.* copy the store, with"):
            ResultStore(copy / "r.sqlite").history()
    assert [row["metric"] for row in ResultStore(copy / "r.sqlite").history()] == ["x", "last"]


def test_lock_that_cannot_be_made_is_a_clear_error_and_no_run(store, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("trl_kd.evaluation.store.FileLock.acquire", refuse)
        with pytest.raises(PermissionError, match=r"The lock `.*run-1.lock` of run 1 cannot be made \(Perm"):
            begin(store)
    assert store.runs() == []


@pytest.mark.parametrize(
    ("message", "expected", "words"),
    [
        ("attempt to write a readonly database", PermissionError, "this user may not write the file"),
        ("database or disk is full", OSError, "See that its drive has room"),
        ("disk I/O error", OSError, "See that its drive has room"),
    ],
)
def test_refusals_of_sqlite_are_clear_errors_and_nothing_is_lost(store, monkeypatch, message, expected, words):
    with begin(store) as run:
        run.add_results("student", 0, {"x": 1.0})

        def refuse(*args):
            raise sqlite3.OperationalError(message)

        with monkeypatch.context() as patch:
            patch.setattr("trl_kd.evaluation.store.Run._model_id", refuse)
            with pytest.raises(expected, match=rf"\({message}\).*{words}"):
                run.add_results("student", 0, {"x": 2.0})
        assert [row["value"] for row in store.history()] == [1.0]
        run.add_results("student", 0, {"x": 3.0})
    assert [row["value"] for row in store.history()] == [3.0]


def test_store_that_was_copied_is_a_store_of_its_own(path, tmp_path):
    store = filled(path)
    with begin(store) as run:
        run.add_results("student", 0, {"y": 2.0})
        copy = shutil.copy(path, tmp_path / "copy.sqlite")
        with begin(ResultStore(copy)) as other:
            assert (other.id, other.resumed) == (run.id, True)
            other.add_results("student", 0, {"y": 3.0})
    assert [row["value"] for row in store.history()] == [1.0, 2.0]
    assert [row["value"] for row in ResultStore(copy).history()] == [1.0, 3.0]


# Values that cannot be kept


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -np.inf, np.float32("nan")])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda bad: sample(5, nll=(bad, 1.0)), "`nll` of model `student`, seed 10, prompt 5, is"),
        (lambda bad: sample(5, nll=(1.0, bad)), "The weight of `nll` of model `student`, seed 10, prompt 5, is"),
        (
            lambda bad: replace(sample(5), divergence=[0.0, bad]),
            r"`divergence\[1\]` of model `student`, seed 10, prompt 5, is",
        ),
    ],
    ids=["value", "weight", "divergence"],
)
def test_samples_with_nan_or_infinity_are_refused_by_name(store, make, words, bad):
    with begin(store) as run:
        with pytest.raises(ValueError, match=rf"{words} -?(nan|inf), and every mean .*NaN logits"):
            run.add_samples("student", 10, [sample(4), make(bad)])
        assert run.samples("student", 10) == []


def test_numbers_that_are_none_are_refused_everywhere_else(store):
    with begin(store) as run:
        with pytest.raises(ValueError, match="Result `x` of model `student`, seed 0, is nan, and"):
            run.add_results("student", 0, {"y": 1.0, "x": float("nan")})
        with pytest.raises(ValueError, match=r"`cost.batches\[1\].p95` is inf, which JSON cannot hold"):
            run.set_details("student", "cost", {"batches": [{}, {"p95": float("inf")}]})
    with pytest.raises(ValueError, match="`settings.a` is nan"):
        begin(store, settings={"a": float("nan")})
    assert store.history() == [] and store.details(1, "student", "cost") is None and len(store.runs()) == 1


def test_samples_that_contradict_themselves_are_refused(store):
    with begin(store) as run:
        with pytest.raises(ValueError, match="The weight of `x` of model `student`, seed 1, prompt 2, is -1.0, but"):
            run.add_samples("student", 1, [sample(2, x=(0.0, -1.0))])
        with pytest.raises(ValueError, match="model `student`, seed 1, have prompt 2 2 times, and one answer"):
            run.add_samples("student", 1, [sample(2), sample(1), sample(2)])
        for write in (
            lambda: run.add_samples("pupil", 1, [sample(2)]),
            lambda: run.add_results("pupil", 1, {"x": 1.0}),
            lambda: run.set_details("pupil", "cost", {}),
        ):
            with pytest.raises(ValueError, match=r"The model is `pupil`, .* Name one of: `teacher`, `student`\."):
                write()
        assert run.samples("student", 1) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "train"}, r"`kind` is 'train', but .* one of \('eval', 'bench'\)"),
        ({"models": [STUDENT, replace(TEACHER, name="student")]}, r"named \['student', 'student'\], but"),
        ({"models": [replace(STUDENT, role="pupil")]}, "The role of model `student` is 'pupil', but"),
        ({"settings": {"generation": {"dtype": object}}}, r"`settings.generation.dtype` is a type .* as JSON\. Give"),
        ({"versions": {"torch": Path("x")}}, "`versions.torch` is a PosixPath"),
    ],
    ids=["kind", "names", "role", "settings", "versions"],
)
def test_begin_with_what_cannot_be_kept_is_refused(store, change, words):
    with pytest.raises(ValueError, match=words):
        begin(store, **change)
    assert store.runs() == [] and listing(store.path.parent) == [store.path.name]


def test_begin_without_models_is_refused(store):
    with pytest.raises(ValueError, match="Give at least one model"):
        store.begin("eval", "n", {}, "d", "s", [], {})


def test_settings_are_kept_as_canonical_json(store):
    with begin(store, settings={"b": (1, 2.0), "a": "é"}):
        pass
    with closing(sqlite3.connect(store.path)) as connection:
        text = connection.execute("SELECT settings FROM runs").fetchone()[0]
    assert text == '{"a":"\\u00e9","b":[1,2.0]}' and json.loads(text) == {"a": "é", "b": [1, 2.0]}
