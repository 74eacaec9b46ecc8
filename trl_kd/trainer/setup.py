"""What happens before the Trainer exists: arguments, tokenizer, datasets."""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import PartialState
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging

from trl_kd import _compat
from trl_kd.data import has_completions, is_plain_text, pack, prepare_dataset
from trl_kd.trainer.kd_config import KDConfig


logger = logging.get_logger(__name__)


def own_arguments(args: Any, config_class: type[KDConfig], model: Any, name: str) -> KDConfig:
    r"""
    The trainer's own copy of the caller's configuration.

    Args:
        args (`KDConfig` or [`~transformers.TrainingArguments`], *optional*):
            What the caller passed. `None` gives the defaults, with an output folder named after the model.
        config_class (`type`):
            Configuration of the trainer.
        model (`str` or [`~transformers.PreTrainedModel`]):
            The student.
        name (`str`):
            Name of the method.

    Returns:
        `KDConfig`: an instance of `config_class` that may be changed.
    """
    own = _copied_arguments(args, config_class, model, name)
    if own.use_vllm and own.lmbda == 0:
        raise ValueError(
            "`use_vllm` is True with `lmbda` 0, but vLLM writes the student's completions, of which there are none. "
            "Set `lmbda` above 0, or `use_vllm=False`."
        )
    if own.use_vllm and not _compat.is_vllm_available():
        raise ImportError(
            "`use_vllm` is True, but vLLM is not installed, so it cannot write the student's completions. Install "
            "the extra `trl_kd[vllm]`, or set `use_vllm=False`."
        )
    return own


def _copied_arguments(args: Any, config_class: type[KDConfig], model: Any, name: str) -> KDConfig:
    """A configuration of the trainer's class: the defaults, made from `TrainingArguments`, or a deep copy."""
    if args is None:
        model_name = model if isinstance(model, str) else _compat.config_model_id(model)
        return config_class(f"{model_name.rstrip('/').split('/')[-1] or 'model'}-{name}")
    if not isinstance(args, config_class):
        if not isinstance(args, TrainingArguments):
            raise TypeError(
                f"`args` is a {type(args).__name__}, but this trainer needs a {config_class.__name__}. Pass one, or "
                "None for the defaults."
            )
        # A plain TrainingArguments, as TRL's trainers accept; `to_dict` hides the token
        return config_class(**(args.to_dict() | {"hub_token": args.hub_token}))
    own = copy.copy(args)
    for field, value in vars(args).items():
        if isinstance(value, dict | list) or field == "accelerator_config":
            setattr(own, field, copy.deepcopy(value))
    return own


def refuse_own_loss(kwargs: dict[str, Any]) -> None:
    """Refuse a loss function of the caller's, which nothing would call."""
    if kwargs.get("compute_loss_func") is not None:
        raise ValueError(
            "`compute_loss_func` is set, but the loss is the method's. Subclass the trainer and override `token_loss`."
        )


def student_source(args: KDConfig) -> dict[str, Any]:
    """Arguments that say where the student is; its tokenizer and its generation config take them too."""
    given = {"trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {})
    return {key: given[key] for key in ("revision", "token", "trust_remote_code") if key in given}


def own_tokenizer(
    processing_class: Any | None, model: Any, args: KDConfig, source: dict[str, Any]
) -> PreTrainedTokenizerBase:
    r"""
    The student's tokenizer with an EOS and a pad token.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            What the caller passed; by default it is loaded from the student's path.
        model (`str` or [`~transformers.PreTrainedModel`]):
            The student.
        args ([`KDConfig`]):
            Configuration, with `eos_token`, `pad_token` and `chat_template_path`.
        source (`dict[str, Any]`):
            What [`student_source`] gives.

    Returns:
        [`~transformers.PreTrainedTokenizerBase`]
    """
    if processing_class is None:
        path = model if isinstance(model, str) else _compat.config_model_id(model)
        if not path:
            raise ValueError(
                "`processing_class` is None, and the student is a model without a path to load a tokenizer from. Pass "
                "the tokenizer as `processing_class`."
            )
        processing_class = AutoTokenizer.from_pretrained(path, **source)
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            f"`processing_class` is a {type(processing_class).__name__}, but only text models are distilled. Pass a "
            "tokenizer."
        )
    if args.eos_token is not None:
        if args.eos_token not in processing_class.get_vocab():
            raise ValueError(
                f"`eos_token` is '{args.eos_token}', which the tokenizer does not have. Choose a token of its "
                "vocabulary."
            )
        processing_class.eos_token = args.eos_token
    if processing_class.eos_token is None:
        raise ValueError(
            "The tokenizer has no EOS token, so completions could never end. Set `eos_token` in the configuration."
        )
    if args.pad_token is not None:
        processing_class.pad_token = args.pad_token
    if processing_class.pad_token is None:
        processing_class.pad_token = processing_class.eos_token
        logger.info(
            f"The tokenizer has no pad token; '{processing_class.pad_token}' is used. Masks do not depend on it."
        )
    if args.chat_template_path is not None:
        if not os.path.isfile(args.chat_template_path):
            raise ValueError(
                f"`chat_template_path` is `{args.chat_template_path}`, which is not a file. Only a Jinja file is "
                "supported: give one, or pass a `processing_class` that has the template."
            )
        with open(args.chat_template_path, encoding="utf-8") as file:
            processing_class.chat_template = file.read()
    return processing_class


def dataset_preparer(
    args: KDConfig,
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: list[int],
    formatting_func: Callable | None,
    add_columns: Callable[[Any, bool, str], Any] | None = None,
) -> Callable[[Any, str], Any]:
    r"""
    A function that formats, tokenises and checks a dataset (or a dictionary of them) by its name.

    Args:
        args ([`KDConfig`]):
            Configuration.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's tokenizer.
        eos_ids (`list[int]`):
            Ids that end a completion.
        formatting_func (`Callable`, *optional*):
            Makes the text of a row.
        add_columns (`Callable`, *optional*):
            What else a row needs: takes the prepared dataset, whether it came as token ids, and its name.

    Returns:
        `Callable`
    """

    def prepare(dataset: Any, name: str, is_training: bool = False) -> Any:
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {key: prepare(value, f"{name}_{key}") for key, value in dataset.items()}
        if "seq_lengths" in (dataset.column_names or []):
            return dataset  # packed already: `evaluate` prepares again what the constructor has prepared
        with PartialState().main_process_first():  # the others read its cache
            return prepare_one(dataset, name, is_training)

    def prepare_one(dataset: Any, name: str, is_training: bool) -> Any:
        if formatting_func is not None:
            dataset = dataset.map(lambda row: {args.dataset_text_field: formatting_func(row)})
        packing = args.packing if is_training or args.eval_packing is None else args.eval_packing
        came_as_ids = "input_ids" in next(iter(dataset), {})
        # These strategies split what is too long, so nothing is cut before
        splits = packing and args.packing_strategy in ("bfd_split", "wrapped")
        dataset = prepare_dataset(
            dataset,
            tokenizer,
            max_length=None if splits else args.max_length,
            eos_token_ids=eos_ids,
            text_field=args.dataset_text_field,
            assistant_only_loss=args.assistant_only_loss,
            num_proc=args.dataset_num_proc,
            name=name,
        )
        if add_columns is not None:
            dataset = add_columns(dataset, came_as_ids, name)
        if is_training:
            _check_rollouts_possible(dataset, args)
        if packing:
            if not has_completions(dataset):
                raise ValueError(
                    f"`packing` is True, but the {name} dataset has prompts alone, whose completions are sampled "
                    "during training. Set `packing=False`, or write the completions first with `trl-kd generate`."
                )
            return pack(dataset, args.max_length, args.packing_strategy, name=name)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset and is_training else dataset

    return prepare


def _check_rollouts_possible(dataset: Any, args: KDConfig) -> None:
    """Refuse a dataset from which the configured rollouts cannot be made."""
    if has_completions(dataset):
        if is_plain_text(dataset) and (args.lmbda > 0 or args.off_policy_source == "teacher"):
            raise ValueError(
                f"The dataset has plain text without prompts, but `lmbda` is {args.lmbda} and `off_policy_source` is "
                f"'{args.off_policy_source}': there is nothing to continue. Split the rows into `prompt` and "
                "`completion`, or set `lmbda=0` with the dataset's completions."
            )
    elif args.off_policy_source == "dataset" and args.lmbda < 1:
        raise ValueError(
            f"The dataset has prompts alone, but `off_policy_source` is 'dataset' and `lmbda` is {args.lmbda}, so "
            f"{1 - args.lmbda:.0%} of the rows need a completion. Set `off_policy_source='teacher'` or `lmbda=1`."
        )


def warn_of_unused_balance(is_mixture_of_experts: bool) -> None:
    """Say that a mixture of experts is trained without the load-balancing loss that its config asks for."""
    if is_mixture_of_experts:
        logger.warning(
            "The student is a mixture of experts whose config asks for a load-balancing loss; this trainer does not "
            "add it. Watch the use of its experts, or keep the routers out of an adapter's `target_modules`."
        )


@contextmanager
def prepared_elsewhere(args: KDConfig) -> Iterator[None]:
    """
    Keep SFTTrainer's constructor from preparing data, and from judging options of a preparation that is done already.

    It would drop columns, refuse prompts alone, and tokenise prompt and completion jointly.
    """
    own = {"packing": False, "assistant_only_loss": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    users = {name: getattr(args, name) for name in own}
    # The collator picks its columns itself, and needs more than the model's forward takes
    vars(args).update(own, remove_unused_columns=False)
    try:
        yield
    finally:
        vars(args).update(users)
