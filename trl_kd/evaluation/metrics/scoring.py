"""What the metrics share that read texts by a model."""

from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import torch

from trl_kd.evaluation.metrics.inputs import check_predictions
from trl_kd.evaluation.models import EvalModel, Reader
from trl_kd.evaluation.suite import EvalRow


def features(*names: str) -> list[datasets.Features]:
    """Columns that all hold token ids, or all texts."""
    # Ids first: a list of them would pass for a text, but no text for a list
    return [
        datasets.Features({name: datasets.Sequence(datasets.Value("int64")) for name in names}),
        datasets.Features({name: datasets.Value("string") for name in names}),
    ]


def open_model(name: str, model: Any, tokenizer: Any = None) -> tuple[Any, Reader]:
    """A model, from a path or as it is, and its reader."""
    opened = EvalModel(name, model, tokenizer=tokenizer)
    loaded = opened.load()
    return loaded, Reader(loaded, opened.tokenizer, chat=False)


def token_rows(
    reader: Reader, prompts: Sequence[Any], completions: Sequence[Any], ended: bool, name: str = "predictions"
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of prompts and completions. Texts are read as a trainer does, with an EOS if they `ended`."""
    check_predictions(completions)
    rows = []
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if isinstance(completion, str):
            row = reader.answer(EvalRow(index, prompt, ()), completion, ended)
        else:
            row = (list(prompt), list(completion))
        if not all(row):
            raise ValueError(
                f"Row {index} has {len(row[0])} tokens in `prompts` and {len(row[1])} in `{name}`, but a likelihood "
                "needs a state to start from and a token to judge. Begin the prompt with the BOS token, or leave the "
                "row out."
            )
        rows.append(row)
    return [prompt for prompt, _ in rows], [completion for _, completion in rows]


def finite(values: Iterable[torch.Tensor], what: str) -> list[torch.Tensor]:
    """The values of each row, if none is NaN or infinite."""
    rows = list(values)
    for index, row in enumerate(rows):
        if not row.isfinite().all():
            raise ValueError(
                f"{what} is not finite for prediction {index}: the logits of a model hold NaN, or rule out a token "
                "that is there. Look at its weights and its dtype, or leave the row out."
            )
    return rows


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Mean by weights; 0 if there are none."""
    total = sum(weights)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / total if total else 0.0
