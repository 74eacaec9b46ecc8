"""What is to be expected of a return at a position, so that only the rest is put down to the token."""

from typing import Any

import torch


def less_position_means(
    returns: list[torch.Tensor], positions: list[torch.Tensor], accelerator: Any
) -> list[torch.Tensor]:
    r"""
    Returns less the mean of those of the other texts of the step at the same position; zero where there is no other.

    Args:
        returns (`list[torch.Tensor]` of shapes `(N,)`):
            Returns of the tokens of each micro-batch.
        positions (`list[torch.Tensor]` of shapes `(N,)`):
            Number of tokens before each in its text.
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's accelerator, to sum over ranks.

    Returns:
        `list[torch.Tensor]` of shapes `(N,)`
    """
    g, t = torch.cat(returns), torch.cat(positions)
    # Of the longest text on any rank
    length = int(accelerator.gather(torch.cat([t, t.new_zeros(1)]).max() + 1).max())
    sums = torch.zeros(2, length, dtype=g.dtype, device=g.device).index_add_(
        1, t, torch.stack([g, torch.ones_like(g)])
    )
    total, count = sum_over_ranks(sums, accelerator)[:, t]
    advantages = torch.where(count > 1, g - (total - g) / (count - 1).clamp_min(1), 0.0)
    return list(advantages.split([len(part) for part in returns]))


def sum_over_ranks(tensor: torch.Tensor, accelerator: Any) -> torch.Tensor:
    """Sum of a tensor over all processes."""
    return accelerator.reduce(tensor, reduction="sum") if accelerator.num_processes > 1 else tensor
