import math

import pytest
import torch

from tests.losses.checks import SHAPES, check_against_loops, logits_of, random_logits
from tests.references import divergences as references
from trl_kd.losses import cross_entropy, entropy, forward_kl, generalized_jsd, reverse_kl, total_variation


DIVERGENCES = {
    "forward_kl": (forward_kl, references.forward_kl),
    "reverse_kl": (reverse_kl, references.reverse_kl),
    "generalized_jsd_0.5": (generalized_jsd, lambda s, t: references.generalized_jsd(s, t, 0.5)),
    "generalized_jsd_0.1": (
        lambda s, t: generalized_jsd(s, t, beta=0.1),
        lambda s, t: references.generalized_jsd(s, t, 0.1),
    ),
    "total_variation": (total_variation, references.total_variation),
}
EVERY_DIVERGENCE = pytest.mark.parametrize("divergence", DIVERGENCES)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (forward_kl, 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)),
        (reverse_kl, 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)),
        # The mixture is [3/8, 5/8]: ln(4/3) and ln(4/5) for the teacher, ln(2/3) and ln(6/5) for the student
        (
            generalized_jsd,
            0.25 * math.log(4 / 3) + 0.25 * math.log(4 / 5) + 0.125 * math.log(2 / 3) + 0.375 * math.log(6 / 5),
        ),
        (total_variation, 0.25),
    ],
)
def test_divergence_literal_probabilities_has_the_value_by_hand(function, expected):
    student, teacher = logits_of(0.25, 0.75), logits_of(0.5, 0.5)
    assert function(student, teacher).item() == pytest.approx(expected, abs=1e-14)


def test_generalized_jsd_literal_beta_weights_the_teacher():
    # Student [1, 0], teacher [0, 1]: the mixture is [1 - beta, beta]
    value = generalized_jsd(logits_of(1.0, 0.0), logits_of(0.0, 1.0), beta=0.1).item()
    assert value == pytest.approx(0.1 * math.log(10) + 0.9 * math.log(10 / 9), abs=1e-14)


def test_cross_entropy_literal_label_is_minus_log_probability():
    values = cross_entropy(logits_of(0.25, 0.75).expand(2, 2), torch.tensor([0, 1]))
    torch.testing.assert_close(values, torch.tensor([math.log(4), math.log(4 / 3)], dtype=torch.float64))


def test_entropy_literal_probabilities_has_the_value_by_hand():
    assert entropy(logits_of(0.5, 0.25, 0.25)).item() == pytest.approx(1.5 * math.log(2), abs=1e-14)


@SHAPES
@EVERY_DIVERGENCE
def test_divergence_random_logits_equals_the_loop_in_value_and_gradient(divergence, shape):
    function, reference = DIVERGENCES[divergence]
    check_against_loops(function, reference, random_logits(shape, seed=0), random_logits(shape, seed=1))


@SHAPES
def test_cross_entropy_random_logits_equals_the_loop_in_value_and_gradient(shape):
    labels = torch.randint(shape[-1], shape[:-1], generator=torch.Generator().manual_seed(2))
    check_against_loops(cross_entropy, references.cross_entropy, random_logits(shape, seed=0), labels)


@SHAPES
def test_entropy_random_logits_equals_the_loop_in_value_and_gradient(shape):
    check_against_loops(entropy, references.entropy, random_logits(shape, seed=0))


@EVERY_DIVERGENCE
def test_divergence_identical_logits_is_zero_with_zero_gradient(divergence):
    function, _ = DIVERGENCES[divergence]
    logits = random_logits((3, 5), seed=0).requires_grad_()
    values = function(logits, logits)
    values.sum().backward()
    # Zero up to float64 rounding; log-softmax of equal inputs is equal
    torch.testing.assert_close(values, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(logits.grad, torch.zeros(3, 5, dtype=torch.float64), rtol=0, atol=1e-15)


@EVERY_DIVERGENCE
def test_divergence_shifted_logits_is_unchanged(divergence):
    function, _ = DIVERGENCES[divergence]
    student, teacher = random_logits((3, 5), seed=0), random_logits((3, 5), seed=1)
    shift = torch.tensor([[-3.0], [0.5], [40.0]], dtype=torch.float64)
    torch.testing.assert_close(function(student + shift, teacher - shift), function(student, teacher))


@EVERY_DIVERGENCE
def test_divergence_backward_leaves_the_teacher_without_gradient(divergence):
    function, _ = DIVERGENCES[divergence]
    student, teacher = random_logits((3, 5), seed=0).requires_grad_(), random_logits((3, 5), seed=1).requires_grad_()
    function(student, teacher).sum().backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0.1


def test_kl_swapped_arguments_changes_direction():
    student, teacher = random_logits((3, 5), seed=0), random_logits((3, 5), seed=1)
    torch.testing.assert_close(forward_kl(student, teacher), reverse_kl(teacher, student))
    assert (forward_kl(student, teacher) - reverse_kl(student, teacher)).abs().max() > 0.4


@pytest.mark.parametrize(("beta", "swapped_beta"), [(0.5, 0.5), (0.2, 0.8)])
def test_generalized_jsd_swapped_arguments_is_symmetric(beta, swapped_beta):
    student, teacher = random_logits((3, 5), seed=0), random_logits((3, 5), seed=1)
    torch.testing.assert_close(
        generalized_jsd(student, teacher, beta), generalized_jsd(teacher, student, swapped_beta)
    )


def test_total_variation_swapped_arguments_is_symmetric_and_at_most_one():
    student, teacher = random_logits((3, 5), seed=0), random_logits((3, 5), seed=1)
    torch.testing.assert_close(total_variation(student, teacher), total_variation(teacher, student))
    assert total_variation(logits_of(1.0, 0.0), logits_of(0.0, 1.0)).item() == 1.0


def test_generalized_jsd_limits_of_beta_are_the_two_kls():
    student, teacher = random_logits((3, 5), seed=0), random_logits((3, 5), seed=1)
    assert torch.equal(generalized_jsd(student, teacher, 0.0), forward_kl(student, teacher))
    assert torch.equal(generalized_jsd(student, teacher, 1.0), reverse_kl(student, teacher))
    small = 1e-6  # The error of the quotient is of this order, times the chi-square divergence
    near_zero, near_one = generalized_jsd(student, teacher, small), generalized_jsd(student, teacher, 1 - small)
    torch.testing.assert_close(near_zero / small, forward_kl(student, teacher), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(near_one / small, reverse_kl(student, teacher), rtol=1e-4, atol=1e-6)


def test_entropy_uniform_and_certain_logits_are_log_vocabulary_and_zero():
    values = entropy(torch.tensor([[7.0, 7.0, 7.0], [1e4, 0.0, -1e4]]))
    torch.testing.assert_close(values, torch.tensor([math.log(3), 0.0]))


def test_cross_entropy_of_teacher_samples_is_forward_kl_plus_teacher_entropy():
    student, teacher = random_logits((1, 5), seed=0), random_logits((1, 5), seed=1)
    labels = torch.arange(5)
    expected = (teacher.softmax(-1)[0] * cross_entropy(student.expand(5, 5), labels)).sum()
    torch.testing.assert_close(forward_kl(student, teacher)[0] + entropy(teacher)[0], expected)


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        ("forward_kl", 1e4),
        ("reverse_kl", 1e4),
        ("generalized_jsd_0.5", math.log(2)),
        ("generalized_jsd_0.1", 0.1 * math.log(10) + 0.9 * math.log(10 / 9)),
        ("total_variation", 1.0),
    ],
)
def test_divergence_logits_of_ten_thousand_is_finite_in_value_and_gradient(divergence, expected):
    function, _ = DIVERGENCES[divergence]
    student, teacher = torch.tensor([[1e4, 0.0]], requires_grad=True), torch.tensor([[0.0, 1e4]])
    value = function(student, teacher)
    value.sum().backward()
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        # Student [.25, .25, .5], teacher [.5, .5, 0]
        ("forward_kl", math.log(2)),
        ("reverse_kl", math.inf),
        # The mixture is [3/8, 3/8, 1/4]
        ("generalized_jsd_0.5", 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2)),
        ("total_variation", 0.5),
    ],
)
def test_divergence_token_excluded_by_the_teacher_has_the_value_by_hand(divergence, expected):
    function, _ = DIVERGENCES[divergence]
    student = torch.tensor([[0.0, 0.0, math.log(2)]], requires_grad=True)
    value = function(student, torch.tensor([[0.0, 0.0, -math.inf]]))
    assert value.item() == pytest.approx(expected, rel=1e-6)
    if expected < math.inf:
        value.sum().backward()
        assert torch.isfinite(student.grad).all() and student.grad.abs().sum() > 0.1


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "reverse_kl"])
def test_divergence_one_hot_teacher_is_finite_and_agrees_with_the_label(divergence):
    function, _ = DIVERGENCES[divergence]
    student = torch.tensor([[0.5, -1.0, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.full((1, 4), -math.inf, dtype=torch.float64)
    teacher[0, 2] = 0.0
    value = function(student, teacher)
    value.sum().backward()
    q = student.detach().softmax(-1)[0, 2].item()
    if divergence == "forward_kl":
        assert value.item() == pytest.approx(-math.log(q), abs=1e-12)
    if divergence == "total_variation":
        assert value.item() == pytest.approx(1 - q, abs=1e-12)
    # A step against the gradient raises the teacher's only token, and lowers the others
    assert torch.isfinite(student.grad).all()
    assert student.grad[0, 2] < -0.01 and (student.grad[0, [0, 1, 3]] > 0).all()


@EVERY_DIVERGENCE
def test_divergence_token_excluded_by_both_adds_nothing(divergence):
    function, reference = DIVERGENCES[divergence]
    student = torch.tensor([[0.3, -1.0, 0.4, -math.inf]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-0.5, 0.7, 1.0, -math.inf]], dtype=torch.float64)
    value = function(student, teacher)
    value.sum().backward()
    expected, gradient = reference(student[0, :3].tolist(), teacher[0, :3].tolist())
    assert value.item() == pytest.approx(expected, abs=1e-12)
    assert student.grad[0].tolist() == pytest.approx([*gradient, 0.0], abs=1e-12)


def test_reverse_kl_student_underflow_on_an_excluded_token_adds_nothing():
    # exp(-1e4) is 0 in any float: `0 * inf` must not make it NaN
    student = torch.tensor([[0.0, 0.0, -1e4]], requires_grad=True)
    value = reverse_kl(student, torch.tensor([[0.0, math.log(3), -math.inf]]))
    value.sum().backward()
    assert value.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)
    assert torch.isfinite(student.grad).all()


def test_forward_kl_teacher_underflow_on_an_excluded_token_adds_nothing():
    student = torch.tensor([[0.0, math.log(3), -math.inf]], requires_grad=True)
    value = forward_kl(student, torch.tensor([[0.0, 0.0, -1e4]]))
    value.sum().backward()
    assert value.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)
    assert torch.isfinite(student.grad).all()


def test_entropy_excluded_token_adds_nothing():
    logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    value = entropy(logits)
    value.sum().backward()
    assert value.item() == pytest.approx(math.log(2), rel=1e-6) and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EVERY_DIVERGENCE
def test_divergence_half_precision_logits_is_computed_in_float32(divergence, dtype):
    function, _ = DIVERGENCES[divergence]
    student, teacher = (random_logits((3, 5), seed, torch.float32).to(dtype) for seed in (0, 1))
    values = function(student.requires_grad_(), teacher)
    assert values.dtype == torch.float32
    # The same numbers in float32 give the same result: nothing is rounded on the way
    assert torch.equal(values, function(student.detach().float(), teacher.float()))
    values.sum().backward()
    assert student.grad.dtype == dtype


@pytest.mark.parametrize("function", [entropy, lambda logits: cross_entropy(logits, torch.tensor([0, 1, 2]))])
def test_single_model_loss_bfloat16_logits_is_computed_in_float32(function):
    logits = random_logits((3, 5), 0, torch.float32).bfloat16()
    assert function(logits).dtype == torch.float32
    assert torch.equal(function(logits), function(logits.float()))


@EVERY_DIVERGENCE
def test_divergence_under_autocast_is_the_same_as_without(divergence):
    function, _ = DIVERGENCES[divergence]
    student, teacher = (random_logits((3, 5), seed, torch.float32) for seed in (0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = function(student, teacher)
    assert torch.equal(values, function(student, teacher))


@EVERY_DIVERGENCE
def test_divergence_no_tokens_is_empty(divergence):
    function, _ = DIVERGENCES[divergence]
    assert function(torch.zeros(0, 5), torch.zeros(0, 5)).shape == (0,)


@EVERY_DIVERGENCE
def test_divergence_vocabularies_that_differ_raises(divergence):
    function, _ = DIVERGENCES[divergence]
    expected = (
        r"`student_logits` has shape \(2, 5\) but `teacher_logits` has shape \(2, 6\)\. A divergence compares both "
        r"models token by token over one vocabulary\. Cut padded heads to the shared vocabulary"
    )
    with pytest.raises(ValueError, match=expected):
        function(torch.zeros(2, 5), torch.zeros(2, 6))


def test_divergence_one_row_against_many_raises_instead_of_broadcasting():
    with pytest.raises(ValueError, match=r"\(1, 5\) but `teacher_logits` has shape \(2, 5\)"):
        total_variation(torch.zeros(1, 5), torch.zeros(2, 5))


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_generalized_jsd_beta_outside_the_unit_interval_raises(beta):
    with pytest.raises(ValueError, match=rf"`beta` is {beta}, but it is the teacher's share in a mixture\. Set it in"):
        generalized_jsd(torch.zeros(1, 5), torch.zeros(1, 5), beta)


def test_cross_entropy_labels_of_another_shape_raises():
    expected = r"`student_logits` has shape \(2, 5\) but `labels` has shape \(3,\)\. Each label needs one row"
    with pytest.raises(ValueError, match=expected):
        cross_entropy(torch.zeros(2, 5), torch.zeros(3, dtype=torch.long))
