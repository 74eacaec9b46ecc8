"""
Metrics as modules for the `evaluate` library, which load without the network.

Each folder here holds one: `evaluate.load(METRIC_MODULES["rouge_l"])` works as for any other module, and so does
[`load_metric`], which leaves no file in anyone's cache. Beside its result, each gives one value per prediction, so
that error bars can be made.
"""

import math
import re
from collections.abc import Sequence
from importlib import import_module
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import evaluate
from datasets import Features, Value

from trl_kd.evaluation.metrics.inputs import check_predictions, check_references


METRIC_MODULES = {
    name: str(Path(__file__).with_name(name))
    for name in (
        "rouge_l",
        "exact_match",
        "chrf",
        "distinct_n",
        "length",
        "eos_share",
        "likelihood",
        "divergence",
        "imitation_gap",
    )
}
"""Folders of the modules that ship with the package, by name."""


def load_metric(name: str, **options: Any) -> evaluate.EvaluationModule:
    r"""
    A metric that ships with the package, or any other module of `evaluate`.

    Args:
        name (`str`):
            Name of a module in `METRIC_MODULES` (`"distinct_2"` and the like for its `n`), path of one of your own,
            or the name of one on the Hub.
        **options (`Any`):
            Arguments of [`~evaluate.load`], such as `config_name`.

    Returns:
        [`~evaluate.EvaluationModule`]: it keeps what it is given in memory.

    Raises:
        ValueError: If there is no such metric.
        ImportError: If the metric needs a package that is not installed.
    """
    if match := re.fullmatch("distinct_[1-9]", name):
        name, options = "distinct_n", {"config_name": match.group()} | options
    if name not in METRIC_MODULES:
        return _load_foreign(name, options)
    module = import_module(f"{__name__}.{name}.{name}")
    metric_class = getattr(module, name.title().replace("_", ""))
    # `evaluate` makes a folder for what would not fit into memory; nothing is ever written there
    with TemporaryDirectory() as folder:
        metric = metric_class(keep_in_memory=True, cache_dir=folder, **options)
        metric.download_and_prepare()
    return metric


def _load_foreign(name: str, options: dict[str, Any]) -> evaluate.EvaluationModule:
    try:
        return evaluate.load(name, **({"keep_in_memory": True} | options))
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"There is no metric '{name}': the package has {', '.join(METRIC_MODULES)}, there is no such path, and "
            f"`evaluate` says: {error} Name one of these, or give the path of a module of `evaluate`."
        ) from error


def text_values(
    name: str, predictions: Sequence[Any], references: Sequence[Sequence[str]] | None = None, **options: Any
) -> list[float]:
    r"""
    One value of a metric for each prediction.

    A module that returns `"values"`, as all do that ship with the package, is called once. Any other is called for
    each prediction by itself, so a metric that is no mean over predictions, such as corpus BLEU, gives the mean of its
    values on single predictions.

    Args:
        name (`str`):
            Metric, as for [`load_metric`].
        predictions (`Sequence[str]` or `Sequence[list[int]]`):
            Texts, or token ids for those metrics that count tokens.
        references (`Sequence[Sequence[str]]`, *optional*):
            References of each prediction, for the metrics that compare with some.
        **options (`Any`):
            Further arguments of the metric's `compute`.

    Returns:
        `list[float]`: in the order of the predictions.

    Raises:
        ValueError: If there is no such metric, if predictions and references don't fit each other, if a reference is
            missing or empty, or if the module gives no finite number.
    """
    metric = load_metric(name)
    inputs = _Inputs.of(metric, name, predictions, references)
    if type(metric).__module__.startswith(f"{__name__}."):
        return metric.compute(**inputs.rows(), **options)["values"]
    first = metric.compute(**inputs.rows(0), **options)
    if "values" in first:
        return list(map(float, metric.compute(**inputs.rows(), **options)["values"]))
    results = [first, *(metric.compute(**inputs.rows(i), **options) for i in range(1, len(predictions)))]
    return [_number(result, (Path(name).stem, metric.name), name, i) for i, result in enumerate(results)]


class _Inputs:
    """Predictions and references under the names, and in the form, that a module wants."""

    def __init__(self, columns: dict[str, list[Any]]):
        self.columns = columns

    @classmethod
    def of(
        cls,
        metric: evaluate.EvaluationModule,
        name: str,
        predictions: Sequence[Any],
        references: Sequence[Sequence[str]] | None,
    ) -> "_Inputs":
        formats = [metric.features] if isinstance(metric.features, Features) else metric.features
        names = set(formats[0])
        check_predictions(predictions)
        columns = {"predictions": list(predictions)}
        if names == {"data"}:
            # Measurements of `evaluate` call their only input so
            columns = {"data": columns["predictions"]}
        elif names - {"predictions", "references"}:
            raise ValueError(
                f"The metric '{name}' needs {sorted(names)}, but there are texts and references alone. Call its "
                "`compute` with all of them: `load_metric` gives the module."
            )
        if "references" in names:
            check_references(predictions, references, name)
            columns["references"] = _references(references, formats, name)
        return cls(columns)

    def rows(self, index: int | None = None) -> dict[str, list[Any]]:
        """All rows, or a single one."""
        return self.columns if index is None else {key: [column[index]] for key, column in self.columns.items()}


def _references(references: Sequence[Sequence[str]], formats: list[Features], name: str) -> list[Any]:
    if not all(isinstance(each["references"], Value) for each in formats):
        return [list(texts) for texts in references]
    several = [i for i, texts in enumerate(references) if len(texts) > 1]
    if several:
        raise ValueError(
            f"The metric '{name}' takes one reference per prediction, but row {several[0]} has "
            f"{len(references[several[0]])}. Keep one, or take a metric that compares with several."
        )
    return [texts[0] for texts in references]


def _number(result: dict[str, Any], keys: Sequence[str], name: str, index: int) -> float:
    """The number of a result that stands for it: under one of the keys, or else the first."""
    numbers = {key: value for key, value in result.items() if isinstance(value, Real) and not isinstance(value, bool)}
    if not numbers:
        raise ValueError(
            f"The metric '{name}' returned {sorted(result)}, none of which is a number, so there is no value for "
            f'prediction {index}. Wrap it in a module of your own that returns one value per prediction as `"values"`.'
        )
    value = float(numbers[next((key for key in keys if key in numbers), next(iter(numbers)))])
    if not math.isfinite(value):
        raise ValueError(
            f"The metric '{name}' is {value} for prediction {index}, which no mean can hold. Look at that prediction "
            "and its references, or leave the row out."
        )
    return value
