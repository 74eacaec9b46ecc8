"""Steps that the projectors take alone, before the student's first: on the teacher's side of the training data."""

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from datasets import IterableDataset
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.utils import logging

from trl_kd.generation import rollout_seed
from trl_kd.losses import Term, cross_entropy, linear_loss, weighted_sum
from trl_kd.trainer.lookahead import teacher_states


logger = logging.get_logger(__name__)


def pretrain_projector(trainer: Any, num_steps: int) -> None:
    r"""
    Train what takes the teacher's states into the student's space, with the student as it is.

    Each step reads one batch of the training data with the teacher and lowers the projector's cross-entropy on the
    student's head; the student is not read. Optimizer and schedule are those of the projectors' later steps. Batches
    are drawn from a generator of their own, so that the run's random state stays as it is.

    Note:
        The authors' code has a stage that trains the projectors first, with the student's cross-entropy beside it
        (`only_save_projector` in `songmzhang/DSKD`). Here the student does not move.

    Args:
        trainer ([`DSKDTrainer`]):
            The trainer, before its first step.
        num_steps (`int`):
            Number of batches on each rank.
    """
    head, accelerator = trainer.student_head(), trainer.accelerator
    first = last = None
    bar = tqdm(total=num_steps, desc="Projector", disable=trainer.args.disable_tqdm or not accelerator.is_main_process)
    for number, batch in zip(range(num_steps), _batches(trainer), strict=False):
        batch = trainer._prepare_inputs(batch)
        selected = batch["selected"] = trainer.select(batch)
        hidden = batch["teacher_hidden"] = teacher_states(trainer, batch, selected)
        with accelerator.autocast():
            (look,) = trainer.look([batch], head, is_step=True)
            states = trainer.projection.teacher_in_student(selected, hidden, look)
            weights = look.is_labelled * look.ranks / look.counts["labelled"].sum().clamp_min(1)
            term = {"ce": Term(cross_entropy, ("projected", "labels"), weights)}
            result = linear_loss({"projected": (states, head)}, term, look.labels, trainer.args.loss_chunk_size)
        result.loss.backward()
        trainer.auxiliary.step()
        bar.update()
        if number in (0, num_steps - 1):
            last = weighted_sum(result.values["ce"], weights).item()
            first = last if first is None else first
    bar.close()
    if last is not None and not math.isfinite(last):
        raise FloatingPointError(
            f"The projectors' cross-entropy is {last} after {num_steps} steps alone, so they would teach the student "
            "nothing. Lower `aux_learning_rate`, and load the teacher in bfloat16 or float32."
        )
    logger.info(f"{num_steps} steps of the projectors alone took their cross-entropy from {first:.3f} to {last:.3f}.")


def _batches(trainer: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of the training data without end, other ones on each rank."""
    args, dataset = trainer.args, trainer.train_dataset
    generator = torch.Generator().manual_seed(rollout_seed(args.seed, -2, trainer.accelerator.process_index))
    is_stream = isinstance(dataset, IterableDataset)
    loader = DataLoader(
        dataset,
        args.per_device_train_batch_size,
        shuffle=None if is_stream else True,
        collate_fn=trainer.data_collator,
        generator=generator,
    )
    rank, ranks = trainer.accelerator.process_index, trainer.accelerator.num_processes
    while True:
        # A stream comes to every rank alike
        yield from islice(loader, rank, None, ranks) if is_stream else loader
