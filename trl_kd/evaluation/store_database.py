"""The SQLite file under the results: how it is laid out, opened, written in whole transactions and found at fault."""

import json
import math
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np


# "trlk": by it a store is told from a database of another program
APPLICATION_ID = 0x74726C6B
SCHEMA_VERSION = 1
BUSY_SECONDS = 30.0

# One statement each: `executescript` would commit before the first one, and a store would not be made in one piece.
SCHEMA = (
    """
    CREATE TABLE runs (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        token TEXT NOT NULL UNIQUE,
        kind TEXT NOT NULL,
        name TEXT NOT NULL,
        dataset TEXT NOT NULL,
        data TEXT NOT NULL,
        settings TEXT NOT NULL,
        versions TEXT NOT NULL,
        identity TEXT NOT NULL,
        created TEXT NOT NULL,
        finished TEXT
    )
    """,
    "CREATE INDEX runs_by_identity ON runs (identity) WHERE finished IS NULL",
    """
    CREATE TABLE models (
        id INTEGER PRIMARY KEY,
        run_id INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        position INTEGER NOT NULL,
        name TEXT NOT NULL,
        role TEXT NOT NULL,
        source TEXT NOT NULL,
        weights TEXT NOT NULL,
        tokenizer TEXT NOT NULL,
        parameters INTEGER,
        size_on_disk INTEGER,
        UNIQUE (run_id, name)
    )
    """,
    """
    CREATE TABLE results (
        model_id INTEGER NOT NULL REFERENCES models (id) ON DELETE CASCADE,
        metric TEXT NOT NULL,
        seed INTEGER NOT NULL,
        value REAL NOT NULL,
        PRIMARY KEY (model_id, metric, seed)
    )
    """,
    """
    CREATE TABLE samples (
        model_id INTEGER NOT NULL REFERENCES models (id) ON DELETE CASCADE,
        seed INTEGER NOT NULL,
        prompt_index INTEGER NOT NULL,
        prompt TEXT NOT NULL,
        "references" TEXT NOT NULL,
        completion TEXT NOT NULL,
        tokens TEXT NOT NULL,
        token_ids TEXT NOT NULL,
        divergence TEXT,
        ended INTEGER NOT NULL,
        PRIMARY KEY (model_id, seed, prompt_index)
    )
    """,
    """
    CREATE TABLE measurements (
        model_id INTEGER NOT NULL,
        seed INTEGER NOT NULL,
        prompt_index INTEGER NOT NULL,
        metric TEXT NOT NULL,
        value REAL NOT NULL,
        weight REAL NOT NULL,
        PRIMARY KEY (model_id, seed, prompt_index, metric),
        FOREIGN KEY (model_id, seed, prompt_index) REFERENCES samples (model_id, seed, prompt_index) ON DELETE CASCADE
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE details (
        model_id INTEGER NOT NULL REFERENCES models (id) ON DELETE CASCADE,
        key TEXT NOT NULL,
        value TEXT NOT NULL,
        PRIMARY KEY (model_id, key)
    )
    """,
    """
    CREATE VIEW history AS
    SELECT
        runs.id AS run_id, runs.name AS run, runs.kind AS kind, models.name AS model, models.role AS role,
        models.source AS source, models.weights AS weights, models.tokenizer AS tokenizer, runs.dataset AS dataset,
        runs.data AS data, results.metric AS metric, results.seed AS seed, results.value AS value,
        runs.versions AS versions, runs.settings AS settings, runs.created AS date, runs.finished AS finished
    FROM results JOIN models ON models.id = results.model_id JOIN runs ON runs.id = models.run_id
    ORDER BY runs.id, models.position, results.metric, results.seed
    """,
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)


class Database:
    """
    One SQLite file. Every use opens it, makes one transaction and closes it again.

    So nothing is shared with forked processes or other threads, and between two uses the store is one file that can
    be copied: the last one to close it merges the write-ahead log.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        create (`bool`):
            Whether to make the file if there is none.
    """

    def __init__(self, path: str | os.PathLike, create: bool = True):
        # A link and its target are one store and must have the same locks
        self.path = Path(os.path.realpath(os.path.expanduser(path)))
        self._check_place(create)
        with self._errors():
            if self._is_empty():
                self._create()
            with self.read() as connection:
                self._check_layout(connection)

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A connection that sees the store at one moment, whatever others write meanwhile."""
        with self._errors(), closing(self._connect_for_reading()) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A connection whose statements are kept all together at the end, or none of them."""
        with self._errors(), closing(self._connect()) as connection:
            # At once: a transaction that begins by reading may find that it can no longer write
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def prefer_wal(self) -> None:
        """Keep a write-ahead log, so that readers need not wait for a writer; without one (network drives) they do."""
        with self._errors(), closing(self._connect()) as connection, suppress(sqlite3.OperationalError):
            connection.execute("PRAGMA journal_mode = WAL")

    def _uri(self, options: str) -> str:
        return f"{self.path.as_uri()}?{options}"

    def _connect(self, mode: str = "rw") -> sqlite3.Connection:
        connection = sqlite3.connect(self._uri(f"mode={mode}"), uri=True, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            connection.execute("PRAGMA foreign_keys = ON")
        except BaseException:
            connection.close()
            raise
        connection.row_factory = sqlite3.Row
        return connection

    def _connect_for_reading(self) -> sqlite3.Connection:
        connection = self._connect()
        try:
            connection.execute("BEGIN")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            return connection
        except BaseException as error:
            connection.close()
            # A store with a write-ahead log wants files beside it. Where none can be made and none are there, nobody
            # is writing, and the file alone is the whole store.
            if not isinstance(error, sqlite3.Error) or not _is_refusal(error) or self._has_log():
                raise
        connection = self._connect("ro&immutable=1")
        connection.execute("BEGIN")
        return connection

    def _has_log(self) -> bool:
        log = Path(f"{self.path}-wal")
        return log.exists() and log.stat().st_size > 0

    def _check_place(self, create: bool) -> None:
        try:
            self._check_path(create)
        except PermissionError as error:
            raise PermissionError(
                f"The results store `{self.path}` cannot be looked at ({error.strerror}): this user may not enter its "
                "folder. Name a store in a folder of yours."
            ) from error

    def _check_path(self, create: bool) -> None:
        folder = self.path.parent
        if self.path.exists() and not self.path.is_file():
            kind = "a folder" if self.path.is_dir() else "no regular file"
            raise IsADirectoryError(
                f"The results store `{self.path}` is {kind}, but a store is one SQLite file. Name a file, such as "
                "`results.sqlite`."
            )
        if not folder.is_dir():
            found = "is not a folder" if folder.exists() else "does not exist"
            raise FileNotFoundError(
                f"The folder `{folder}` of the results store `{self.path.name}` {found}, so the store cannot be made "
                "or read. Make the folder, or name a store in one that is there."
            )
        if not create and not self.path.exists():
            raise FileNotFoundError(
                f"There is no results store `{self.path}`, so there are no runs to read. Give the path of a store "
                "that `trl-kd eval` has written, or run it first."
            )

    def _is_empty(self) -> bool:
        """No store yet: no file, or one that was opened and left before anything was written."""
        if not self.path.exists():
            return True
        with closing(self._connect_for_reading()) as connection:
            tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            return not tables and not _pragma(connection, "application_id") and not _pragma(connection, "user_version")

    def _create(self) -> None:
        try:
            # SQLite would not say why it cannot
            self.path.touch()
        except OSError as error:
            raise type(error)(
                f"The results store `{self.path}` cannot be made ({error.strerror}), so no result could be kept. Name "
                "a store in a folder that this user may write to, or change the folder's permissions."
            ) from error
        with self.write() as connection:
            # Another process may have made it since
            if not _pragma(connection, "user_version"):
                for statement in SCHEMA:
                    connection.execute(statement)
        self.prefer_wal()

    def _check_layout(self, connection: sqlite3.Connection) -> None:
        application, version = _pragma(connection, "application_id"), _pragma(connection, "user_version")
        if application != APPLICATION_ID:
            raise ValueError(
                f"`{self.path}` is an SQLite database of another program (application id {application}, expected "
                f"{APPLICATION_ID}), and results are not written into other data. Name another file for the store."
            )
        if version > SCHEMA_VERSION:
            raise ValueError(
                f"The results store `{self.path}` has version {version}, but this release of trl_kd reads versions "
                f"up to {SCHEMA_VERSION}. It was written by a newer release: update trl_kd, or name another file."
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """SQLite's errors in words that say what to do."""
        try:
            yield
        except sqlite3.Error as error:
            raise self._explained(error) from error

    def _explained(self, error: sqlite3.Error) -> Exception:
        text = str(error)
        if not self.path.exists():
            return FileNotFoundError(
                f"The results store `{self.path}` cannot be opened ({text}): there is no such file and none can be "
                "made. Give the path of a store, in a folder that this user may write to."
            )
        if _is_refusal(error):
            pending = " Its last writes lie in the log beside it." if self._has_log() else ""
            return PermissionError(
                f"The results store `{self.path}` cannot be written ({text}): this user may not write the file or "
                f"its folder `{self.path.parent}`, where SQLite keeps its journal.{pending} Change the permissions, "
                "or copy the store, with its `-wal` file if there is one, to a folder of yours."
            )
        if "not a database" in text:
            return ValueError(
                f"`{self.path}` is no results store: it is not an SQLite database ({text}), and a store is one. It "
                "was left as it is. Name another file, or the store that `trl-kd eval` has written."
            )
        if "malformed" in text or "decode" in text or "no such table" in text:
            return self.damaged(text)
        if "locked" in text or "locking" in text:
            return TimeoutError(
                f"The results store `{self.path}` is held by another process ({text}) for more than "
                f"{BUSY_SECONDS:.0f} seconds, and two cannot write at once. Stop that process, or name another file."
            )
        if isinstance(error, sqlite3.OperationalError):
            return OSError(
                f"The results store `{self.path}` cannot be used ({text}). What was written before is kept. See "
                "that its drive has room and works, then run the same command again: it goes on where it stopped."
            )
        return error

    def damaged(self, found: str) -> ValueError:
        return ValueError(
            f"The results store `{self.path}` is damaged ({found}): part of the file is missing or was overwritten, "
            "so its figures cannot be trusted. Restore it from a copy, or save what is left with `sqlite3 "
            f"{self.path.name} .recover`, and go on in another file."
        )


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


def _is_refusal(error: sqlite3.Error) -> bool:
    return any(part in str(error) for part in ("readonly", "unable to open", "permission denied", "access permission"))


def to_json(value: Any, what: str) -> str:
    """Canonical JSON: sorted keys, no spaces. `what` is the name that an error gives to the value."""
    return json.dumps(plain(value, what), sort_keys=True, separators=(",", ":"))


def plain(value: Any, what: str) -> Any:
    """The value as lists, dicts with text keys, text, numbers, booleans and None; else a clear error."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{what}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{what}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"`{what}` is {value}, which JSON cannot hold and no figure can be made from. Leave it out, or look for "
            "where it came from."
        )
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"`{what}` is a {type(value).__name__} ({value!r}), but the store keeps settings and details as JSON. Give a "
        "number, a text, a boolean, None, or lists and dicts of these."
    )
