"""What the training commands share: options, data, one run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from trl_kd import KDConfig


def train(
    trainer_class: type,
    script_args: "ScriptArguments",
    training_args: "KDConfig",
    model_args: "ModelConfig",
    dataset_args: "DatasetMixtureConfig",
) -> None:
    """Train, save, and push to the Hub if asked to."""
    set_model_init_kwargs(training_args, model_args)
    datasets = load_datasets(script_args, training_args, dataset_args)
    trainer = build_trainer(trainer_class, training_args, model_args, *datasets)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.accelerator.print("Training completed.")

    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Model pushed to the Hub as {trainer.hub_model_id}.")

    # Finishes the trackers and destroys the process group
    trainer.end()


def build_trainer(
    trainer_class: type, training_args: "KDConfig", model_args: "ModelConfig", train_dataset, eval_dataset=None
):
    """The trainer of a command, whose options `set_model_init_kwargs` has handed to the models."""
    from trl import get_peft_config, get_quantization_config

    return trainer_class(
        model=model_args.model_name_or_path,
        teacher_model=training_args.teacher_model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        # The student's: it must not be in `model_init_kwargs` too. The teacher has `teacher_model_init_kwargs`.
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )


def check_arguments(script_args, training_args, model_args, dataset_args) -> None:
    """Refuse a command that names no student, no teacher and no cache, or not exactly one source of data."""
    check_models(training_args, model_args)
    check_data(script_args, dataset_args)


def check_models(training_args: "KDConfig", model_args: "ModelConfig") -> None:
    """Refuse a command that names no student, or no teacher and no cache."""
    if model_args.model_name_or_path is None:
        raise ValueError(
            "`model_name_or_path` is not set, but distillation needs a student. Pass `--model_name_or_path`."
        )
    sources = ("teacher_model_name_or_path", "teacher_models", "teacher_adapter", "teacher_cache")
    if all(vars(training_args)[name] is None for name in sources):
        raise ValueError(
            "`teacher_model_name_or_path` is not set, and neither are `teacher_adapter`, `teacher_models` and "
            "`teacher_cache`, but distillation needs a teacher. Pass `--teacher_model_name_or_path`, "
            "`--teacher_adapter base` for the student's own base, or `--teacher_cache` with a folder of "
            "`trl-kd cache`."
        )


def check_data(script_args: "ScriptArguments", dataset_args: "DatasetMixtureConfig") -> None:
    """Refuse a command that names not exactly one source of data."""
    if bool(script_args.dataset_name) == bool(dataset_args.datasets):
        given = "both are set" if script_args.dataset_name else "neither is set"
        raise ValueError(
            f"Of `dataset_name` and `datasets`, {given}, but the training data comes from one place. Pass "
            "`--dataset_name`, or list a mixture under `datasets` in the YAML file."
        )


def set_model_init_kwargs(training_args: "KDConfig", model_args: "ModelConfig") -> None:
    """
    Hand the options of `ModelConfig` to the models; what `model_init_kwargs` say themselves wins.

    `--dtype`, `--model_revision` and the quantisation are the student's. The teacher is never updated, so it is loaded
    in the dtype of its checkpoint, and as a whole: `--teacher_model_init_kwargs` sets anything else.
    """
    shared = {"trust_remote_code": training_args.trust_remote_code}
    if model_args.attn_implementation is not None:
        shared["attn_implementation"] = model_args.attn_implementation
    student = {"revision": model_args.model_revision, "dtype": model_args.dtype}
    training_args.model_init_kwargs = {**shared, **student, **(training_args.model_init_kwargs or {})}
    training_args.teacher_model_init_kwargs = {**shared, **(training_args.teacher_model_init_kwargs or {})}


def load_datasets(script_args, training_args, dataset_args) -> tuple:
    """The training split, and the evaluation split if the run evaluates."""
    from trl import get_dataset

    from trl_kd.scripts.arguments import load_splits, select_split

    if dataset_args.datasets:
        splits = get_dataset(dataset_args)
    else:
        splits = load_splits(
            script_args.dataset_name, config=script_args.dataset_config, streaming=script_args.dataset_streaming
        )
    train_dataset = select_split(splits, script_args.dataset_train_split, "dataset_train_split")
    if training_args.eval_strategy == "no":
        return train_dataset, None
    return train_dataset, select_split(splits, script_args.dataset_test_split, "dataset_test_split")


# Command -> its configuration, its trainer, and what it does
METHODS = {
    "amm": ("AMMConfig", "AMMTrainer", "Distil a teacher into a student by adversarial moment matching (AMM)."),
    "dskd": (
        "DSKDConfig",
        "DSKDTrainer",
        "Distil a teacher into a student by dual-space distillation (DSKD), also across tokenizers.",
    ),
    "sparse-td": (
        "SparseTDConfig",
        "SparseTDTrainer",
        "Distil a teacher into a student on the teacher's likeliest tokens (SparseTD), also from a cache of them.",
    ),
}


def make_parser(method: str, prog: str | None = None) -> "TrlParser":
    """Parser of every option of the script, the trainer, the models and the data."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    import trl_kd
    from trl_kd.scripts.arguments import HelpFormatter
    from trl_kd.scripts.launch import launch_help, script_module

    config, _, description = METHODS[method]
    return TrlParser(
        (ScriptArguments, getattr(trl_kd, config), ModelConfig, DatasetMixtureConfig),
        prog=prog,
        allow_abbrev=False,
        # Argparse would print the several hundred options before every error message.
        usage="%(prog)s [--config FILE.yaml] [options]",
        description=f"{description}\n\n"
        "--config FILE.yaml sets any option; the command line wins. --dataset_name takes a Hub name, a local .jsonl,\n"
        ".jsonl.gz, .json or .parquet file (its rows are the split `train`), or a folder with one file per split.",
        epilog=launch_help(script_module(method)),
        formatter_class=HelpFormatter,
    )


def run(method: str, arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse the command line and train; leave with one line if it is wrong."""
    import trl_kd
    from trl_kd.scripts.arguments import parse_options

    parsed = parse_options(make_parser(method, prog), arguments, check=check_arguments)
    train(getattr(trl_kd, METHODS[method][1]), *parsed)
