"""The only place that reduces per-token values (besides `linear`, which returns a weighted sum)."""

import torch


def weighted_sum(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    r"""
    Sum of `weights * values` over the tokens that carry weight.

    Tokens of weight zero are left out, not multiplied: an infinite value there would turn the sum into NaN.

    Args:
        values (`torch.Tensor` of shape `(...)`):
            Per-token values.
        weights (`torch.Tensor` of shape `(...)`):
            Per-token weights; no gradient flows to them.

    Returns:
        `torch.Tensor` of shape `()`: zero, with a zero gradient, when no token carries weight.

    Examples:

    ```python
    >>> weighted_sum(torch.tensor([1.0, 3.0, torch.inf]), torch.tensor([0.5, 0.5, 0.0]))
    tensor(2.)
    ```
    """
    weights, counted = weights.detach().to(values.dtype), weights != 0
    if values.requires_grad:
        # Before anything else: zero times an infinite slope is NaN
        return (values[counted] * weights[counted]).sum()
    # The same without waiting for the device to count
    return (torch.where(counted, values, 0.0) * weights).sum()


def token_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""
    Mean of `values` over the tokens of `mask`.

    Args:
        values (`torch.Tensor` of shape `(...)`):
            Per-token values.
        mask (`torch.Tensor` of shape `(...)`):
            True for the tokens to count.

    Returns:
        `torch.Tensor` of shape `()`: zero, with a zero gradient, when no token is counted.

    Examples:

    ```python
    >>> token_mean(torch.tensor([1.0, 3.0, torch.inf]), torch.tensor([True, True, False]))
    tensor(2.)
    ```
    """
    selected = values[mask.bool()]
    return selected.sum() / max(selected.numel(), 1)
