"""Configuration that all distillation trainers share."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import SFTConfig


@dataclass
class KDConfig(SFTConfig):
    r"""
    Configuration that the distillation trainers share.

    This class includes only the parameters that are specific to distillation. For a full list of training arguments,
    please refer to the [`~transformers.TrainingArguments`] and [`~trl.SFTConfig`] documentation. Note that default
    values in this class may differ from those.

    Parameters:
        > Parameters that control the teacher

        teacher_model_name_or_path (`str`, *optional*):
            Path or Hub name of the teacher, used when the trainer's `teacher_model` argument is not given.
        teacher_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`] of the teacher. `dtype`
            defaults to the checkpoint's. `{"load_in_4bit": true}` and `{"load_in_8bit": true}` quantise it with
            bitsandbytes.
        teacher_device (`str`, *optional*):
            Where the teacher computes, such as `"cpu"` or `"cuda:1"`; or `"offload"`, where its weights wait in CPU
            memory and come to the training device layer by layer. By default it is with the student.
        teacher_adapter (`str`, *optional*):
            Makes the student's own base the teacher, so that one copy of the weights is in memory: `"base"` is the
            base with the student's adapter switched off; a folder or Hub name is another adapter for the same base,
            and so is the name of one that the student holds.
        teacher_models (`list[str]`, *optional*):
            Paths or Hub names of several teachers with one tokenizer, in place of `teacher_model_name_or_path`.
        teacher_weights (`list[float]`, *optional*):
            Weight of the loss against each of several teachers. Equal by default.
        teacher_column (`str`, *optional*):
            Column that names the teacher of each row, among several: its number, from 0, or its path or Hub name.
        teacher_system_prompt (`str`, *optional*):
            System message that the teacher alone reads, before one that is there. For a whole prompt of its own, a
            row has a column `teacher_prompt`.
        teacher_cache (`str`, *optional*):
            Folder that `trl-kd cache` has written for this dataset. It takes the teacher's place, which is not loaded;
            losses on both models take their sparse form, with one bucket for all tokens that are not in the cache.
        eval_teacher_cache (`str`, *optional*):
            The same for the evaluation dataset.

        > Parameters that control where completions come from

        lmbda (`float`, *optional*, defaults to `0.0`):
            Share of the rows of an optimizer step whose completion the student writes (on-policy). The other rows are
            off-policy.
        on_policy_weight (`float`, *optional*, defaults to `0.5`):
            Weight `w` of the on-policy rows: the loss is `(1 - w) * off + w * on`, each a mean over its own tokens. A
            step that has one source only takes that mean.
        off_policy_source (`str`, *optional*, defaults to `"auto"`):
            Who writes the completions of off-policy rows: `"dataset"`; `"teacher"`, which samples them live and
            ignores the dataset's; or `"auto"`, the dataset where it has completions and the teacher where it has none.

        > Parameters that control generation

        max_completion_length (`int`, *optional*, defaults to `256`):
            Longest generated completion, in tokens. `max_length` limits dataset rows only.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature of generated completions. `0.0` decodes greedily.
        top_p (`float`, *optional*, defaults to `1.0`):
            Probability mass of the tokens to sample from.
        top_k (`int`, *optional*, defaults to `0`):
            Number of tokens to sample from. `0` samples from all.
        min_p (`float`, *optional*):
            Smallest probability of a token, relative to the most likely one.
        repetition_penalty (`float`, *optional*, defaults to `1.0`):
            Penalty on tokens that occurred already. `1.0` is none.
        rollout_batch_size (`int`, *optional*):
            Prompts that a model continues at a time. By default all that it continues in an optimizer step on a
            device, which is fastest; set it if that takes too much memory. vLLM has its own limits.
        generation_kwargs (`dict[str, Any]`, *optional*):
            Further fields of [`~transformers.GenerationConfig`] or, with `use_vllm`, of vLLM's `SamplingParams`. They
            win over the fields above.

        > Parameters that control generation by vLLM

        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether vLLM writes the student's completions. It gets the student's weights before the rollouts of each
            optimizer step and writes them in one call. A resumed run goes on with the same prompts, but not bit for
            bit with the same completions.
        vllm_mode (`str`, *optional*, defaults to `"colocate"`):
            Where vLLM runs: `"colocate"`, within the training processes and on their GPUs; or `"server"`, on others,
            where `vllm serve` has the student.
        vllm_model_impl (`str`, *optional*, defaults to `"vllm"`):
            Whose code runs the student in a colocated vLLM: `"vllm"`, its own, or `"transformers"`.
        vllm_enable_sleep_mode (`bool`, *optional*, defaults to `False`):
            Whether a colocated vLLM gives its GPU memory back between rollouts. Waking it takes time.
        vllm_server_base_url (`str`, *optional*):
            Address of the server, such as `http://localhost:8000`. It wins over host and port.
        vllm_server_host (`str`, *optional*, defaults to `"0.0.0.0"`):
            Host of the server.
        vllm_server_port (`int`, *optional*, defaults to `8000`):
            Port of the server.
        vllm_server_timeout (`float`, *optional*, defaults to `240.0`):
            Seconds to wait for the server to be up.
        vllm_group_port (`int`, *optional*, defaults to `51216`):
            Port over which the server is called to receive weights.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Share of a GPU's memory that a colocated vLLM may take.
        vllm_max_model_length (`int`, *optional*):
            Longest prompt with its completion that a colocated vLLM has room for, in tokens. If `None`, the model's
            own limit.
        vllm_tensor_parallel_size (`int`, *optional*, defaults to `1`):
            Number of processes, and GPUs, over which a colocated vLLM spreads the student.

        > Parameters that control the computation of the loss

        loss_chunk_size (`int`, *optional*):
            Tokens whose logits exist at a time. If `None`, 128 to 1,024, as 32 MiB per model (on a GPU 512) allow.

        > Parameters that control auxiliary modules (critics, projectors)

        aux_learning_rate (`float`, *optional*, defaults to `0.001`):
            Learning rate of the auxiliary modules' own AdamW.
        aux_adam_beta1 (`float`, *optional*, defaults to `0.9`):
            First coefficient of their AdamW.
        aux_adam_beta2 (`float`, *optional*, defaults to `0.999`):
            Second coefficient of their AdamW.
        aux_weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay of their AdamW.
        aux_max_grad_norm (`float`, *optional*, defaults to `1.0`):
            Bound on their gradient norm. `0.0` does not clip.
        aux_lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            Their learning rate schedule, by the names of [`~transformers.SchedulerType`].
        aux_warmup_steps (`int`, *optional*, defaults to `0`):
            Optimizer steps of linear warm-up of that schedule, if it has one.

        > Parameters that control logging

        log_completions (`bool`, *optional*, defaults to `False`):
            Whether to print a sample of the student's completions at each log, write them to `_completions/` in
            the output folder as parquet (the underscore keeps them from the Hub), and send them to trackio or wandb if
            these are in `report_to`.
        num_completions_to_print (`int`, *optional*):
            Number of completions to print. `None` prints all.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]:
    > - `bf16`: Defaults to `True` on an accelerator and to `False` on a CPU, where it is slow and less exact.
    """

    _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS + ["teacher_model_init_kwargs", "generation_kwargs"]

    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Path or Hub name of the teacher, used when the trainer's `teacher_model` argument is not given."
        },
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `AutoModelForCausalLM.from_pretrained` of the teacher. `dtype` defaults to "
            'the checkpoint\'s. `{"load_in_4bit": true}` and `{"load_in_8bit": true}` quantise it with bitsandbytes.'
        },
    )
    teacher_device: str | None = field(
        default=None,
        metadata={
            "help": "Where the teacher computes, such as 'cpu' or 'cuda:1'; or 'offload', where its weights wait in "
            "CPU memory and come to the training device layer by layer. By default it is with the student."
        },
    )
    teacher_adapter: str | None = field(
        default=None,
        metadata={
            "help": "Makes the student's own base the teacher, so that one copy of the weights is in memory: 'base' "
            "is the base with the student's adapter switched off; a folder or Hub name is another adapter for the "
            "same base, and so is the name of one that the student holds."
        },
    )
    teacher_models: list[str] | None = field(
        default=None,
        metadata={
            "help": "Paths or Hub names of several teachers with one tokenizer, in place of "
            "`teacher_model_name_or_path`."
        },
    )
    teacher_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of the loss against each of several teachers. Equal by default."}
    )
    teacher_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that names the teacher of each row, among several: its number, from 0, or its path or Hub "
            "name."
        },
    )
    teacher_system_prompt: str | None = field(
        default=None,
        metadata={
            "help": "System message that the teacher alone reads, before one that is there. For a whole prompt of its "
            "own, a row has a column `teacher_prompt`."
        },
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder that `trl-kd cache` has written for this dataset. It takes the teacher's place, which is "
            "not loaded; losses on both models take their sparse form, with one bucket for all tokens that are not in "
            "the cache."
        },
    )
    eval_teacher_cache: str | None = field(default=None, metadata={"help": "The same for the evaluation dataset."})
    lmbda: float = field(
        default=0.0,
        metadata={
            "help": "Share of the rows of an optimizer step whose completion the student writes (on-policy). The "
            "other rows are off-policy."
        },
    )
    on_policy_weight: float = field(
        default=0.5,
        metadata={
            "help": "Weight `w` of the on-policy rows: the loss is `(1 - w) * off + w * on`, each a mean over its own "
            "tokens. A step that has one source only takes that mean."
        },
    )
    off_policy_source: str = field(
        default="auto",
        metadata={
            "help": "Who writes the completions of off-policy rows: 'dataset'; 'teacher', which samples them live and "
            "ignores the dataset's; or 'auto', the dataset where it has completions and the teacher where it has "
            "none.",
            "choices": ["auto", "dataset", "teacher"],
        },
    )
    max_completion_length: int = field(
        default=256,
        metadata={"help": "Longest generated completion, in tokens. `max_length` limits dataset rows only."},
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "Sampling temperature of generated completions. 0.0 decodes greedily."},
    )
    top_p: float = field(default=1.0, metadata={"help": "Probability mass of the tokens to sample from."})
    top_k: int = field(default=0, metadata={"help": "Number of tokens to sample from. 0 samples from all."})
    min_p: float | None = field(
        default=None,
        metadata={"help": "Smallest probability of a token, relative to the most likely one."},
    )
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Penalty on tokens that occurred already. 1.0 is none."}
    )
    rollout_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Prompts that a model continues at a time. By default all that it continues in an optimizer step "
            "on a device, which is fastest; set it if that takes too much memory. vLLM has its own limits."
        },
    )
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Further fields of `GenerationConfig` or, with `use_vllm`, of vLLM's `SamplingParams`. They win "
            "over the fields above."
        },
    )
    use_vllm: bool = field(
        default=False,
        metadata={
            "help": "Whether vLLM writes the student's completions. It gets the student's weights before the "
            "rollouts of each optimizer step and writes them in one call. A resumed run goes on with the "
            "same prompts, but not bit for bit with the same completions.",
        },
    )
    vllm_mode: str = field(
        default="colocate",
        metadata={
            "help": "Where vLLM runs: 'colocate', within the training processes and on their GPUs; or 'server', "
            "on others, where `vllm serve` has the student.",
            "choices": ["colocate", "server"],
        },
    )
    vllm_model_impl: str = field(
        default="vllm",
        metadata={"help": "Whose code runs the student in a colocated vLLM: 'vllm', its own, or 'transformers'."},
    )
    vllm_enable_sleep_mode: bool = field(
        default=False,
        metadata={
            "help": "Whether a colocated vLLM gives its GPU memory back between rollouts. Waking it takes time."
        },
    )
    vllm_server_base_url: str | None = field(
        default=None,
        metadata={"help": "Address of the server, such as `http://localhost:8000`. It wins over host and port."},
    )
    vllm_server_host: str = field(
        default="0.0.0.0",
        metadata={"help": "Host of the server."},
    )
    vllm_server_port: int = field(
        default=8000,
        metadata={"help": "Port of the server."},
    )
    vllm_server_timeout: float = field(
        default=240.0,
        metadata={"help": "Seconds to wait for the server to be up."},
    )
    vllm_group_port: int = field(
        default=51216,
        metadata={"help": "Port over which the server is called to receive weights."},
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3,
        metadata={"help": "Share of a GPU's memory that a colocated vLLM may take."},
    )
    vllm_max_model_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest prompt with its completion that a colocated vLLM has room for, in tokens. If None, "
            "the model's own limit.",
        },
    )
    vllm_tensor_parallel_size: int = field(
        default=1,
        metadata={"help": "Number of processes, and GPUs, over which a colocated vLLM spreads the student."},
    )
    loss_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Tokens whose logits exist at a time. If None, 128 to 1,024, as 32 MiB per model (on a GPU 512) "
            "allow."
        },
    )
    aux_learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of the auxiliary modules' own AdamW."}
    )
    aux_adam_beta1: float = field(default=0.9, metadata={"help": "First coefficient of their AdamW."})
    aux_adam_beta2: float = field(default=0.999, metadata={"help": "Second coefficient of their AdamW."})
    aux_weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of their AdamW."})
    aux_max_grad_norm: float = field(
        default=1.0, metadata={"help": "Bound on their gradient norm. 0.0 does not clip."}
    )
    aux_lr_scheduler_type: str = field(
        default="constant",
        metadata={"help": "Their learning rate schedule, by the names of `transformers.SchedulerType`."},
    )
    aux_warmup_steps: int = field(
        default=0, metadata={"help": "Optimizer steps of linear warm-up of that schedule, if it has one."}
    )
    log_completions: bool = field(
        default=False,
        metadata={
            "help": "Whether to print a sample of the student's completions at each log, write them to "
            "`_completions/` in the output folder as parquet (the underscore keeps them from the Hub), and send them "
            "to trackio or wandb if these are in `report_to`."
        },
    )
    num_completions_to_print: int | None = field(
        default=None, metadata={"help": "Number of completions to print. None prints all."}
    )

    def __post_init__(self):
        if self.bf16 is None and (self.use_cpu or not torch.accelerator.is_available()):
            self.bf16 = False
        super().__post_init__()
        if self.fp16:
            raise ValueError(
                "`fp16` is True, but a loss scaler would scale the gradients of the student and not those of the "
                "auxiliary modules, and may skip steps that they take. Set `bf16=True`, or `fp16=False` for float32."
            )
        check_range("lmbda", self.lmbda, 0.0, 1.0, "a share of rows")
        check_range("on_policy_weight", self.on_policy_weight, 0.0, 1.0, "a share of the loss")
        check_range("temperature", self.temperature, 0.0, float("inf"), "a sampling temperature")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"`top_p` is {self.top_p}, but it is a probability mass. Set it in (0, 1].")
        if self.max_completion_length < 1:
            raise ValueError(
                f"`max_completion_length` is {self.max_completion_length}, but a completion has at least one token. "
                "Set it to 1 or more."
            )
        if self.loss_chunk_size is not None and self.loss_chunk_size < 1:
            raise ValueError(
                f"`loss_chunk_size` is {self.loss_chunk_size}, but it is a number of tokens. Set it to 1 or more, or "
                "to None for the default."
            )
        if self.rollout_batch_size is not None and self.rollout_batch_size < 1:
            raise ValueError(
                f"`rollout_batch_size` is {self.rollout_batch_size}, but it is a number of prompts. Set it to 1 or "
                "more, or to None for all at a time."
            )
        check_choice("off_policy_source", self.off_policy_source, ("auto", "dataset", "teacher"))
        check_choice("vllm_mode", self.vllm_mode, ("colocate", "server"))
        self._refuse_ignored_options()
        if self.packing and (self.lmbda > 0 or self.off_policy_source == "teacher"):
            raise ValueError(
                f"`packing` is True with `lmbda` {self.lmbda} and `off_policy_source` '{self.off_policy_source}', but "
                "a packed row holds several prompts and cannot be continued by a rollout. Set `packing=False`, or "
                "train off-policy: `lmbda=0` with completions from the dataset."
            )

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled, as `training_args.bin` beside the student, may be pushed with it: no token is in it."""
        state = vars(self) | {"hub_token": None}
        for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
            if isinstance(state[name], dict):
                state[name] = {key: value for key, value in state[name].items() if key != "token"}
        return state

    def __copy__(self) -> "KDConfig":
        """A copy in this process keeps its tokens."""
        own = object.__new__(type(self))
        vars(own).update(vars(self))
        return own

    def __deepcopy__(self, memo: dict[int, Any]) -> "KDConfig":
        own = object.__new__(type(self))
        vars(own).update(copy.deepcopy(vars(self), memo))
        return own

    def check_cache(self, cache: Any) -> None:
        """Refuse a teacher cache that holds less than is asked for."""

    def cached_sets(self) -> tuple[float | None, int | None]:
        """Mass and size of the sets that are taken from a cache; by default all that it has."""
        return None, None

    def unread(self) -> tuple[str, ...]:
        """Prefixes of fields that nothing reads under these settings."""
        return () if self.use_vllm else ("vllm_",)

    def _refuse_ignored_options(self) -> None:
        """Options of SFTConfig that belong to its own loss: refused, since nothing would come of them."""
        for name, accepted, reason in (
            ("loss_type", ("nll",), "The trainer's method is the loss."),
            ("label_smoothing_factor", (0.0,), "The teacher's distribution takes the place of smoothed labels."),
            ("router_aux_loss_coef", (None, 0.0), "The load-balancing loss of mixtures of experts is not added."),
            ("truncation_mode", ("keep_start",), "A completion that is too long loses its end."),
            ("padding_free", (False,), "Use `packing`, which has no padding either."),
        ):
            if (value := getattr(self, name)) not in accepted:
                raise ValueError(
                    f"`{name}` is {value!r}, but this trainer does not use it. {reason} Leave it at {accepted[0]!r}."
                )
        if self.completion_only_loss is False:
            raise ValueError(
                "`completion_only_loss` is False, but a prompt is what completions are conditioned on and is not "
                "trained. Leave it unset, or pass `text` to train every token."
            )


def check_range(name: str, value: float, low: float, high: float, meaning: str) -> None:
    """Refuse a number outside of [low, high], with what it means."""
    if not low <= value <= high:
        end = "non-negative" if high == float("inf") else f"in [{low:g}, {high:g}]"
        raise ValueError(f"`{name}` is {value}, but it is {meaning}. Set it {end}.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse an unknown option, with the known ones."""
    if value not in choices:
        known = ", ".join(f"'{choice}'" for choice in choices)
        raise ValueError(f"`{name}` is '{value}', which does not exist. Choose one of {known}.")
