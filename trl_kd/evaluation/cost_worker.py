"""The process in which `cost.py` measures a model: it reads a request, loads, measures, writes the answer and ends.

It imports what serving needs and no more: further libraries would count as the model's memory (those of the trainers,
another 90 MB beside 350).
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file, find_adapter_config_file, logging

from trl_kd._compat import context_length, is_placed


# Arguments of `from_pretrained` that say where a model's files are
_SOURCE = ("cache_dir", "revision", "subfolder", "token")
# In the order in which Transformers and PEFT look for them; an index lists the files of a model in several parts
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


class _Refusal(ValueError):
    """What the caller is to hear without a traceback."""


def size_on_disk(path: str | os.PathLike, adapter: bool = False, **source: Any) -> int | None:
    r"""
    Bytes of the weight files that are loaded from a folder, or from the local cache for a Hub name.

    What else lies in the folder does not count: the same weights in a second format, states of an optimizer.

    Args:
        path (`str` or `os.PathLike`):
            Folder or Hub name.
        adapter (`bool`, *optional*, defaults to `False`):
            Whether it is the files of a PEFT adapter that are wanted.
        source (`Any`, *optional*):
            Where in the repository they are: `revision`, `subfolder`, `cache_dir`, `variant`.

    Returns:
        `int` or `None`: `None` if no file on this machine has a name that Transformers or PEFT gives weights.
    """
    variant = source.pop("variant", None)
    for name in _ADAPTER_WEIGHTS if adapter else _WEIGHTS:
        if variant is not None:
            name = f".{variant}.".join(name.rsplit(".", 1))
        try:
            file = Path(cached_file(path, name, local_files_only=True, **source))
        except OSError:  # no such file
            continue
        if not name.endswith(".json"):
            return file.stat().st_size
        parts = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
        return sum((file.parent / part).stat().st_size for part in parts)
    return None


@dataclass(frozen=True)
class _Parts:
    """What is loaded: a model, and perhaps an adapter on it; each with its arguments of `from_pretrained`."""

    model: str
    model_arguments: dict[str, Any]
    adapter: str | None
    adapter_arguments: dict[str, Any]

    @classmethod
    def of(cls, path: str, base: str | None, arguments: dict[str, Any]) -> "_Parts":
        """Finds out whether `path` is an adapter, and of what."""
        source = {name: value for name, value in arguments.items() if name in _SOURCE}
        try:
            adapter_config = find_adapter_config_file(path, **source)
        except OSError as error:
            raise _Refusal(_not_loaded(path, error)) from error
        if adapter_config is None:
            if base is not None:
                raise _Refusal(
                    f"`base` is `{base}`, but `{path}` is no adapter: it has no `adapter_config.json`. Leave `base` "
                    "out, or give the folder of an adapter."
                )
            return cls(path, arguments, None, {})
        # Where the adapter lies says nothing about where its base lies
        kept = {name: value for name, value in arguments.items() if name not in ("revision", "subfolder")}
        if base is None:
            saved = json.loads(Path(adapter_config).read_text(encoding="utf-8"))
            base = saved.get("base_model_name_or_path")
            kept |= {"revision": saved["revision"]} if saved.get("revision") else {}
        if not base:
            raise _Refusal(
                f"The adapter `{path}` does not say which model it belongs to, so it cannot be loaded. Give that "
                "model as `base`."
            )
        return cls(base, kept, path, source)

    def sizes(self) -> tuple[int | None, int | None]:
        """Bytes of the model's files, and of the adapter's."""
        where = {name: value for name, value in self.model_arguments.items() if name in (*_SOURCE, "variant")}
        adapter = size_on_disk(self.adapter, adapter=True, **self.adapter_arguments) if self.adapter else None
        return size_on_disk(self.model, **where), adapter

    def config(self) -> Any:
        """The model's configuration. The code that belongs to it is imported, so that loading is nothing else."""
        names = (*_SOURCE, "trust_remote_code")
        arguments = {name: value for name, value in self.model_arguments.items() if name in names}
        try:
            config = AutoConfig.from_pretrained(self.model, **arguments)
        except (OSError, ValueError) as error:
            raise _Refusal(_not_loaded(self.model, error)) from error
        MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if self.adapter:
            import peft  # noqa: F401
        return config


def _measure(request: Mapping[str, Any]) -> dict[str, Any]:
    if request["threads"] is not None:
        torch.set_num_threads(request["threads"])
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = torch.device(request["device"] or accelerator or "cpu")
    parts = _Parts.of(request["path"], request["base"], request["model_init_kwargs"])
    _check_positions(parts.model, parts.config(), request["prompt_length"] + request["new_tokens"])
    before = _memory(device)
    model, load_seconds, own_parameters = _load(parts, device)
    after = _memory(device)
    times = _time_generations(model, request, _synchroniser(device))
    model_bytes, adapter_bytes = parts.sizes()
    parameters = model.get_nb_trainable_parameters()[1] if parts.adapter else model.num_parameters()
    on_cuda, host_peak = device.type == "cuda", _host_peak()
    return {
        "parameters": parameters,
        "adapter_parameters": parameters - own_parameters if parts.adapter else None,
        "bytes_on_disk": None if model_bytes is None else model_bytes + (adapter_bytes or 0),
        "adapter_bytes_on_disk": adapter_bytes,
        "load_seconds": load_seconds,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if on_cuda else host_peak,
        "memory_after_load_bytes": after,
        "memory_before_load_bytes": before,
        "reserved_memory_bytes": torch.cuda.max_memory_reserved(device) if on_cuda else None,
        "host_peak_memory_bytes": host_peak,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if on_cuda else _processor(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        **{name: request[name] for name in ("prompt_length", "new_tokens", "repeats")},
        **times,
    }


def _not_loaded(path: str, error: Exception) -> str:
    reason = str(error).rstrip(".\n ")
    return (
        f"The model `{path}` could not be loaded: {reason}. Give a folder with `config.json` or `adapter_config.json` "
        "and weights, or the name of a causal language model on the Hub that this machine can reach."
    )


def _check_positions(path: str, config: Any, needed: int) -> None:
    positions = context_length(config)
    if isinstance(positions, int) and 0 < positions < needed:
        raise _Refusal(
            f"`prompt_length` and `new_tokens` make {needed} tokens, but `{path}` has {positions} positions. Make "
            "them smaller."
        )


def _load(parts: _Parts, device: torch.device) -> tuple[PreTrainedModel, float, int]:
    """The model on its device, the seconds that took, and the parameters of the model under an adapter."""
    arguments = parts.model_arguments
    if device.type == "cuda":
        # Weights go straight there, as a server loads them; quantised ones must
        arguments = {"device_map": {"": str(device)}} | arguments
    try:
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(parts.model, **arguments)
        # `generate` fills options that are unset from the model's own config, such as a `repetition_penalty`
        model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
        own_parameters = model.num_parameters()
        if parts.adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, parts.adapter, **parts.adapter_arguments)
        if not is_placed(model):
            model.to(device)
        model.eval()
        _synchroniser(device)()
        return model, time.perf_counter() - start, own_parameters
    except (OSError, ValueError) as error:
        raise _Refusal(_not_loaded(parts.adapter or parts.model, error)) from error


def _time_generations(
    model: PreTrainedModel,
    request: Mapping[str, Any],
    synchronise: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """`first_token_seconds` and `batches` of a cost."""
    embeddings = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    shape = max(request["batch_sizes"]), request["prompt_length"]
    prompts = torch.randint(len(embeddings.weight), shape, generator=generator).to(embeddings.weight.device)
    # Batch size and new tokens of each quantity
    jobs = {"first": (1, 1)} | {str(size): (size, request["new_tokens"]) for size in request["batch_sizes"]}
    configs = {name: _generation_config(model, new_tokens) for name, (_, new_tokens) in jobs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(1 + request["repeats"]):
        for name, (size, _) in jobs.items():
            synchronise()
            start = clock()
            _generate(model, prompts[:size], configs[name])
            synchronise()
            seconds[name].append(clock() - start)
    counted = {name: times[1:] for name, times in seconds.items()}  # the first round warms up
    return _summary(counted, request["new_tokens"])


def _summary(seconds: dict[str, list[float]], new_tokens: int) -> dict[str, Any]:
    percentiles = {name: [float(p) for p in np.percentile(times, [50, 95])] for name, times in seconds.items()}
    first = percentiles.pop("first")
    batches = {
        size: {"tokens_per_second": int(size) * new_tokens / p50, "p50_seconds": p50, "p95_seconds": p95}
        for size, (p50, p95) in percentiles.items()
    }
    return {"first_token_seconds": {"p50": first[0], "p95": first[1]}, "batches": batches}


def _generation_config(model: PreTrainedModel, new_tokens: int) -> GenerationConfig:
    """Greedy decoding to exactly this length."""
    return GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=0,  # prompts of one length are never padded
        use_cache=True,
        disable_compile=True,
    )


def _generate(model: PreTrainedModel, prompts: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """Continue prompts `(B, P)`; the new tokens alone, `(B, K)`."""
    output = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
    completions = output[:, prompts.shape[1] :]
    if completions.shape[1] != config.max_new_tokens:
        raise _Refusal(
            f"The model wrote {completions.shape[1]} tokens where {config.max_new_tokens} were asked for, so its "
            "speed would be wrong. It has a `generate` of its own; leave its cost out."
        )
    return completions


def _synchroniser(device: torch.device) -> Callable[[], None]:
    """Waits until the device has done what it was given."""
    return (lambda: None) if device.type == "cpu" else partial(torch.accelerator.synchronize, device)


def _memory(device: torch.device) -> int:
    """Bytes in use now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def _host_peak() -> int:
    """Most bytes of memory that this process has held."""
    if sys.platform == "linux":  # where `ru_maxrss` starts from the peak of the process that started this one
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        if "VmHWM" in fields:  # some sandboxes leave it out
            return int(fields["VmHWM"].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def main(request_file: str, result_file: str) -> None:
    """Answer a request of [`measure_cost`]."""
    logging.disable_progress_bar()
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    try:
        result = _measure(request)
    except _Refusal as error:
        result = {"error": str(error)}
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
