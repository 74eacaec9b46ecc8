"""Maps between the hidden states of two models: learned, or found from the output heads alone.

A projection that keeps the logits (v2 of dual-space distillation) takes a state h of one model to the state of the
other whose logits are nearest: min_P ||W_to P - W_from||, over the rows of both heads that stand for the same tokens.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from trl_kd.modules.lm_head import LMHead


# Rows of the heads that are read at a time
_CHUNK_ROWS = 2**14


def make_projector(in_features: int, out_features: int, bias: bool, seed: int) -> nn.Linear:
    r"""
    A linear map with PyTorch's default initialisation, as in v1 of dual-space distillation.

    Args:
        in_features (`int`):
            Width of the states to project.
        out_features (`int`):
            Width of the space to project into.
        bias (`bool`):
            Whether the map has a bias: v1 has one, v2 has none.
        seed (`int`):
            Seed of the draw; the global random state stays as it is.

    Returns:
        [`~torch.nn.Linear`]: in float32.
    """
    projector = nn.utils.skip_init(nn.Linear, in_features, out_features, bias=bias, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    bound = in_features**-0.5  # what nn.Linear does for weight and bias
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return projector


class ResidualProjector(nn.Module):
    r"""
    A linear map, and beside it a small network that starts at zero: `A x + B gelu(C rms_norm(x))`, with B = 0.

    Note:
        Ours; the authors' projectors are linear. A student that is narrower than its teacher cannot say with its head
        what a linear image of the teacher's state holds, but a bent one can say more.

    Args:
        linear ([`~torch.nn.Linear`]):
            The map to start from.
        hidden_size (`int`):
            Width of the network.
        seed (`int`):
            Seed of its draw; the global random state stays as it is.
    """

    def __init__(self, linear: nn.Linear, hidden_size: int, seed: int):
        super().__init__()
        self.linear = linear
        self.inner = make_projector(linear.in_features, hidden_size, True, seed)
        self.outer = make_projector(hidden_size, linear.out_features, False, seed)
        nn.init.zeros_(self.outer.weight)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        r"""
        Projected states.

        Args:
            states (`torch.Tensor` of shape `(N, H)`):
                States of the source.

        Returns:
            `torch.Tensor` of shape `(N, H_target)`
        """
        bent = F.gelu(self.inner(F.rms_norm(states, states.shape[-1:])))
        return self.linear(states) + self.outer(bent)


@torch.no_grad()
def logit_invariant_map(
    source: LMHead,
    target: LMHead,
    source_ids: torch.Tensor | None = None,
    target_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""
    The linear map of states under which the target's head gives the source's logits, as nearly as possible.

    With A and B the heads' matrices (times their scales), the map P minimises ||B P - A||, so that B (P h) is about
    A h for every h. In v2 of dual-space distillation, `W^{t->s} = W^t (W^s)^+` up to transposition.

    Note:
        The authors take the pseudo-inverse of a head, (V x H). This is the same map from the Gram matrix B' B, (H x H)
        and summed over chunks of the vocabulary in float64, for heads whose directions are all well above rounding:
        the default cutoff of a float32 pseudo-inverse grows with V and drops weak ones, ours does not. Biases of heads
        are ours (none of their models has any): the difference of the biases is taken over as nearly as possible, by a
        bias of the map.

    Args:
        source ([`LMHead`]):
            Head of the model whose states are projected, `(V, H_source)`.
        target ([`LMHead`]):
            Head of the model into whose space they go, `(V, H_target)`.
        source_ids (`torch.Tensor` of shape `(K,)`, *optional*):
            Rows of the source's head to use. By default all.
        target_ids (`torch.Tensor` of shape `(K,)`, *optional*):
            Rows of the target's head that stand for the same tokens, in the same order.

    Returns:
        `tuple`: weight of shape `(H_target, H_source)`, and bias of shape `(H_target,)`, or `None` if neither head has
        a bias; in float32, or in float64 for float64 heads, on the device of the target.

    Raises:
        ValueError: If the numbers of rows differ.

    Examples:

    ```python
    >>> teacher = LMHead(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    >>> student = LMHead(torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 2.0]]))
    >>> logit_invariant_map(teacher, student)[0]
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    ```
    """
    gram, cross, offset = _normal_equations(source, target, source_ids, target_ids)
    return _solution(_pseudo_inverse(gram), cross, offset, target.weight)


def _solution(
    inverse: torch.Tensor, cross: torch.Tensor, offset: torch.Tensor | None, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    dtype = torch.promote_types(like.dtype, torch.float32)
    parts = (inverse @ cross, None if offset is None else inverse @ offset)
    return tuple(None if part is None else part.to(like.device, dtype) for part in parts)


def _normal_equations(
    source: LMHead,
    target: LMHead,
    source_ids: torch.Tensor | None,
    target_ids: torch.Tensor | None,
    needs_gram: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """B' B (zero unless it is needed), B' A and B' (a - b), where a and b are the biases."""
    rows = [
        len(head.weight) if ids is None else len(ids) for head, ids in ((source, source_ids), (target, target_ids))
    ]
    if rows[0] != rows[1]:
        raise ValueError(
            f"The source has {rows[0]} rows and the target {rows[1]}, but a projection keeps the logits of tokens "
            "that both have. Cut padded heads to the shared vocabulary, or pass the rows of the same tokens as "
            "`source_ids` and `target_ids`."
        )
    device = target.weight.device
    exact = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    has_bias = source.bias is not None or target.bias is not None
    widths = source.weight.shape[1], target.weight.shape[1]
    gram = torch.zeros(widths[1], widths[1], dtype=torch.float64, device=exact)
    cross = torch.zeros(widths[1], widths[0], dtype=torch.float64, device=exact)
    offset = torch.zeros(widths[1], dtype=torch.float64, device=exact) if has_bias else None
    for start in range(0, rows[0], _CHUNK_ROWS):
        chunk = slice(start, start + _CHUNK_ROWS)
        a, a_bias = _rows(source, chunk if source_ids is None else source_ids[chunk], exact)
        b, b_bias = _rows(target, chunk if target_ids is None else target_ids[chunk], exact)
        if needs_gram:
            gram.addmm_(b.T, b)
        cross.addmm_(b.T, a)
        if has_bias:
            offset.addmv_(b.T, a_bias - b_bias)
    return gram, cross, offset


def _rows(head: LMHead, rows: slice | torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Some rows of a head and of its bias, in float64, with its scale."""
    weight = head.weight.detach()[rows].to(device, torch.float64)
    bias = weight.new_zeros(len(weight)) if head.bias is None else head.bias.detach()[rows].to(weight)
    return weight * head.scale, bias * head.scale


def _pseudo_inverse(gram: torch.Tensor) -> torch.Tensor:
    # Directions that no row of the head has, to rounding, get no weight. The eigenvalues are squares of the head's
    # singular values, whose own rounding in float32 is what counts
    return torch.linalg.pinv(gram, rtol=len(gram) * torch.finfo(torch.float32).eps ** 2, hermitian=True)


class RecomputedProjector:
    r"""
    The map from the student's states to the teacher's that the student's current head implies, not learned.

    v2 of dual-space distillation: `P^{s->t} = (W^s)' ((W^t)')^+`, from the student's detached head as it is now. No
    gradient reaches it.

    Args:
        teacher ([`LMHead`]):
            The teacher's head, `(V_t, D)`, frozen.
        teacher_ids (`torch.Tensor` of shape `(K,)`, *optional*):
            Rows of the teacher's head to use. By default all.
        student_ids (`torch.Tensor` of shape `(K,)`, *optional*):
            Rows of the student's head that stand for the same tokens.
    """

    def __init__(
        self,
        teacher: LMHead,
        teacher_ids: torch.Tensor | None = None,
        student_ids: torch.Tensor | None = None,
    ):
        self.teacher, self.teacher_ids, self.student_ids = teacher, teacher_ids, student_ids
        # The teacher's side never changes
        gram, _, _ = _normal_equations(teacher, teacher, teacher_ids, teacher_ids)
        self._inverse = _pseudo_inverse(gram)

    @torch.no_grad()
    def __call__(self, student: LMHead) -> tuple[torch.Tensor, torch.Tensor | None]:
        r"""
        Weight `(D, d)` and bias of the map for the head that is given. Costs V * D * d multiplications in float64.

        Args:
            student ([`LMHead`]):
                The student's head, `(V_s, d)`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`
        """
        _, cross, offset = _normal_equations(student, self.teacher, self.student_ids, self.teacher_ids, False)
        return _solution(self._inverse, cross, offset, self.teacher.weight)
