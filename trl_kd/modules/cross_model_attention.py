"""Cross-model attention: which tokens of one tokenizer stand where in the text of another, learned.

Implements the alignment of [Dual-Space Knowledge Distillation](https://huggingface.co/papers/2406.17328) for different
vocabularies (DSKD-CMA): one score for each pair of a student's and a teacher's token, read in both directions.
"""

import math

import torch
import torch.nn as nn


def token_scale(values: torch.Tensor) -> torch.Tensor:
    r"""
    One number for the size of a set of vectors, by which keys and values of the attention are divided: N(X) = X / std.

    The unbiased standard deviation over all elements; no mean is removed from X.

    Args:
        values (`torch.Tensor` of shape `(..., H)`):
            The vectors, any float dtype; computed in float32, or in float64.

    Returns:
        `torch.Tensor` of shape `()`: at least 1e-6; 1 for fewer than two elements.

    Examples:

    ```python
    >>> token_scale(torch.tensor([[1.0, 3.0]]))  # sqrt(2)
    tensor(1.4142)
    ```
    """
    values = values if values.dtype == torch.float64 else values.float()
    return values.std().clamp_min(1e-6) if values.numel() > 1 else values.new_ones(())


def scale_of_sums(sums: torch.Tensor) -> torch.Tensor:
    r"""
    [`token_scale`] of vectors that lie in several places (micro-batches, ranks), from their added up sums.

    Args:
        sums (`torch.Tensor` of shape `(3,)`):
            Number of elements, their sum, and the sum of their squares, in float64.

    Returns:
        `torch.Tensor` of shape `()`, in float32.

    Examples:

    ```python
    >>> scale_of_sums(torch.tensor([2.0, 4.0, 10.0], dtype=torch.float64))  # of 1 and 3
    tensor(1.4142)
    ```
    """
    count, total, squares = sums.unbind()
    variance = (squares - total.square() / count.clamp_min(1)) / (count - 1).clamp_min(1)
    return torch.where(count > 1, variance.clamp_min(0).sqrt().clamp_min(1e-6), 1.0).float()


class CrossModelAttention(nn.Module):
    r"""
    Attention between the tokens of a student and those of a teacher, in both directions from one score matrix.

    With Q_i a projection of the student's token i, K_j what is known of the teacher's token j, and D the width of the
    teacher: A_ij = <Q_i, K_j> / sqrt(2 D). The student's positions read the teacher's values by a softmax over j, the
    teacher's positions read the student's by a softmax over i. Only tokens of the same sequence see each other.

    Note:
        The authors add -1e5 to the scores of tokens that may not see each other, so a token without any partner reads
        an average of what it should not see (its loss is masked). Here it reads zeros.

    Args:
        student_width (`int`):
            Width d of the student's input embeddings: a token is described by those of itself and of its follower.
        teacher_width (`int`):
            Width D of the teacher's.
        bias (`bool`, *optional*, defaults to `True`):
            Whether the projection of the queries has a bias.
    """

    def __init__(self, student_width: int, teacher_width: int, bias: bool = True):
        super().__init__()
        self.query = nn.Linear(2 * student_width, 2 * teacher_width, bias=bias)

    def forward(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        teacher_values: torch.Tensor,
        student_values: torch.Tensor,
        student_segments: torch.Tensor,
        teacher_segments: torch.Tensor,
        sizes: tuple[int, int, int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        What each token reads on the other side.

        Args:
            queries (`torch.Tensor` of shape `(N_s, 2 * d)`):
                Student's tokens: embeddings of the token that is read and of the one that is predicted.
            keys (`torch.Tensor` of shape `(N_t, 2 * D)`):
                Teacher's tokens, in the same way.
            teacher_values (`torch.Tensor` of shape `(N_t, H_s)`):
                The teacher's states, projected into the student's space.
            student_values (`torch.Tensor` of shape `(N_s, H_t)`):
                The student's states, projected into the teacher's space.
            student_segments (`torch.Tensor` of shape `(N_s,)`):
                Number of the sequence of each student's token, ascending.
            teacher_segments (`torch.Tensor` of shape `(N_t,)`):
                The same for the teacher's tokens.
            sizes (`tuple[int, int, int]`, *optional*):
                Number of sequences, and most tokens of one, the student's and the teacher's. If they are not given,
                the device is asked for them.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]` of shapes `(N_s, H_s)` and `(N_t, H_t)`: the teacher's values as the
            student's tokens read them, and the student's as the teacher's tokens do; in float32, or in float64.
        """
        wide = torch.promote_types(self.query.weight.dtype, torch.float32)
        with torch.autocast(queries.device.type, enabled=False):
            tensors = (self.query(queries.to(self.query.weight.dtype)), keys, teacher_values, student_values)
            q, k, teacher_values, student_values = (tensor.to(wide) for tensor in tensors)
            if not len(q) or not len(k):
                nothing = 0.0 * (q.sum() + k.sum() + teacher_values.sum() + student_values.sum())
                return (
                    nothing + q.new_zeros(len(q), teacher_values.shape[1]),
                    nothing + q.new_zeros(len(k), student_values.shape[1]),
                )
            if sizes is None:
                rows = int(torch.maximum(student_segments[-1], teacher_segments[-1])) + 1
                sizes = rows, *(int(part.bincount().max()) for part in (student_segments, teacher_segments))
            to_student, student_mask = _places(student_segments, sizes[0], sizes[1])
            to_teacher, teacher_mask = _places(teacher_segments, sizes[0], sizes[2])
            scores = _padded(q, to_student, student_mask) @ _padded(k, to_teacher, teacher_mask).mT
            scores = scores / math.sqrt(k.shape[1])  # (rows, n, m)
            seen = student_mask.unsqueeze(2) & teacher_mask.unsqueeze(1)
            of_teacher = _safe_softmax(scores, seen, 2) @ _padded(teacher_values, to_teacher, teacher_mask)
            of_student = _safe_softmax(scores, seen, 1).mT @ _padded(student_values, to_student, student_mask)
        return of_teacher.flatten(0, 1)[to_student], of_student.flatten(0, 1)[to_teacher]


def _places(segments: torch.Tensor, rows: int, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Place of each token in a padded `(rows, longest)`, flattened, and which places are taken."""
    counts = torch.zeros(rows, dtype=torch.long, device=segments.device).index_add_(
        0, segments, torch.ones_like(segments)
    )
    firsts = counts.cumsum(0) - counts
    inside = torch.arange(len(segments), device=segments.device) - firsts[segments]
    return segments * longest + inside, torch.arange(longest, device=segments.device) < counts.unsqueeze(1)


def _padded(values: torch.Tensor, places: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Tokens `(N, H)` in their rows `(rows, longest, H)`, zeros elsewhere."""
    out = values.new_zeros(mask.numel(), values.shape[1])
    return out.index_copy(0, places, values).unflatten(0, mask.shape)


def _safe_softmax(scores: torch.Tensor, seen: torch.Tensor, dim: int) -> torch.Tensor:
    """Softmax over what is seen; zeros, and a zero gradient, where nothing is."""
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(dim)
    return weights.masked_fill(~seen, 0.0)
