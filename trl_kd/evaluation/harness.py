"""Benchmarks of lm-evaluation-harness, through its own API. Needs the extra `harness`."""

import copy
import difflib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trl_kd.evaluation.models import EvalModel


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run_harness(
    model: "str | PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 8,
    include_path: str | Path | None = None,
    include_defaults: bool = True,
    apply_chat_template: bool = False,
    bootstrap_iters: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """
    Results of a model on tasks of [lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness).

    Tasks are looked up and their data loaded before the model is. The model, its training mode, the tokenizer and the
    global random states are the same afterwards.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Folder with a model or an adapter, name on the Hub, or a model object.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `None`):
            Its tokenizer. May be `None` where `model` is a `str`.
        tasks (`Sequence[str]`):
            Names of tasks, groups or tags; `*` stands for any text.
        limit (`int`, *optional*):
            Number of rows per task, from its start. Defaults to all.
        num_fewshot (`int`, *optional*):
            Examples before each question. Defaults to what the task says. A task that says 0 stays at 0.
        batch_size (`int` or `str`, *optional*, defaults to `8`):
            Rows per batch, or `"auto"`.
        include_path (`str` or `Path`, *optional*):
            Folder with tasks of one's own in YAML.
        include_defaults (`bool`, *optional*, defaults to `True`):
            Whether the harness's own tasks are indexed as well, which takes some seconds.
        apply_chat_template (`bool`, *optional*, defaults to `False`):
            Whether questions are put into the tokenizer's chat template.
        bootstrap_iters (`int`, *optional*, defaults to `1000`):
            Resamples for the standard error of metrics that are no mean (a mean has a formula).
        seed (`int`, *optional*, defaults to `0`):
            Seed of sampled generations and of the choice of few-shot examples.

    Returns:
        `dict[str, dict[str, Any]]`: for each task or group `version`, `num_fewshot`, `samples` (rows that were used)
        and `metrics`, which maps a metric to its `value`, `standard_error` and `higher_is_better`, `None` where there
        is none. A metric with a filter is called `"<metric>,<filter>"`. Ready for JSON.

    Raises:
        ImportError: If lm-evaluation-harness, or what a task needs beside it, is not installed.
        ValueError: If a task is unknown, its data are not on this machine and cannot be fetched, or the model's
            logits are not numbers.

    Examples:

    ```python
    >>> run_harness("path/to/student", None, ["arc_easy"], limit=100)["arc_easy"]["metrics"]["acc"]
    {'value': 0.61, 'standard_error': 0.049020713000019756, 'higher_is_better': True}
    ```
    """
    lm_eval = _import_lm_eval()
    from lm_eval.models.huggingface import HFLM

    if limit is not None and limit < 1:
        raise ValueError(f"`limit` is {limit}, but it is a number of rows. Set it to 1 or more, or to `None` for all.")
    with _random_states_kept():
        # Few-shot examples and processed rows may depend on the random state from here on
        loaded, manager = _load_tasks(tasks, include_path, include_defaults)
        if isinstance(model, str):
            entry = EvalModel(name=model, model=model, tokenizer=tokenizer)
            model, tokenizer = entry.load(), entry.tokenizer
        with _model_kept(model):
            results = lm_eval.simple_evaluate(
                # The wrapper sets a padding token
                model=HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size),
                tasks=loaded,
                task_manager=manager,
                num_fewshot=num_fewshot,
                batch_size=batch_size,
                limit=limit,
                bootstrap_iters=bootstrap_iters,
                apply_chat_template=apply_chat_template,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    if results is None:
        raise ValueError("This process is not the first of several, which has the results. Run on a single process.")
    return {name: _task_result(name, results) for name in results["results"]}


def _import_lm_eval() -> Any:
    """The package, which is optional and slow to import."""
    try:
        import lm_eval
    except ImportError as error:
        raise ImportError(
            f"lm-evaluation-harness cannot be imported ({error}), so its tasks cannot run. Install it with "
            "`pip install trl_kd[harness]`."
        ) from error
    return lm_eval


def _load_tasks(
    names: Sequence[str], include_path: str | Path | None, include_defaults: bool
) -> tuple[list[Any], Any]:
    """Tasks and groups with their data, each named once, and the manager that knows them."""
    from lm_eval.tasks import TaskManager

    if isinstance(names, str) or not names:
        raise ValueError(f"`tasks` is {names!r}, which names no tasks. Pass a list such as `['arc_easy']`.")
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"`include_path` is `{include_path}`, which is no folder. Pass one that holds tasks in YAML.")
    manager = TaskManager(
        include_path=None if include_path is None else str(include_path), include_defaults=include_defaults
    )
    names = dict.fromkeys(match for pattern in names for match in _match(pattern, manager))
    parts = {name: _load_task(name, manager) for name in names}
    groups = {name: part["groups"][name] for name, part in parts.items() if name in part.get("groups", {})}
    # A pattern may match a group and its members, which the harness would not run twice
    inside = {
        member for name in groups for member in (*parts[name]["groups"], *parts[name]["tasks"]) if member != name
    }
    # A tag is no more than a list of tasks
    tasks = {name: task for part in parts.values() for name, task in part["tasks"].items() if name not in inside}
    loaded = [group for name, group in groups.items() if name not in inside] + list(tasks.values())
    return loaded, manager


def _match(name: str, manager: Any) -> list[str]:
    """The known names that a name or pattern stands for."""
    matches = manager.match_tasks([name])
    if not matches:
        # Similar spellings first, then names that contain it
        near = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.7)
        near += [known for known in manager.all_tasks if name in known and known not in near]
        near = f"Did you mean {', '.join(f'`{known}`' for known in near[:5])}? " if near else ""
        raise ValueError(
            f"`tasks` names '{name}', which lm-evaluation-harness does not know among {len(manager.all_tasks)} tasks. "
            f"{near}`lm-eval ls tasks` lists its own; `include_path` adds a folder of others."
        )
    return matches


def _load_task(name: str, manager: Any) -> Mapping[str, Any]:
    """A task or group with its data."""
    try:
        return manager.load([name])
    except ImportError as error:
        raise ImportError(
            f"The task '{name}' needs a package that is not installed: {error}. Install it, or leave the task out."
        ) from error
    # `datasets` and the Hub raise these for what they neither have nor reach, under many names
    except (ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"The data of the task '{name}' are not on this machine and cannot be fetched: {error}. Load them once "
            "with access to the Hub and without `HF_HUB_OFFLINE` and `HF_DATASETS_OFFLINE`, or correct the path in "
            "the task's YAML."
        ) from error


def _task_result(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of what `simple_evaluate` returns, whose keys are `<metric>,<filter>`, as plain numbers."""
    row = results["results"][name]
    directions = results["higher_is_better"].get(name) or {}
    metrics = {}
    for key, value in row.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        metrics[metric if filter_name == "none" else key] = {
            "value": _number(value),
            "standard_error": _number(row.get(f"{metric}_stderr,{filter_name}")),
            "higher_is_better": directions.get(metric),
        }
    samples = results["n-samples"].get(name, {}).get("effective", row.get("sample_len", row.get("sample_count")))
    # A number or a text, by the YAML
    version = results["versions"].get(name)
    return {
        "version": None if version is None else str(version),
        "num_fewshot": results["n-shot"].get(name),
        "samples": samples,
        "metrics": metrics,
    }


def _number(value: Any) -> float | None:
    """A float that JSON can hold; the harness writes "N/A" where it has none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


@contextmanager
def _model_kept(model: "PreTrainedModel") -> Iterator[None]:
    """
    Gives each submodule its training mode back, and stops at logits that are not numbers.

    A comparison with NaN is false, so a broken model would be given the score of its first choice.
    """

    def check(module, args, output):
        if torch.isnan(output.logits).any():
            raise ValueError("The model's logits are not numbers (NaN), so it has no answers. Check its weights.")

    modes = [(module, module.training) for module in model.modules()]
    handle = model.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()
        for module, training in modes:
            module.training = training


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """The harness seeds all global generators."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
