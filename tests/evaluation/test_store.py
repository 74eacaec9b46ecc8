import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.evaluation.stores import (
    SETTINGS,
    STUDENT,
    TEACHER,
    VERSIONS,
    begin,
    sample,
)
from trl_kd.evaluation.store import ResultStore, Sample


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.sqlite"


@pytest.fixture
def store(path):
    return ResultStore(path)


# What is written is read


def test_samples_written_are_read_back_equal(store):
    written = [
        Sample(3, "a\0b\n\u20ac \U0001f600", [], "", [], None, False, {}, []),
        Sample(0, "p", ["", "é"], "yes no", ["yes", " no"], [0.1 + 0.2, 1e-300], True, {"nll": (1 / 3, 2.0)}, [5, 6]),
    ]
    with begin(store) as run:
        run.add_samples("student", 10, written)
        assert run.samples("student", 10) == [written[1], written[0]]
        assert run.samples("student", 20) == run.samples("teacher", 10) == []
    assert ResultStore(store.path).samples(run.id, "student", 10) == [written[1], written[0]]


def test_samples_of_numpy_numbers_are_kept_as_numbers(store):
    floats, whole = np.float32([0.5, 0.25]), np.int64([1, 2])
    given = Sample(
        whole[0], "p", [], "ab", ["a", "b"], list(floats), np.bool_(True), {"x": (floats[0], whole[1])}, whole
    )
    with begin(store, settings={"n": whole[1], "grid": floats}) as run:
        run.add_samples("student", whole[0], [given])
        (read,) = run.samples("student", 1)
    assert read == Sample(1, "p", [], "ab", ["a", "b"], [0.5, 0.25], True, {"x": (0.5, 2.0)}, [1, 2])
    assert store.run(run.id).settings == {"n": 2, "grid": [0.5, 0.25]}


def test_samples_of_equal_index_are_replaced_and_others_kept(store):
    with begin(store) as run:
        run.add_samples("student", 10, [sample(0, "old"), sample(1, "old")])
        run.add_samples("student", 20, [sample(1, "other seed")])
        run.add_samples("teacher", 10, [sample(1, "other model")])
        run.add_samples("student", 10, [sample(1, "new", x=(1.0, 1.0)), sample(2, "new")])
    texts = {
        (model, seed): [(s.index, s.completion) for s in store.samples(run.id, model, seed)]
        for model in ("teacher", "student")
        for seed in (10, 20)
    }
    assert texts == {
        ("student", 10): [(0, "old"), (1, "new"), (2, "new")],
        ("student", 20): [(1, "other seed")],
        ("teacher", 10): [(1, "other model")],
        ("teacher", 20): [],
    }
    assert store.metrics(run.id, "student") == ["x"]


def test_samples_with_one_that_cannot_be_written_are_not_written_at_all(store):
    with begin(store) as run:
        run.add_samples("student", 10, [sample(0, "old")])
        with pytest.raises(sqlite3.Error):
            run.add_samples("student", 10, [sample(0, "new"), replace(sample(1), prompt=["no text"])])
        assert [s.completion for s in run.samples("student", 10)] == ["old"]


def test_values_are_arrays_of_seeds_and_prompts_with_weights(store):
    with begin(store) as run:
        # Not in order, with a gap in the prompts, one prompt without the metric and one of the other model's alone
        run.add_samples("student", 20, [sample(4, y=(8.0, 3.0)), sample(0, y=(7.0, 2.0))])
        run.add_samples("student", 10, [sample(0, y=(5.0, 1.0), z=(1.0, 1.0)), sample(4, z=(2.0, 1.0))])
        run.add_samples("teacher", 10, [sample(0), sample(2, y=(9.0, 4.0))])
    values, weights = store.values(run.id, "student", "y")
    assert values.dtype == weights.dtype == np.float64
    assert values.tolist() == [[5.0, 0.0, 0.0], [7.0, 0.0, 8.0]]
    assert weights.tolist() == [[1.0, 0.0, 0.0], [2.0, 0.0, 3.0]]
    values, weights = store.values(run.id, "teacher", "y")
    assert values.tolist() == [[0.0, 9.0, 0.0]] and weights.tolist() == [[0.0, 4.0, 0.0]]
    assert store.values(run.id, "student", "x") is None and store.values(run.id, "teacher", "z") is None
    assert store.metrics(run.id, "student") == ["y", "z"] and store.metrics(run.id, "teacher") == ["y"]
    assert store.run(run.id).seeds == [10, 20]


def test_details_are_replaced_and_kept_in_order(store):
    with begin(store) as run:
        run.set_details("student", "cost", {"old": 1})
        run.set_details("student", "cost", {"b": [1.5, None], "a": {"1": "x"}})
        run.set_details("student", "training", [{"step": 1}])
    assert list(store.details(run.id, "student", "cost").items()) == [("b", [1.5, None]), ("a", {"1": "x"})]
    assert store.details(run.id, "student", "training") == [{"step": 1}]
    assert store.details(run.id, "teacher", "cost") is None and store.details(run.id, "student", "judge") is None


def test_history_has_one_row_per_model_metric_and_seed(store):
    with begin(store) as run:
        run.add_results("student", 20, {"rouge_l": 3.0})
        run.add_results("student", 10, {"rouge_l": 1.0, "nll": 2.0})
        run.add_results("student", 10, {"nll": 2.5})
        run.add_results("teacher", 10, {"rouge_l": 4.0})
        run.finish()
    with begin(store, kind="bench", name="second", data="d2", dataset="sums", models=[STUDENT]) as later:
        later.add_results("student", 10, {"rouge_l": 5.0})
    rows = store.history()
    figures = [(row["run_id"], row["model"], row["dataset"], row["metric"], row["seed"], row["value"]) for row in rows]
    assert figures == [
        (run.id, "teacher", "stories", "rouge_l", 10, 4.0),
        (run.id, "student", "stories", "nll", 10, 2.5),
        (run.id, "student", "stories", "rouge_l", 10, 1.0),
        (run.id, "student", "stories", "rouge_l", 20, 3.0),
        (later.id, "student", "sums", "rouge_l", 10, 5.0),
    ]
    info = store.run(run.id)
    assert rows[0] == {
        "run_id": run.id, "run": "first", "kind": "eval", "model": "teacher", "role": "teacher", "source": "big",
        "weights": "aa", "tokenizer": "tt", "dataset": "stories", "data": "d1", "metric": "rouge_l", "seed": 10,
        "value": 4.0, "versions": VERSIONS, "settings": SETTINGS, "date": info.created, "finished": info.finished,
    }  # fmt: skip
    assert rows[-1]["data"] == "d2" and rows[-1]["kind"] == "bench" and rows[-1]["finished"] is None
    with closing(sqlite3.connect(store.path)) as connection:
        assert connection.execute("SELECT count(*), sum(value) FROM history").fetchone() == (5, 15.5)


def test_runs_are_listed_with_all_that_was_given(store):
    with begin(store) as run:
        run.add_results("teacher", 3, {"x": 1.0})
        run.add_samples("student", 1, [sample(0)])
    with begin(store, kind="bench", name="second", data="d2", dataset="sums", models=[STUDENT]) as other:
        other.finish()
    first, second = store.runs()
    assert (first.id, first.name, first.kind, first.data, first.dataset) == (run.id, "first", "eval", "d1", "stories")
    assert first.models == [TEACHER, STUDENT] and first.settings == SETTINGS and first.versions == VERSIONS
    assert first.seeds == [1, 3] and first.finished is None and first.created.endswith("+00:00")
    assert (second.kind, second.data, second.dataset, second.seeds) == ("bench", "d2", "sums", [])
    assert second.models == [STUDENT] and second.finished >= second.created


def test_run_is_found_by_number_name_and_latest(store):
    ids = {}
    for key, name, finished in [("a1", "a", True), ("b1", "b", True), ("a2", "a", True), ("b2", "b", False)]:
        with begin(store, name=name, data=key) as run:
            ids[key] = run.id
            if finished:
                run.finish()
    with begin(store, name="only begun", data="c") as run:
        pass
    assert store.run("latest").id == store.run("a").id == ids["a2"]
    assert store.run("b").id == ids["b1"]
    assert store.run("only begun").id == run.id
    assert store.run(ids["b2"]).id == store.run(str(ids["b2"])).id == ids["b2"]
    with pytest.raises(ValueError, match=r"The run is `c`, .* Name one of: 1 `a`, 2 `b`, 3 `a`, 4 `b` \(unfinished\)"):
        store.run("c")
    with pytest.raises(ValueError, match="The run is `99`"):
        store.run(99)
    for read in (store.samples, store.values, store.details):
        with pytest.raises(ValueError, match=r"The run is 99, .* Give one of: 1, 2, 3, 4, 5\."):
            read(99, "student", 0)
        with pytest.raises(ValueError, match=r"`pupil`, but run 1 has no results .* `teacher`, `student`\."):
            read(1, "pupil", 0)


def test_run_of_an_empty_store_says_how_to_make_one(store):
    for which in ("latest", 1):
        with pytest.raises(ValueError, match=r"has no runs\. Run `trl-kd eval` first"):
            store.run(which)
    assert store.runs() == store.history() == []
    begin(store).close()
    with pytest.raises(ValueError, match=r"The run is `latest`, .* Name one of: 1 `first` \(unfinished\)\."):
        store.run("latest")


# Runs that go on


def test_begin_goes_on_with_an_unfinished_equal_run(store):
    with begin(store) as first:
        first.add_samples("student", 10, [sample(0)])
        assert not first.resumed
    settings = {"generation": {"top_p": 0.9}, "stop": None, "seeds": (10, 20), "temperature": 1}
    moved = [replace(STUDENT, source="moved", parameters=5), TEACHER]
    with begin(store, name="again", dataset="moved", settings=settings, models=moved) as second:
        assert (second.id, second.resumed) == (first.id, True)
        assert len(second.samples("student", 10)) == 1
        second.add_samples("student", 10, [sample(1)])
        second.finish()
    (info,) = store.runs()
    assert (info.name, info.dataset, info.models) == ("again", "moved", moved)
    assert [s.index for s in store.samples(first.id, "student", 10)] == [0, 1]
    with begin(store) as third:
        assert (third.id, third.resumed) == (2, False)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "bench"},
        {"data": "d2"},
        {"settings": {**SETTINGS, "temperature": 0.7}},
        {"settings": {**SETTINGS, "stop": False}},
        {"settings": {**SETTINGS, "seeds": [20, 10]}},
        {"versions": {**VERSIONS, "torch": "2.7"}},
        {"models": [TEACHER]},
        {"models": [TEACHER, replace(STUDENT, weights="cc")]},
        {"models": [TEACHER, replace(STUDENT, tokenizer="uu")]},
        {"models": [TEACHER, replace(STUDENT, role="before")]},
        {"models": [TEACHER, replace(STUDENT, name="other")]},
    ],
)
def test_begin_with_anything_else_is_a_new_run(store, change):
    with begin(store):
        pass
    with begin(store, **change) as other:
        assert (other.id, other.resumed) == (2, False)


def test_begin_does_not_join_a_living_run(store, path):
    with begin(store) as first, begin(ResultStore(path)) as second, begin(store) as third:
        assert [run.id for run in (first, second, third)] == [1, 2, 3]
        second.close()
        with begin(store) as fourth:
            assert (fourth.id, fourth.resumed) == (2, True)
    assert len(store.runs()) == 3


def test_finish_removes_the_lock_and_close_leaves_the_run_to_others(store, path):
    run = begin(store)
    lock = Path(f"{path}.run-1.lock")
    assert lock.exists()
    with run:
        run.finish()
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name]
    for write in (lambda: run.add_results("student", 0, {"x": 1.0}), lambda: run.finish()):
        with pytest.raises(ValueError, match="Run 1 is finished or was let go, so another process may own it"):
            write()
    with begin(store) as unfinished:
        pass
    with pytest.raises(ValueError, match="Run 2 is finished or was let go"):
        unfinished.add_samples("student", 0, [sample(0)])
    assert store.samples(2, "student", 0) == [] and store.history() == []


def test_run_whose_store_was_replaced_does_not_write_into_the_new_one(store, path):
    with begin(store) as run:
        path.unlink()
        with pytest.raises(FileNotFoundError, match="cannot be opened .*no such file"):
            run.add_results("student", 0, {"x": 1.0})
        fresh = ResultStore(path)
        with pytest.raises(ValueError, match="`.*run-1.lock` of the new run 1 is held by a living process"):
            begin(fresh)
        run.close()
        begin(fresh).close()
        run._lock.acquire(timeout=0)
        with pytest.raises(ValueError, match="Run 1 is not in the store .* any more: the file was replaced"):
            run.add_results("student", 0, {"x": 1.0})
    assert fresh.history() == []
