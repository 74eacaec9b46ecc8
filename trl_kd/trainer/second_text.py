"""Text for the language-model term alone: a batch of it beside each micro-batch."""

import random
from typing import Any

import torch
from datasets import Dataset

from trl_kd.data import KDCollator, has_completions
from trl_kd.generation import rollout_seed
from trl_kd.trainer import setup
from trl_kd.trainer.tokens import count_tokens


class SecondText:
    r"""
    Deals out rows of a second dataset, in an order that the seed and the optimizer step say, so that a resumed run
    goes on with the same rows.

    Args:
        trainer ([`_KDTrainer`]):
            The trainer.
        dataset ([`~datasets.Dataset`]):
            Rows in any format of the training data, with completions or text.

    Raises:
        TypeError: If it is a stream.
        ValueError: If it has nothing to learn from.
    """

    def __init__(self, trainer: Any, dataset: Any):
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"`lm_dataset` is a {type(dataset).__name__}, but its rows are drawn by their number. Pass a Dataset; "
                "`datasets.load_dataset` gives one without `streaming`."
            )
        args, tokenizer = trainer.args, trainer.processing_class
        prepare = setup.dataset_preparer(args, tokenizer, trainer.eos_token_ids, None)
        self.rows = prepare(dataset, "lm")
        if not has_completions(self.rows):
            raise ValueError(
                "`lm_dataset` has prompts alone, but the language-model term learns from text. Pass rows with "
                "completions, `messages` or `text`."
            )
        self._pass, self._order = -1, []
        self.trainer, self.collator = trainer, KDCollator(tokenizer.pad_token_id, args.pad_to_multiple_of)

    def add_to(self, batches: list[dict[str, Any]]) -> None:
        """Give each micro-batch of an optimizer step as many rows as it has, as `"second"`, counted."""
        trainer, sizes = self.trainer, [len(batch["prompt_length"]) for batch in batches]
        world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        # Places of full micro-batches, so that a short one repeats and skips nothing
        first = trainer.state.global_step * trainer.args.gradient_accumulation_steps
        for number, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
            start = ((first + number) * world + rank) * trainer.args.train_batch_size
            rows = [self.rows[self._index(start + i)] for i in range(size)]
            device = batch["input_ids"].device
            batch["second"] = {name: tensor.to(device) for name, tensor in self.collator(rows).items()}
        counts = torch.stack([count_tokens(batch["second"]) for batch in batches]).sum(dim=0)
        counts = counts.to(trainer.accelerator.device)
        if world > 1:
            counts = trainer.accelerator.reduce(counts, reduction="sum")
        for batch in batches:
            batch["second"]["token_counts"] = counts

    def _index(self, place: int) -> int:
        """Row at a place of the endless sequence of shuffled passes through the dataset."""
        passed, place = divmod(place, len(self.rows))
        if passed != self._pass:
            self._pass, self._order = passed, list(range(len(self.rows)))
            random.Random(rollout_seed(self.trainer.args.seed, passed)).shuffle(self._order)
        return self._order[place]
