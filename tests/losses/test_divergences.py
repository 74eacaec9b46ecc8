import math

import pytest
import torch

from tests.losses.checks import SHAPES, check_against_loops, logits_of, random_logits
from tests.references import divergences as references
from trl_kd.losses import (
    adaptive_kl,
    cross_entropy,
    entropy,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    top1_agreement,
    total_variation,
)


DIVERGENCES = {
    "forward_kl": (forward_kl, references.forward_kl),
    "reverse_kl": (reverse_kl, references.reverse_kl),
    "generalized_jsd_0.5": (generalized_jsd, lambda s, t: references.generalized_jsd(s, t, 0.5)),
    "generalized_jsd_0.1": (
        lambda s, t: generalized_jsd(s, t, beta=0.1),
        lambda s, t: references.generalized_jsd(s, t, 0.1),
    ),
    "skewed_forward_kl_0.1": (skewed_forward_kl, lambda s, t: references.skewed_forward_kl(s, t, 0.1)),
    "skewed_forward_kl_0.7": (
        lambda s, t: skewed_forward_kl(s, t, skew=0.7),
        lambda s, t: references.skewed_forward_kl(s, t, 0.7),
    ),
    "skewed_reverse_kl_0.1": (skewed_reverse_kl, lambda s, t: references.skewed_reverse_kl(s, t, 0.1)),
    "skewed_reverse_kl_0.7": (
        lambda s, t: skewed_reverse_kl(s, t, skew=0.7),
        lambda s, t: references.skewed_reverse_kl(s, t, 0.7),
    ),
    "adaptive_kl_0.5": (adaptive_kl, lambda s, t: references.adaptive_kl(s, t, 0.5)),
    "adaptive_kl_0.9": (lambda s, t: adaptive_kl(s, t, head=0.9), lambda s, t: references.adaptive_kl(s, t, 0.9)),
    "total_variation": (total_variation, references.total_variation),
}
EVERY_DIVERGENCE = pytest.mark.parametrize("divergence", DIVERGENCES)
# With a softmax temperature, and what the loops take beside the logits
HEATED = {
    "forward_kl": (forward_kl, references.forward_kl, ()),
    "reverse_kl": (reverse_kl, references.reverse_kl, ()),
    "generalized_jsd": (generalized_jsd, references.generalized_jsd, (0.3,)),
    "skewed_forward_kl": (skewed_forward_kl, references.skewed_forward_kl, (0.2,)),
    "skewed_reverse_kl": (skewed_reverse_kl, references.skewed_reverse_kl, (0.2,)),
    "adaptive_kl": (adaptive_kl, references.adaptive_kl, (0.6,)),
    "total_variation": (total_variation, references.total_variation, ()),
}
EVERY_HEATED = pytest.mark.parametrize("name", HEATED)


# Of the student [1/4, 3/4] and the teacher [1/2, 1/2]
LITERALS = pytest.mark.parametrize(
    ("function", "expected"),
    [
        (forward_kl, 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)),
        (reverse_kl, 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)),
        # The mixture is [3/8, 5/8]: ln(4/3) and ln(4/5) for the teacher, ln(2/3) and ln(6/5) for the student
        (
            generalized_jsd,
            0.25 * math.log(4 / 3) + 0.25 * math.log(4 / 5) + 0.125 * math.log(2 / 3) + 0.375 * math.log(6 / 5),
        ),
        # Mixtures [11/40, 29/40], a tenth of it the teacher, and [19/40, 21/40], a tenth of it the student
        (skewed_forward_kl, 0.5 * math.log(20 / 11) + 0.5 * math.log(20 / 29)),
        (skewed_reverse_kl, 0.25 * math.log(10 / 19) + 0.75 * math.log(10 / 7)),
        # Head and tail hold one token each, with the same gap
        (adaptive_kl, 0.25 * math.log(4 / 3) + 0.125 * math.log(1 / 2) + 0.375 * math.log(3 / 2)),
        (total_variation, 0.25),
    ],
)


@LITERALS
def test_divergence_literal_probabilities_has_the_value_by_hand(function, expected):
    student, teacher = logits_of(0.25, 0.75), logits_of(0.5, 0.5)
    assert function(student, teacher).item() == pytest.approx(expected, abs=1e-14)


@LITERALS
def test_divergence_literal_temperature_flattens_the_distributions(function, expected):
    # Square roots of 1 : 9 are 1 : 3
    value = function(logits_of(0.1, 0.9), logits_of(0.5, 0.5), kd_temperature=2.0).item()
    assert value == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(("head", "share"), [(0.5, 0.25), (0.8, 0.5), (1.0, 1.0)])
def test_adaptive_kl_literal_gaps_of_head_and_tail_are_the_shares(head, share):
    # Gaps .1 .1 .2 of the tokens .6 .3 .1: the tail holds .1 + .3 <= .5, or .1 <= .2, or nothing
    student, teacher = (0.5, 0.2, 0.3), (0.6, 0.3, 0.1)
    forward = sum(p * math.log(p / q) for p, q in zip(teacher, student, strict=True))
    reverse = sum(q * math.log(q / p) for p, q in zip(teacher, student, strict=True))
    value = adaptive_kl(logits_of(*student), logits_of(*teacher), head).item()
    assert value == pytest.approx(share * forward + (1 - share) * reverse, abs=1e-14)


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
@EVERY_HEATED
@pytest.mark.parametrize("kd_temperature", [0.1, 2.5, 10.0])
def test_divergence_random_logits_at_a_temperature_equals_the_loop_in_value_and_gradient(name, shape, kd_temperature):
    function, reference, arguments = HEATED[name]
    # Cold logits that are far apart would make the loop divide by zero
    spread = min(1.0, kd_temperature)

    def heated(student, teacher):
        return function(student, teacher, *arguments, kd_temperature=kd_temperature)

    def loop(student, teacher):
        return references.at_temperature(reference, student, teacher, kd_temperature, *arguments)

    check_against_loops(heated, loop, spread * random_logits(shape, seed=0), spread * random_logits(shape, seed=1))


@EVERY_HEATED
def test_divergence_temperature_divides_the_logits(name):
    function, _, arguments = HEATED[name]
    student, teacher = random_logits((3, 5), seed=0), random_logits((3, 5), seed=1)
    # Powers of two divide without rounding
    for kd_temperature in (0.125, 1.0, 4.0):
        expected = function(student / kd_temperature, teacher / kd_temperature, *arguments)
        assert torch.equal(function(student, teacher, *arguments, kd_temperature=kd_temperature), expected)


@pytest.mark.parametrize("function", [forward_kl, reverse_kl, lambda *args, **kw: 4 * generalized_jsd(*args, **kw)])
def test_kl_hot_temperature_squared_is_the_variance_of_the_difference_of_logits(function):
    # exp(z / T) is 1 + z / T: the KL is half the chi-square distance of near-uniform distributions, the JSD an eighth
    student, teacher = random_logits((3, 5), seed=0), random_logits((3, 5), seed=1)
    values = function(student, teacher, kd_temperature=1e4) * 1e8
    torch.testing.assert_close(values, (teacher - student).var(-1, correction=0) / 2, rtol=1e-3, atol=0)


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


@pytest.mark.parametrize(
    ("skewed", "plain"), [(skewed_forward_kl, forward_kl), (skewed_reverse_kl, reverse_kl)], ids=["forward", "reverse"]
)
def test_skewed_kl_limits_of_skew_are_the_kl_and_zero(skewed, plain):
    student, teacher = random_logits((3, 5), seed=0), random_logits((3, 5), seed=1)
    assert torch.equal(skewed(student, teacher, skew=0.0), plain(student, teacher))
    # The derivative at 0 is of the order of the chi-square distance
    torch.testing.assert_close(skewed(student, teacher, skew=1e-9), plain(student, teacher), rtol=1e-5, atol=0)
    assert skewed(student, teacher, skew=1 - 1e-6).max() < 1e-9


@pytest.mark.parametrize("skew", [0.1, 0.5, 0.9])
def test_skewed_kl_swapped_models_swap_the_directions(skew):
    student, teacher = random_logits((3, 5), seed=0), random_logits((3, 5), seed=1)
    torch.testing.assert_close(
        skewed_forward_kl(student, teacher, skew), skewed_reverse_kl(teacher, student, skew), rtol=0, atol=1e-15
    )


@pytest.mark.parametrize("skewed", [skewed_forward_kl, skewed_reverse_kl])
@pytest.mark.parametrize("skew", [0.1, 0.5])
def test_skewed_kl_is_at_most_minus_the_logarithm_of_the_skew(skewed, skew):
    # Reached by distributions that share no token
    apart = skewed(logits_of(1.0, 0.0), logits_of(0.0, 1.0), skew).item()
    assert apart == pytest.approx(-math.log(skew), abs=1e-14)
    assert (
        skewed(10 * random_logits((50, 5), seed=0), 10 * random_logits((50, 5), seed=1), skew).max() <= apart + 1e-14
    )


def test_skewed_kl_at_one_half_are_both_parts_of_the_jensen_shannon_divergence():
    student, teacher = random_logits((3, 5), seed=0), random_logits((3, 5), seed=1)
    parts = skewed_forward_kl(student, teacher, 0.5) + skewed_reverse_kl(student, teacher, 0.5)
    torch.testing.assert_close(parts / 2, generalized_jsd(student, teacher), rtol=0, atol=1e-15)


def test_adaptive_kl_whole_head_is_the_forward_kl():
    student, teacher = random_logits((3, 5), seed=0), random_logits((3, 5), seed=1)
    torch.testing.assert_close(adaptive_kl(student, teacher, head=1.0), forward_kl(student, teacher))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adaptive_kl_without_head_is_the_reverse_kl(dtype):
    # Whatever the rounding of the sum of all probabilities
    student, teacher = random_logits((200, 50), seed=0, dtype=dtype), random_logits((200, 50), seed=1, dtype=dtype)
    torch.testing.assert_close(adaptive_kl(student, teacher, head=0.0), reverse_kl(student, teacher))


def test_adaptive_kl_lies_between_both_directions():
    student, teacher = random_logits((200, 5), seed=0), random_logits((200, 5), seed=1)
    both = torch.stack([forward_kl(student, teacher), reverse_kl(student, teacher)])
    values = adaptive_kl(student, teacher)
    assert ((both.amin(0) - 1e-12 <= values) & (values <= both.amax(0) + 1e-12)).all()


def test_adaptive_kl_shares_carry_no_gradient():
    student, teacher = random_logits((3, 5), seed=0).requires_grad_(), random_logits((3, 5), seed=1)
    forward, reverse = forward_kl(student, teacher), reverse_kl(student, teacher)
    share = ((adaptive_kl(student, teacher) - reverse) / (forward - reverse)).detach()
    (expected,) = torch.autograd.grad((share * forward + (1 - share) * reverse).sum(), student)
    (actual,) = torch.autograd.grad(adaptive_kl(student, teacher).sum(), student)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("head", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("logits", [[0.0, 0.0, 0.0], [1e4, 0.0, -1e4], [0.3, -1.0, -math.inf]])
def test_adaptive_kl_equal_distributions_is_zero_with_zero_gradient(logits, head):
    student = torch.tensor([logits], requires_grad=True)
    value = adaptive_kl(student, student.detach() + 2.0, head)
    value.sum().backward()
    # The shift rounds: 1e4 + 2 keeps 10 bits after the point
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(student.grad, torch.zeros(1, 3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("head", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("excluded", ["teacher", "student"])
def test_adaptive_kl_token_that_one_model_excludes_is_infinite(excluded, head):
    # Its probability under the other, 1e-11, is lost in any sum
    logits = torch.tensor([[0.0, 0.0, -25.0]]), torch.tensor([[1.0, 0.0, -math.inf]])
    student, teacher = logits if excluded == "teacher" else logits[::-1]
    assert adaptive_kl(student, teacher, head).item() == math.inf


def test_top1_agreement_literal_logits_compares_the_first_tokens():
    student = torch.tensor([[0.6, 0.4, 0.0], [0.3, 0.7, 0.0], [-1.0, -2.0, 1e4]])
    teacher = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [-math.inf, -math.inf, 0.0]])
    values = top1_agreement(student, teacher)
    assert values.tolist() == [1.0, 0.0, 1.0] and values.dtype == torch.float32


def test_top1_agreement_teacher_in_doubt_agrees_with_either():
    student, teacher = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.0, 0.5, 1.0]]), torch.tensor([2.0, 2.0, 0.0])
    assert top1_agreement(student, teacher.expand(3, 3)).tolist() == [1.0, 1.0, 0.0]


@SHAPES
def test_top1_agreement_random_logits_equals_the_loop(shape):
    student, teacher = random_logits(shape, seed=0), random_logits(shape, seed=1)
    values = top1_agreement(student.requires_grad_(), teacher)
    assert values.dtype == torch.float64 and not values.requires_grad and values.shape == shape[:-1]
    for index in torch.cartesian_prod(*(torch.arange(n) for n in shape[:-1])).tolist():
        s, t = (logits[tuple(index)].tolist() for logits in (student, teacher))
        assert values[tuple(index)].item() == (s.index(max(s)) == t.index(max(t)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_top1_agreement_half_precision_logits_returns_float32(dtype):
    logits = random_logits((3, 5), 0, torch.float32).to(dtype)
    assert top1_agreement(logits, logits).dtype == torch.float32
    assert top1_agreement(torch.zeros(0, 5), torch.zeros(0, 5)).shape == (0,)


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
        ("skewed_forward_kl_0.1", math.log(10)),
        ("skewed_reverse_kl_0.1", math.log(10)),
        ("skewed_forward_kl_0.7", math.log(10 / 7)),
        ("skewed_reverse_kl_0.7", math.log(10 / 7)),
        ("adaptive_kl_0.5", 1e4),
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


@EVERY_HEATED
@pytest.mark.parametrize("kd_temperature", [0.1, 10.0])
def test_divergence_logits_of_ten_thousand_at_a_temperature_is_finite(name, kd_temperature):
    function, _, arguments = HEATED[name]
    student = torch.tensor([[1e4, 0.0], [1e4, 1e4 - 5]], requires_grad=True)
    values = function(student, torch.tensor([[0.0, 1e4], [-1e4, -1e4]]), *arguments, kd_temperature=kd_temperature)
    values.sum().backward()
    assert torch.isfinite(values).all() and torch.isfinite(student.grad).all()
    # The second row is far from zero, its logits 5 apart (which stays exact): that gap, heated
    small = function(torch.tensor([[5.0, 0.0]]), torch.zeros(1, 2), *arguments, kd_temperature=kd_temperature)
    assert values[1].item() == pytest.approx(small.item(), rel=1e-5)
    unbounded = name in ("forward_kl", "reverse_kl", "adaptive_kl")
    assert values[0].item() > 1 / 2
    assert not unbounded or values[0].item() == pytest.approx(1e4 / kd_temperature, rel=1e-6)


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        # Student [.25, .25, .5], teacher [.5, .5, 0]
        ("forward_kl", math.log(2)),
        ("reverse_kl", math.inf),
        # The mixture is [3/8, 3/8, 1/4]
        ("generalized_jsd_0.5", 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2)),
        # Mixtures [.275, .275, .45] and [.475, .475, .05]
        ("skewed_forward_kl_0.1", math.log(20 / 11)),
        ("skewed_reverse_kl_0.1", 0.5 * math.log(10 / 19) + 0.5 * math.log(10)),
        ("adaptive_kl_0.5", math.inf),
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


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "reverse_kl" and "adaptive" not in d])
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
    if divergence == "skewed_forward_kl_0.1":
        assert value.item() == pytest.approx(-math.log(0.1 + 0.9 * q), abs=1e-12)
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


@pytest.mark.parametrize("skewed", [skewed_forward_kl, skewed_reverse_kl])
@pytest.mark.parametrize("skew", [-0.1, 1.0, math.nan])
def test_skewed_kl_skew_outside_of_its_range_raises(skewed, skew):
    expected = (
        rf"`skew` is {skew}, but it is the share of a distribution in the mixture that it is compared with; at 1, "
        r"that is with itself\. Set it in \[0, 1\)\."
    )
    with pytest.raises(ValueError, match=expected):
        skewed(torch.zeros(1, 5), torch.zeros(1, 5), skew)


@pytest.mark.parametrize("head", [-0.1, 1.1, math.nan])
def test_adaptive_kl_head_outside_the_unit_interval_raises(head):
    expected = rf"`head` is {head}, but it is a mass of the teacher's distribution\. Set it in \[0, 1\]\."
    with pytest.raises(ValueError, match=expected):
        adaptive_kl(torch.zeros(1, 5), torch.zeros(1, 5), head)


@EVERY_HEATED
@pytest.mark.parametrize("kd_temperature", [0.0, -1.0, math.inf, math.nan])
def test_divergence_temperature_that_no_softmax_has_raises(name, kd_temperature):
    function, _, arguments = HEATED[name]
    expected = (
        rf"`kd_temperature` is {kd_temperature}, but logits are divided by it\. Set it above 0; 1 changes nothing\."
    )
    with pytest.raises(ValueError, match=expected):
        function(torch.zeros(1, 5), torch.zeros(1, 5), *arguments, kd_temperature=kd_temperature)


def test_top1_agreement_vocabularies_that_differ_raises():
    expected = r"`student_logits` has shape \(2, 5\) but `teacher_logits` has shape \(2, 6\)\. .* shared vocabulary"
    with pytest.raises(ValueError, match=expected):
        top1_agreement(torch.zeros(2, 5), torch.zeros(2, 6))


def test_cross_entropy_labels_of_another_shape_raises():
    expected = r"`student_logits` has shape \(2, 5\) but `labels` has shape \(3,\)\. Each label needs one row"
    with pytest.raises(ValueError, match=expected):
        cross_entropy(torch.zeros(2, 5), torch.zeros(3, dtype=torch.long))
