"""Inputs and the comparison with loops that the tests of per-token losses share."""

import pytest
import torch


# An even and an odd shape, (B, K, V)
SHAPES = pytest.mark.parametrize("shape", [(2, 4, 8), (3, 1, 7)])


def random_logits(shape, seed, dtype=torch.float64):
    return 2.0 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def logits_of(*probabilities):
    return torch.tensor([probabilities], dtype=torch.float64).log()


def check_against_loops(function, reference, logits, *others):
    """Values and gradients, each token with its own weight in the backward pass; 1e-12 is float64 rounding."""
    logits = logits.clone().requires_grad_()
    values = function(logits, *others)
    assert values.shape == logits.shape[:-1] and values.dtype == torch.float64
    weights = torch.arange(1, values.numel() + 1, dtype=torch.float64).view(values.shape)
    (weights * values).sum().backward()
    for index in torch.cartesian_prod(*(torch.arange(n) for n in values.shape)).tolist():
        index = tuple(index)
        expected, gradient = reference(logits[index].tolist(), *(other[index].tolist() for other in others))
        assert values[index].item() == pytest.approx(expected, abs=1e-12)
        torch.testing.assert_close(
            logits.grad[index], weights[index] * torch.tensor(gradient, dtype=torch.float64), rtol=1e-10, atol=1e-12
        )
