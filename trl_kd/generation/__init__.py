"""Rollouts: text that the student or the teacher writes, as rows that look like data."""

from trl_kd.generation.rollouts import (
    RolloutWriter,
    Sampling,
    completion_text,
    distinct_n,
    draw_on_policy,
    eos_token_ids,
    generate_completions,
    rollout_seed,
)


__all__ = [
    "RolloutWriter",
    "Sampling",
    "completion_text",
    "distinct_n",
    "draw_on_policy",
    "eos_token_ids",
    "generate_completions",
    "rollout_seed",
]
