import math
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.references import dual_space as loops
from trl_kd.losses import adaptive_kl, forward_kl, reverse_kl
from trl_kd.losses.dual_space import student_space, teacher_space
from trl_kd.modules import LMHead
from trl_kd.modules.projector import RecomputedProjector, logit_invariant_map, make_projector


# (V, width of the student, width of the teacher)
SHAPES = pytest.mark.parametrize("shape", [(12, 4, 6), (23, 5, 3)])
# Float64, by way of a Gram matrix whose condition is a few hundred
TOLERANCE = 1e-11


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def head_of(vocab_size, width, seed, dtype=torch.float64, bias=False, **options):
    weight = normal(vocab_size, width, seed=seed).to(dtype)
    return LMHead(weight, normal(vocab_size, seed=seed + 100).to(dtype) if bias else None, **options)


def close(actual, expected, tolerance=TOLERANCE):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(
        actual.double(), expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item())
    )


def residual(source, target, weight, bias=None):
    """Squared distance of the target's logits of mapped states from the source's, for states that span the space."""
    states = torch.cat([torch.zeros(1, source.weight.shape[1]), torch.eye(source.weight.shape[1])]).double()
    found = target(F.linear(states, weight, bias)) - source(states)
    return (found[1:] - found[0]).square().sum().item(), found[0].square().sum().item()


# The map of least squares


def test_logit_invariant_map_literal_heads_have_the_map_by_hand():
    # Normal equations: (1 + 1 + 4) m = 1 * 3 + 1 * 1 + 2 * 1
    source, target = LMHead(torch.tensor([[3.0], [1.0], [1.0]])), LMHead(torch.tensor([[1.0], [1.0], [2.0]]))
    weight, bias = logit_invariant_map(source, target)
    assert weight.tolist() == [[pytest.approx(1.0, abs=1e-6)]] and bias is None
    # And the other way: (9 + 1 + 1) m = 6
    assert logit_invariant_map(target, source)[0].tolist() == [[pytest.approx(6 / 11, abs=1e-6)]]


@SHAPES
def test_logit_invariant_map_is_the_pseudo_inverse_of_one_head_times_the_other(shape):
    vocab_size, width, teacher_width = shape
    student, teacher = head_of(vocab_size, width, 0), head_of(vocab_size, teacher_width, 1)
    to_student, bias = logit_invariant_map(teacher, student)
    assert to_student.shape == (width, teacher_width) and to_student.dtype == torch.float64 and bias is None
    close(to_student, loops.initial_to_student(student.weight, teacher.weight))
    to_teacher, bias = logit_invariant_map(student, teacher)
    assert to_teacher.shape == (teacher_width, width) and bias is None
    close(to_teacher, loops.initial_to_teacher(student.weight, teacher.weight))


@pytest.mark.parametrize("num_rows", [9, 7])
def test_logit_invariant_map_on_paired_rows_of_different_vocabularies_is_that_of_the_rows(num_rows):
    student, teacher = head_of(12, 4, 0), head_of(17, 6, 1)
    generator = torch.Generator().manual_seed(2)
    student_ids = torch.randperm(12, generator=generator)[:num_rows]
    teacher_ids = torch.randperm(17, generator=generator)[:num_rows]
    found, _ = logit_invariant_map(teacher, student, source_ids=teacher_ids, target_ids=student_ids)
    close(found, loops.initial_to_student(student.weight[student_ids], teacher.weight[teacher_ids]))
    # The order of the pairs is of no matter; which are paired is
    order = torch.randperm(num_rows, generator=generator)
    close(logit_invariant_map(teacher, student, teacher_ids[order], student_ids[order])[0], found)
    other, _ = logit_invariant_map(teacher, student, teacher_ids.roll(1), student_ids)
    assert (other - found).abs().max() > 1e-2


def test_logit_invariant_map_ids_of_one_head_restrict_it_to_the_rows_of_the_other():
    student, teacher = head_of(8, 4, 0), head_of(12, 6, 1)
    ids = torch.arange(8)
    expected = loops.initial_to_student(student.weight, teacher.weight[:8])
    close(logit_invariant_map(teacher, student, source_ids=ids)[0], expected)
    close(logit_invariant_map(teacher.cut(8), student, target_ids=ids)[0], expected)
    close(logit_invariant_map(teacher.cut(8), student)[0], expected)


@pytest.mark.parametrize(("source_scale", "target_scale"), [(0.25, 1.0), (1.0, 4.0), (2.0, -0.5)])
def test_logit_invariant_map_scales_of_the_heads_are_part_of_them(source_scale, target_scale):
    source, target = head_of(12, 6, 1, scale=source_scale), head_of(12, 4, 0, scale=target_scale)
    found, _ = logit_invariant_map(source, target)
    close(found, loops.initial_to_student(target_scale * target.weight, source_scale * source.weight))


@pytest.mark.parametrize("which", ["source", "target", "both"])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.5, 3.0)])
def test_logit_invariant_map_biases_are_fitted_by_least_squares(which, scales):
    source = head_of(12, 6, 1, bias=which != "target", scale=scales[0])
    target = head_of(12, 4, 0, bias=which != "source", scale=scales[1])
    weight, bias = logit_invariant_map(source, target)
    plain = [replace(head, bias=None) for head in (source, target)]
    close(weight, logit_invariant_map(*plain)[0])
    source_bias, target_bias = (
        torch.zeros(12).double() if head.bias is None else head.scale * head.bias for head in (source, target)
    )
    assert bias.shape == (4,) and bias.dtype == torch.float64
    close(bias, torch.linalg.lstsq(target.scale * target.weight, (source_bias - target_bias)[:, None]).solution[:, 0])
    assert bias.abs().max() > 1e-2


def test_logit_invariant_map_biases_of_paired_rows_are_those_of_the_rows():
    source, target = head_of(12, 6, 1, bias=True), head_of(17, 4, 0, bias=True)
    source_ids, target_ids = torch.tensor([3, 0, 7, 11, 5, 9]), torch.tensor([16, 2, 3, 9, 0, 1])
    _, bias = logit_invariant_map(source, target, source_ids, target_ids)
    difference = (source.bias[source_ids] - target.bias[target_ids])[:, None]
    close(bias, torch.linalg.lstsq(target.weight[target_ids], difference).solution[:, 0])


def test_logit_invariant_map_no_other_map_is_nearer():
    source, target = head_of(12, 6, 1, bias=True, scale=0.7), head_of(12, 4, 0, bias=True)
    weight, bias = logit_invariant_map(source, target)
    best = residual(source, target, weight, bias)
    for seed in range(10):
        moved = residual(
            source, target, weight + 1e-3 * normal(4, 6, seed=seed), bias + 1e-3 * normal(4, seed=seed + 50)
        )
        assert moved[0] > best[0] and moved[1] > best[1]


def test_logit_invariant_map_head_that_the_target_can_express_has_its_logits_to_rounding():
    target = head_of(30, 5, 0, bias=True)
    mixing, shift = normal(5, 8, seed=2), normal(5, seed=3)
    source = LMHead(target.weight @ mixing, target.weight @ shift + target.bias)
    weight, bias = logit_invariant_map(source, target)
    close(weight, mixing)
    close(bias, shift)
    hidden = normal(4, 8, seed=4)
    close(target(F.linear(hidden, weight, bias)), source(hidden))


@pytest.mark.parametrize("bias", [True, False])
def test_logit_invariant_map_of_a_head_to_itself_is_the_identity(bias):
    head = head_of(30, 5, 0, bias=bias)
    weight, offset = logit_invariant_map(head, head)
    close(weight, torch.eye(5))
    assert offset is None if not bias else offset.abs().max() < TOLERANCE


# Heads with fewer directions than their width


def low_rank(vocab_size, width, rank, seed, dtype=torch.float64):
    """Small whole numbers, so that the rank is exact in each dtype."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(-3, 4, (vocab_size, rank), generator=generator)
    return (left @ torch.randint(-3, 4, (rank, width), generator=generator)).to(dtype)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logit_invariant_map_head_without_full_rank_takes_the_smallest_solution(seed, rank, dtype):
    target, source = LMHead(low_rank(60, 6, rank, seed, dtype)), LMHead(low_rank(60, 4, 4, seed + 50, dtype))
    weight, _ = logit_invariant_map(source, target)
    expected = torch.linalg.pinv(target.weight.double(), rtol=1e-9) @ source.weight.double()
    close(weight, expected, 1e-9 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("strength", [1e-7, 1e-9, 0.0])
def test_logit_invariant_map_directions_below_the_rounding_of_float32_have_no_part(strength):
    strengths = torch.tensor([1.0, 0.5, strength], dtype=torch.float64)
    basis, turn = torch.linalg.qr(normal(40, 3, seed=0)).Q, torch.linalg.qr(normal(3, 3, seed=1)).Q
    target, source = LMHead((basis * strengths) @ turn), head_of(40, 6, 2)
    expected = turn[:2].T @ torch.diag(1 / strengths[:2]) @ basis[:, :2].T @ source.weight
    # Two directions that are close to the third by that much
    close(logit_invariant_map(source, target)[0], expected, 1e-6)
    close(RecomputedProjector(target)(source)[0], expected, 1e-6)


def test_logit_invariant_map_weak_directions_are_kept():
    # A ratio of 1e-4 of singular values is 1e-8 in the Gram matrix: below the rounding of float32, above float64's
    strengths = torch.tensor([1.0, 1.0, 1e-2, 1e-4], dtype=torch.float64)
    basis = torch.linalg.qr(normal(40, 4, seed=0)).Q
    turn = torch.linalg.qr(normal(4, 4, seed=1)).Q
    target, source = LMHead((basis * strengths) @ turn), head_of(40, 6, 2)
    expected = turn.T @ torch.diag(1 / strengths) @ basis.T @ source.weight
    weight, _ = logit_invariant_map(source, target)
    # 1e-16 of the Gram matrix over 1e-8
    close(weight, expected, 1e-6)
    assert expected.abs().max() > 1e3


@pytest.mark.parametrize("num_rows", [1, 3])
def test_logit_invariant_map_fewer_tokens_than_width_gives_their_logits_with_the_smallest_map(num_rows):
    student, teacher = head_of(12, 5, 0), head_of(12, 7, 1)
    ids = torch.tensor([7, 2, 10])[:num_rows]
    weight, _ = logit_invariant_map(teacher, student, ids, ids)
    close(student.weight[ids] @ weight, teacher.weight[ids], 1e-9)
    close(weight, torch.linalg.pinv(student.weight[ids]) @ teacher.weight[ids], 1e-9)


def test_logit_invariant_map_zero_head_gives_a_zero_map():
    weight, _ = logit_invariant_map(head_of(12, 6, 1), LMHead(torch.zeros(12, 4)))
    assert torch.equal(weight, torch.zeros_like(weight))


def test_logit_invariant_map_unused_columns_have_no_part():
    target = head_of(20, 5, 0)
    target.weight[:, 2] = 0.0
    weight, _ = logit_invariant_map(head_of(20, 4, 1), target)
    assert weight[2].abs().max() < 1e-9
    kept = torch.tensor([0, 1, 3, 4])
    close(weight[kept], torch.linalg.pinv(target.weight[:, kept]) @ head_of(20, 4, 1).weight, 1e-9)


# Chunks, dtypes, gradient


@pytest.mark.parametrize("vocab_size", [8191, 8192, 8193, 20_011])
def test_logit_invariant_map_large_vocabularies_count_each_row_once(vocab_size):
    student, teacher = head_of(vocab_size, 3, 0, bias=True), head_of(vocab_size, 4, 1, bias=True)
    student.weight[-3:] += 500.0  # a last piece that is left out, or counted twice, shows
    teacher.weight[-3:] -= 300.0
    student.weight[::4096] *= 30.0
    weight, bias = logit_invariant_map(teacher, student)
    close(weight, loops.initial_to_student(student.weight, teacher.weight), 1e-9)
    close(bias, torch.linalg.pinv(student.weight) @ (teacher.bias - student.bias), 1e-9)
    everything = torch.arange(vocab_size)
    by_ids = logit_invariant_map(teacher, student, everything, everything)
    close(by_ids[0], weight), close(by_ids[1], bias)
    flipped = logit_invariant_map(teacher, student, everything.flip(0), everything.flip(0))
    close(flipped[0], weight, 1e-9), close(flipped[1], bias, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logit_invariant_map_narrow_heads_are_solved_in_float64(dtype):
    # Almost parallel columns: in float32 the Gram matrix would lose the small direction
    student = normal(40, 4, seed=0)
    student[:, 1] = student[:, 0] + 2.0**-6 * normal(40, seed=5)
    student, teacher = (LMHead(weight.to(dtype)) for weight in (student, normal(40, 6, seed=1)))
    weight, _ = logit_invariant_map(teacher, student)
    assert weight.dtype == torch.float32
    expected = loops.initial_to_student(student.weight.double(), teacher.weight.double())
    close(weight, expected, 1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logit_invariant_map(teacher, student)[0], weight)


def test_projectors_of_heads_of_two_dtypes_are_in_that_of_the_space_they_lead_to():
    narrow, wide = head_of(12, 4, 0, torch.bfloat16, bias=True), head_of(12, 6, 1, bias=True)
    for source, target, dtype in ((wide, narrow, torch.float32), (narrow, wide, torch.float64)):
        found = (*logit_invariant_map(source, target), *RecomputedProjector(target)(source))
        assert {part.dtype for part in found} == {dtype}


def test_logit_invariant_map_carries_no_gradient_and_leaves_its_heads():
    heads = [head_of(12, width, width, bias=True) for width in (4, 6)]
    before = [head.weight.clone() for head in heads]
    for head in heads:
        head.weight.requires_grad_(), head.bias.requires_grad_()
    weight, bias = logit_invariant_map(*heads)
    assert not weight.requires_grad and not bias.requires_grad
    assert all(torch.equal(head.weight, weight) for head, weight in zip(heads, before, strict=True))


@pytest.mark.parametrize(
    ("source_ids", "target_ids"), [(None, None), (None, torch.arange(4)), (torch.arange(3), torch.arange(4))]
)
def test_logit_invariant_map_other_numbers_of_rows_raise(source_ids, target_ids):
    with pytest.raises(ValueError, match=r"The source has (\d+) rows and the target (\d+), but .* Cut padded heads"):
        logit_invariant_map(head_of(6, 3, 0), head_of(5, 3, 1), source_ids, target_ids)


# At the start


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, adaptive_kl])
@pytest.mark.parametrize("kind", ["itself", "a wider copy"])
def test_projectors_of_least_squares_between_equal_models_have_no_divergence_in_either_space(divergence, kind):
    head, hidden = head_of(30, 5, 0), normal(8, 5, seed=1)
    teacher, teacher_hidden = head, hidden
    if kind == "a wider copy":
        # The same logits from a wider model: its states have a part that its head does not see
        turn = torch.linalg.qr(normal(9, 9, seed=2)).Q
        teacher = LMHead(F.pad(head.weight, (0, 4)) @ turn)
        teacher_hidden = torch.cat([hidden, 3.0 * normal(8, 4, seed=3)], dim=1) @ turn
        close(teacher(teacher_hidden), head(hidden))
    to_student, _ = logit_invariant_map(teacher, head)
    for to_teacher in (logit_invariant_map(head, teacher)[0], RecomputedProjector(teacher)(head)[0]):
        labels = teacher(teacher_hidden).argmax(-1)
        values = student_space(
            head(hidden), head(F.linear(teacher_hidden, to_student)), labels, labels, divergence=divergence
        )
        projected = teacher(F.linear(hidden, to_teacher))
        values |= teacher_space(projected, teacher(teacher_hidden), divergence=divergence)
        assert values["student_space_kd"].abs().max() < 1e-12 and values["teacher_space_kd"].abs().max() < 1e-12
        assert values["projector_agreement"].min() == 1.0
    if kind == "itself":
        close(to_student, torch.eye(5)), close(to_teacher, torch.eye(5))


# From the student's current head


@SHAPES
def test_recomputed_projector_is_the_pseudo_inverse_of_the_teachers_head_times_the_students(shape):
    vocab_size, width, teacher_width = shape
    student, teacher = head_of(vocab_size, width, 0), head_of(vocab_size, teacher_width, 1)
    weight, bias = RecomputedProjector(teacher)(student)
    assert weight.shape == (teacher_width, width) and bias is None
    close(weight, loops.initial_to_teacher(student.weight, teacher.weight))
    gram = teacher.weight.T @ teacher.weight
    close(weight, torch.linalg.solve(gram, teacher.weight.T @ student.weight), 1e-10)


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_recomputed_projector_equals_the_map_of_least_squares(with_ids, bias):
    student, teacher = head_of(12, 4, 0, bias=bias, scale=0.5), head_of(12, 6, 1, bias=bias, scale=2.0)
    ids = (torch.tensor([3, 0, 7, 11, 5, 9, 1]), torch.tensor([1, 2, 4, 9, 0, 10, 8])) if with_ids else (None, None)
    found = RecomputedProjector(teacher, teacher_ids=ids[0], student_ids=ids[1])(student)
    expected = logit_invariant_map(student, teacher, source_ids=ids[1], target_ids=ids[0])
    close(found[0], expected[0])
    assert (found[1] is None) == (expected[1] is None) == (not bias)
    if bias:
        close(found[1], expected[1])
        assert expected[1].abs().max() > 1e-2


def test_recomputed_projector_head_without_full_rank_takes_the_smallest_solution():
    teacher, student = LMHead(low_rank(60, 6, 3, 0)), head_of(60, 4, 1)
    close(
        RecomputedProjector(teacher)(student)[0], torch.linalg.pinv(teacher.weight, rtol=1e-9) @ student.weight, 1e-9
    )


def test_recomputed_projector_follows_a_head_that_a_step_changes():
    student, teacher = head_of(12, 4, 0, bias=True), head_of(12, 6, 1)
    weight, bias = (nn.Parameter(part) for part in (student.weight.clone(), student.bias.clone()))
    projector = RecomputedProjector(teacher)
    optimizer = torch.optim.SGD([weight, bias], lr=0.1)
    seen = []
    for _ in range(3):
        found = projector(LMHead(weight, bias))
        expected = logit_invariant_map(LMHead(weight, bias), teacher)
        close(found[0], expected[0]), close(found[1], expected[1])
        seen.append(found[0].clone())
        LMHead(weight, bias)(normal(3, 4, seed=2)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (seen[1] - seen[0]).abs().max() > 1e-2 and (seen[2] - seen[1]).abs().max() > 1e-2


@pytest.mark.parametrize("change", ["in place", "bias", "data", "in place of data", "another tensor", "another scale"])
def test_recomputed_projector_follows_every_kind_of_change(change):
    teacher = head_of(12, 6, 1)
    student = LMHead(nn.Parameter(normal(12, 4, seed=0)), nn.Parameter(normal(12, seed=2)))
    projector = RecomputedProjector(teacher)
    before = [part.clone() for part in projector(student)]
    with torch.no_grad():
        if change == "in place":
            student.weight[3:5].add_(1.0)
        elif change == "bias":
            student.bias.mul_(-2.0)
        elif change == "in place of data":  # as DeepSpeed does, which no version counter sees
            student.weight.data[3:5].add_(1.0)
        elif change == "data":
            student.weight.data = normal(12, 4, seed=7)
        elif change == "another tensor":
            student = replace(student, weight=normal(12, 4, seed=7))
        else:
            student = replace(student, scale=0.5)
    found, expected = projector(student), logit_invariant_map(student, teacher)
    close(found[0], expected[0]), close(found[1], expected[1])
    assert max((a - b).abs().max() for a, b in zip(found, before, strict=True)) > 1e-2


def test_recomputed_projector_heads_made_anew_at_one_address_are_told_apart():
    # As gathered and dequantised heads are: the storage of the last step is free, and taken again
    teacher, storage = head_of(12, 6, 1), torch.empty(12, 4, dtype=torch.float64)
    projector = RecomputedProjector(teacher)
    for seed in range(4):
        weight = torch.from_numpy(storage.numpy())  # a tensor without history at the same address
        weight.numpy()[:] = normal(12, 4, seed=seed).numpy()
        close(projector(LMHead(weight))[0], loops.initial_to_teacher(weight, teacher.weight))


def test_recomputed_projector_teachers_side_is_solved_once(monkeypatch):
    student, teacher = head_of(12, 4, 0), head_of(12, 6, 1)
    projector = RecomputedProjector(teacher)

    def refuse(*args, **options):
        raise AssertionError("solved again")

    with monkeypatch.context() as patch:
        for name in ("pinv", "solve", "lstsq", "inv", "cholesky", "eigh", "svd", "qr"):
            patch.setattr(torch.linalg, name, refuse)
        found = [projector(head)[0] for head in (student, LMHead(student.weight + 1.0))]
    for weight, shift in zip(found, (0.0, 1.0), strict=True):
        close(weight, loops.initial_to_teacher(student.weight + shift, teacher.weight))


def test_recomputed_projector_carries_no_gradient_to_either_head():
    student, teacher = head_of(12, 4, 0, bias=True), head_of(12, 6, 1, bias=True)
    for head in (student, teacher):
        head.weight.requires_grad_(), head.bias.requires_grad_()
    weight, bias = RecomputedProjector(teacher)(student)
    assert not weight.requires_grad and not bias.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_projector_narrow_heads_give_float32(dtype):
    student, teacher = head_of(40, 4, 0, dtype), head_of(40, 6, 1, dtype)
    weight, _ = RecomputedProjector(teacher)(student)
    assert weight.dtype == torch.float32
    close(weight, loops.initial_to_teacher(student.weight.double(), teacher.weight.double()), 1e-6)


def test_recomputed_projector_other_numbers_of_rows_raise():
    with pytest.raises(ValueError, match=r"The source has 5 rows and the target 6, but .* Cut padded heads"):
        RecomputedProjector(head_of(6, 3, 0))(head_of(5, 3, 1))


# At random


@pytest.mark.parametrize("bias", [True, False])
def test_make_projector_is_a_float32_linear_map_with_the_default_initialisation(bias):
    projector = make_projector(400, 300, bias, seed=0)
    assert isinstance(projector, nn.Linear) and projector.weight.shape == (300, 400)
    assert {parameter.dtype for parameter in projector.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in projector.parameters())
    assert (projector.bias is not None) == bias
    # Uniform within 1 / sqrt(in): 120,000 draws know the deviation to 0.2 %
    for parameter in projector.parameters():
        assert 0.95 / 20 < parameter.abs().max() <= 1 / 20
        assert parameter.std().item() == pytest.approx(
            1 / 20 / math.sqrt(3), rel=0.01 if parameter.dim() == 2 else 0.1
        )
        assert abs(parameter.mean().item()) < (5e-4 if parameter.dim() == 2 else 1e-2)


@pytest.mark.parametrize("bias", [True, False])
def test_make_projector_draw_is_that_of_its_seed_alone_and_moves_no_other(bias):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = make_projector(6, 4, bias, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    again, other = make_projector(6, 4, bias, seed=3), make_projector(6, 4, bias, seed=4)
    for one, same, different in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, same) and (one - different).abs().min() > 1e-4


def test_make_projector_seeds_no_accelerator(monkeypatch):
    # `torch.manual_seed` would, and put back none of them
    seeded = []
    for name in ("cuda", "xpu", "mps"):
        for function in ("manual_seed", "manual_seed_all"):
            if hasattr(getattr(torch, name), function):
                monkeypatch.setattr(getattr(torch, name), function, lambda seed, name=name: seeded.append(name))
    make_projector(6, 4, True, seed=3)
    assert not seeded


def test_make_projector_default_dtype_and_device_of_the_caller_change_nothing():
    expected = make_projector(6, 4, True, seed=3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = make_projector(6, 4, True, seed=3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.weight.dtype == torch.float32 and torch.equal(found.weight, expected.weight)
