"""The fused form of each objective: values of a block of rows, and slopes in place of autograd.

Each does what the plain function of the same name does, with the same arguments, on the names of logits instead of
logits; `losses/block.py` says what slopes and flows are. p is the teacher's distribution, q the student's, f a
critic's values. Gradient is wanted where `weights` are given.
"""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch

from trl_kd.losses import divergences, moments, on_set, predictions
from trl_kd.losses.block import Block
from trl_kd.losses.on_set import OnSet


_Weights = torch.Tensor | None


def _forward_kl(
    block: Block, weights: _Weights, student: str, teacher: str, kd_temperature: float = 1.0
) -> torch.Tensor:
    q, p = block.softmax(student, kd_temperature), block.softmax(teacher, kd_temperature)
    ratio = block.minus(p.log_probs, q.log_probs)
    values, _ = block.expected(p.probs, ratio, out=ratio)
    if weights is not None:
        q.add_flow(p.probs, -weights)
    return values


def _reverse_kl(
    block: Block, weights: _Weights, student: str, teacher: str, kd_temperature: float = 1.0
) -> torch.Tensor:
    q, p = block.softmax(student, kd_temperature), block.softmax(teacher, kd_temperature)
    ratio = block.minus(q.log_probs, p.log_probs)
    values, products = block.expected(q.probs, ratio, out=ratio)
    if weights is not None:
        q.add_flow(products, weights)
    return values


def _generalized_jsd(
    block: Block, weights: _Weights, student: str, teacher: str, beta: float = 0.5, kd_temperature: float = 1.0
) -> torch.Tensor:
    if beta in (0.0, 1.0):
        limit = _forward_kl if beta == 0.0 else _reverse_kl
        return limit(block, weights, student, teacher, kd_temperature)
    q, p = block.softmax(student, kd_temperature), block.softmax(teacher, kd_temperature)
    log_m = _mixture(block, p.probs, q.probs, beta).log_()
    ratio = block.minus(p.log_probs, log_m)
    from_teacher, _ = block.expected(p.probs, ratio, out=ratio)
    ratio = torch.sub(q.log_probs, log_m, out=log_m)
    from_student, products = block.expected(q.probs, ratio, out=ratio)
    if weights is not None:
        # What the derivative of m adds is the same for all tokens
        q.add_flow(products, (1.0 - beta) * weights)
    return beta * from_teacher + (1.0 - beta) * from_student


def _skewed_forward_kl(
    block: Block, weights: _Weights, student: str, teacher: str, skew: float = 0.1, kd_temperature: float = 1.0
) -> torch.Tensor:
    if skew == 0.0:
        return _forward_kl(block, weights, student, teacher, kd_temperature)
    q, p = block.softmax(student, kd_temperature), block.softmax(teacher, kd_temperature)
    m = _mixture(block, p.probs, q.probs, skew)
    log_m = torch.log(m, out=block.scratch.like(m))
    ratio = torch.sub(p.log_probs, log_m, out=log_m)
    values, _ = block.expected(p.probs, ratio, out=ratio)
    if weights is not None:
        q.add_slope(torch.div(p.probs, m, out=m), (skew - 1.0) * weights)
    return values


def _skewed_reverse_kl(
    block: Block, weights: _Weights, student: str, teacher: str, skew: float = 0.1, kd_temperature: float = 1.0
) -> torch.Tensor:
    if skew == 0.0:
        return _reverse_kl(block, weights, student, teacher, kd_temperature)
    q, p = block.softmax(student, kd_temperature), block.softmax(teacher, kd_temperature)
    m = _mixture(block, q.probs, p.probs, skew)
    log_m = torch.log(m, out=block.scratch.like(m))
    ratio = torch.sub(q.log_probs, log_m, out=log_m)
    values, products = block.expected(q.probs, ratio, out=ratio)
    if weights is not None:
        q.add_flow(products, weights)
        q.add_slope(torch.div(q.probs, m, out=m), -skew * weights)
    return values


def _mixture(block: Block, left: torch.Tensor, right: torch.Tensor, share: float) -> torch.Tensor:
    """share * left + (1 - share) * right, above zero."""
    mixture = torch.lerp(right, left, share, out=block.scratch.like(left))
    return mixture.clamp_min_(torch.finfo(mixture.dtype).tiny)


def _adaptive_kl(
    block: Block, weights: _Weights, student: str, teacher: str, head: float = 0.5, kd_temperature: float = 1.0
) -> torch.Tensor:
    q, p = block.softmax(student, kd_temperature), block.softmax(teacher, kd_temperature)
    share = divergences._head_share(p.probs, q.probs, head)
    forward, _ = block.expected(p.probs, block.minus(p.log_probs, q.log_probs))
    reverse, products = block.expected(q.probs, block.minus(q.log_probs, p.log_probs))
    if weights is not None:
        q.add_flow(p.probs, -share * weights)
        q.add_flow(products, (1.0 - share) * weights)
    return share * forward + (1.0 - share) * reverse


def _total_variation(
    block: Block, weights: _Weights, student: str, teacher: str, kd_temperature: float = 1.0
) -> torch.Tensor:
    sign = block.sign(teacher, student, kd_temperature)
    if weights is not None:
        block.softmax(student, kd_temperature).add_slope(sign, -0.5 * weights)
    difference = block.difference(teacher, student, kd_temperature)
    return 0.5 * torch.abs(difference, out=block.scratch.like(difference)).sum(dim=1)


def _cross_entropy(block: Block, weights: _Weights, student: str, labels: str) -> torch.Tensor:
    q = block.softmax(student)
    if weights is not None:
        q.add_label_flow(block.labels[labels], -weights)
    return -q.log_probs.gather(1, block.labels[labels].unsqueeze(1)).squeeze(1)


def _entropy(block: Block, weights: _Weights, name: str) -> torch.Tensor:
    p = block.softmax(name)
    values, products = block.expected(p.probs, p.log_probs)
    if weights is not None:
        p.add_flow(products, -weights)
    return -values


def _top1_agreement(block: Block, weights: _Weights, student: str, teacher: str) -> torch.Tensor:
    chosen = block.logits[student].argmax(dim=1, keepdim=True)
    logits = block.logits[teacher]
    return (logits.gather(1, chosen).squeeze(1) == logits.amax(dim=1)).to(logits.dtype)


def _top1_accuracy(block: Block, weights: _Weights, student: str, labels: str) -> torch.Tensor:
    logits = block.logits[student]
    chosen = logits.gather(1, block.labels[labels].unsqueeze(1)).squeeze(1)
    return (chosen == logits.amax(dim=1)).to(logits.dtype)


def _moment(block: Block, weights: _Weights, student: str, teacher: str, critic: str) -> torch.Tensor:
    f = block.logits[critic]
    if weights is not None:
        block.softmax(student).add_slope(f, -weights)
    return block.dot(block.difference(teacher, student), f)


def _exact_moment(block: Block, weights: _Weights, student: str, teacher: str) -> torch.Tensor:
    return 2.0 * _total_variation(block, None if weights is None else 2.0 * weights, student, teacher)


def _exact_penalised_moment(block: Block, weights: _Weights, student: str, teacher: str) -> torch.Tensor:
    difference, total = block.difference(teacher, student), block.total(teacher, student)
    f = torch.clamp_min(total, torch.finfo(total.dtype).tiny, out=block.scratch.like(total))
    f = torch.div(difference, f, out=f)
    if weights is not None:
        block.softmax(student).add_slope(f, -weights)
    return block.dot(difference, f)


def _critic_objective(
    block: Block, weights: _Weights, student: str, teacher: str, critic: str, penalty: float
) -> torch.Tensor:
    f, difference = block.logits[critic], block.difference(teacher, student)
    penalised = torch.mul(block.total(teacher, student), f, out=block.scratch.like(f))
    part = torch.add(difference, penalised, alpha=-penalty / 4, out=block.scratch.like(f))
    values = block.dot(part, f)
    if weights is not None and critic in block.trained:
        block.add_gradient(critic, torch.add(difference, penalised, alpha=-penalty / 2, out=part), weights)
    return values


def _saturation(block: Block, weights: _Weights, student: str, teacher: str, critic: str) -> torch.Tensor:
    f = block.logits[critic]
    return 0.5 * block.dot(block.total(teacher, student), torch.abs(f, out=block.scratch.like(f)))


def _log_sum_exp(block: Block, weights: _Weights, name: str) -> torch.Tensor:
    p = block.softmax(name)
    if weights is not None:
        # No function of the distribution: a logit that all share counts too
        block.add_gradient(name, p.probs.clone(), weights)
    chosen = p.log_probs.argmax(dim=1, keepdim=True)
    return (block.logits[name].gather(1, chosen) - p.log_probs.gather(1, chosen)).squeeze(1)


def _set_forward_kl(block: Block, weights: _Weights, student: str, ids: str, teacher: str) -> torch.Tensor:
    q, index = block.softmax(student), block.labels[ids]
    log_q = q.log_probs.gather(1, index)
    log_p = block.labels[teacher].to(log_q.dtype).log_softmax(dim=1)
    if weights is not None:
        q.add_sparse_flow(index, log_p.exp(), -weights)
    return divergences._expected_log_ratio(log_p, log_q)


def _tail_nll(block: Block, weights: _Weights, student: str, ids: str, teacher: str) -> torch.Tensor:
    q, index = block.softmax(student), block.labels[ids]
    log_q = q.log_probs.gather(1, index).masked_fill(block.labels[teacher] == float("-inf"), float("-inf"))
    if weights is not None:
        q.add_sparse_flow(index, log_q.softmax(dim=1), -weights)
    return -log_q.logsumexp(dim=1)


def _on_set(block: Block, weights: _Weights, student: str, ids: str, teacher: str, function: OnSet) -> torch.Tensor:
    q, index, log_p = block.softmax(student), block.labels[ids], block.labels[teacher]
    log_q = q.log_probs.gather(1, index)
    if weights is None:
        return function.of_set(log_q, log_p)
    with torch.enable_grad():
        values = function.of_set(log_q.requires_grad_(), log_p)
        # dD / d log q is q dD / dq
        (flow,) = torch.autograd.grad(values.sum(), log_q)
    q.add_sparse_flow(index, flow, weights)
    return values.detach()


_FUSED: dict[Callable, Callable] = {
    divergences.forward_kl: _forward_kl,
    divergences.reverse_kl: _reverse_kl,
    divergences.generalized_jsd: _generalized_jsd,
    divergences.skewed_forward_kl: _skewed_forward_kl,
    divergences.skewed_reverse_kl: _skewed_reverse_kl,
    divergences.adaptive_kl: _adaptive_kl,
    divergences.total_variation: _total_variation,
    predictions.cross_entropy: _cross_entropy,
    predictions.entropy: _entropy,
    predictions.top1_accuracy: _top1_accuracy,
    predictions.top1_agreement: _top1_agreement,
    moments.moment: _moment,
    moments.exact_moment: _exact_moment,
    moments.exact_penalised_moment: _exact_penalised_moment,
    moments.critic_objective: _critic_objective,
    moments.saturation: _saturation,
    on_set.set_forward_kl: _set_forward_kl,
    on_set.tail_nll: _tail_nll,
    predictions.log_sum_exp: _log_sum_exp,
}


def fused_form(function: Callable) -> Callable | None:
    """`form(block, weights, *names)` for a plain function, or for a `partial` of one; `None` if it has none."""
    options = {}
    if isinstance(function, partial) and not function.args:
        function, options = function.func, function.keywords
    if isinstance(function, OnSet):
        return partial(_on_set, function=function)
    form = _FUSED.get(function) if isinstance(function, Hashable) else None
    return partial(form, **options) if form is not None and options else form


def plain_form(function: Callable) -> Callable:
    r"""
    The same for any per-token function of logits, by autograd on one block.

    Args:
        function (`Callable`):
            Takes logits `(n, V)` (and labels), returns `(n,)`. Its gradient reaches the logits of trained models only.

    Returns:
        `Callable`: `form(block, weights, *names)`.
    """

    def form(block: Block, weights: _Weights, *names: str) -> torch.Tensor:
        rows = len(next(iter(block.logits.values())))
        inputs = {name: block.labels[name] if name in block.labels else block.logits[name].detach() for name in names}
        if weights is None:
            return _per_token(function, function(*(inputs[name] for name in names)), rows)
        leaves = {name: inputs[name].requires_grad_() for name in names if name in block.trained}
        with torch.enable_grad():
            values = _per_token(function, function(*(inputs[name] for name in names)), rows)
        _refuse_other_leaves(function, values, leaves)
        if leaves and values.requires_grad:
            ones = torch.ones_like(values)
            found = torch.autograd.grad(values, list(leaves.values()), ones, allow_unused=True)
            for name, gradient in zip(leaves, found, strict=True):
                if gradient is not None:
                    # Rows are independent, so what is infinite in one leaves the others alone
                    column = weights.unsqueeze(1)
                    block.add_gradient(name, torch.where(column != 0, gradient, 0.0), weights)
        return values.detach()

    return form


def _per_token(function: Callable, values: torch.Tensor, rows: int) -> torch.Tensor:
    if values.shape != (rows,):
        raise ValueError(
            f"`{getattr(function, '__name__', function)}` returned shape {tuple(values.shape)} for {rows} tokens, but "
            "each token has a weight of its own. Return one value per token, and reduce nothing."
        )
    return values


def _refuse_other_leaves(function: Callable, values: torch.Tensor, leaves: dict[str, Any]) -> None:
    """The gradient of a parameter that the function holds would be lost."""
    waiting, seen = [values.grad_fn], set()
    known = {id(leaf) for leaf in leaves.values()}
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            raise ValueError(
                f"`{getattr(function, '__name__', function)}` needs the gradient of a tensor of shape "
                f"{tuple(variable.shape)} that is none of its inputs. `linear_loss` makes those of hidden states and "
                "heads only, so this one would be lost. Make it a pair of its own, or detach it."
            )
        waiting += [child for child, _ in node.next_functions]
