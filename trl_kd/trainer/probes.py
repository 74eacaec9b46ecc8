"""A trainer's parts put to work on a few rows, and left as they were: likelihoods, rollouts, a step on the clock."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle, islice
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from trl_kd.checks.live import RowLikelihoods, Written, token_nll
from trl_kd.data import DualCollator
from trl_kd.generation import rollout_seed
from trl_kd.generation.rollouts import forked_rng
from trl_kd.modules.lm_head import LMHead, last_hidden_states
from trl_kd.teachers import CachedTeacher, TeacherGroup
from trl_kd.trainer.health import Health
from trl_kd.trainer.metrics import MetricSums
from trl_kd.trainer.tokens import SelectedTokens, model_inputs


# Seconds after which a probe takes no further micro-batch
_PATIENCE = 15.0
# Numbers the draws of a check apart from those of training steps and of evaluation
_CHECK = -3


# Nothing stays


@contextmanager
def untouched(trainer: Any) -> Iterator[None]:
    r"""
    Everything that a run depends on is as it was when this is left: weights, gradients, modes, optimizers, random
    states, sums for the log, what steps have been seen.

    The student's weights are not copied: nothing inside may step its optimizer. Auxiliary modules (critics,
    projectors) may be trained inside.

    Args:
        trainer ([`_KDTrainer`]):
            The trainer, between two optimizer steps, or before its first.
    """
    modules = [trainer.model, trainer.auxiliary.modules, *(teacher.model for teacher in models_of(trainer.teacher))]
    with ExitStack() as stack:
        stack.enter_context(_same_random_state(trainer))
        stack.enter_context(_same_auxiliary(trainer.auxiliary))
        stack.enter_context(_same_attributes(trainer))
        for module in modules:
            stack.enter_context(_same_modules(module))
        # In the place of what is added to
        trainer._sums = {"train": MetricSums(), "eval": MetricSums()}
        trainer._health = Health(trainer.accelerator)
        yield


@contextmanager
def _same_random_state(trainer: Any) -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    try:
        with forked_rng(trainer.accelerator.device, rollout_seed(trainer.args.seed, _CHECK)):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def _same_attributes(trainer: Any) -> Iterator[None]:
    """Of the trainer and of what this package has put into it, attributes that were set anew are set back."""
    own = [part for part in vars(trainer).values() if type(part).__module__.startswith("trl_kd.")]
    before = [(part, dict(vars(part))) for part in (trainer, *own)]
    try:
        yield
    finally:
        for part, attributes in before:
            vars(part).clear()
            vars(part).update(attributes)


@contextmanager
def _same_auxiliary(auxiliary: Any) -> Iterator[None]:
    """Auxiliary modules and their optimizers, which a probe may step, come back from a file."""
    with TemporaryDirectory() as folder:
        auxiliary.save(folder)
        try:
            yield
        finally:
            auxiliary.load(folder)


@contextmanager
def _same_modules(root: nn.Module) -> Iterator[None]:
    """Mode, checkpointing, buffers and gradients of a model."""
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in root.modules()]
    gradients = [(parameter, parameter.grad) for parameter in root.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, attributes, buffers in before:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


# Rows


def models_of(teacher: Any) -> list[Any]:
    """The teachers that are models: one, several, or none of a cache."""
    if isinstance(teacher, TeacherGroup):
        return list(teacher.teachers)
    return [] if isinstance(teacher, CachedTeacher) else [teacher]


def sample_rows(dataset: Any, count: int) -> list[dict[str, Any]]:
    """Rows from all over a dataset; of a stream the first ones."""
    try:
        size = len(dataset)
    except TypeError:
        return list(islice(iter(dataset), count))
    count = min(count, size)
    return [dataset[index * size // count] for index in range(count)]


def batches_of(trainer: Any, rows: list[dict[str, Any]], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Rows as the run collates them, on its device."""
    for start in range(0, len(rows), size):
        yield _on_device(trainer, trainer.data_collator(rows[start : start + size]))


def _on_device(trainer: Any, batch: dict[str, Any]) -> dict[str, Any]:
    return {name: part.to(trainer.accelerator.device) for name, part in batch.items()}


# Likelihoods


@torch.no_grad()
def likelihoods(trainer: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    r"""
    How likely the rows' completions are under student and teacher.

    Args:
        trainer ([`_KDTrainer`]):
            The trainer, within [`untouched`].
        rows (`list[dict[str, Any]]`):
            Prepared rows with completions.

    Returns:
        `list[dict[str, Any]]`: for each teacher that is a model, and for a cache, arguments of [`likelihood_finding`].
        Empty if nothing is known of the tokens, as with a cache that has none of them in its sets.
    """
    trainer.model.eval()
    found: list[_Sides] = []
    for batch in batches_of(trainer, rows, trainer.args.per_device_train_batch_size):
        selected = trainer.select(batch)
        count = len(selected.labels)
        with trainer.accelerator.autocast():
            hidden = selected.of(last_hidden_states(trainer.model, **model_inputs(batch)))[:count]
            head = LMHead.of(trainer.model).cut(trainer.vocab_size)
            student = token_nll(hidden, head, selected.labels, trainer.args.loss_chunk_size)
        for number, teacher in enumerate(models_of(trainer.teacher) or [None]):
            if number == len(found):
                found.append(_Sides(trainer, None if teacher is None else teacher.name))
            found[number].add(batch, selected, student, _teacher_nll(trainer, teacher, batch, selected), number)
    return [sides.arguments() for sides in found if sides.student.units and sum(sides.student.units)]


def _teacher_nll(trainer: Any, teacher: Any, batch: dict, selected: SelectedTokens) -> torch.Tensor:
    """Of the teacher's tokens; NaN where a cache does not know."""
    if teacher is not None:
        batch = batch | {"teacher": teacher}
    with trainer.accelerator.autocast():
        said = trainer.read_teacher(batch, selected)
        if not isinstance(said, tuple):
            theirs = _teacher_selection(selected)
            count = len(theirs.labels)
            return token_nll(said[:count], teacher.head, theirs.labels, trainer.args.loss_chunk_size)
    ids, log_probs = (part[: len(selected.labels)] for part in said)
    is_label = (ids == selected.labels.unsqueeze(1)) & torch.isfinite(log_probs)
    known = torch.where(is_label, -log_probs.float(), 0.0).sum(dim=1)
    return known.masked_fill(~is_label.any(dim=1), float("nan"))


def _teacher_selection(selected: SelectedTokens) -> SelectedTokens:
    """The teacher's tokens across vocabularies; else the student's."""
    theirs = vars(selected).get("teacher")
    return selected if theirs is None else theirs


class _Sides:
    """Sums over rows of both models."""

    def __init__(self, trainer: Any, name: str | None):
        self.trainer, self.name = trainer, name
        self.is_dual = isinstance(trainer.row_format, DualCollator)
        self.student, self.teacher = RowLikelihoods([], []), RowLikelihoods([], [])
        self.tokens = self.known = 0

    def add(self, batch: dict, selected: SelectedTokens, student: Any, teacher: Any, number: int) -> None:
        """Add a batch."""
        theirs = _teacher_selection(selected)
        rows = _sequence_numbers(batch, selected, "")
        chosen = torch.ones_like(rows, dtype=torch.bool)
        if "teacher_index" in batch:
            chosen = batch["teacher_index"][selected.rows[: len(rows)] // batch["labels"].shape[1]] == number
        if self.is_dual:
            other, kept = _sequence_numbers(batch, theirs, "teacher_"), torch.ones_like(theirs.labels).bool()
        else:
            self.tokens += int(chosen.sum())
            chosen = chosen & ~torch.isnan(teacher)
            self.known += int(chosen.sum())
            other, kept = rows, chosen
        for row in torch.cat([rows[chosen], other[kept]]).unique().tolist():
            ours, its = chosen & (rows == row), kept & (other == row)
            _append(self.student, student[ours], self._units(selected.labels[ours], "student"))
            _append(self.teacher, teacher[its], self._units(theirs.labels[its], "teacher"))

    def _units(self, labels: torch.Tensor, side: str) -> float:
        if not self.is_dual:
            return float(len(labels))
        lengths = vars(self.trainer.row_format)[side].tokens.lengths
        return float(lengths[labels.cpu().numpy()].sum())

    def arguments(self) -> dict[str, Any]:
        """Arguments of `likelihood_finding`."""
        several = isinstance(self.trainer.teacher, TeacherGroup)
        return {
            "student": self.student,
            "teacher": self.teacher,
            "unit": "byte" if self.is_dual else "token",
            "known": self.known / self.tokens if self.tokens else 1.0,
            "vocab_size": None if self.is_dual else self.trainer.vocab_size,
            "name": f"likelihood: {self.name}" if several else "likelihood",
        }


def _append(sums: RowLikelihoods, nats: torch.Tensor, units: float) -> None:
    sums.nats.append(nats.double().sum().item())
    sums.units.append(units)


def _sequence_numbers(batch: dict, selected: SelectedTokens, prefix: str) -> torch.Tensor:
    """Number of the text that each token is of: its row, or the sequence in a packed row."""
    places = selected.rows[: len(selected.labels)]
    if "position_ids" in batch:
        return (batch["position_ids"] == 0).long().flatten().cumsum(0)[places]
    return places // batch[f"{prefix}labels"].shape[1]


# Rollouts


def write(trainer: Any, rows: list[dict[str, Any]], who: str) -> Written:
    r"""
    Completions by the run's own sampling, as many at a time as an optimizer step has rows.

    Args:
        trainer ([`_KDTrainer`]):
            The trainer, within [`untouched`].
        rows (`list[dict[str, Any]]`):
            Prepared rows with prompts.
        who (`str`):
            `"student"` or `"teacher"`.

    Returns:
        [`Written`]
    """
    prompts, ends, completions = [trainer.row_format.prompt(row, who) for row in rows], trainer.eos_token_ids, []
    if who == "teacher" and isinstance(trainer.row_format, DualCollator):
        ends = sorted(trainer.row_format.teacher.formatter.eos_token_ids)
    writer = {"student": trainer.write_with_student, "teacher": trainer.write_with_teacher}[who]
    size = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    for start in range(0, len(prompts), size):
        seed = rollout_seed(trainer.args.seed, _CHECK, start)
        completions += writer(prompts[start : start + size], seed)
    return Written(completions, list(ends))


# Time


def time_step(trainer: Any, rows: list[dict[str, Any]], num_steps: int) -> tuple[dict[str, float], int]:
    r"""
    Put one optimizer step on the clock, but for the step of the student's optimizer.

    A warm-up of one micro-batch says how many of the step's are taken.

    Args:
        trainer ([`_KDTrainer`]):
            The trainer, within [`untouched`].
        rows (`list[dict[str, Any]]`):
            Prepared rows; they are repeated where there are too few.
        num_steps (`int`):
            Steps that schedules span.

    Returns:
        `tuple[dict[str, float], int]`: seconds by part, scaled to the whole step; and the micro-batches that were
        taken.
    """
    args, model = trainer.args, trainer.model
    model.train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs)
    if not trainer.auxiliary.optimizers():
        trainer.auxiliary.start(max(num_steps, 1))
    # A probe is no first step, before which projectors are trained alone
    vars(trainer).update({"_is_pretrained": True, "_step": []} if "_is_pretrained" in vars(trainer) else {})
    endless = cycle(rows)

    def batch() -> dict[str, Any]:
        return _on_device(trainer, trainer.data_collator(list(islice(endless, args.per_device_train_batch_size))))

    warm_up = sum(_step_seconds(trainer, [batch()]).values())
    number = max(1, min(args.gradient_accumulation_steps, int(_PATIENCE / max(warm_up, 1e-9))))
    seconds = _step_seconds(trainer, [batch() for _ in range(number)])
    return {name: value * args.gradient_accumulation_steps / number for name, value in seconds.items()}, number


def _step_seconds(trainer: Any, batches: list[dict[str, Any]]) -> dict[str, float]:
    """Rollouts, forward and backward of some micro-batches, and the step of what is trained beside the student."""
    device, seconds = trainer.accelerator.device, {"rollouts": 0.0}

    def timed(function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = _now(device)
            try:
                return function(*args, **kwargs)
            finally:
                seconds["rollouts"] += _now(device) - start

        return run

    writers = {name: vars(trainer).get(name) for name in ("write_with_student", "write_with_teacher")}
    trainer.write_with_student = timed(trainer.write_with_student)
    trainer.write_with_teacher = timed(trainer.write_with_teacher)
    start = _now(device)
    try:
        batches, _ = trainer.get_batch_samples(iter(batches), len(batches), device)
        for batch in batches:
            with trainer.accelerator.autocast():
                loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
        trainer._before_optimizer_step()
    finally:
        for name, writer in writers.items():
            vars(trainer).pop(name)
            vars(trainer).update({} if writer is None else {name: writer})
    total = _now(device) - start
    trainer.model.zero_grad()
    trainer.auxiliary.modules.zero_grad()
    rest = {"forward and backward": total - seconds["rollouts"]}
    return (seconds if seconds["rollouts"] else {}) | rest


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
    return time.perf_counter()
