"""Every version branch, and every non-public name of TRL, Transformers or PEFT that the package touches."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn as nn


def plain_parameter(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """A parameter as a dense tensor: FSDP2 shards are gathered, with gradient."""
    from torch.distributed.tensor import DTensor

    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def plain_weight(module: nn.Module) -> torch.Tensor:
    """Weight of an output head as a dense tensor: gathered (FSDP2), dequantised (bitsandbytes 4 and 8 bit)."""
    weight = module.weight  # once: where PEFT trains some tokens of it, each look puts it together anew
    if weight.is_floating_point() and not type(weight).__module__.startswith("bitsandbytes"):
        return plain_parameter(weight)
    # PEFT keeps the list of quantised layouts; it returns what is not quantised unchanged
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(module)


def plain_bias(module: nn.Module) -> torch.Tensor | None:
    """Bias of an output head as a dense tensor. PEFT's wrapper for trained tokens answers for the weight only."""
    owner = module.original_module if type(module).__name__ == "TrainableTokensWrapper" else module
    return plain_parameter(owner.bias)


def is_peft_model(model: nn.Module) -> bool:
    """Whether the model is wrapped by PEFT; `peft` is imported only if it is loaded already."""
    from accelerate.utils import is_peft_model

    return is_peft_model(model)


def has_adapter(module: nn.Module) -> bool:
    """Whether PEFT has put an adapter around this very module. A full copy (`modules_to_save`) is not an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def is_quantised(model: nn.Module) -> bool:
    """Whether the model's weights were loaded in a quantised form."""
    return "quantization_config" in model.config.to_dict()


def is_placed(model: nn.Module) -> bool:
    """Whether the model stays where it was loaded: dispatched by a device map, or quantised."""
    return "hf_device_map" in vars(model) or is_quantised(model)


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate keeps weights of the model elsewhere and brings them when they are needed."""
    from accelerate.utils import has_offloaded_params

    return any(has_offloaded_params(module) for module in model.modules())


def brought_back(module: nn.Module) -> AbstractContextManager:
    """The weights of a module are on its device inside of this, also if accelerate has offloaded them."""
    from accelerate.utils import align_module_device

    return align_module_device(module)


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs; for one that is offloaded, where its embeddings are computed."""
    embeddings = model.get_input_embeddings()
    if not embeddings.weight.is_meta:
        return embeddings.weight.device
    with brought_back(embeddings):
        return embeddings.weight.device


def check_one_device(model: nn.Module) -> None:
    """Refuse a student that a device map has split: its head and its hidden states may lie apart."""
    devices = {str(device) for device in vars(model).get("hf_device_map", {}).values()}
    if len(devices) > 1:
        raise NotImplementedError(
            f"The student is split over the devices {', '.join(sorted(devices))} by its device map, but the loss "
            "needs its head and its hidden states on one. Make one GPU visible (`CUDA_VISIBLE_DEVICES=0`), or use "
            "several through `accelerate launch`."
        )


def keep_4bit_layout(model: nn.Module) -> None:
    """
    Keep bitsandbytes from repacking 4-bit weights for inference on CPUs with AVX512-BF16.

    It repacks in the first forward in eval mode, as a rollout is. Afterwards no gradient passes through the layer
    (0.50: "an autograd kernel was not registered"), its scales are rounded, and a saved state has them transposed.
    """
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes") and "support_avx512bf16_for_cpu" in vars(module):
            module.support_avx512bf16_for_cpu = False


def keep_8bit_scales(model: nn.Module) -> None:
    """
    Keep 8-bit layers alive under DoRA on a CPU.

    PEFT 0.21 dequantises them in each forward, and on a CPU puts their weights back without the scales that
    bitsandbytes has moved elsewhere, so that the second forward finds none ("'NoneType' object has no attribute
    'dtype'").
    """

    def forget_copy(module: nn.Module, args: Any) -> None:
        if module.weight.CB is not None and module.weight.SCB is None:  # the layer's own state still has both
            module.weight.CB = None

    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes") and type(module).__name__ == "Linear8bitLt":
            module.register_forward_pre_hook(forget_copy)


def dequantised(model: nn.Module) -> nn.Module:
    """
    The model with the values of its bitsandbytes weights in plain float32 weights.

    How stored 4-bit weights were read cannot be turned round, so saving fails with `NotImplementedError`
    (Transformers 5.23); once that is forgotten, weights are saved as those of any model that was built in memory.
    """
    model = model.dequantize(dtype=torch.float32)
    model._weight_conversions = None
    return model


def run_inside_forward(wrapped: nn.Module, model: nn.Module, method: Callable[..., Any], *args: Any) -> Any:
    """
    Call `method(*args)` inside the forward of `wrapped`, which wraps `model` (DDP, FSDP, DeepSpeed, or itself).

    Gradient synchronisation and parameter gathering hang on the wrapper's forward; a loss that is computed outside of
    it goes unseen. The idea is Lightning's forward redirection, which TRL uses too.
    """
    patched = "forward" in model.__dict__  # accelerate patches the instance; else the class attribute must return
    original = model.forward

    def restore() -> None:
        if patched:
            model.forward = original
        else:
            model.__dict__.pop("forward", None)

    def redirected(*inner_args: Any) -> Any:
        restore()  # `method` calls the real forward
        return method(*inner_args)

    model.forward = redirected
    try:
        return wrapped(*args)
    finally:
        restore()


@contextmanager
def swapped_generation_config(model: nn.Module, generation_config: Any) -> Iterator[None]:
    """
    Let `model` generate with this config alone.

    `generate` fills options that are unset from the model's own config, such as the `top_k` and `repetition_penalty`
    that many models ship. A rollout with those is not a sample of the student.
    """
    owner = model.get_base_model() if is_peft_model(model) else model
    original = owner.generation_config
    owner.generation_config = generation_config
    try:
        yield
    finally:
        owner.generation_config = original


def is_vllm_available() -> bool:
    """Whether vLLM is installed."""
    from trl.import_utils import is_vllm_available

    return is_vllm_available()


def vllm_generation(**options: Any) -> Any:
    """TRL's engine for generation by vLLM, in this process or on a server."""
    from trl.generation.vllm_generation import VLLMGeneration

    return VLLMGeneration(**options)


@contextmanager
def kept_base_weights(model: nn.Module) -> Iterator[None]:
    """
    Put the frozen weights under an adapter back as they were.

    TRL merges an adapter in place to send the weights to vLLM, and takes it out again. In bfloat16 each round trip
    moves the base by rounding (0.4% of its norm in about 100 steps, on a tiny model), while the saved adapter belongs
    to the base as it was. The copy waits in host memory. This may go when TRL merges a copy.
    """
    adapted = filter(has_adapter, model.modules()) if is_peft_model(model) else ()
    frozen = [parameter for module in adapted for parameter in module.get_base_layer().parameters()]
    kept = [parameter.detach().to("cpu", copy=True) for parameter in frozen]
    try:
        yield
    finally:
        for parameter, value in zip(frozen, kept, strict=True):
            parameter.data.copy_(value)


def print_completions(prompts: list[str], completions: list[str], step: int, num_samples: int | None) -> None:
    """Rich table of prompts and completions, as TRL's trainers print it."""
    from trl.trainer.utils import print_prompt_completions_sample

    print_prompt_completions_sample(prompts, completions, {}, None, step, num_samples)


def rotate_checkpoints(output_dir: str, save_total_limit: int | None, best_model_checkpoint: str | None) -> None:
    """Delete the oldest checkpoints beyond the limit, as the Trainer does."""
    from transformers.trainer_utils import rotate_checkpoints

    rotate_checkpoints(output_dir, save_total_limit, best_model_checkpoint, use_mtime=True)


def config_model_id(model: nn.Module) -> str:
    """Name or path that the model was loaded from; empty for a model that was built in memory."""
    return model.config.name_or_path or ""


def context_length(config: Any) -> int | None:
    """Positions that a model has, by its configuration, if that says so."""
    text = config.get_text_config()
    name = "max_position_embeddings"
    return text.to_dict().get(text.attribute_map.get(name, name))


def mend_adapter(model: nn.Module) -> None:
    """
    Undo what TRL 1.16 and PEFT 0.21 do to adapters that hold more than small matrices.

    TRL casts all that QLoRA trains to bfloat16. A whole head or embeddings of tokens in it do not fit hidden states of
    float32, and their updates are lost in rounding (TRL's issue 7268, for DoRA): these take back the dtype of the
    student's plain weights. And PEFT's wrapper of a head with trained tokens does not say how large it is.
    """
    if not is_peft_model(model):
        return
    keep_8bit_scales(model)
    head = model.get_output_embeddings()
    if type(head).__name__ == "TrainableTokensWrapper":
        head.in_features, head.out_features = head.original_module.in_features, head.original_module.out_features
    if not is_quantised(model):
        return
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("modules_to_save" in name or "token_adapter" in name):
            parameter.data = parameter.data.to(dtype)


@contextmanager
def kept_dtypes(model: nn.Module) -> Iterator[None]:
    """
    What is trained keeps its dtype while a checkpoint is loaded.

    TRL trains QLoRA's adapters in bfloat16, and PEFT makes float32 of an adapter that it loads, so a resumed run would
    go on in other numbers than the one it continues.
    """
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in dtypes:
            parameter.data = parameter.data.to(dtypes[name])


def hooked_sft_trainer() -> type:
    """`SFTTrainer` with public hooks in place of the private methods that a KD trainer must extend."""
    from trl import SFTTrainer

    class HookedSFTTrainer(SFTTrainer):
        """Maps private methods of the Trainer to the hooks `save_state_to`, `load_state_from`, `checkpoint`."""

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            mend_adapter(self.model)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
            with kept_dtypes(self.model):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            super()._save_optimizer_and_scheduler(output_dir)
            self.save_state_to(output_dir)

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                self.load_state_from(checkpoint)

        def _load_best_model(self) -> None:
            with kept_dtypes(self.model):
                super()._load_best_model()
            self.load_state_from(self.state.best_model_checkpoint)

        def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
            folder = f"{self._get_output_dir(trial)}/checkpoint-{self.state.global_step}"
            self.checkpoint(folder, lambda: super(HookedSFTTrainer, self)._save_checkpoint(model, trial))
            if self.args.push_to_hub:
                super()._push_from_checkpoint(folder)

        def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
            """Not in the middle of a save, where the Trainer calls it: what is pushed is complete."""

    return HookedSFTTrainer


def gkd_trainer() -> tuple[type, type]:
    """
    TRL's experimental GKD: trainer and configuration.

    Its loss is divided by the number of ranks, so it is comparable on one rank only (TRL 1.16).
    """
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    return GKDTrainer, GKDConfig


def gold_trainer() -> tuple[type, type]:
    """TRL's experimental GOLD: trainer and configuration."""
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    return GOLDTrainer, GOLDConfig
