"""What the results store keeps: its entries as Python sees them, and their way into rows and back."""

import hashlib
import json
import math
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from trl_kd.evaluation.store_database import Database, to_json


ROLES = ("teacher", "before", "student", "other")
KINDS = ("eval", "bench")


@dataclass(frozen=True)
class ModelEntry:
    r"""
    One model of a run.

    Args:
        name (`str`):
            Its name in tables, different for each model of a run.
        role (`str`):
            `"teacher"`, `"before"` (the student before distillation), `"student"` or `"other"`.
        source (`str`):
            The folder or Hub name that it was loaded from.
        weights (`str`):
            Digest of its weights.
        tokenizer (`str`):
            Digest of its tokenizer.
        parameters (`int`, *optional*):
            Number of parameters.
        size_on_disk (`int`, *optional*):
            Bytes of its files.
    """

    name: str
    role: str
    source: str
    weights: str
    tokenizer: str
    parameters: int | None = None
    size_on_disk: int | None = None


@dataclass
class Sample:
    r"""
    What one model answered to one prompt.

    Args:
        index (`int`):
            The prompt's place in the dataset.
        prompt (`str`):
            The prompt as text.
        references (`list[str]`):
            Reference answers; may be empty.
        completion (`str`):
            The answer.
        tokens (`list[str]`):
            The pieces of the answer as text.
        divergence (`list[float]`, *optional*):
            Total variation to the teacher at each token of the answer; `None` without a teacher of the same
            vocabulary.
        ended (`bool`):
            Whether the answer ended with EOS.
        values (`dict[str, tuple[float, float]]`):
            Metric to its value for this prompt and the weight that the value has in the mean over prompts.
        token_ids (`list[int]`):
            The tokens of the answer.
    """

    index: int
    prompt: str
    references: list[str]
    completion: str
    tokens: list[str]
    divergence: list[float] | None
    ended: bool
    values: dict[str, tuple[float, float]]
    token_ids: list[int]


@dataclass
class RunInfo:
    """A run as a reader sees it. `created` and `finished` are in UTC, in ISO 8601."""

    id: int
    kind: str
    name: str
    dataset: str
    data: str
    settings: dict
    versions: dict
    created: str
    finished: str | None
    models: list[ModelEntry]
    seeds: list[int]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def from_json(database: Database, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise database.damaged(f"`{text[:40]}` is no JSON") from error


def check_finite(value: float, what: str) -> None:
    if not math.isfinite(value):
        raise ValueError(
            f"{what} is {value}, and every mean over it would be too. Look for the cause in the model (NaN logits?); "
            "a prompt that has no value takes the value 0.0 and the weight 0."
        )


def sample_row(sample: Sample, model: str, seed: int) -> tuple:
    """The columns of a sample after its model and seed."""
    divergence = None
    if sample.divergence is not None:
        for place, value in enumerate(sample.divergence):
            check_finite(value, f"`divergence[{place}]` of model `{model}`, seed {seed}, prompt {sample.index},")
        divergence = json.dumps([float(value) for value in sample.divergence])
    return (
        int(sample.index),
        sample.prompt,
        json.dumps(list(sample.references)),
        sample.completion,
        json.dumps(list(sample.tokens)),
        json.dumps([int(token) for token in sample.token_ids]),
        divergence,
        bool(sample.ended),
    )


def measurement_rows(sample: Sample, model: str, seed: int) -> list[tuple[int, str, float, float]]:
    """Index, metric, value and weight of each value of a sample."""
    where = f"of model `{model}`, seed {seed}, prompt {sample.index},"
    rows = []
    for metric, (value, weight) in sample.values.items():
        check_finite(value, f"`{metric}` {where}")
        check_finite(weight, f"The weight of `{metric}` {where}")
        if weight < 0:
            raise ValueError(
                f"The weight of `{metric}` {where} is {weight}, but it counts tokens, bytes or prompts. Give 0 or "
                "more."
            )
        rows.append((int(sample.index), metric, float(value), float(weight)))
    return rows


def read_samples(
    database: Database, connection: sqlite3.Connection, run_id: int, model: str, seed: int
) -> list[Sample]:
    key = find_model(connection, run_id, model), int(seed)
    rows = connection.execute(
        "SELECT * FROM samples WHERE model_id = ? AND seed = ? ORDER BY prompt_index", key
    ).fetchall()
    values = {row["prompt_index"]: {} for row in rows}
    for index, metric, value, weight in connection.execute(
        "SELECT prompt_index, metric, value, weight FROM measurements WHERE model_id = ? AND seed = ?", key
    ):
        values[index][metric] = (value, weight)
    lists = ("references", "tokens", "token_ids")
    return [
        Sample(
            index=row["prompt_index"],
            prompt=row["prompt"],
            completion=row["completion"],
            divergence=None if row["divergence"] is None else from_json(database, row["divergence"]),
            ended=bool(row["ended"]),
            values=values[row["prompt_index"]],
            **{name: from_json(database, row[name]) for name in lists},
        )
        for row in rows
    ]


def find_model(connection: sqlite3.Connection, run_id: int, model: str) -> int:
    ids = dict(connection.execute("SELECT name, id FROM models WHERE run_id = ? ORDER BY position", (run_id,)))
    if model in ids:
        return ids[model]
    if not ids:
        runs = ", ".join(str(row[0]) for row in connection.execute("SELECT id FROM runs ORDER BY id"))
        raise ValueError(f"The run is {run_id}, but the store has no such run. Give one of: {runs or 'none yet'}.")
    raise ValueError(
        f"The model is `{model}`, but run {run_id} has no results of it. Name one of: "
        + ", ".join(f"`{name}`" for name in ids)
        + "."
    )


def check_models(kind: str, models: Sequence[ModelEntry]) -> None:
    if kind not in KINDS:
        raise ValueError(f"`kind` is {kind!r}, but a run is an evaluation or a benchmark. Set it to one of {KINDS}.")
    names = [model.name for model in models]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"The models are named {names}, but a run keeps its results under their names. Give at least one model, "
            "and each a name of its own."
        )
    for model in models:
        if model.role not in ROLES:
            raise ValueError(
                f"The role of model `{model.name}` is {model.role!r}, but comparisons are made by role. Set it to one "
                f"of {ROLES}."
            )


def identity(columns: Mapping[str, str], models: Sequence[ModelEntry]) -> str:
    """Digest of all that two runs must have in common to be one."""
    known = [json.loads(columns[key], parse_float=_number) for key in ("settings", "versions")]
    entries = sorted([model.name, model.role, model.weights, model.tokenizer] for model in models)
    text = to_json([columns["kind"], columns["data"], known, entries], "identity")
    return hashlib.sha256(text.encode()).hexdigest()


def _number(text: str) -> float | int:
    """`1.0` from a YAML file and `1` from a command line are one setting."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def insert_run(connection: sqlite3.Connection, columns: Mapping[str, str], models: Sequence[ModelEntry]) -> int:
    names, places = ", ".join(columns), ", ".join(f":{key}" for key in columns)
    run_id = connection.execute(f"INSERT INTO runs ({names}) VALUES ({places})", dict(columns)).lastrowid
    connection.executemany(
        "INSERT INTO models (run_id, position, name, role, source, weights, tokenizer, parameters, size_on_disk) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (run_id, place, m.name, m.role, m.source, m.weights, m.tokenizer, m.parameters, m.size_on_disk)
            for place, m in enumerate(models)
        ],
    )
    return run_id


def update_run(
    connection: sqlite3.Connection, run_id: int, columns: Mapping[str, str], models: Sequence[ModelEntry]
) -> None:
    connection.execute(
        "UPDATE runs SET name = ?, dataset = ? WHERE id = ?", (columns["name"], columns["dataset"], run_id)
    )
    connection.executemany(
        "UPDATE models SET position = ?, source = ?, parameters = ?, size_on_disk = ? WHERE run_id = ? AND name = ?",
        [(place, m.source, m.parameters, m.size_on_disk, run_id, m.name) for place, m in enumerate(models)],
    )
