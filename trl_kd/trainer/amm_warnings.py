"""Warnings of AMM while there is still time: settings at odds, a student that collapses, a critic that is too slow."""

from dataclasses import MISSING, Field, fields
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Of a run's first logged value: below or above it, something is wrong
_ENTROPY, _DISTINCT, _LENGTH, _TOTAL_VARIATION = 0.5, 0.7, 0.7, 1.1
# Share of the total variation that a critic sees, and for how many logs in a row it is given time
_TIGHTNESS, _PATIENCE = 0.5, 5


def warn_of_settings(args: Any) -> None:
    r"""
    Say what works but is likely a mistake.

    Args:
        args ([`AMMConfig`]):
            Configuration of the run.
    """
    changed = [
        field.name for field in fields(args) if field.name.startswith(args.unread()) and _is_changed(args, field)
    ]
    if args.critic == "value_head" and args.critic_head != "low_rank" and args.critic_rank != type(args).critic_rank:
        changed.append("critic_rank")
    if changed:
        names = ", ".join(f"`{name}`" for name in changed)
        logger.warning(
            f'{names}: set, but nothing reads them with `critic="{args.critic}"` and '
            f'`on_policy_gradient="{args.on_policy_gradient}"`. `critic_*` concern `critic="value_head"` '
            '(`critic_rank` the head "low_rank"), `later_*` `on_policy_gradient="full"`, `vllm_*` `use_vllm=True`.'
        )
    if args.critic == "value_head" and args.critic_features == "student":
        logger.warning(
            '`critic_features` is "student". For a linear critic on the student\'s own states the moment is the '
            "gradient of forward KL with respect to the student's output head, which is nearly zero after "
            'fine-tuning however much the models differ. Take "both" or "teacher".'
        )
    rollouts = args.lmbda * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.on_policy_gradient == "full" and args.later_baseline == "position" and rollouts < 2:
        logger.warning(
            f"An optimizer step has {rollouts:g} rollouts, but later costs are compared between rollouts, so one "
            'alone has no effect. Raise `gradient_accumulation_steps` or `lmbda`, or take `later_baseline="value"`.'
        )
    if args.on_policy_gradient == "full" and (altered := _altered_sampling(args)):
        logger.warning(
            f"Rollouts are drawn with {altered}, so they are not samples of the student itself, and the policy "
            "gradient of the later states is biased. Leave the sampling options at their defaults."
        )


def _is_changed(args: Any, field: Field) -> bool:
    value = vars(args)[field.name]
    if field.default_factory is MISSING:
        return value != field.default
    return list(value) != field.default_factory()  # a tuple will do


def _altered_sampling(args: Any) -> str:
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0, "do_sample": True}
    used = {name: vars(args)[name] for name in plain if name in vars(args)} | (args.generation_kwargs or {})
    lengths = ("max_new_tokens", "max_length", "max_tokens", "use_cache")
    altered = {name: value for name, value in used.items() if name not in lengths and value != plain.get(name)}
    return ", ".join(f"`{name}={value}`" for name, value in altered.items())


class DriftWatch(TrainerCallback):
    r"""
    Reads what is logged; warns once of each kind. It needs no state: a resumed run has the log of the whole run.

    Args:
        args ([`AMMConfig`]):
            Configuration of the run.
    """

    def __init__(self, args: Any):
        self.limits: dict[str, tuple[float, float]] = {}  # allowed range, relative to the first value
        if args.on_policy_gradient == "full":
            self.limits = {
                "kd/on_policy/student_entropy": (_ENTROPY, float("inf")),
                "kd/on_policy/distinct_2": (_DISTINCT, float("inf")),
                # Later costs are sums: who stops early has none
                "kd/on_policy/completion_length": (_LENGTH, float("inf")),
                "kd/off_policy/total_variation": (0.0, _TOTAL_VARIATION),
            }
        self.watches_critic = args.critic == "value_head"
        self._warned: set[str] = set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        history = [entry for entry in state.log_history if "loss" in entry]
        if not history or "loss" not in (logs or {}):
            return
        for name, (low, high) in self.limits.items():
            values = [entry[name] for entry in history if name in entry]
            if len(values) > 1 and not low * values[0] <= values[-1] <= high * values[0]:
                self._warn(
                    name,
                    f"`{name}` went from {values[0]:.3g} to {values[-1]:.3g}. The full on-policy gradient favours few "
                    "easy states and short texts, and this is how it shows. Lower `later_weight` or `later_gamma`, "
                    'raise the share of off-policy rows, or take `on_policy_gradient="direct"`.',
                )
        if self.watches_critic:
            self._check_critic(history)

    def _check_critic(self, history: list[dict[str, float]]) -> None:
        for name in ("kd/off_policy/tightness", "kd/on_policy/tightness"):
            values = [entry[name] for entry in history if name in entry][-_PATIENCE:]
            if len(values) == _PATIENCE and max(values) < _TIGHTNESS:
                self._warn(
                    name,
                    f"`{name}` has stayed under {_TIGHTNESS}: the critic sees {values[-1]:.0%} of the difference "
                    "between teacher and student, and the student is pushed by what is left. Raise "
                    '`critic_learning_rate` or `critic_steps`, or take `critic="exact"`, which sees all of it.',
                )

    def _warn(self, name: str, message: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            logger.warning(message)
