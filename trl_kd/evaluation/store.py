"""Results of evaluations in one SQLite file: every answer, every figure, and what they were made from."""

import json
import os
import sqlite3
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from trl_kd.evaluation.store_database import Database, plain, to_json
from trl_kd.evaluation.store_rows import (
    ModelEntry,
    RunInfo,
    Sample,
    check_finite,
    check_models,
    find_model,
    from_json,
    identity,
    insert_run,
    measurement_rows,
    now,
    read_samples,
    sample_row,
    update_run,
)


__all__ = ["ModelEntry", "ResultStore", "Run", "RunInfo", "Sample"]


class Run:
    r"""
    A run that is being written, made by [`ResultStore.begin`]; a context manager that lets the run go at its end.

    Every method is one transaction: when it has returned, what it wrote is kept, even if the process is killed. A run
    that is left unfinished can be taken up again by the next `begin` of the same settings.

    Attributes:
        id (`int`):
            The run's number in the store.
        resumed (`bool`):
            Whether an earlier process had begun it.
    """

    def __init__(self, database: Database, run_id: int, token: str, resumed: bool, lock: FileLock):
        self.id = run_id
        self.resumed = resumed
        self._database = database
        self._token = token
        self._lock = lock

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def add_samples(self, model: str, seed: int, samples: Sequence[Sample]) -> None:
        """
        Keep answers of one model and seed; those of the same index are replaced.

        Args:
            model (`str`):
                The model's name.
            seed (`int`):
                Seed of generation.
            samples (`Sequence` of [`Sample`]):
                The answers.

        Raises:
            ValueError: If a value, weight or divergence is NaN or infinite, a weight is negative, an index comes
                twice, or the run has no such model.
        """
        rows = [sample_row(sample, model, seed) for sample in samples]
        values = [row for sample in samples for row in measurement_rows(sample, model, seed)]
        for index, times in Counter(row[0] for row in rows).items():
            if times > 1:
                raise ValueError(
                    f"The samples of model `{model}`, seed {seed}, have prompt {index} {times} times, and one answer "
                    "would replace the other. Number the prompts by their place in the dataset."
                )
        with self._database.write() as connection:
            key = self._model_id(connection, model), int(seed)
            # Their measurements go with them
            connection.executemany(
                "DELETE FROM samples WHERE model_id = ? AND seed = ? AND prompt_index = ?",
                [(*key, row[0]) for row in rows],
            )
            connection.executemany(
                "INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", [(*key, *row) for row in rows]
            )
            connection.executemany(
                "INSERT INTO measurements VALUES (?, ?, ?, ?, ?, ?)", [(*key, *row) for row in values]
            )

    def samples(self, model: str, seed: int) -> list[Sample]:
        """The answers kept so far, by index."""
        with self._database.read() as connection:
            return read_samples(self._database, connection, self.id, model, seed)

    def add_results(self, model: str, seed: int, results: Mapping[str, float]) -> None:
        """
        Keep one figure per metric of one model and seed: the rows of `history`. Earlier ones are replaced.

        Args:
            model (`str`):
                The model's name.
            seed (`int`):
                Seed of generation.
            results (`Mapping[str, float]`):
                Metric to value.

        Raises:
            ValueError: If a value is NaN or infinite, or the run has no such model.
        """
        rows = []
        for metric, value in results.items():
            check_finite(value, f"Result `{metric}` of model `{model}`, seed {seed},")
            rows.append((metric, int(seed), float(value)))
        with self._database.write() as connection:
            model_id = self._model_id(connection, model)
            connection.executemany(
                "INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?)", [(model_id, *row) for row in rows]
            )

    def set_details(self, model: str, key: str, value: Any) -> None:
        """
        Keep what is not one figure per seed, as JSON.

        Args:
            model (`str`):
                The model's name.
            key (`str`):
                `"cost"`, `"by_position"`, `"judge"`, `"harness"` or `"training"`.
            value (`Any`):
                Lists and dicts of numbers, texts, booleans and None.

        Raises:
            ValueError: If the value is no JSON (NaN and infinity are not), or the run has no such model.
        """
        # Not sorted: the order of a dict is part of what is shown
        text = json.dumps(plain(value, key))
        with self._database.write() as connection:
            model_id = self._model_id(connection, model)
            connection.execute("INSERT OR REPLACE INTO details VALUES (?, ?, ?)", (model_id, key, text))

    def finish(self) -> None:
        """Mark the run as whole and let it go. Nothing more can be written to it."""
        with self._database.write() as connection:
            self._check_held(connection)
            connection.execute("UPDATE runs SET finished = ? WHERE id = ?", (now(), self.id))
        # Nobody asks for the lock of a finished run, so the file may go while it is held
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """
        Let the run go without finishing it.

        The lock file stays: removed under the eyes of a process that is about to lock it, it would let two in.
        """
        self._lock.release()

    def _model_id(self, connection: sqlite3.Connection, model: str) -> int:
        self._check_held(connection)
        return find_model(connection, self.id, model)

    def _check_held(self, connection: sqlite3.Connection) -> None:
        if not self._lock.is_locked:
            raise ValueError(
                f"Run {self.id} is finished or was let go, so another process may own it and nothing can be written. "
                "Write before `finish` and inside the `with` block; `begin` takes up a run that is not finished."
            )
        row = connection.execute("SELECT token FROM runs WHERE id = ?", (self.id,)).fetchone()
        if row is None or row["token"] != self._token:
            raise ValueError(
                f"Run {self.id} is not in the store `{self._database.path}` any more: the file was replaced while "
                "the run was going on, and its results would be mixed with others. Begin the run again."
            )


class ResultStore:
    r"""
    Results of evaluations in one SQLite file, which survives a kill at any moment and several writers at once.

    Args:
        path (`str` or `os.PathLike`):
            The file; a new store is made if there is none.
        create (`bool`, *optional*, defaults to `True`):
            Whether to make it. `False` for those who only read, so that a mistyped path is an error.

    Raises:
        OSError: If the folder does not exist, or the file cannot be made, read or written.
        ValueError: If the file is no store, is damaged, or was written by a newer release.

    Examples:

    ```python
    >>> store = ResultStore("results.sqlite")
    >>> models = [ModelEntry("student", "student", "./student", weights="9f2c", tokenizer="77ab")]
    >>> with store.begin("eval", "first", {"seeds": [0]}, "d41d", "stories", models, {"trl_kd": "0.1.0"}) as run:
    ...     run.add_results("student", 0, {"rouge_l": 31.5})
    ...     run.finish()
    >>> store.history()[0]["value"]
    31.5
    ```
    """

    def __init__(self, path: str | os.PathLike, create: bool = True):
        self._database = Database(path, create)

    @property
    def path(self) -> Path:
        """The file, links resolved."""
        return self._database.path

    def begin(
        self,
        kind: str,
        name: str,
        settings: Mapping[str, Any],
        data: str,
        dataset: str,
        models: Sequence[ModelEntry],
        versions: Mapping[str, Any],
    ) -> Run:
        """
        Go on with an unfinished run of the same kind, settings, data, models and versions, or begin a new one.

        A run that a living process holds is left alone. A run that is taken up gets the new `name` and `dataset`, and
        the new sources of its models: they say where things lie, not what they are.

        Args:
            kind (`str`):
                `"eval"` or `"bench"`.
            name (`str`):
                Name of the run, for people.
            settings (`Mapping[str, Any]`):
                All that decides the results; compared as canonical JSON.
            data (`str`):
                Digest of the prompts and references.
            dataset (`str`):
                Name of the dataset, for people.
            models (`Sequence` of [`ModelEntry`]):
                The models, in the order of the tables.
            versions (`Mapping[str, Any]`):
                Versions of the libraries.

        Returns:
            [`Run`]: the run, locked for this process.

        Raises:
            ValueError: If the kind, a role or a model's name is not what it should be, or the settings are no JSON.
        """
        check_models(kind, models)
        columns = {"kind": kind, "name": name, "dataset": dataset, "data": data}
        columns |= {"settings": to_json(settings, "settings"), "versions": to_json(versions, "versions")}
        columns["identity"] = identity(columns, models)
        lock = None
        try:
            with self._database.write() as connection:
                unfinished = connection.execute(
                    "SELECT id, token FROM runs WHERE identity = ? AND finished IS NULL ORDER BY id",
                    (columns["identity"],),
                ).fetchall()
                for row in unfinished:
                    # Asked for while the store is held, so that no two processes and no `finish` meet here
                    if (lock := self._try_lock(row["id"])) is not None:
                        update_run(connection, row["id"], columns, models)
                        return Run(self._database, row["id"], row["token"], True, lock)
                token = uuid.uuid4().hex
                run_id = insert_run(connection, columns | {"token": token, "created": now()}, models)
                lock = self._try_lock(run_id)
                if lock is None:
                    raise ValueError(
                        f"The lock `{self._lock_file(run_id)}` of the new run {run_id} is held by a living process, "
                        "which began it in an earlier store of this name. Stop that process, or name another file."
                    )
            return Run(self._database, run_id, token, False, lock)
        except BaseException:
            if lock is not None:
                lock.release()
            raise

    def runs(self) -> list[RunInfo]:
        """All runs, finished or not, the oldest first."""
        with self._database.read() as connection:
            return [self._info(connection, row) for row in connection.execute("SELECT * FROM runs ORDER BY id")]

    def run(self, which: int | str) -> RunInfo:
        """
        One run.

        Args:
            which (`int` or `str`):
                Its number; or a name, of which the newest finished run is taken (the newest, if none is finished); or
                `"latest"`, the newest finished run of all.

        Returns:
            [`RunInfo`]: the run.

        Raises:
            ValueError: If there is none; lists those that there are.
        """
        runs = sorted(self.runs(), key=lambda run: (run.finished is not None, run.id), reverse=True)
        by_name = [run for run in runs if run.name == which]
        if which == "latest":
            by_name += [run for run in runs if run.finished]
        if not by_name and str(which).isdecimal():
            by_name = [run for run in runs if run.id == int(which)]
        if by_name:
            return by_name[0]
        there = [f"{run.id} `{run.name}`{'' if run.finished else ' (unfinished)'}" for run in self.runs()]
        raise ValueError(
            f"The run is `{which}`, but the store `{self.path}` has "
            + (f"no such run. Name one of: {', '.join(there)}." if there else "no runs. Run `trl-kd eval` first.")
        )

    def samples(self, run_id: int, model: str, seed: int) -> list[Sample]:
        """The answers of one model and seed, by index; empty if there are none."""
        with self._database.read() as connection:
            return read_samples(self._database, connection, run_id, model, seed)

    def values(self, run_id: int, model: str, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
        """
        One metric of one model, per seed and prompt.

        Columns are the prompts of the whole run by index, so that two models of it are paired; a prompt without a
        value has the value 0 and the weight 0.

        Args:
            run_id (`int`):
                The run's number.
            model (`str`):
                The model's name.
            metric (`str`):
                The metric's name.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: values and weights, both float64 of shape `(S, P)`, seeds in order; `None`
            if the model has no such metric.
        """
        with self._database.read() as connection:
            model_id = find_model(connection, run_id, model)
            rows = connection.execute(
                "SELECT seed, prompt_index, value, weight FROM measurements WHERE model_id = ? AND metric = ?",
                (model_id, metric),
            ).fetchall()
            seeds = connection.execute(
                "SELECT DISTINCT seed FROM samples WHERE model_id = ? ORDER BY seed", (model_id,)
            ).fetchall()
            indices = connection.execute(
                "SELECT DISTINCT prompt_index FROM samples JOIN models ON models.id = model_id WHERE run_id = ? "
                "ORDER BY prompt_index",
                (run_id,),
            ).fetchall()
        if not rows:
            return None
        places = {row[0]: place for place, row in enumerate(seeds)}
        columns = {row[0]: place for place, row in enumerate(indices)}
        values, weights = np.zeros((2, len(places), len(columns)))
        for seed, index, value, weight in rows:
            values[places[seed], columns[index]] = value
            weights[places[seed], columns[index]] = weight
        return values, weights

    def metrics(self, run_id: int, model: str) -> list[str]:
        """The metrics that the model has per prompt, by name."""
        with self._database.read() as connection:
            rows = connection.execute(
                "SELECT DISTINCT metric FROM measurements WHERE model_id = ? ORDER BY metric",
                (find_model(connection, run_id, model),),
            ).fetchall()
        return [row[0] for row in rows]

    def details(self, run_id: int, model: str, key: str) -> Any | None:
        """What `set_details` has kept, or `None`."""
        with self._database.read() as connection:
            row = connection.execute(
                "SELECT value FROM details WHERE model_id = ? AND key = ?",
                (find_model(connection, run_id, model), key),
            ).fetchone()
            return None if row is None else from_json(self._database, row["value"])

    def history(self) -> list[dict]:
        """One row per run, model, metric and seed: the view `history`, with `settings` and `versions` as dicts."""
        with self._database.read() as connection:
            rows = [dict(row) for row in connection.execute("SELECT * FROM history")]
        for row in rows:
            for key in ("settings", "versions"):
                row[key] = from_json(self._database, row[key])
        return rows

    def _lock_file(self, run_id: int) -> str:
        return f"{self.path}.run-{run_id}.lock"

    def _try_lock(self, run_id: int) -> FileLock | None:
        lock = FileLock(self._lock_file(run_id), thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        except OSError as error:
            raise PermissionError(
                f"The lock `{self._lock_file(run_id)}` of run {run_id} cannot be made ({error.strerror}), and without "
                "it two processes could write the same run. Change the permissions of the folder, or name another."
            ) from error
        return lock

    def _info(self, connection: sqlite3.Connection, row: sqlite3.Row) -> RunInfo:
        models = connection.execute(
            "SELECT name, role, source, weights, tokenizer, parameters, size_on_disk FROM models WHERE run_id = ? "
            "ORDER BY position",
            (row["id"],),
        ).fetchall()
        seeds = connection.execute(
            "SELECT DISTINCT seed FROM models JOIN samples ON model_id = id WHERE run_id = :run UNION "
            "SELECT DISTINCT seed FROM models JOIN results ON model_id = id WHERE run_id = :run ORDER BY seed",
            {"run": row["id"]},
        ).fetchall()
        texts = {key: row[key] for key in ("id", "kind", "name", "dataset", "data", "created", "finished")}
        settings, versions = (from_json(self._database, row[key]) for key in ("settings", "versions"))
        return RunInfo(
            **texts,
            settings=settings,
            versions=versions,
            models=[ModelEntry(**dict(model)) for model in models],
            seeds=[seed[0] for seed in seeds],
        )
