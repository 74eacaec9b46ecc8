"""What a model costs to serve, measured on this machine.

Everything is measured in a fresh process that does nothing else and imports only what serving needs, by
`cost_worker.py`: what the caller holds would count as the model's memory, and its threads would compete for the cores.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_kd.evaluation.cost_worker import size_on_disk


__all__ = ["QUICK", "measure_cost", "price_per_million_tokens", "ratios", "size_on_disk"]

# Settings of `measure_cost` for a small model in a hurry
QUICK = {"prompt_length": 32, "new_tokens": 32, "repeats": 3}

# A figure of a student means something beside a teacher's only if these are equal
_CONDITIONS = ("device", "device_name", "threads", "prompt_length", "new_tokens")
_BATCH_RATIOS = ("tokens_per_second", "p50_seconds")
_STDERR_LINES = 12


def measure_cost(
    path: str | os.PathLike,
    *,
    base: str | None = None,
    batch_sizes: Sequence[int] = (1, 8),
    prompt_length: int = 64,
    new_tokens: int = 64,
    repeats: int = 10,
    dtype: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    model_init_kwargs: Mapping[str, Any] | None = None,
    price_per_hour: float | None = None,
) -> dict[str, Any]:
    r"""
    Measure what a causal language model costs to serve: size, time to load, memory, latency and throughput.

    Starts a process that loads the model, warms it up and lets it continue random prompts greedily by exactly
    `new_tokens` tokens: EOS is suppressed and the model's own generation config is set aside, so that models differ in
    nothing but their speed. Repeats go round all quantities in turn, so that a busy moment of the machine meets each.

    Args:
        path (`str` or `os.PathLike`):
            Folder or Hub name of a model, or of a PEFT adapter, which is measured on its base and not merged into it.
        base (`str`, *optional*):
            Folder or Hub name of the base of an adapter; by default the one that its `adapter_config.json` names.
        batch_sizes (`Sequence[int]`, *optional*, defaults to `(1, 8)`):
            Numbers of prompts that are continued at a time.
        prompt_length (`int`, *optional*, defaults to `64`):
            Length of the prompts, in tokens.
        new_tokens (`int`, *optional*, defaults to `64`):
            Length of the continuations, in tokens.
        repeats (`int`, *optional*, defaults to `10`):
            Measurements of each time, after one that does not count.
        dtype (`str`, *optional*):
            Type to load the weights in, such as `"bfloat16"`; by default the one they were saved in.
        device (`str`, *optional*):
            Where to run; by default the accelerator, if there is one, else the CPU.
        threads (`int`, *optional*):
            CPU threads; by default PyTorch's choice for a new process.
        model_init_kwargs (`Mapping[str, Any]`, *optional*):
            Further arguments of `from_pretrained`, as JSON has them: `revision`, `attn_implementation`, or a
            `quantization_config` as a dictionary. `revision` and `subfolder` of an adapter are the adapter's.
        price_per_hour (`float`, *optional*):
            What the machine costs per hour, in any currency.

    Returns:
        `dict[str, Any]`, which JSON can hold:

        - `parameters`, all of them; `adapter_parameters`, the part that an adapter adds (`None` without one);
        - `bytes_on_disk`, of the weight files, of an adapter with its base; `adapter_bytes_on_disk` (`None` without);
        - `load_seconds`, from the call of `from_pretrained` to a model that is on its device, in a process that has
          imported everything. The files may be in the memory of the operating system;
        - `peak_memory_bytes`, `memory_after_load_bytes` and `memory_before_load_bytes`: on CUDA, memory of tensors;
          elsewhere memory of the process with its libraries. `reserved_memory_bytes`: what PyTorch took of a CUDA
          device (`None` elsewhere). `host_peak_memory_bytes`: of the process, wherever the model is;
        - `first_token_seconds`, of one prompt: `{"p50", "p95"}`;
        - `batches`: for each batch size (a string, as in JSON) `p50_seconds` and `p95_seconds` of whole generations,
          and `tokens_per_second`, all new tokens of a batch over the median time;
        - `device`, `device_name`, `dtype`, `threads`, `prompt_length`, `new_tokens`, `repeats`: what it holds for;
        - with `price_per_hour`: that, and `price_per_million_tokens` for each batch size.

    Raises:
        ValueError: If there is no model at `path`, it has too few positions, or an argument is out of range.
        RuntimeError: If the process ends without a result; the message has its last words.
    """
    _check_settings(batch_sizes, prompt_length, new_tokens, repeats, threads)
    request = {
        "path": os.fspath(path),
        "base": base,
        "batch_sizes": sorted(set(batch_sizes)),
        "prompt_length": prompt_length,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "device": device,
        "threads": threads,
        "model_init_kwargs": {"dtype": dtype or "auto"} | dict(model_init_kwargs or {}),
    }
    cost = _in_fresh_process(request)
    if price_per_hour is not None:
        prices = {size: price_per_million_tokens(cost, price_per_hour, int(size)) for size in cost["batches"]}
        cost |= {"price_per_hour": price_per_hour, "price_per_million_tokens": prices}
    return cost


def price_per_million_tokens(cost: Mapping[str, Any], price_per_hour: float, batch_size: int = 8) -> float:
    r"""
    Price of a million new tokens on a machine that is busy all the time.

    Args:
        cost (`Mapping[str, Any]`):
            Result of [`measure_cost`].
        price_per_hour (`float`):
            What the machine costs per hour.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of prompts at a time, one of those that were measured.

    Returns:
        `float`, in the currency of `price_per_hour`.

    Raises:
        ValueError: If the price is negative or not a number, or the batch size was not measured.

    Examples:

    ```python
    >>> cost = {"batches": {"8": {"tokens_per_second": 1000.0}}}
    >>> price_per_million_tokens(cost, price_per_hour=3.6)  # 3.6 million tokens an hour
    1.0
    ```
    """
    if not 0 <= price_per_hour < float("inf"):
        raise ValueError(f"`price_per_hour` is {price_per_hour}, which is no price. Give a number of at least 0.")
    if str(batch_size) not in cost["batches"]:
        measured = ", ".join(cost["batches"])
        raise ValueError(
            f"`batch_size` is {batch_size}, but speed was measured at {measured} only. Give one of these, or measure "
            f"again with `batch_sizes` that have it."
        )
    tokens_per_hour = 3600 * cost["batches"][str(batch_size)]["tokens_per_second"]
    return price_per_hour / tokens_per_hour * 1e6


def ratios(cost: Mapping[str, Any], teacher_cost: Mapping[str, Any]) -> dict[str, Any]:
    r"""
    What a student costs, as a multiple of what its teacher costs.

    Args:
        cost (`Mapping[str, Any]`):
            Result of [`measure_cost`] for the student.
        teacher_cost (`Mapping[str, Any]`):
            The same for the teacher, under the same conditions; the dtype may differ, since it is a choice.

    Returns:
        `dict[str, Any]`: `parameters`, `bytes_on_disk`, `load_seconds`, `peak_memory_bytes`, `first_token_seconds` (of
        the medians), and `batches`, which has `tokens_per_second` and `p50_seconds` for each batch size that both were
        measured at. `None` where a figure is missing on one side, or the teacher's is 0.

    Raises:
        ValueError: If the two were measured on different devices, threads or lengths.

    Examples:

    ```python
    >>> student = {"parameters": 10, "batches": {"1": {"tokens_per_second": 300.0, "p50_seconds": 0.2}}}
    >>> teacher = {"parameters": 40, "batches": {"1": {"tokens_per_second": 150.0, "p50_seconds": 0.4}}}
    >>> ratios(student, teacher)["parameters"], ratios(student, teacher)["batches"]
    (0.25, {'1': {'tokens_per_second': 2.0, 'p50_seconds': 0.5}})
    ```
    """
    for name in _CONDITIONS:
        if cost.get(name) != teacher_cost.get(name):
            raise ValueError(
                f"`{name}` is {cost.get(name)} for the model and {teacher_cost.get(name)} for its teacher: their "
                "ratio would say more about that than about the models. Measure both in the same way."
            )

    def ratio(own: float | None, other: float | None) -> float | None:
        return None if own is None or not other else own / other

    sizes = ("parameters", "bytes_on_disk", "load_seconds", "peak_memory_bytes")
    latency = [side.get("first_token_seconds", {}).get("p50") for side in (cost, teacher_cost)]
    batches = {
        size: {name: ratio(own[name], teacher_cost["batches"][size][name]) for name in _BATCH_RATIOS}
        for size, own in cost["batches"].items()
        if size in teacher_cost["batches"]
    }
    found = {name: ratio(cost.get(name), teacher_cost.get(name)) for name in sizes}
    return found | {"first_token_seconds": ratio(*latency), "batches": batches}


def _check_settings(
    batch_sizes: Sequence[int], prompt_length: int, new_tokens: int, repeats: int, threads: int | None
) -> None:
    given = {"prompt_length": prompt_length, "new_tokens": new_tokens, "repeats": repeats, "threads": threads}
    for name, value in (given | {"batch_sizes": batch_sizes}).items():
        smallest = min(batch_sizes, default=0) if name == "batch_sizes" else 1 if value is None else value
        if smallest < 1:
            raise ValueError(f"`{name}` is {value}, and nothing can be measured with that. Give 1 or more.")


def _in_fresh_process(request: dict[str, Any]) -> dict[str, Any]:
    """What `cost_worker.py` answers to the request, from a process of its own."""
    with tempfile.TemporaryDirectory(prefix="trl_kd_cost_") as folder:
        question, answer, errors = (Path(folder) / name for name in ("request.json", "result.json", "stderr"))
        try:
            question.write_text(json.dumps(request), encoding="utf-8")
        except TypeError as error:
            raise ValueError(
                f"`model_init_kwargs` are {request['model_init_kwargs']}, which cannot be sent to another process as "
                f'JSON: {error}. Write types as strings (`"bfloat16"`) and configurations as dictionaries.'
            ) from error
        # It finds the packages that this process finds, and not those that lie where it happens to be started
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path)}
        command = [sys.executable, "-P", "-m", "trl_kd.evaluation.cost_worker", str(question), str(answer)]
        with errors.open("w") as stream:
            status = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
            ).returncode
        if status != 0 or not answer.exists():
            raise RuntimeError(_last_words(request["path"], status, errors.read_text(errors="replace")))
        result = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in result:
        raise ValueError(result["error"])
    return result


def _last_words(path: str, status: int, errors: str) -> str:
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    lines = "\n".join(errors.strip().splitlines()[-_STDERR_LINES:]) or "(it wrote nothing)"
    hint = " Signal 9 most often means that memory ran out: take smaller batches." if status == -9 else ""
    return (
        f"The process that measured the cost of `{path}` {how}, so there are no figures.{hint} Mend what its "
        f"last lines say, or leave the cost out:\n{lines}"
    )
