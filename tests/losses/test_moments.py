import itertools
import math

import pytest
import torch

from tests.losses.checks import SHAPES, check_against_loops, logits_of, random_logits
from tests.references import divergences as references
from trl_kd.losses import (
    discount_weights,
    exact_critic,
    exact_moment,
    exact_penalised_moment,
    horizon,
    later_returns,
    moment,
    penalised_critic,
    total_variation,
)


MOMENTS = {
    "moment": lambda student, teacher: moment(student, teacher, random_logits(tuple(student.shape), seed=9)),
    "exact_moment": exact_moment,
    "exact_penalised_moment": exact_penalised_moment,
}
EVERY_MOMENT = pytest.mark.parametrize("function", MOMENTS.values(), ids=MOMENTS)
CRITICS = pytest.mark.parametrize("critic", [exact_critic, penalised_critic])


def test_moment_literal_probabilities_has_the_value_by_hand():
    student, teacher = logits_of(0.5, 0.3, 0.2), logits_of(0.2, 0.3, 0.5)
    critic = torch.tensor([[1.0, 7.0, -2.0]], dtype=torch.float64)
    assert moment(student, teacher, critic).item() == pytest.approx(-0.3 - 0.6, abs=1e-15)


def test_moment_literal_probabilities_has_the_gradient_by_hand():
    # -pi_S (f - E_S f): E_S f = .5 - .4 = .1
    student = logits_of(0.5, 0.3, 0.2).requires_grad_()
    critic = torch.tensor([[1.0, 0.0, -2.0]], dtype=torch.float64)
    moment(student, logits_of(0.2, 0.3, 0.5), critic).sum().backward()
    assert student.grad[0].tolist() == pytest.approx([-0.5 * 0.9, 0.3 * 0.1, 0.2 * 2.1], abs=1e-15)


def test_exact_moment_literal_probabilities_is_twice_the_total_variation():
    assert exact_moment(logits_of(0.5, 0.3, 0.2), logits_of(0.2, 0.3, 0.5)).item() == pytest.approx(0.6, abs=1e-15)


def test_exact_penalised_moment_literal_probabilities_is_the_le_cam_divergence():
    value = exact_penalised_moment(logits_of(0.5, 0.3, 0.2), logits_of(0.2, 0.3, 0.5)).item()
    assert value == pytest.approx(2 * 0.3**2 / 0.7, abs=1e-15)


def test_critics_literal_probabilities_have_the_values_by_hand():
    student, teacher = logits_of(0.25, 0.5, 0.25), logits_of(0.5, 0.5, 0.0)
    assert exact_critic(student, teacher)[0].tolist() == [1.0, 0.0, -1.0]
    assert penalised_critic(student, teacher)[0].tolist() == pytest.approx([1 / 3, 0.0, -1.0], abs=1e-15)


@SHAPES
def test_moment_random_logits_equals_the_loop_in_value_and_gradient(shape):
    student, teacher, critic = (random_logits(shape, seed) for seed in range(3))
    check_against_loops(moment, references.moment, student, teacher, critic)


@SHAPES
@pytest.mark.parametrize("name", ["exact_moment", "exact_penalised_moment"])
def test_exact_moments_random_logits_equal_the_loop_in_value_and_gradient(name, shape):
    student, teacher = random_logits(shape, seed=0), random_logits(shape, seed=1)
    check_against_loops(MOMENTS[name], getattr(references, name), student, teacher)


def test_exact_moment_value_and_gradient_are_those_of_twice_the_total_variation():
    results = []
    for function in (exact_moment, lambda s, t: 2 * total_variation(s, t)):
        student = random_logits((3, 5), seed=0).requires_grad_()
        values = function(student, random_logits((3, 5), seed=1))
        values.sum().backward()
        results.append((values.detach(), student.grad))
    torch.testing.assert_close(results[0], results[1])


def test_exact_critic_beats_every_pattern_of_signs():
    student, teacher = random_logits((1, 4), seed=0), random_logits((1, 4), seed=1)
    patterns = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=torch.float64)
    values = moment(student.expand(16, 4), teacher.expand(16, 4), patterns)
    assert exact_moment(student, teacher).item() == pytest.approx(values.max().item(), abs=1e-15)


def test_penalised_critic_is_the_stationary_maximum_of_its_objective():
    student, teacher = random_logits((1, 4), seed=0), random_logits((1, 4), seed=1)
    p_s, p_t = student.softmax(-1), teacher.softmax(-1)

    def objective(f):  # lambda = 2
        return ((p_t - p_s) * f - (p_t + p_s) / 2 * f**2).sum()

    best = penalised_critic(student, teacher).requires_grad_()
    objective(best).backward()
    torch.testing.assert_close(best.grad, torch.zeros_like(best), rtol=0, atol=1e-15)
    assert objective(best) > max(objective(0.9 * best), objective(1.1 * best), objective(best.sign()))


def test_exact_penalised_moment_is_at_most_the_exact_moment():
    student, teacher = random_logits((50, 5), seed=0), random_logits((50, 5), seed=1)
    penalised, exact = exact_penalised_moment(student, teacher), exact_moment(student, teacher)
    assert (penalised <= exact).all() and (penalised >= exact**2 / 2 - 1e-12).all()  # Cauchy-Schwarz


@pytest.mark.parametrize("function", [exact_moment, exact_penalised_moment])
def test_exact_moments_identical_logits_are_zero_with_zero_gradient(function):
    student = random_logits((3, 5), seed=0).requires_grad_()
    values = function(student, random_logits((3, 5), seed=0))
    values.sum().backward()
    assert torch.equal(values, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(student.grad, torch.zeros(3, 5, dtype=torch.float64))


def test_moment_identical_logits_is_zero_for_any_critic():
    student, critic = random_logits((3, 5), seed=0), random_logits((3, 5), seed=9)
    assert torch.equal(moment(student, student.clone(), critic), torch.zeros(3, dtype=torch.float64))


def test_moment_critic_plus_a_constant_of_the_state_is_unchanged_in_value_and_gradient():
    results = []
    for offset in (torch.zeros(3, 1), torch.tensor([[5.0], [-2.0], [0.3]])):
        student = random_logits((3, 5), seed=0).requires_grad_()
        values = moment(student, random_logits((3, 5), seed=1), random_logits((3, 5), seed=2) + offset)
        values.sum().backward()
        results.append((values.detach(), student.grad))
    torch.testing.assert_close(results[0], results[1])


def test_moment_is_linear_in_the_critic_and_odd_in_the_models():
    student, teacher, f, g = (random_logits((3, 5), seed) for seed in range(4))
    torch.testing.assert_close(
        moment(student, teacher, 2 * f - 3 * g), 2 * moment(student, teacher, f) - 3 * moment(student, teacher, g)
    )
    torch.testing.assert_close(moment(student, teacher, f), -moment(teacher, student, f))


def test_exact_moments_swapped_models_are_symmetric():
    student, teacher = random_logits((3, 5), seed=0), random_logits((3, 5), seed=1)
    torch.testing.assert_close(exact_moment(student, teacher), exact_moment(teacher, student))
    torch.testing.assert_close(exact_penalised_moment(student, teacher), exact_penalised_moment(teacher, student))


@EVERY_MOMENT
def test_moments_shifted_logits_are_unchanged(function):
    student, teacher = random_logits((3, 5), seed=0), random_logits((3, 5), seed=1)
    shift = torch.tensor([[-3.0], [0.5], [40.0]], dtype=torch.float64)
    torch.testing.assert_close(function(student + shift, teacher - shift), function(student, teacher))


def test_moment_backward_reaches_the_student_alone():
    student, teacher, critic = (random_logits((3, 5), seed).requires_grad_() for seed in range(3))
    moment(student, teacher, critic).sum().backward()
    assert teacher.grad is None and critic.grad is None and student.grad.abs().sum() > 0.1


@CRITICS
def test_critics_have_no_gradient(critic):
    student, teacher = (random_logits((3, 5), seed).requires_grad_() for seed in range(2))
    assert not critic(student, teacher).requires_grad


@pytest.mark.parametrize("function", [exact_moment, exact_penalised_moment])
def test_exact_moments_opposite_logits_of_ten_thousand_are_two(function):
    student, teacher = torch.tensor([[1e4, 0.0]], requires_grad=True), torch.tensor([[0.0, 1e4]])
    value = function(student, teacher)
    value.sum().backward()
    assert value.item() == 2.0 and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("function", [exact_moment, exact_penalised_moment])
def test_exact_moments_tokens_excluded_by_one_or_both_are_finite(function):
    student = torch.tensor([[0.0, 0.0, -math.inf, 0.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0, -math.inf, -math.inf]], dtype=torch.float64)
    value = function(student, teacher)
    value.sum().backward()
    # Student thirds, teacher halves: differences 1/6, 1/6, 0, -1/3
    expected = 2 / 3 if function is exact_moment else 2 * (1 / 36) / (5 / 6) + 1 / 3
    assert value.item() == pytest.approx(expected, abs=1e-12)
    assert torch.isfinite(student.grad).all() and student.grad[0, 3] > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [exact_moment, exact_penalised_moment])
def test_exact_moments_half_precision_logits_are_computed_in_float32(function, dtype):
    student, teacher = (random_logits((3, 5), seed, torch.float32).to(dtype) for seed in (0, 1))
    values = function(student, teacher)
    assert values.dtype == torch.float32
    assert torch.equal(values, function(student.float(), teacher.float()))


def test_moment_bfloat16_critic_is_used_in_float32():
    student, teacher, critic = (random_logits((3, 5), seed, torch.float32).bfloat16() for seed in range(3))
    values = moment(student, teacher, critic)
    assert values.dtype == torch.float32
    assert torch.equal(values, moment(student.float(), teacher.float(), critic.float()))


@pytest.mark.parametrize("function", [exact_moment, exact_penalised_moment])
def test_exact_moments_vocabularies_that_differ_raise(function):
    with pytest.raises(ValueError, match=r"shape \(2, 5\) but `teacher_logits` has shape \(2, 6\)"):
        function(torch.zeros(2, 5), torch.zeros(2, 6))


@CRITICS
@pytest.mark.parametrize("shape", [(2, 6), (1, 5)])
def test_critics_shapes_that_differ_raise(critic, shape):
    with pytest.raises(ValueError, match=r"`student_logits` has shape \(2, 5\) but `teacher_logits` has shape"):
        critic(torch.zeros(2, 5), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 1), (1, 5), (5,)])
def test_moment_critic_of_another_shape_raises(shape):
    expected = r"`critic_values` has shape .* but the logits have shape \(2, 5\)\. The critic must value every action"
    with pytest.raises(ValueError, match=expected):
        moment(torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(shape))


def test_discount_weights_literal_positions_are_powers_of_gamma():
    weights = discount_weights(torch.tensor([[0, 1, 2], [3, 0, 1]]), 0.5)
    assert weights.tolist() == [[1.0, 0.5, 0.25], [0.125, 1.0, 0.5]] and weights.dtype == torch.float64


def test_discount_weights_gamma_one_is_one():
    assert torch.equal(discount_weights(torch.arange(100), 1.0), torch.ones(100, dtype=torch.float64))


def test_discount_weights_long_completion_is_exact():
    # 0.999^1000: in float32 the base alone is off by 1e-8, the power by 1e-5
    assert discount_weights(torch.tensor([1000]), 0.999).item() == pytest.approx(0.999**1000, rel=1e-13)


@pytest.mark.parametrize("gamma", [0.0, -0.5, 1.0001, math.nan])
def test_discount_weights_gamma_outside_the_range_raises(gamma):
    with pytest.raises(ValueError, match=rf"`gamma` is {gamma}, but it discounts later tokens\. Set it in \(0, 1\]\."):
        discount_weights(torch.arange(3), gamma)


def test_horizon_literal_lengths_have_the_values_by_hand():
    remaining = torch.tensor([1, 2, 3])
    assert horizon(remaining, 1.0).tolist() == [1.0, 2.0, 3.0]
    assert horizon(remaining, 0.5).tolist() == [1.0, 1.5, 1.75]
    assert horizon(remaining, 0.9).tolist() == pytest.approx([1.0, 1.9, 2.71], abs=1e-14)


def loop_later_returns(costs, mask, gamma):
    result = [[0.0] * len(row) for row in costs]
    for b, row in enumerate(costs):
        for t in range(len(row)):
            for later in range(t + 1, len(row)):
                if mask[b][t] and mask[b][later]:
                    result[b][t] += gamma ** (later - t) * row[later]
    return result


def test_later_returns_literal_costs_sum_strictly_later_ones():
    costs = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert later_returns(costs, mask, 1.0).tolist() == [[6.0, 4.0, 0.0], [2.0, 0.0, 0.0]]
    assert later_returns(costs, mask, 0.5).tolist() == [[2.0, 2.0, 0.0], [1.0, 0.0, 0.0]]


@pytest.mark.parametrize("shape", [(2, 6), (3, 5), (1, 1)])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_later_returns_random_costs_equal_the_loop(shape, gamma):
    costs = random_logits(shape, seed=0)
    mask = torch.arange(shape[1]) < torch.tensor([shape[1], 2, 0])[: shape[0], None]
    expected = torch.tensor(loop_later_returns(costs.tolist(), mask.tolist(), gamma), dtype=torch.float64)
    torch.testing.assert_close(later_returns(costs, mask, gamma), expected)
    torch.testing.assert_close(later_returns(costs, mask.long(), gamma), expected)


def test_later_returns_costs_behind_the_mask_may_be_infinite():
    costs = torch.tensor([[1.0, 2.0, math.inf, math.nan]])
    assert later_returns(costs, torch.tensor([[1, 1, 0, 0]]), 1.0).tolist() == [[2.0, 0.0, 0.0, 0.0]]


def test_later_returns_have_no_gradient():
    costs = torch.ones(1, 3, requires_grad=True)
    assert not later_returns(costs, torch.ones(1, 3), 0.9).requires_grad


def test_later_returns_under_autocast_are_the_same_as_without():
    costs = random_logits((2, 300), seed=0, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        returns = later_returns(costs, torch.ones(2, 300), 0.9)
    assert torch.equal(returns, later_returns(costs, torch.ones(2, 300), 0.9))
