import math

import pytest
import torch
import torch.nn as nn

from tests.references import dual_space as loops
from trl_kd.modules.cross_model_attention import CrossModelAttention, scale_of_sums, token_scale


WIDTH, TEACHER_WIDTH = 3, 5
NAMES = ["queries", "keys", "teacher_values", "student_values"]
# Numbers of tokens of student and teacher in each segment
LAYOUTS = {
    "one": ([4], [6]),
    "one token each": ([1], [1]),
    "several": ([3, 1, 5], [2, 7, 1]),
    "without student": ([2, 0, 3], [4, 3, 1]),
    "without teacher": ([2, 4, 3], [4, 0, 1]),
    "last without teacher": ([2, 3], [4, 0]),
    "last without student": ([2, 0], [4, 3]),
    "none in common": ([2, 0], [0, 3]),
}
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_attention(dtype=torch.float64, bias=True):
    attention = CrossModelAttention(WIDTH, TEACHER_WIDTH, bias=bias).to(dtype)
    with torch.no_grad():
        for seed, parameter in enumerate(attention.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=70 + seed))
    return attention


def make_inputs(layout, dtype=torch.float64, seed=0):
    """Leaves with gradient, and the segments of their rows."""
    counts, teacher_counts = LAYOUTS[layout] if isinstance(layout, str) else layout
    num_student, num_teacher = sum(counts), sum(teacher_counts)
    sizes = {
        "queries": (num_student, 2 * WIDTH),
        "keys": (num_teacher, 2 * TEACHER_WIDTH),
        "teacher_values": (num_teacher, WIDTH + 1),
        "student_values": (num_student, TEACHER_WIDTH + 1),
    }
    leaves = {
        name: normal(*size, seed=seed + place, dtype=dtype).requires_grad_()
        for place, (name, size) in enumerate(sizes.items())
    }
    segments = [
        torch.repeat_interleave(torch.arange(len(numbers)), torch.tensor(numbers))
        for numbers in (counts, teacher_counts)
    ]
    return leaves, segments


def loop(attention, leaves, segments):
    """Each segment alone."""
    query = attention.query.weight, attention.query.bias
    at_student = torch.zeros_like(leaves["queries"][:, :1]).expand(-1, WIDTH + 1).clone()
    at_teacher = torch.zeros_like(leaves["keys"][:, :1]).expand(-1, TEACHER_WIDTH + 1).clone()
    for segment in {*segments[0].tolist(), *segments[1].tolist()}:
        own, partners = segments[0] == segment, segments[1] == segment
        at_student[own], at_teacher[partners] = loops.cross_model_attention(
            query,
            leaves["queries"][own],
            leaves["keys"][partners],
            leaves["teacher_values"][partners],
            leaves["student_values"][own],
        )
    return at_student, at_teacher


def backward(found, attention, leaves):
    """Gradients of everything, with another factor on each entry; zero where there is none."""
    loss = sum((value * normal(*value.shape, seed=90 + place).to(value)).sum() for place, value in enumerate(found))
    tensors = dict(attention.named_parameters()) | leaves
    gradients = [None] * len(tensors)
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if gradient is None else gradient
        for (name, tensor), gradient in zip(tensors.items(), gradients, strict=True)
    }


def check(layout, dtype=torch.float64, bias=True, tolerance=1e-12):
    attention, exact = make_attention(dtype, bias), make_attention(torch.float64, bias)
    leaves, segments = make_inputs(layout, dtype)
    doubles = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    with torch.no_grad():
        for parameter, rounded in zip(exact.parameters(), attention.parameters(), strict=True):
            parameter.copy_(rounded)
    found, expected = attention(*leaves.values(), *segments), loop(exact, doubles, segments)
    gradients, expected_gradients = backward(found, attention, leaves), backward(expected, exact, doubles)
    for value, other in zip(found, expected, strict=True):
        assert value.shape == other.shape
        torch.testing.assert_close(value.double(), other, rtol=0, atol=tolerance)
    for name, gradient in gradients.items():
        largest = expected_gradients[name].abs().max().item() if gradient.numel() else 0.0
        torch.testing.assert_close(
            gradient.double(), expected_gradients[name], rtol=0, atol=tolerance * max(1.0, largest), msg=name
        )
    return expected, expected_gradients


# By hand


def test_cross_model_attention_literal_inputs_have_the_values_by_hand():
    attention = CrossModelAttention(1, 2, bias=False).double()
    with torch.no_grad():
        attention.query.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]))
    # Scores, over the root of 4: [[0, ln 3], [0, 0]]
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()
    keys = torch.tensor([[0.0, 0.0, 5.0, 7.0], [2 * math.log(3), 0.0, -5.0, 7.0]], dtype=torch.float64)
    teacher_values, student_values = torch.tensor([[4.0], [8.0]]).double(), torch.tensor([[12.0], [0.0]]).double()
    segments = torch.zeros(2, dtype=torch.long)
    at_student, at_teacher = attention(queries, keys, teacher_values, student_values, segments, segments)
    # Shares (1/4, 3/4) and (1/2, 1/2) over the teacher's tokens; (1/2, 1/2) and (3/4, 1/4) over the student's
    torch.testing.assert_close(at_student, torch.tensor([[7.0], [6.0]]).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(at_teacher, torch.tensor([[6.0], [9.0]]).double(), rtol=0, atol=1e-14)


def test_cross_model_attention_equal_scores_read_the_mean_of_their_segment():
    attention = CrossModelAttention(WIDTH, TEACHER_WIDTH).double()
    nn.init.zeros_(attention.query.weight), nn.init.zeros_(attention.query.bias)
    leaves, segments = make_inputs("several")
    at_student, at_teacher = attention(*leaves.values(), *segments)
    for segment in range(3):
        own, partners = segments[0] == segment, segments[1] == segment
        mean = leaves["teacher_values"][partners].mean(0).expand_as(at_student[own])
        torch.testing.assert_close(at_student[own], mean, rtol=0, atol=1e-14)
        mean = leaves["student_values"][own].mean(0).expand_as(at_teacher[partners])
        torch.testing.assert_close(at_teacher[partners], mean, rtol=0, atol=1e-14)


# Against the loop


@EVERY_LAYOUT
@pytest.mark.parametrize("bias", [True, False])
def test_cross_model_attention_equals_the_loop(layout, bias):
    expected, gradients = check(layout, bias=bias)
    if layout == "several":
        assert all(value.abs().max() > 0.1 for value in expected)
        assert all(gradient.abs().max() > 1e-2 for gradient in gradients.values())


@pytest.mark.parametrize("layout", ["one", "several", "without student", "without teacher"])
def test_cross_model_attention_in_float32_equals_the_loop(layout):
    check(layout, torch.float32, tolerance=1e-5)


def test_cross_model_attention_long_segments_equal_the_loop():
    check(([40, 7, 1], [3, 33, 29]))


# Segments


@EVERY_LAYOUT
def test_cross_model_attention_packed_segments_equal_separate_calls(layout):
    attention = make_attention()
    leaves, segments = make_inputs(layout)
    at_student, at_teacher = attention(*leaves.values(), *segments)
    for segment in range(len(LAYOUTS[layout][0])):
        own, partners = segments[0] == segment, segments[1] == segment
        arguments = [leaves["queries"][own], leaves["keys"][partners], leaves["teacher_values"][partners]]
        arguments += [leaves["student_values"][own], segments[0][own] * 0, segments[1][partners] * 0]
        alone = attention(*arguments)
        torch.testing.assert_close(at_student[own], alone[0], rtol=0, atol=1e-13)
        torch.testing.assert_close(at_teacher[partners], alone[1], rtol=0, atol=1e-13)


def test_cross_model_attention_numbers_of_segments_may_start_anywhere_and_have_gaps():
    attention = make_attention()
    leaves, segments = make_inputs("several")
    expected = attention(*leaves.values(), *segments)
    names = torch.tensor([2, 3, 9])
    found = attention(*leaves.values(), *(names[part] for part in segments))
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-13)


def test_cross_model_attention_other_segments_have_no_influence():
    attention = make_attention()
    leaves, segments = make_inputs("several")
    expected = [value.detach() for value in attention(*leaves.values(), *segments)]
    with torch.no_grad():
        for name, leaf in leaves.items():
            own = segments[0] if name in ("queries", "student_values") else segments[1]
            leaf[own == 1] = 1e3 * normal(*leaf[own == 1].shape, seed=5)
    found = attention(*leaves.values(), *segments)
    for value, other, own in zip(found, expected, segments, strict=True):
        torch.testing.assert_close(value[own != 1], other[own != 1], rtol=0, atol=1e-13)
        assert (value[own == 1] - other[own == 1]).abs().max() > 1.0
    # Nor gradient
    gradient = torch.autograd.grad(found[0][segments[0] == 2].sum(), leaves["teacher_values"])[0]
    assert not gradient[segments[1] != 2].any() and gradient[segments[1] == 2].any()


@pytest.mark.parametrize(
    "layout", ["without student", "without teacher", "last without student", "last without teacher", "none in common"]
)
def test_cross_model_attention_tokens_without_partner_read_zeros_and_gradients_are_finite(layout):
    attention = make_attention()
    leaves, segments = make_inputs(layout)
    found = attention(*leaves.values(), *segments)
    has_partner = [torch.isin(segments[0], segments[1]), torch.isin(segments[1], segments[0])]
    for value, known in zip(found, has_partner, strict=True):
        assert not value[~known].any() and (value[known] != 0).all()
    assert not all(known.all() for known in has_partner)
    sum(value.sum() for value in found).backward()
    for tensor in (*leaves.values(), *attention.parameters()):
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all()
    for name in NAMES:
        known = has_partner[0] if name in ("queries", "student_values") else has_partner[1]
        assert not leaves[name].grad[~known].any()
        if known.any() and "values" in name:
            assert leaves[name].grad[known].any()


@pytest.mark.parametrize("layout", [([0], [3]), ([3], [0]), ([0], [0])], ids=str)
def test_cross_model_attention_no_tokens_on_a_side_give_zeros_and_zero_gradients(layout):
    attention = make_attention(torch.float32)
    leaves, segments = make_inputs(layout, torch.float32)
    found = attention(*leaves.values(), *segments)
    assert found[0].shape == (layout[0][0], WIDTH + 1) and found[1].shape == (layout[1][0], TEACHER_WIDTH + 1)
    assert all(value.dtype == torch.float32 and not value.any() for value in found)
    sum(value.sum() for value in found).backward()
    # DDP waits for each parameter
    for tensor in (*leaves.values(), *attention.parameters()):
        assert tensor.grad is not None and not tensor.grad.any()


def test_cross_model_attention_order_of_tokens_is_of_no_matter():
    attention = make_attention()
    leaves, segments = make_inputs("one")
    expected = attention(*leaves.values(), *segments)
    turned = {name: leaf.flip(0) for name, leaf in leaves.items()}
    found = attention(*turned.values(), *segments)
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value.flip(0), other, rtol=0, atol=1e-13)


# Gradient of one direction


@pytest.mark.parametrize("direction", [0, 1])
def test_cross_model_attention_each_direction_trains_the_query_and_its_own_values(direction):
    attention = make_attention()
    leaves, segments = make_inputs("several")
    attention(*leaves.values(), *segments)[direction].square().sum().backward()
    assert attention.query.weight.grad.abs().max() > 1e-3
    # It adds one number to all scores of a teacher's token, which the softmax over the student's does not see
    assert (attention.query.bias.grad.abs().max() > 1e-3) == (direction == 0)
    own, other = ("teacher_values", "student_values") if direction == 0 else ("student_values", "teacher_values")
    assert leaves[own].grad.abs().max() > 1e-3
    assert leaves[other].grad is None or not leaves[other].grad.any()


def test_cross_model_attention_gradients_equal_finite_differences():
    attention = make_attention()
    leaves, segments = make_inputs("without teacher")

    def values(weight, bias, *inputs):
        parameters = {"query.weight": weight, "query.bias": bias}
        return torch.func.functional_call(attention, parameters, (*inputs, *segments))

    assert torch.autograd.gradcheck(values, (*attention.parameters(), *leaves.values()))


# Precision


@pytest.mark.parametrize("is_autocast", [False, True])
def test_cross_model_attention_scores_of_bfloat16_inputs_are_float32(is_autocast):
    attention = make_attention(torch.float32)
    leaves, segments = make_inputs("several", torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        found = attention(*leaves.values(), *segments)
    expected = attention(*(leaf.float() for leaf in leaves.values()), *segments)
    for value, other in zip(found, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, other, rtol=0, atol=1e-6)
    sum(value.square().sum() for value in found).backward()
    assert all(leaf.grad.dtype == torch.bfloat16 and leaf.grad.abs().max() > 1e-3 for leaf in leaves.values())
    assert all(parameter.grad.dtype == torch.float32 for parameter in attention.parameters())


def test_cross_model_attention_bfloat16_module_rounds_queries_alone():
    # Scores of size 300, of which bfloat16 keeps one bit below the point
    attention = make_attention(torch.bfloat16)
    leaves, segments = make_inputs("one", torch.bfloat16)
    with torch.no_grad():
        leaves["keys"].mul_(100.0)
    found = attention(*leaves.values(), *segments)
    queries = attention.query(leaves["queries"]).float()
    scores = queries @ leaves["keys"].float().T / math.sqrt(2 * TEACHER_WIDTH)
    assert scores.abs().max() > 200 and (scores - scores.bfloat16()).abs().max() > 0.1
    torch.testing.assert_close(found[0], scores.softmax(1) @ leaves["teacher_values"].float(), rtol=0, atol=1e-4)
    torch.testing.assert_close(found[1], scores.softmax(0).T @ leaves["student_values"].float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("factor", [1e4, -1e4])
def test_cross_model_attention_extreme_scores_choose_one_token_with_finite_gradients(factor):
    attention = make_attention(torch.float32)
    leaves, segments = make_inputs("several", torch.float32)
    with torch.no_grad():
        leaves["keys"].mul_(factor)
    at_student, at_teacher = attention(*leaves.values(), *segments)
    queries = attention.query(leaves["queries"])
    scores = (queries @ leaves["keys"].T).masked_fill(segments[0][:, None] != segments[1], -math.inf)
    assert scores[torch.isfinite(scores)].abs().max() > 1e4
    torch.testing.assert_close(at_student, leaves["teacher_values"][scores.argmax(1)])
    torch.testing.assert_close(at_teacher, leaves["student_values"][scores.argmax(0)])
    (at_student.sum() + at_teacher.sum()).backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in (*leaves.values(), *attention.parameters()))


def test_cross_model_attention_very_negative_scores_do_not_reach_tokens_of_other_segments():
    # The authors' additive mask of -1e5 would prefer those
    attention = CrossModelAttention(WIDTH, TEACHER_WIDTH)
    nn.init.zeros_(attention.query.weight), nn.init.constant_(attention.query.bias, -1e6)
    leaves, segments = make_inputs("several", torch.float32)
    with torch.no_grad():
        leaves["keys"].fill_(1.0)
    at_student, _ = attention(*leaves.values(), *segments)
    for segment in range(3):
        mean = leaves["teacher_values"][segments[1] == segment].mean(0)
        torch.testing.assert_close(at_student[segments[0] == segment], mean.expand(LAYOUTS["several"][0][segment], -1))


def test_cross_model_attention_query_is_one_linear_map_of_both_widths():
    attention = CrossModelAttention(3, 5)
    shapes = {name: tuple(parameter.shape) for name, parameter in attention.named_parameters()}
    assert shapes == {"query.weight": (10, 6), "query.bias": (10,)}
    assert {name for name, _ in CrossModelAttention(3, 5, bias=False).named_parameters()} == {"query.weight"}


# The size of a set of vectors


def test_token_scale_literal_inputs_have_the_values_by_hand():
    # Mean 3; squares 4 + 1 + 0 + 9 = 14, over three
    assert token_scale(torch.tensor([[1.0, 2.0], [3.0, 6.0]])).item() == pytest.approx(math.sqrt(14 / 3), rel=1e-6)


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 6), (7,)])
def test_token_scale_is_the_deviation_of_all_elements_as_one_sample(shape):
    values = 3.0 * normal(*shape, seed=0) + 2.0
    scale = token_scale(values)
    assert scale.shape == () and scale.dtype == torch.float64
    assert scale.item() == pytest.approx(loops.standard_deviation(values), rel=1e-14)
    assert token_scale(7.0 * values + 5.0).item() == pytest.approx(7.0 * scale.item(), rel=1e-13)
    # The mean stays when vectors are divided by it
    assert (values / scale).std().item() == pytest.approx(1.0, rel=1e-13)


def test_token_scale_half_precision_is_computed_in_float32():
    values = (normal(100, 6, seed=0) + 100.0).bfloat16()
    scale = token_scale(values)
    assert scale.dtype == torch.float32 and torch.equal(scale, token_scale(values.float()))
    assert torch.isfinite(token_scale(torch.tensor([[6e4, -6e4]], dtype=torch.float16)))


def test_token_scale_equal_numbers_have_the_smallest_scale_and_stay_finite():
    scale = token_scale(torch.full((3, 2), 4.0))
    assert scale.item() == pytest.approx(1e-6, rel=1e-6)
    nearly = torch.tensor([1.0, 1.0 + 1e-5], dtype=torch.float64)
    assert token_scale(nearly).item() == pytest.approx(1e-5 / math.sqrt(2), rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (0, 4)])
def test_token_scale_of_too_few_numbers_divides_without_harm(shape):
    values = torch.full(shape, 4.0)
    scale = token_scale(values)
    assert scale.item() >= 1e-6 and torch.isfinite(values / scale).all()


# Of sums that are added up over micro-batches and ranks


def sums_of(values):
    return torch.tensor([values.numel(), values.sum(), values.square().sum()], dtype=torch.float64)


@pytest.mark.parametrize("cuts", [[10], [3, 7], [1, 0, 4, 5]])
def test_scale_of_sums_of_parts_is_the_scale_of_all(cuts):
    values = 3.0 * normal(10, 6, seed=0) + 2.0
    scale = scale_of_sums(sum(sums_of(part) for part in values.split(cuts)))
    assert scale.shape == () and scale.dtype == torch.float32
    assert scale.item() == pytest.approx(token_scale(values).item(), rel=1e-6)


@pytest.mark.parametrize(("number", "value"), [(6, 4.1), (5, 0.0), (17, 1.89), (19, 7.02), (21, 6.89)])
def test_scale_of_sums_equal_numbers_have_the_smallest_scale(number, value):
    # The variance of some is negative, by rounding
    values = torch.full((number,), value, dtype=torch.float64)
    assert scale_of_sums(sums_of(values)).item() == pytest.approx(1e-6, rel=1e-4)


@pytest.mark.parametrize("values", [torch.full((1,), 4.0), torch.zeros(0)])
def test_scale_of_sums_of_too_few_numbers_is_that_of_token_scale(values):
    scale = scale_of_sums(sums_of(values.double()))
    assert scale.item() >= 1e-6 and scale.item() == token_scale(values).item()
