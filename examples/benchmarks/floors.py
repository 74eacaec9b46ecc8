"""
What the benchmarks share: a batch, the matrix products that no exact loss can avoid, clocks, and tables.

A floor is the products of a loss and nothing else, in the same chunks of rows and in buffers that are used again: no
softmax, no autograd. One product takes 2 N V H operations. With a student S, a teacher T and a learned critic C:

    gemm4   S, T; d_states and d_weight of S
    gemm7   the same with a critic in the same pass: S, T, C; both gradients of S and of C
    gemm15  S, T; five ascents of the critic: C and its d_weight; C once more, d_states and d_weight of S
    gemm8   S and T, each also projected into the other's space through the other's frozen head: S, T, S', T'; both
            gradients of S, and the d_states of S' and T'
"""

import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from trl_kd.losses import LinearLoss, Term, linear_loss, top_tokens
from trl_kd.modules import LMHead


Shape = tuple[int, int, int, int]  # N, H_s, H_t, V
CACHED = 64  # tokens of a state that are taken from the teacher
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


@dataclass(frozen=True)
class Batch:
    """Hidden states `(N, H)` and heads `(V, H)` by name, and what a trainer knows of the N rows."""

    states: dict[str, torch.Tensor]
    heads: dict[str, LMHead]
    mask: torch.Tensor  # (N,), true for the rows that count
    labels: torch.Tensor  # (N,)
    weights: torch.Tensor  # (N,), of the counted rows in their mean
    chunk_size: int
    top: tuple[torch.Tensor, torch.Tensor]  # (N, K): the teacher's most likely tokens, as from a cache
    engine: Callable[..., LinearLoss] = linear_loss

    @classmethod
    def random(cls, shape: Shape, valid: float, frozen_head: bool, chunk_size: int, dtype: torch.dtype, device: str):
        """Logits with a standard deviation of 2: neither flat nor one-hot."""
        n, student_width, teacher_width, vocab_size = shape
        generator = torch.Generator(device).manual_seed(0)  # a CPU would take seconds for what a GPU's heads hold

        def normal(rows: int, width: int, scale: float) -> torch.Tensor:
            return (torch.empty(rows, width, device=device).normal_(generator=generator) * scale).to(dtype)

        student = normal(vocab_size, student_width, 2 / math.sqrt(student_width)).requires_grad_(not frozen_head)
        teacher = normal(vocab_size, teacher_width, 2 / math.sqrt(teacher_width))
        critic = normal(vocab_size, teacher_width, 0.5 / math.sqrt(teacher_width)).requires_grad_()
        heads = {
            "student": LMHead(student),
            "teacher": LMHead(teacher),
            "critic": LMHead(critic, soft_cap=1.0),  # bounded by 1, as `ValueHead.pair` makes it
            "teacher_in_student": LMHead(student.detach()),
            "student_in_teacher": LMHead(teacher),
        }
        states = {name: normal(n, head.weight.shape[1], 1.0) for name, head in heads.items()}
        for name in states.keys() - {"teacher"}:
            states[name].requires_grad_()
        mask = torch.randperm(n, generator=generator, device=device) < max(1, round(n * valid))
        labels = torch.randint(vocab_size, (n,), generator=generator, device=device)
        weights = torch.full((n,), 1.0, device=device) / mask.sum()
        top = top_tokens(states["teacher"], heads["teacher"], min(CACHED, vocab_size))
        return cls(states, heads, mask, labels, weights, chunk_size, top)

    def leaves(self) -> dict[str, torch.Tensor]:
        """Tensors that get a gradient."""
        tensors = {f"{name} states": states for name, states in self.states.items()}
        tensors |= {f"{name} weight": head.weight for name, head in self.heads.items()}
        return {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}

    def clear(self) -> None:
        """Forget the gradients."""
        for leaf in self.leaves().values():
            leaf.grad = None

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients that the last loss has handed back."""
        return {name: leaf.grad for name, leaf in self.leaves().items() if leaf.grad is not None}

    def pairs(self, *names: str) -> dict[str, tuple[torch.Tensor, LMHead]]:
        """Pairs of `linear_loss`: the rows that count."""
        return {name: (self.states[name][self.mask], self.heads[name]) for name in names}

    def term(self, function: Callable[..., torch.Tensor], *inputs: str, sign: float = 1.0) -> Term:
        """The mean of a function over the rows that count."""
        return Term(function, inputs or ("student", "teacher"), sign * self.weights[self.mask])

    def loss(self, pairs: dict[str, tuple[torch.Tensor, LMHead]], terms: dict[str, Term]) -> torch.Tensor:
        """The weighted sum of the terms, by this batch's engine."""
        ids, log_probs = self.cached()
        labels = {"labels": self.labels[self.mask], "ids": ids, "top": log_probs}
        return self.engine(pairs, terms, labels, self.chunk_size).loss

    def cached(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's tokens of the rows that count."""
        return tuple(part[self.mask] for part in self.top)

    def double(self) -> "Batch":
        """The same numbers as leaves in float64."""

        def leaf(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().double().requires_grad_(tensor.requires_grad)

        heads = {name: replace(head, weight=leaf(head.weight)) for name, head in self.heads.items()}
        states = {name: leaf(states) for name, states in self.states.items()}
        top = self.top[0], self.top[1].double()
        return replace(self, states=states, heads=heads, weights=self.weights.double(), top=top)

    def rows(self, index: torch.Tensor) -> "Batch":
        """Some of the rows; their gradients reach the leaves of this batch."""
        states = {name: states[index] for name, states in self.states.items()}
        own = {name: getattr(self, name)[index] for name in ("mask", "labels", "weights")}
        return replace(self, states=states, **own, top=tuple(part[index] for part in self.top))


def plain_loss(pairs: dict, terms: dict[str, Term], labels: dict, chunk_size: int | None) -> LinearLoss:
    """What `linear_loss` computes, on the logits of all rows at once and by autograd."""
    inputs = {name: states if head is None else head(states) for name, (states, head) in pairs.items()}
    inputs |= labels
    trained = [term for term in terms.values() if term.weights is not None]
    values = [term.function(*(inputs[name] for name in term.inputs)) for term in trained]
    return LinearLoss(sum((v * term.weights).sum() for v, term in zip(values, trained, strict=True)), {})


def products(names: tuple[str, ...], batch: Batch, again: tuple[str, ...] = (), times: int = 0) -> None:
    """
    One pass over the rows with the products of these pairs and the gradients that their leaves want; then some more
    over other pairs, with the gradient of the critic's head only.
    """
    states = {name: batch.states[name].detach()[batch.mask] for name in {*names, *again}}
    heads = {name: batch.heads[name].weight.detach() for name in states}
    rows = len(next(iter(states.values())))
    buffers = {name: head.new_empty(min(batch.chunk_size, rows), len(head)) for name, head in heads.items()}
    d_states = {name: torch.empty_like(states[name]) for name in names if batch.states[name].requires_grad}
    d_heads = {name: torch.empty_like(heads[name]) for name in names if batch.heads[name].weight.requires_grad}
    sweeps = [(names, d_states, d_heads)] + [(again, {}, {"critic": d_heads.get("critic")})] * times
    for index, (present, to_states, to_heads) in enumerate(sweeps):
        for start in range(0, rows, batch.chunk_size):
            chunk = {name: states[name][start : start + batch.chunk_size] for name in present}
            logits = {name: buffers[name][: len(part)] for name, part in chunk.items()}
            for name in present:
                torch.mm(chunk[name], heads[name].T, out=logits[name])
            for name in to_states:
                torch.mm(logits[name], heads[name], out=to_states[name][start : start + batch.chunk_size])
            for name, gradient in to_heads.items():
                beta = 0.0 if index == start == 0 else 1.0
                torch.addmm(gradient, logits[name].T, chunk[name], beta=beta, out=gradient)
    for name, gradient in d_states.items():
        batch.states[name].grad = torch.zeros_like(batch.states[name])
        batch.states[name].grad[batch.mask] = gradient
    for name, gradient in d_heads.items():
        batch.heads[name].weight.grad = gradient


GAME = ("student", "teacher", "critic")
FLOORS = {
    "gemm4": partial(products, ("student", "teacher")),
    "gemm7": partial(products, GAME),
    "gemm15": partial(products, GAME, again=("critic",), times=4),
    "gemm8": partial(products, ("student", "teacher_in_student", "teacher", "student_in_teacher")),
}


def interleave(
    jobs: dict[str, Callable[[], Any]],
    prepare: Callable[[], Any],
    rounds: int,
    clock: Callable[[], float],
    device: str,
) -> dict[str, list[float]]:
    """
    Seconds of each job in each round. All jobs take part in a round, every other one backwards, so that what the
    machine does meanwhile meets all of them.
    """
    seconds = {name: [] for name in jobs}
    for index in range(rounds):
        for name in list(jobs)[:: 1 if index % 2 == 0 else -1]:
            prepare()
            synchronize(device)
            start = clock()
            jobs[name]()
            synchronize(device)
            seconds[name].append(clock() - start)
    return seconds


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def median_ratio(seconds: list[float], reference: list[float]) -> float:
    """Median over the rounds of a ratio within a round."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


def machine(device: str, threads: int, clock: str) -> str:
    """What the figures hold for, in one line."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        models = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
        name = f"{models[0] if models else platform.processor()}, {threads} thread{'s' * (threads > 1)}"
    packages = []
    for package in ("torch", "trl", "transformers", "liger-kernel"):
        try:
            packages.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            packages.append(f"no {package}")
    return f"{name}; {clock} time; {', '.join(packages)}"


def show(title: str, columns: list[str], rows: list[list[str]], markdown: bool) -> None:
    """A table for the terminal, or one to paste."""
    if markdown:
        print(f"\n{title}\n")
        for cells in (columns, ["---"] * len(columns), *rows):
            print(f"| {' | '.join(cells)} |")
        return
    table = Table(*columns, title=title, title_justify="left")
    for cells in rows:
        table.add_row(*cells)
    Console(width=119).print(table)


@dataclass(frozen=True)
class Verdict:
    """A figure beside its bar."""

    subject: str
    value: float | None
    limit: float

    @property
    def holds(self) -> bool:
        """False for a figure that could not be had, and for NaN."""
        return self.value is not None and self.value <= self.limit

    def cells(self) -> list[str]:
        """What the table of verdicts shows."""
        value = "not measured" if self.value is None else f"{self.value:.3g}"
        return ["PASS" if self.holds else "MISSED", self.subject, value, f"<= {self.limit:g}"]


def judge(verdicts: list[Verdict], markdown: bool) -> None:
    """Show the verdicts; end with status 1 if a bar is missed."""
    show("Verdicts", ["", "figure", "measured", "bar"], [verdict.cells() for verdict in verdicts], markdown)
    missed = sum(not verdict.holds for verdict in verdicts)
    print(f"\n{len(verdicts) - missed} of {len(verdicts)} bars held.")
    raise SystemExit(1 if missed else 0)
