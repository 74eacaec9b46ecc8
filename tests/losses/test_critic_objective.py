import math

import pytest
import torch

from tests.losses.checks import SHAPES, check_against_loops, logits_of, random_logits
from tests.references import divergences as references
from trl_kd.losses import critic_objective, moment, penalised_critic, saturation


PENALTIES = pytest.mark.parametrize("penalty", [0.0, 0.6, 3.0])
STUDENT, TEACHER = (0.5, 0.3, 0.2), (0.2, 0.3, 0.5)


def best_on_a_grid(student, teacher, penalty, grid):
    """The best value of each action of one state: the objective is a sum over actions, so they are searched apart."""
    best = []
    for action in range(student.shape[-1]):
        values = torch.zeros(len(grid), student.shape[-1], dtype=torch.float64)
        values[:, action] = grid
        found = critic_objective(student.expand_as(values), teacher.expand_as(values), values, penalty)
        best.append(grid[found.argmax()])
    return torch.stack(best)


# Objective


def test_critic_objective_literal_values_has_the_value_and_gradient_by_hand():
    critic = torch.tensor([[1.0, 2.0, -0.5]], dtype=torch.float64, requires_grad=True)
    value = critic_objective(logits_of(*STUDENT), logits_of(*TEACHER), critic, penalty=0.4)
    # Moment -0.3 - 0.15; weights .35 .3 .35, squares 1 4 .25: mean square 1.6375
    assert value.item() == pytest.approx(-0.45 - 0.2 * 1.6375, abs=1e-15)
    value.sum().backward()
    expected = [-0.3 - 0.4 * 0.35 * 1.0, -0.4 * 0.3 * 2.0, 0.3 + 0.4 * 0.35 * 0.5]
    assert critic.grad[0].tolist() == pytest.approx(expected, abs=1e-15)


@SHAPES
@PENALTIES
def test_critic_objective_random_logits_equals_the_loop_in_value_and_gradient(shape, penalty):
    critic, student, teacher = (random_logits(shape, seed) for seed in range(3))

    def function(critic, student, teacher):
        return critic_objective(student, teacher, critic, penalty)

    def reference(critic, student, teacher):
        return references.critic_objective(critic, student, teacher, penalty)

    check_against_loops(function, reference, critic, student, teacher)


@pytest.mark.parametrize("penalty", [0.0, 2.5])
def test_critic_objective_gradient_at_zero_is_the_difference_of_the_policies(penalty):
    student, teacher = random_logits((3, 5), seed=0), random_logits((3, 5), seed=1)
    critic = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    value = critic_objective(student, teacher, critic, penalty)
    assert torch.equal(value, torch.zeros(3, dtype=torch.float64))
    value.sum().backward()
    torch.testing.assert_close(critic.grad, teacher.softmax(-1) - student.softmax(-1), rtol=0, atol=1e-15)


def test_critic_objective_without_penalty_is_the_moment():
    student, teacher, critic = (random_logits((3, 5), seed) for seed in range(3))
    value = critic_objective(student, teacher, critic, 0.0)
    torch.testing.assert_close(value, moment(student, teacher, critic), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("penalty", "bound"), [(2.0, 1.0), (1.0, 1.0), (1.0, 0.3), (0.5, 2.0), (5.0, 1.0)])
def test_critic_objective_maximum_within_the_bound_is_the_clipped_closed_form(penalty, bound):
    student, teacher = random_logits((4, 3), seed=0), random_logits((4, 3), seed=1)
    p_s, p_t = student.softmax(-1), teacher.softmax(-1)
    expected = (2 / penalty * (p_t - p_s) / (p_t + p_s)).clamp(-bound, bound)
    grid = torch.linspace(-bound, bound, 4001, dtype=torch.float64)
    found = torch.stack([best_on_a_grid(*each, penalty, grid) for each in zip(student, teacher, strict=True)])
    torch.testing.assert_close(found, expected, rtol=0, atol=0.51 * (2 * bound / 4000))  # half a cell
    if (penalty, bound) == (2.0, 1.0):
        torch.testing.assert_close(expected, penalised_critic(student, teacher), rtol=0, atol=1e-14)


def test_critic_objective_backward_reaches_the_critic_alone():
    student, teacher, critic = (random_logits((3, 5), seed).requires_grad_() for seed in range(3))
    critic_objective(student, teacher, critic, 0.5).sum().backward()
    assert student.grad is None and teacher.grad is None and critic.grad.abs().sum() > 0.1


def test_critic_objective_identical_policies_is_minus_the_penalty():
    logits, critic = random_logits((3, 5), seed=0), random_logits((3, 5), seed=1)
    expected = -0.35 * (logits.softmax(-1) * critic**2).sum(-1)
    torch.testing.assert_close(critic_objective(logits, logits.clone(), critic, 0.7), expected, rtol=0, atol=1e-14)


def test_critic_objective_shifted_logits_are_unchanged():
    student, teacher, critic = (random_logits((3, 5), seed) for seed in range(3))
    shift = torch.tensor([[-3.0], [0.5], [40.0]], dtype=torch.float64)
    shifted = critic_objective(student + shift, teacher - shift, critic, 0.5)
    torch.testing.assert_close(shifted, critic_objective(student, teacher, critic, 0.5))


def test_critic_objective_opposite_logits_of_ten_thousand_has_the_value_by_hand():
    student, teacher = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])
    critic = torch.tensor([[-1.0, 0.5]], requires_grad=True)
    value = critic_objective(student, teacher, critic, 2.0)
    value.sum().backward()
    assert value.item() == 1.5 - 0.5 * (1.0 + 0.25)
    assert critic.grad.tolist() == [[-1.0 + 1.0, 1.0 - 0.5]]


def test_critic_objective_tokens_that_both_exclude_have_no_value_and_no_gradient():
    student = torch.tensor([[0.0, 0.0, -math.inf]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, -math.inf, -math.inf]], dtype=torch.float64)
    critic = torch.tensor([[0.5, -1.0, 7.0]], dtype=torch.float64, requires_grad=True)
    value = critic_objective(student, teacher, critic, 1.0)
    value.sum().backward()
    # Student halves, teacher the first: differences .5 -.5 0, weights .75 .25 0
    assert value.item() == pytest.approx(0.25 + 0.5 - 0.5 * (0.75 * 0.25 + 0.25), abs=1e-15)
    assert critic.grad[0].tolist() == pytest.approx([0.5 - 0.375, -0.5 + 0.25, 0.0], abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [lambda s, t, c: critic_objective(s, t, c, 0.7), saturation])
def test_critic_values_in_half_precision_are_computed_in_float32(function, dtype):
    inputs = [random_logits((3, 5), seed, torch.float32).to(dtype) for seed in range(3)]
    values = function(*inputs)
    assert values.dtype == torch.float32
    assert torch.equal(values, function(*(tensor.float() for tensor in inputs)))


def test_critic_objective_gradient_of_a_bfloat16_critic_keeps_its_dtype():
    student, teacher = logits_of(*STUDENT).float(), logits_of(*TEACHER).float()
    critic = torch.zeros(1, 3, dtype=torch.bfloat16, requires_grad=True)
    critic_objective(student, teacher, critic, 1.0).sum().backward()
    assert torch.equal(critic.grad, torch.tensor([[-0.3, 0.0, 0.3]]).bfloat16())


# Saturation


def test_saturation_literal_values_has_the_value_by_hand():
    critic = torch.tensor([[1.0, -2.0, -0.5]], dtype=torch.float64)
    value = saturation(logits_of(*STUDENT), logits_of(*TEACHER), critic)
    assert value.item() == pytest.approx(0.35 * 1.0 + 0.3 * 2.0 + 0.35 * 0.5, abs=1e-15)


@SHAPES
def test_saturation_random_logits_equals_the_loop(shape):
    student, teacher, critic = (random_logits(shape, seed) for seed in range(3))
    values = saturation(student, teacher, critic)
    assert values.shape == shape[:-1]
    rows = zip(*(tensor.flatten(0, 1).tolist() for tensor in (student, teacher, critic)), strict=True)
    expected = [references.saturation(*row) for row in rows]
    assert values.flatten().tolist() == pytest.approx(expected, abs=1e-13)


def test_saturation_of_a_critic_at_its_bound_is_the_bound_and_carries_no_gradient():
    student, teacher, critic = (random_logits((3, 5), seed).requires_grad_() for seed in range(3))
    values = saturation(student, teacher, 0.7 * critic.sign())
    torch.testing.assert_close(values, torch.full((3,), 0.7, dtype=torch.float64))
    assert not saturation(student.detach(), teacher, critic).requires_grad
    assert not saturation(student, teacher.detach(), critic.detach()).requires_grad


def test_saturation_opposite_logits_of_ten_thousand_has_the_value_by_hand():
    student, teacher = torch.tensor([[1e4, 0.0, 0.0]]), torch.tensor([[0.0, 1e4, 0.0]])
    assert saturation(student, teacher, torch.tensor([[0.5, -1.0, 9.0]])).item() == 0.75


# Errors


@pytest.mark.parametrize("function", [lambda s, t, c: critic_objective(s, t, c, 1.0), saturation])
def test_critic_shapes_that_differ_raise(function):
    logits = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"shape \(2, 5\) but `teacher_logits` has shape \(2, 6\)"):
        function(logits, torch.zeros(2, 6), logits)
    for shape in ((2, 1), (1, 5), (5,)):
        with pytest.raises(ValueError, match=r"`critic_values` has shape .* but the logits have shape \(2, 5\)\. The"):
            function(logits, logits, torch.zeros(shape))
