"""What models say of each token of given completions: their likelihood, and how far two models are apart there."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm
from transformers import TopPLogitsWarper

from trl_kd.losses import cross_entropy, entropy, forward_kl, reverse_kl, total_variation


if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Rows of logits that are widened to float32 at a time
_CHUNK_SIZE = 512


@contextmanager
def eval_mode(*models: "PreTrainedModel") -> Iterator[None]:
    """Puts models into eval mode and gives each submodule its own mode back afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def batches(items: Sequence, batch_size: int, description: str, progress: bool) -> Iterator[Sequence]:
    """Consecutive slices of `items`, with a progress bar."""
    starts = range(0, len(items), batch_size)
    for start in tqdm(starts, desc=description, disable=not progress, leave=False):
        yield items[start : start + batch_size]


def _completion_logits(
    model: "PreTrainedModel", prompts: Sequence[list[int]], completions: Sequence[list[int]]
) -> list[torch.Tensor]:
    """Logits of a batch at the states that predict each completion: per row `(K, V)`, in the model's dtype."""
    # The last token of a completion leads to no further state
    rows = [prompt + completion[:-1] for prompt, completion in zip(prompts, completions, strict=True)]
    length = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=model.device)
    attention_mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=model.device)
    # Logits at position i predict token i + 1, so the first state is the prompt's last position
    first = min(map(len, prompts)) - 1
    logits = model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=length - first
    ).logits  # (B, S - first, V)
    return [
        row[len(prompt) - 1 - first :][: len(completion)]
        for row, prompt, completion in zip(logits, prompts, completions, strict=True)
    ]


def _nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Logits `(N, V)`, `-inf` for the tokens that `generate` would not draw."""
    return logits if top_p == 1.0 else TopPLogitsWarper(top_p)(None, logits.float())


def _next_token_values(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, top_p: float
) -> dict[str, torch.Tensor]:
    """What can be said of two next-token distributions, `(N, V)` each; `(N,)` for each name."""
    q, p = _nucleus(student_logits, top_p), _nucleus(teacher_logits, top_p)
    values = {
        "total_variation": total_variation(q, p),
        "forward_kl": forward_kl(student_logits, p),
        "reverse_kl": reverse_kl(q, teacher_logits),
        "student_entropy": entropy(q),
        "teacher_entropy": entropy(p),
    }
    if top_p < 1.0:
        values["outside"] = q.softmax(dim=-1).masked_fill(p > float("-inf"), 0.0).sum(dim=-1)
        values["teacher_cut"] = reverse_kl(p, teacher_logits)
    return values


@torch.no_grad()
def compare_rows(
    student: "PreTrainedModel",
    teacher: "PreTrainedModel",
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    *,
    batch_size: int = 16,
    top_p: float = 1.0,
    progress: bool = False,
    description: str = "Comparing",
) -> Iterator[dict[str, torch.Tensor]]:
    """
    Comparison of two models of one vocabulary at each token of given completions.

    Args:
        student ([`~transformers.PreTrainedModel`]):
            Model to be judged. Like the teacher, it is in eval mode meanwhile.
        teacher ([`~transformers.PreTrainedModel`]):
            Model to be imitated. Where one head is padded further than the other, both are cut to the shared size.
        prompts (`Sequence[list[int]]`):
            Token ids, at least one per prompt.
        completions (`Sequence[list[int]]`):
            Token ids that continue the prompts, at least one per completion.
        batch_size (`int`, *optional*, defaults to `16`):
            Rows per batch.
        top_p (`float`, *optional*, defaults to `1.0`):
            Probability mass of the nucleus that both models are sampled from, as in [`evaluate_fidelity`].
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.
        description (`str`, *optional*, defaults to `"Comparing"`):
            Text of the progress bar.

    Yields:
        `dict[str, torch.Tensor]`: for each completion, in nats, `total_variation`, `forward_kl`, `reverse_kl`,
        `student_entropy`, `teacher_entropy`, `nll` and `teacher_nll`, each of shape `(K,)`, float64, on the CPU; with
        `top_p` below 1 also `outside` and `teacher_cut`.
    """
    with eval_mode(student, teacher):
        for batch in batches(list(zip(prompts, completions, strict=True)), batch_size, description, progress):
            batch_prompts, batch_completions = zip(*batch, strict=True)
            student_logits = torch.cat(_completion_logits(student, batch_prompts, batch_completions))  # (N, V)
            teacher_logits = student_logits
            if teacher is not student:
                teacher_logits = torch.cat(_completion_logits(teacher, batch_prompts, batch_completions))
                teacher_logits = teacher_logits.to(student_logits.device)
            labels = torch.tensor(sum(batch_completions, []), device=student_logits.device)
            # Heads of one family may be padded to different sizes
            vocab_size = min(student_logits.size(-1), teacher_logits.size(-1))
            chunks: dict[str, list[torch.Tensor]] = defaultdict(list)
            for rows in torch.arange(len(labels), device=student_logits.device).split(_CHUNK_SIZE):
                s, t, y = student_logits[rows], teacher_logits[rows], labels[rows]
                values = _next_token_values(s[:, :vocab_size], t[:, :vocab_size], top_p)
                values |= {"nll": cross_entropy(s, y), "teacher_nll": cross_entropy(t, y)}
                for name, value in values.items():
                    chunks[name].append(value.double())
            lengths = [len(completion) for completion in batch_completions]
            columns = {name: torch.cat(values).cpu().split(lengths) for name, values in chunks.items()}
            yield from (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


@torch.no_grad()
def likelihood_rows(
    model: "PreTrainedModel",
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    *,
    batch_size: int = 16,
    progress: bool = False,
    description: str = "Reading",
) -> Iterator[torch.Tensor]:
    """
    Negative log-likelihood of each token of given completions.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model to be judged, in eval mode meanwhile.
        prompts (`Sequence[list[int]]`):
            Token ids, at least one per prompt.
        completions (`Sequence[list[int]]`):
            Token ids that continue the prompts, at least one per completion.
        batch_size (`int`, *optional*, defaults to `16`):
            Rows per batch.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.
        description (`str`, *optional*, defaults to `"Reading"`):
            Text of the progress bar.

    Yields:
        `torch.Tensor` of shape `(K,)` for each completion: nats, float64, on the CPU.
    """
    with eval_mode(model):
        for batch in batches(list(zip(prompts, completions, strict=True)), batch_size, description, progress):
            batch_prompts, batch_completions = zip(*batch, strict=True)
            rows = _completion_logits(model, batch_prompts, batch_completions)
            for logits, completion in zip(rows, batch_completions, strict=True):
                labels = torch.tensor(completion, device=logits.device)
                yield (
                    torch.cat(
                        [
                            cross_entropy(s, y)
                            for s, y in zip(logits.split(_CHUNK_SIZE), labels.split(_CHUNK_SIZE), strict=True)
                        ]
                    )
                    .double()
                    .cpu()
                )
