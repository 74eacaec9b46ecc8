"""The ascent of learned moment critics: their own steps of Adam, once per optimizer step, on all of its tokens."""

from dataclasses import replace
from functools import partial
from typing import Any

import psutil
import torch
import torch.nn as nn
from transformers.utils import logging

from trl_kd.losses import (
    LinearLoss,
    Term,
    critic_objective,
    discount_weights,
    linear_loss,
    moment,
    saturation,
    total_variation,
)
from trl_kd.losses.linear import default_chunk_size
from trl_kd.modules import LMHead, ValueHead, critic_features, planned_bytes
from trl_kd.modules.critic import CRITIC_HEADS
from trl_kd.trainer.auxiliary import AuxiliaryModules
from trl_kd.trainer.tokens import TokenBatch


logger = logging.get_logger(__name__)

SOURCES = ("off_policy", "on_policy")
_CRITIC_INPUTS = ("student", "teacher", "critic")


def make_critics(args: Any, student_width: int, teacher_head: LMHead, device: torch.device) -> dict[str, ValueHead]:
    r"""
    A value head for each source that training has, if they fit.

    Args:
        args ([`AMMConfig`]):
            Configuration with the `critic_*` fields.
        student_width (`int`):
            Width of the student's last hidden states.
        teacher_head ([`LMHead`]):
            The teacher's output head, cut to the shared vocabulary.
        device (`torch.device`):
            Where they will live.

    Returns:
        `dict[str, ValueHead]`: by source.

    Raises:
        ValueError: If they take more memory than is free.
    """
    widths = {"teacher": teacher_head.weight.shape[1], "student": student_width}
    widths["both"] = sum(widths.values())
    arguments = {
        "head": args.critic_head,
        "num_features": widths[args.critic_features],
        "embeddings": teacher_head,
        "bound": args.critic_bound,
        "rank": args.critic_rank,
    }
    sources = [name for name, share in zip(SOURCES, (1.0 - args.lmbda, args.lmbda), strict=True) if share > 0]
    plan = teacher_head.meta()

    def size_of(head: str) -> int:
        return len(sources) * planned_bytes(**(arguments | {"head": head, "embeddings": plan}))

    size, free = size_of(args.critic_head), free_memory(device)
    if free is not None and size > free:
        is_thin = args.critic_rank < min(arguments["num_features"], plan.weight.shape[0])
        sizes = {head: size_of(head) for head in CRITIC_HEADS if head != "low_rank" or is_thin}
        others = ", ".join(f'"{head}": {_gigabytes(n)}' for head, n in sizes.items() if n < size)
        smaller = f"another head ({others}), or " if others else ""
        raise ValueError(
            f'The critics with `critic_head="{args.critic_head}"` take {_gigabytes(size)} with gradients and Adam, '
            f'but {_gigabytes(free)} are free on {device}. Take {smaller}`critic="exact"`, which takes none.'
        )
    logger.info(f"The {len(sources)} critics take {_gigabytes(size)} with gradients and Adam.")
    return {name: ValueHead(**arguments, seed=index) for index, name in enumerate(sources)}


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; `None` where nobody can tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available if device.type == "cpu" else None


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


class MomentCritics(AuxiliaryModules):
    r"""
    Critics, one for each source, with their optimizer. They rise; the student never gives them a gradient.

    Gradients are summed over all micro-batches and ranks before each step, so that the result does not depend on how
    an optimizer step is split.
    """

    critic_optimizer: torch.optim.Optimizer | None = None

    @property
    def critics(self) -> dict[str, ValueHead]:
        """The critics by source; a subclass of the trainer may have other modules beside them."""
        return {name: self.modules[name] for name in SOURCES if name in self.modules}

    def critic_parameters(self) -> list[nn.Parameter]:
        """What rises."""
        return [parameter for critic in self.critics.values() for parameter in critic.parameters()]

    def joint_parameters(self) -> list[nn.Parameter]:
        """What steps with the student: critics do not."""
        own = {id(parameter) for parameter in self.critic_parameters()}
        return [parameter for parameter in super().joint_parameters() if id(parameter) not in own]

    def optimizers(self) -> dict[str, Any]:
        """Optimizers and schedules by name, as a checkpoint keeps them."""
        own = {} if self.critic_optimizer is None else {"critic_optimizer": self.critic_optimizer}
        return super().optimizers() | own

    def start(self, num_training_steps: int) -> None:
        """Make the optimizers."""
        super().start(num_training_steps)
        # Gradients shrink with the factor of the values; next to Adam's usual 1e-8, wide critics would hardly move
        groups = [
            {"params": list(critic.parameters()), "eps": 1e-8 * critic.scale} for critic in self.critics.values()
        ]
        if groups:
            betas = tuple(map(float, self.args.critic_betas))
            self.critic_optimizer = torch.optim.Adam(groups, lr=self.args.critic_learning_rate, betas=betas)

    def pair(self, source: str, tokens: TokenBatch) -> tuple[torch.Tensor, LMHead]:
        """States and head of a source's critic at these tokens, for `linear_loss`."""
        return self.modules[source].pair(self.features(tokens), tokens.pairs["teacher"][1])

    def features(self, tokens: TokenBatch) -> torch.Tensor:
        """What the critics see of these tokens, `(N, H)`."""
        names = {"teacher": ("teacher",), "student": ("student",), "both": ("teacher", "student")}
        return critic_features(*(tokens.pairs[name][0] for name in names[self.args.critic_features]))

    @torch.enable_grad()
    def ascend(
        self, tokens: list[TokenBatch], first_values: dict[str, list[dict[str, torch.Tensor]]] | None = None
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        r"""
        Take the K steps of all critics.

        Args:
            tokens (`list[TokenBatch]`):
                All micro-batches of this rank's optimizer step, detached.
            first_values (`dict[str, list[dict[str, torch.Tensor]]]`, *optional*):
                Per-token values by source, if the gradient of the first step is there already.

        Returns:
            `dict[str, tuple[torch.Tensor, torch.Tensor]]`: sums and weights to log. The moments are those before the
            first step, when the critics have not seen these tokens.
        """
        rows = {name: [batch.of_source(name == "on_policy") for batch in tokens] for name in self.critics}
        critics = self._present(rows)
        embeddings = tokens[0].pairs["teacher"][1]
        passes = self.args.critic_steps - (first_values is not None)
        if passes > 0:
            rows = {
                name: [replace(b, pairs=b.pairs | {"features": (self.features(b), None)}) for b in batches]
                for name, batches in rows.items()
            }
        if passes > 1:
            with self.accelerator.autocast():
                rows = with_known_logits(rows, self.args.loss_chunk_size)
        report = {}
        for index in range(self.args.critic_steps):
            is_first = index == 0
            for name in critics:
                if is_first and first_values is not None:
                    values = first_values[name]
                else:
                    values = [self._backward(name, batch, embeddings, with_metrics=is_first) for batch in rows[name]]
                if is_first and values:
                    report |= self._unseen(name, {key: torch.cat([v[key] for v in values]) for key in values[0]})
            grad_norm = self._step(critics)
            if is_first:
                report["kd/critic_grad_norm"] = (grad_norm, torch.ones(()))
        learning_rate = self.critic_optimizer.param_groups[0]["lr"]
        report["kd/critic_learning_rate"] = (torch.tensor(learning_rate), torch.ones(()))
        return report

    def objective(self, tokens: TokenBatch) -> Term:
        """What a critic ascends, as a loss, on pairs that hold it."""
        weights = tokens.source_weights
        if self.args.gamma != 1.0:
            weights = weights * discount_weights(tokens.positions, self.args.gamma).to(weights.dtype)
        return Term(partial(critic_objective, penalty=self.args.critic_penalty), _CRITIC_INPUTS, -weights)

    def _backward(
        self, name: str, batch: TokenBatch, embeddings: LMHead, with_metrics: bool
    ) -> dict[str, torch.Tensor]:
        """Gradient of a critic's objective on some rows; per-token values before the step."""
        terms = {"critic_objective": self.objective(batch)}
        if with_metrics:
            terms |= {"moment": Term(moment, _CRITIC_INPUTS), "total_variation": Term(total_variation)}
        with self.accelerator.autocast():
            pairs = batch.pairs | {"critic": self.modules[name].pair(batch.pairs["features"][0], embeddings)}
            result = linear_loss(pairs, terms, chunk_size=self.args.loss_chunk_size)
        with torch.autocast(result.loss.device.type, enabled=False):  # else it would round what is float32
            result.loss.backward()
        return result.values

    def _unseen(self, name: str, values: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        count = torch.tensor(values["moment"].numel())
        total = values["moment"].sum()
        largest = 2 * self.args.critic_bound * values["total_variation"].sum()
        return {
            f"kd/{name}/unseen_moment": (total, count),
            f"kd/{name}/unseen_tightness": (total, largest),
            f"kd/{name}/critic_objective": (values["critic_objective"].sum(), count),
        }

    def _present(self, rows: dict[str, list[TokenBatch]]) -> list[str]:
        """Sources that have tokens on any rank: a step of Adam on nothing would still change its second moments."""
        device = self.accelerator.device
        counts = torch.tensor([sum(len(part.labels) for part in parts) for parts in rows.values()], device=device)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        return [name for name, count in zip(rows, counts.tolist(), strict=True) if count]

    def _step(self, critics: list[str]) -> torch.Tensor:
        """One step of Adam on the gradient of all ranks; its norm."""
        parameters = [parameter for name in critics for parameter in self.modules[name].parameters()]
        if self.accelerator.num_processes > 1:
            for parameter in parameters:
                if parameter.grad is None:  # this rank has no tokens of the source
                    parameter.grad = torch.zeros_like(parameter)
                # The mean: row weights are times the number of ranks already
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf"))
        self.critic_optimizer.step()
        self.critic_optimizer.zero_grad()
        # The trainer's autocast may be on all the while, and would hand the next step the weights of this one
        torch.clear_autocast_cache()
        return grad_norm


@torch.no_grad()
def with_known_logits(rows: dict[str, list[TokenBatch]], chunk_size: int | None) -> dict[str, list[TokenBatch]]:
    r"""
    The same rows, some of them with the models' logits in place of states and head, for several passes over them.

    Args:
        rows (`dict[str, list[TokenBatch]]`):
            Detached tokens by source.
        chunk_size (`int`, *optional*):
            Rows per chunk of `linear_loss`.

    Returns:
        `dict[str, list[TokenBatch]]`: with logits for four chunks of rows at most, within 256 MiB on a CPU and 1 GiB
        elsewhere.
    """
    found, room = {}, None
    for source, batches in rows.items():
        found[source] = []
        for batch in batches:
            pairs = {name: batch.pairs[name] for name in ("student", "teacher")}
            if room is None:
                room = _rows_to_keep(pairs, chunk_size)
            known = batch.at(slice(0, room))
            room -= len(known.labels)
            if len(known.labels):
                logits = {name: (head(known.pairs[name][0]), None) for name, (_, head) in pairs.items()}
                found[source].append(replace(known, pairs=known.pairs | logits))
            if len(known.labels) < len(batch.labels) or not len(batch.labels):
                found[source].append(batch.at(slice(len(known.labels), None)))
    return found


def _rows_to_keep(pairs: dict[str, tuple[torch.Tensor, LMHead]], chunk_size: int | None) -> int:
    """Rows whose logits of both models fit the budget."""
    device = pairs["teacher"][0].device
    row = sum(len(head.weight) * head.weight.dtype.itemsize for _, head in pairs.values())
    fit = (2**28 if device.type == "cpu" else 2**30) // row
    return min(fit, 4 * (chunk_size or default_chunk_size(pairs, device)))


def critic_terms(weights: torch.Tensor) -> dict[str, Term]:
    """The student's side of the game under a learned critic, on pairs that hold it."""
    return {"moment": Term(moment, _CRITIC_INPUTS, weights), "saturation": Term(saturation, _CRITIC_INPUTS)}


def merge(results: dict[str, LinearLoss], is_on_policy: torch.Tensor) -> LinearLoss:
    r"""
    One result from those of the sources of a micro-batch.

    Args:
        results (`dict[str, LinearLoss]`):
            By source, of the sources that have tokens.
        is_on_policy (`torch.Tensor` of shape `(N,)`):
            Source of each token.

    Returns:
        [`LinearLoss`]: the sum, and the values that all sources have, in the order of the tokens.
    """
    names = set.intersection(*(set(result.values) for result in results.values()))
    values = {}
    for name in sorted(names):
        parts = {source: result.values[name] for source, result in results.items()}
        values[name] = torch.zeros(
            len(is_on_policy), dtype=next(iter(parts.values())).dtype, device=is_on_policy.device
        )
        for source, part in parts.items():
            values[name].masked_scatter_(is_on_policy == (source == "on_policy"), part)
    return LinearLoss(torch.stack([result.loss for result in results.values()]).sum(), values)
