"""What each method needs beside the models: the workspace of its loss, critics, projectors, and states it keeps."""

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from trl_kd.checks.activations import LossCall
from trl_kd.checks.weights import Weights
from trl_kd.losses.linear import _BLOCK_NUMEL, default_chunk_size
from trl_kd.modules import LMHead, planned_bytes


# Parameter, gradient and both moments of Adam, in float32
_BYTES_PER_PARAMETER = 16
# Buffers of a block of logits that the objectives of one call use at a time. Counted on a CPU, with all that methods
# log: 11 to 15, of the adaptive divergence 17, in bfloat16 three more. On a GPU they are compiled, and the peaks in
# docs/performance.md are those of one (total variation, exact critic, reverse KL) or two (JSD)
_BLOCKS = {"cpu": 14, "cuda": 2}
# Rows of a head that are read at a time in float64, to find a projector (modules/projector.py)
_PROJECTOR_ROWS = 2**14
# Bytes of logits that learned critics keep between their steps, and chunks of them (trainer/critics.py)
_KNOWN_LOGITS, _KNOWN_CHUNKS = {"cpu": 2**28, "cuda": 2**30}, 4


@dataclass(frozen=True)
class StepFacts:
    r"""
    What the needs of a method depend on.

    Args:
        args ([`KDConfig`]):
            Configuration.
        student ([`Weights`]):
            Of the student.
        teacher ([`Weights`], *optional*):
            Of the teacher; `None` for a cache.
        tokens (`int`):
            Trained tokens of a micro-batch.
        micro_batches (`int`):
            Of an optimizer step.
        device_type (`str`):
            `"cuda"` or `"cpu"`.
        num_teachers (`int`, *optional*, defaults to `1`):
            Teachers.
    """

    args: Any
    student: Weights
    teacher: Weights | None
    tokens: int
    micro_batches: int
    device_type: str
    num_teachers: int = 1

    @property
    def autocast(self) -> bool:
        """Whether the run is in mixed precision."""
        return bool(self.args.bf16)

    @property
    def vocab_size(self) -> int:
        """Tokens that student and teacher share, if their tokenizers are one."""
        return self.student.rows if self.teacher is None else min(self.student.rows, self.teacher.rows)

    def dtype_of(self, model: Weights) -> torch.dtype:
        """In which products with this model's head are made."""
        return torch.bfloat16 if self.autocast else model.head_dtype

    def states(self, model: Weights, rows: int | None = None) -> int:
        """Bytes of hidden states."""
        return (self.tokens if rows is None else rows) * model.width * model.head_dtype.itemsize


@dataclass(frozen=True)
class Needs:
    r"""
    What a method needs beside the models.

    Args:
        calls (`tuple[LossCall, ...]`):
            Calls of `linear_loss` in a micro-batch.
        before_loss (`int`, *optional*, defaults to `0`):
            Bytes that are needed for a while when the student's forward is done.
        before_step (`int`, *optional*, defaults to `0`):
            The same before the student's first forward of the step.
        after_step (`int`, *optional*, defaults to `0`):
            The same when all micro-batches are done.
        kept (`int`, *optional*, defaults to `0`):
            Bytes of states that are kept over the step.
        modules (`dict[str, int]`, *optional*):
            Bytes of what is trained or averaged beside the student, by name.
    """

    calls: tuple[LossCall, ...]
    before_loss: int = 0
    before_step: int = 0
    after_step: int = 0
    kept: int = 0
    modules: dict[str, int] | None = None


def needs_of(method: str, facts: StepFacts) -> Needs:
    r"""
    What a method needs beside the models.

    Args:
        method (`str`):
            `"amm"`, `"dskd"` or `"sparse-td"`.
        facts ([`StepFacts`]):
            The run.

    Returns:
        [`Needs`]

    Raises:
        ValueError: If there is no such method.
    """
    methods = {"amm": _amm, "dskd": _dskd, "sparse-td": _sparse_td}
    if method not in methods:
        raise ValueError(f"`method` is '{method}', which does not exist. Choose one of {', '.join(methods)}.")
    needs = methods[method](facts)
    if facts.num_teachers > 1:
        # Each teacher has its own call, on all rows or on its own
        share = 1.0 if facts.args.teacher_column is None else 1.0 / facts.num_teachers
        calls = tuple(replace(call, share=share * call.share) for call in needs.calls)
        needs = replace(needs, calls=calls * facts.num_teachers, kept=needs.kept * facts.num_teachers)
    return needs


def workspace(facts: StepFacts, models: list[Weights], rows: int, extra: int = 0, sizes: Any = None) -> int:
    r"""
    Bytes that a call of `linear_loss` needs until it returns, without the gradients that it hands over.

    Args:
        facts ([`StepFacts`]):
            The run.
        models (`list[Weights]`):
            Those whose logits exist at a time, trained or not.
        rows (`int`):
            Tokens of the call.
        extra (`int`, *optional*, defaults to `0`):
            Further pairs with the last of these heads, such as a projected teacher or a tied critic.
        sizes (`list[int]`, *optional*):
            Rows of each head. By default the shared vocabulary.

    Returns:
        `int`
    """
    sizes = sizes or [facts.vocab_size] * len(models)
    chunk = min(chunk_rows(facts, dict(enumerate(zip(models, sizes, strict=True)))), max(rows, 1))
    total = 0
    for index, (model, size) in enumerate(zip(models, sizes, strict=True)):
        dtype = facts.dtype_of(model)
        pairs = 1 + (extra if index == len(models) - 1 else 0)
        total += pairs * chunk * size * dtype.itemsize
        if dtype != model.head_dtype:  # the head and its states in the dtype of the product
            total += pairs * (size + rows) * model.width * dtype.itemsize
    most = max(1, _BLOCK_NUMEL[facts.device_type] // max(sizes))
    block = math.ceil(chunk / math.ceil(chunk / most))
    return total + _BLOCKS[facts.device_type] * block * max(sizes) * 4


def chunk_rows(facts: StepFacts, heads: dict[Any, tuple[Weights, int]]) -> int:
    """Rows whose logits exist at a time, before there are fewer."""
    if facts.args.loss_chunk_size:
        return facts.args.loss_chunk_size
    logits = {n: (torch.empty(0, size, dtype=facts.dtype_of(m)), None) for n, (m, size) in heads.items()}
    return default_chunk_size(logits, torch.device(facts.device_type))


def _models(facts: StepFacts) -> list[Weights]:
    return [facts.student] if facts.teacher is None else [facts.student, facts.teacher]


def _amm(facts: StepFacts) -> Needs:
    args, student, teacher = facts.args, facts.student, facts.teacher
    dtype = facts.dtype_of(student)
    learns = args.critic == "value_head"
    looks_ahead = (learns and args.critic_order == "before") or args.on_policy_gradient == "full"
    both = _states_of_both(facts)
    if not learns:
        call = LossCall(workspace(facts, _models(facts), facts.tokens), dtype)
        if not looks_ahead:
            return Needs((call,))
        kept = facts.micro_batches * both if facts.micro_batches > 1 else 0
        return Needs((call,), before_step=kept, kept=kept)
    shares = [share for share in (1.0 - args.lmbda, args.lmbda) if share > 0]
    rows = math.ceil(max(shares) * facts.tokens)
    calls = tuple(LossCall(workspace(facts, _models(facts), rows, extra=1), dtype, share) for share in shares)
    modules = {"critic": len(shares) * planned_bytes(**_critic_arguments(facts))}
    ascent = _ascent(facts)
    if args.critic_order == "after":
        return Needs(calls, after_step=ascent, kept=facts.micro_batches * both, modules=modules)
    if facts.micro_batches == 1:
        return Needs(calls, before_loss=ascent, modules=modules)
    kept = facts.micro_batches * facts.states(teacher)
    return Needs(calls, before_step=ascent + facts.micro_batches * both, kept=kept, modules=modules)


def _states_of_both(facts: StepFacts) -> int:
    return sum(facts.states(model) for model in _models(facts))


def _critic_arguments(facts: StepFacts) -> dict[str, Any]:
    args, teacher = facts.args, facts.teacher
    widths = {"teacher": teacher.width, "student": facts.student.width, "both": teacher.width + facts.student.width}
    head = LMHead(torch.empty(facts.vocab_size, teacher.width, dtype=teacher.head_dtype, device="meta"))
    names = {"head": args.critic_head, "bound": args.critic_bound, "rank": args.critic_rank}
    return names | {"num_features": widths[args.critic_features], "embeddings": head}


def _ascent(facts: StepFacts) -> int:
    """A learned critic's steps on all tokens: its features, the logits that are kept, and a call of the loss."""
    args, teacher = facts.args, facts.teacher
    arguments = _critic_arguments(facts)
    tokens = facts.tokens * facts.micro_batches
    features = tokens * arguments["num_features"] * 4
    width = {"tied": teacher.width, "low_rank": args.critic_rank, "full": arguments["num_features"]}[args.critic_head]
    # Scaled features, the critic's states before and after a product, and their gradient
    states = facts.tokens * (arguments["num_features"] + 3 * width) * 4
    gradient = facts.vocab_size * width * 4 if args.critic_head != "tied" else 0
    known, kept = 0, 0
    if args.critic_steps > (2 if args.critic_order == "after" else 1):
        row = sum(facts.vocab_size * facts.dtype_of(model).itemsize for model in _models(facts))
        chunk = chunk_rows(facts, {i: (model, facts.vocab_size) for i, model in enumerate(_models(facts))})
        kept = min(_KNOWN_LOGITS[facts.device_type] // row, _KNOWN_CHUNKS * chunk, tokens)
        known = kept * row
    # Logits that are kept need no buffers: where that is all of them, only the critic's values do
    space = workspace(facts, _models(facts), facts.tokens, extra=1) if kept < tokens else 0
    space = max(space, workspace(facts, [teacher], min(kept, facts.tokens)))
    return features + states + known + gradient + space


def _dskd(facts: StepFacts) -> Needs:
    args, student, teacher = copy.copy(facts.args), facts.student, facts.teacher
    is_one = args.alignment == "same" or (args.alignment == "auto" and student.rows == teacher.rows)
    args.resolve("same" if is_one else "eta" if args.alignment == "auto" else args.alignment)
    sizes = [facts.vocab_size] * 2 if is_one else [student.rows, teacher.rows]
    dtype, kept = facts.dtype_of(student), facts.micro_batches * facts.states(teacher)
    if args.objective != "dual_space":
        both = LossCall(workspace(facts, _models(facts), facts.tokens, sizes=sizes), dtype)
        alone = LossCall(workspace(facts, [student], facts.tokens, sizes=sizes[:1]), dtype)
        return Needs((alone, both), kept=kept)
    calls = []
    if args.student_space:
        space = workspace(facts, [student], facts.tokens, extra=1 + (args.teacher_temperature != 1.0), sizes=sizes[:1])
        # The projected teacher, which autograd keeps, and its gradient
        calls.append(LossCall(space + 2 * facts.tokens * (teacher.width + student.width) * 4, dtype))
    if args.teacher_space:
        space = workspace(facts, [teacher], facts.tokens, extra=1, sizes=sizes[1:])
        calls.append(LossCall(space, facts.dtype_of(teacher), trains_head=False, width=teacher.width))
    modules, before_loss = _projectors(facts, args), 0
    if args.teacher_space and args.student_to_teacher == "recomputed" and student.trained:
        rows = min(_PROJECTOR_ROWS, min(sizes))
        before_loss = (rows + student.width) * (student.width + teacher.width) * 8
    return Needs(tuple(calls), before_loss, kept=kept, modules={"projectors": modules})


def _projectors(facts: StepFacts, args: Any) -> int:
    own, theirs = facts.student.width, facts.teacher.width
    bias, hidden = bool(args.projector_bias), args.projector_hidden_size or 0
    numbers = fixed = 0

    def linear(source: int, target: int) -> int:
        return source * target + target * bias + (hidden * (source + 1 + target) if hidden else 0)

    if args.student_space:
        numbers += linear(theirs, own)
    if args.teacher_space and args.student_to_teacher == "learned":
        numbers += linear(own, theirs)
    elif args.teacher_space:  # the inverse in float64, and the map
        fixed = theirs * theirs * 8 + own * theirs * 4
    if args.alignment == "cma":
        numbers += 4 * own * theirs + 2 * theirs * bias
    return numbers * _BYTES_PER_PARAMETER + fixed


def _sparse_td(facts: StepFacts) -> Needs:
    args, student, teacher = copy.copy(facts.args), facts.student, facts.teacher
    args.resolve()
    dtype = facts.dtype_of(student)
    # Ids, log-probabilities and masks of the teacher's tokens, in the forms that the objectives take
    sets = facts.tokens * args.max_actions * (8 + 4 * 4 + 1)
    models = _models(facts) if args.lm_weight > 0 and args.kd_ratio > 0 else [student]
    calls = [LossCall(sets + workspace(facts, models, facts.tokens), dtype)]
    if not _is_closed(args):
        # Products with some rows of the head: their gradient is as large as the head, too
        calls.append(LossCall(sets, dtype))
    before_loss = sets
    if teacher is not None:
        # Logits of a chunk in float32, and their exponentials, whose sum is taken
        chunk = min(facts.tokens, chunk_rows(facts, {"head": (teacher, facts.vocab_size)}))
        before_loss += chunk * facts.vocab_size * 2 * 4
        if facts.dtype_of(teacher) != teacher.head_dtype:
            before_loss += facts.vocab_size * teacher.width * 2
    modules = {}
    if args.target_ema is not None:  # an average in float32, and its forward needs another in the student's dtype
        numel = sum(part.numel for part in student.trained)
        modules["target"] = 4 * numel + sum(p.numel * p.itemsize for p in student.trained if p.itemsize != 4)
    return Needs(tuple(calls), before_loss, modules=modules)


def _is_closed(args: Any) -> bool:
    """Whether `set_forward_kl` is all that is asked for."""
    named = {name for name, weight in args.objectives.items() if weight > 0} - {"path_consistency"}
    plain = (args.q_min, args.backup, args.entropy_weight, args.train_eos) == (float("-inf"), "soft", 1.0, True)
    plain = plain and math.isinf(args.chi2_alpha) and args.label_outside != "union" and args.tail_weight > 0
    return plain and named == {"expected_inverse_soft_q"}
