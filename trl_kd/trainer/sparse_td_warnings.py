"""What is worth a word about a run of temporal-difference distillation."""

import math
from typing import Any

from transformers.utils import logging

from trl_kd.trainer.objectives import has_temporal_difference


logger = logging.get_logger(__name__)


def say_what_is_trained(args: Any, objective: Any) -> None:
    r"""
    Say where no temporal difference is left in the loss, and warn of settings that work and are likely a mistake.

    Args:
        args ([`SparseTDConfig`]):
            Configuration, resolved.
        objective (`Callable`, *optional*):
            The caller's own loss.
    """
    if objective is None and not has_temporal_difference(args):
        is_kl = args.objectives == {"expected_inverse_soft_q": args.tail_weight}
        what = "the forward KL to the teacher's renormalised set" if is_kl else "imitation state by state"
        logger.warning(
            f"`objectives` {args.objectives} with `chi2_alpha` {args.chi2_alpha:g} and `gamma` {args.gamma:g} hold no "
            f"temporal difference: the value of the next state cancels, and what is left is {what}."
        )
    if args.tail_weight == 0 and args.lm_weight == 0:
        logger.warning(
            "`tail_weight` and `lm_weight` are 0, so nothing keeps the student from tokens outside of the teacher's "
            "set, and their mass grows. Set `tail_weight=1.0`."
        )
    elif args.tail_weight == 0:
        logger.warning(
            "`tail_weight` is 0: the language-model term alone holds the student back from tokens outside of the "
            'teacher\'s set. This did harm wherever it was measured; `preset="expected"` is what helped.'
        )
    names = {name for name, weight in args.objectives.items() if weight > 0 and objective is None}
    has_chi2 = not math.isinf(args.chi2_alpha) and bool(names & {"expected_inverse_soft_q", "inverse_soft_q"})
    if has_chi2 and args.chi2_center == "zero":
        logger.warning(
            f"`chi2_alpha` is {args.chi2_alpha:g}: the square draws implied rewards to zero, and the student to more "
            'entropy than the teacher has. `chi2_center="teacher"` draws them to the teacher\'s own.'
        )
    compares = bool(names & {"teacher_reward", "soft_actor_critic"})
    compares |= has_chi2 and args.chi2_center == "teacher"
    if args.gauge == "raw" and compares:
        logger.warning(
            '`gauge` is "raw", but Q-values of student and teacher are compared, whose logits differ by a number in '
            'each state that means nothing. Take `gauge="max"` or `gauge="logsoftmax"`, which fix it.'
        )
    if "sqil" in names and args.lmbda == 0:
        logger.warning(
            "`sqil` rewards the teacher's text with 1 and the student's own with 0, but `lmbda` is 0, so all rewards "
            "are 1 and say nothing. Set `lmbda=0.5`."
        )
    sampled = {"inverse_soft_q", "large_margin"} & names
    if args.lmbda == 1.0 and sampled:
        logger.warning(
            f"`lmbda` is 1, so every row is the student's, but {', '.join(sorted(sampled))} learns from the tokens of "
            "the teacher's text alone. Lower `lmbda`, or take an objective that needs no such text."
        )


def check_group(args: Any, looks_ahead: bool, lm_dataset: Any) -> None:
    """Refuse several teachers where one has to be compared over a whole step, or on text that no column speaks of."""
    if looks_ahead:
        raise NotImplementedError(
            "There are several teachers, but `path_consistency` compares whole rollouts with one. Take one teacher, "
            "or other objectives."
        )
    if lm_dataset is not None and args.kd_ratio > 0:
        raise NotImplementedError(
            f"There are several teachers, but on `lm_dataset` with `kd_ratio` {args.kd_ratio} one is asked. Set "
            "`kd_ratio=0.0`, or take one teacher."
        )


def check_second_text(args: Any, lm_dataset: Any) -> None:
    r"""
    Refuse a second text from which nothing would be learned, or that a cache has never seen.

    Args:
        args ([`SparseTDConfig`]):
            Configuration, resolved.
        lm_dataset ([`~datasets.Dataset`], *optional*):
            The second text.
    """
    if lm_dataset is None:
        return
    if args.lm_weight == 0:
        raise ValueError(
            "`lm_dataset` is set, but `lm_weight` is 0, so nothing would be learned from it. Set `lm_weight=1.0`, or "
            "leave out the dataset."
        )
    if args.teacher_cache is not None and args.kd_ratio > 0:
        raise ValueError(
            f"`lm_dataset` is set with a `teacher_cache` and `kd_ratio` {args.kd_ratio}, but the cache has the "
            "teacher's tokens of the training data alone. Set `kd_ratio=0.0`, or train with the teacher itself."
        )
