"""Checks that the metrics share, and what is common to their results."""

from collections.abc import Sequence
from typing import Any


def check_predictions(predictions: Sequence[Any]) -> None:
    """There is something to measure, of one kind."""
    if not len(predictions):
        raise ValueError("`predictions` is empty, so there is nothing to measure. Pass at least one.")
    num_texts = sum(isinstance(prediction, str) for prediction in predictions)
    if num_texts not in (0, len(predictions)):
        raise ValueError(
            f"`predictions` has {num_texts} texts and {len(predictions) - num_texts} lists of token ids, which are "
            "counted in different units. Pass texts or token ids."
        )


def check_references(predictions: Sequence[Any], references: Sequence[Sequence[str]] | None, name: str) -> None:
    """Each prediction has a reference to compare it with, and none is empty."""
    check_predictions(predictions)
    if references is None:
        raise ValueError(
            f"The metric '{name}' compares with references, but `references` is None. Pass a list of references for "
            "each prediction, or measure something else."
        )
    if len(predictions) != len(references):
        raise ValueError(
            f"`references` has {len(references)} rows but `predictions` has {len(predictions)}. A prediction is "
            "compared with the references at its own index. Pass as many rows as predictions."
        )
    for index, texts in enumerate(references):
        if isinstance(texts, str):
            raise ValueError(
                f"`references` has a text in row {index}, but a prediction may have several references. Make it a "
                "list of one."
            )
        if not len(texts):
            raise ValueError(
                f"`references` has no reference in row {index}, so there is nothing to compare the prediction with. "
                "Remove the row."
            )
        if not all(text.strip() for text in texts):
            raise ValueError(
                f"`references` has an empty text in row {index}, which no prediction can resemble. Remove that "
                "reference, or the row."
            )


def mean(values: Sequence[float]) -> float:
    """Plain mean."""
    return sum(values) / len(values)
