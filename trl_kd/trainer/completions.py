"""What the student wrote, for people to read: printed, as parquet, and in trackio or wandb."""

import os
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from tqdm import tqdm
from transformers.utils import is_rich_available, logging

from trl_kd import _compat
from trl_kd.data import has_completions
from trl_kd.generation import rollout_seed


logger = logging.get_logger(__name__)


def log_completions(trainer: Any, prompts: list[list[int]], completions: list[list[int]]) -> None:
    r"""
    Show the last step's rollouts of this rank.

    Args:
        trainer ([`_KDTrainer`]):
            The trainer, for its tokenizer, step, output folder and trackers.
        prompts (`list[list[int]]`):
            Token ids of the prompts.
        completions (`list[list[int]]`):
            Token ids that the student wrote.
    """
    if not completions:
        return
    import pandas as pd

    args, step = trainer.args, trainer.state.global_step
    texts = [trainer.processing_class.batch_decode(ids, skip_special_tokens=False) for ids in (prompts, completions)]
    if is_rich_available():
        _compat.print_completions(*texts, step, args.num_completions_to_print)
    table = pd.DataFrame({"step": step, "prompt": texts[0], "completion": texts[1]})
    folder = os.path.join(args.output_dir, "_completions")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"completions_{step:05d}.parquet")
    table.to_parquet(path + ".tmp")
    os.replace(path + ".tmp", path)
    for name in ("trackio", "wandb"):
        if name in (args.report_to or []):
            tracker = __import__(name)
            tracker.log({"completions": tracker.Table(dataframe=table)})


def with_teacher_completions(trainer: Any, dataset: Any) -> Any:
    r"""
    Evaluation data with a completion in each row: the teacher writes them once where there are prompts alone.

    Args:
        trainer ([`_KDTrainer`]):
            The trainer, for its teacher and processes.
        dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them):
            Prepared data.

    Returns:
        The same, if it has completions; else a [`~datasets.Dataset`] with them.

    Raises:
        ValueError: If prompts alone come as a stream.
    """
    if isinstance(dataset, dict):
        return {key: with_teacher_completions(trainer, value) for key, value in dataset.items()}
    if has_completions(dataset):
        return dataset
    if not isinstance(dataset, Dataset):
        raise ValueError(
            "The evaluation data is a stream of prompts alone, so there is nothing to evaluate on that stays the "
            "same. Pass a `Dataset`, or write the completions first with `trl-kd generate`."
        )
    logger.info(f"The teacher writes completions for the {len(dataset)} prompts of the evaluation data.")
    collator = trainer.row_format
    size, rank = trainer.args.per_device_eval_batch_size, trainer.accelerator.process_index
    starts = list(range(0, len(dataset), size))[rank :: trainer.accelerator.num_processes]
    rows = []
    for start in tqdm(starts, desc="Teacher completions", disable=rank > 0 or trainer.args.disable_tqdm):
        group = [dataset[i] for i in range(start, min(start + size, len(dataset)))]
        prompts = [collator.prompt(row, "teacher") for row in group]
        # Numbered apart from training steps, and equal for any number of processes
        written = trainer.write_with_teacher(prompts, rollout_seed(trainer.args.seed, -1, start))
        completed = [collator.complete(row, text, "teacher") for row, text in zip(group, written, strict=True)]
        rows += list(enumerate(completed, start))
    rows = [row for _, row in sorted(gather_object(rows), key=lambda item: item[0])]
    return Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]})
