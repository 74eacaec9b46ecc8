"""Path consistency of the student's own text, over a whole optimizer step."""

from typing import Any

import torch

from trl_kd.losses import Term, cross_entropy, path_consistency
from trl_kd.trainer.baselines import less_position_means
from trl_kd.trainer.transitions import StateTokens


def path_slopes(tokens: list[StateTokens], args: Any, accelerator: Any) -> list[dict[str, torch.Tensor]]:
    r"""
    Values of `path_consistency` of each token of a rollout, and the derivative of their sum by its log-probability.

    What was to be expected of a return is the mean of the other rollouts of the step at the same position, so all of
    them have to be seen before the first loss. The derivative is then a weight of each token, and the gradient that of
    a weighted log-likelihood, in one pass with everything else.

    Args:
        tokens (`list[StateTokens]`):
            All micro-batches of this rank's optimizer step, detached.
        args ([`SparseTDConfig`]):
            Configuration, resolved.
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's accelerator, to sum over ranks.

    Returns:
        `list[dict[str, torch.Tensor]]`: per micro-batch `"path_consistency"` and `"path_slope"` of shape `(N,)`; zero
        for off-policy tokens, and where no other rollout is as long.
    """
    ratios, returns = [], []
    for batch in tokens:
        terms = {name: Term(cross_entropy, (name, "labels")) for name in ("student", "teacher")}
        nll = batch.linear_loss(terms, args.loss_chunk_size).values
        with torch.enable_grad():
            # log pi(y|s) - log pi*(y|s); nothing is to come after the end of the return
            ratio = (nll["teacher"] - nll["student"]).requires_grad_()
            returns.append(batch.course.returns(ratio, torch.zeros_like(ratio), needs_next=False))
        ratios.append(ratio)
    own = [batch.is_on_policy for batch in tokens]
    found = less_position_means(
        [part.detach()[mask] for part, mask in zip(returns, own, strict=True)],
        [batch.positions[mask] for batch, mask in zip(tokens, own, strict=True)],
        accelerator,
    )
    answers = []
    for ratio, part, mask, rest in zip(ratios, returns, own, found, strict=True):
        rest = torch.zeros_like(part.detach()).masked_scatter(mask, rest)
        with torch.enable_grad():
            values = path_consistency(part, part.detach() - rest)
            (slope,) = torch.autograd.grad(values.sum(), ratio)
        answers.append({"path_consistency": values.detach(), "path_slope": slope})
    return answers
