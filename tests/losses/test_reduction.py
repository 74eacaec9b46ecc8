import math

import pytest
import torch

from trl_kd.losses import token_mean, weighted_sum


def test_weighted_sum_literal_values_has_the_value_and_gradient_by_hand():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    result = weighted_sum(values, torch.tensor([[0.5, 0.0], [-1.0, 0.25]]))
    result.backward()
    assert result.item() == 0.5 - 3.0 + 1.0 and result.shape == ()
    assert values.grad.tolist() == [[0.5, 0.0], [-1.0, 0.25]]


@pytest.mark.parametrize("hidden", [math.inf, -math.inf, math.nan])
def test_weighted_sum_infinite_value_without_weight_is_left_out(hidden):
    values = torch.tensor([1.0, hidden, 3.0], requires_grad=True)
    result = weighted_sum(values, torch.tensor([1.0, 0.0, 2.0]))
    result.backward()
    assert result.item() == 7.0 and values.grad.tolist() == [1.0, 0.0, 2.0]


@pytest.mark.parametrize("shape", [(3,), (0,), (2, 0)])
def test_weighted_sum_no_weight_is_zero_with_zero_gradient(shape):
    values = torch.full(shape, math.inf, requires_grad=True)
    result = weighted_sum(values, torch.zeros(shape))
    result.backward()
    assert result.item() == 0.0 and torch.equal(values.grad, torch.zeros(shape))


def test_weighted_sum_backward_leaves_the_weights_without_gradient():
    values, weights = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    weighted_sum(values, weights).backward()
    assert weights.grad is None and values.grad.tolist() == [1.0] * 3


def test_weighted_sum_float32_weights_keep_float64_values():
    result = weighted_sum(torch.tensor([1.0 + 1e-12], dtype=torch.float64), torch.ones(1))
    assert result.dtype == torch.float64 and result.item() == 1.0 + 1e-12


def test_weighted_sum_nan_weight_shows():
    assert weighted_sum(torch.ones(2), torch.tensor([1.0, math.nan])).isnan()


def test_token_mean_literal_values_has_the_value_and_gradient_by_hand():
    values = torch.tensor([[1.0, math.inf], [3.0, 8.0]], requires_grad=True)
    result = token_mean(values, torch.tensor([[1, 0], [1, 1]]))
    result.backward()
    assert result.item() == 4.0
    torch.testing.assert_close(values.grad, torch.tensor([[1.0, 0.0], [1.0, 1.0]]) / 3)


@pytest.mark.parametrize("shape", [(3,), (0,), (2, 2)])
def test_token_mean_all_masked_is_zero_with_zero_gradient(shape):
    values = torch.full(shape, math.nan, requires_grad=True)
    result = token_mean(values, torch.zeros(shape, dtype=torch.bool))
    result.backward()
    assert result.item() == 0.0 and torch.equal(values.grad, torch.zeros(shape))
