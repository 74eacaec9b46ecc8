"""How near a student is to a teacher of the same vocabulary, on the states that each of them visits.

A state is a prompt and the completion so far. Where states come from matters: on the teacher's states a student may
agree with its teacher and still lead itself, token by token, to states where the two differ. So everything is measured
on three sets of states: given texts (references), the teacher's own rollouts and the student's own rollouts. At each
state both next-token distributions are compared over the whole vocabulary, exactly; only the states are sampled.
With nucleus sampling they are compared as they are then sampled from.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from trl_kd.evaluation.per_token import batches, compare_rows, eval_mode
from trl_kd.generation import Sampling, distinct_n, generate_completions, rollout_seed
from trl_kd.losses.action_sets import check_mass


if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel


FIDELITY_METRICS = {
    "student_states/total_variation": "TV, student states",
    "student_states/reverse_kl": "RKL, student states",
    "teacher_states/total_variation": "TV, teacher states",
    "teacher_states/forward_kl": "FKL, teacher states",
    "reference_states/total_variation": "TV, references",
    "reference_states/forward_kl": "FKL, references",
    "reference_states/nll": "NLL, references",
    "imitation_gap": "imitation gap",
    "student_states/student_entropy": "student entropy",
    "student_states/teacher_entropy": "teacher entropy",
    "student_states/distinct_2": "distinct-2",
}
"""Metrics of [`evaluate_fidelity`] that [`fidelity_table`] shows, in its order, and their titles there."""


def _eos_token_ids(model: "PreTrainedModel") -> list[int]:
    """The ids that end a text of this model, from its generation config."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


@torch.no_grad()
def sample_completions(
    model: "PreTrainedModel",
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    seed: int = 0,
    top_p: float = 1.0,
    eos_token_ids: Sequence[int] | None = None,
    progress: bool = True,
    description: str = "Sampling",
) -> list[list[int]]:
    """
    Completions drawn from the model's own distribution, or from its nucleus: temperature 1, no top-k, no penalty.

    Each batch is drawn under a seed made of `seed` and its index, with the global random state untouched. Two models
    that are sampled with the same `seed` and `batch_size` share their noise: equal models write equal texts, and
    differences between similar models have less variance.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model. Its training mode and its generation config are the same afterwards.
        prompts (`Sequence[list[int]]`):
            Token ids, at least one per prompt.
        max_new_tokens (`int`):
            Length at which a completion is cut.
        batch_size (`int`, *optional*, defaults to `16`):
            Prompts per batch.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the samples.
        top_p (`float`, *optional*, defaults to `1.0`):
            Probability mass of the nucleus, the most likely tokens, that is drawn from.
        eos_token_ids (`Sequence[int]`, *optional*):
            Ids that end a completion. Defaults to those of the model's generation config.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
        description (`str`, *optional*, defaults to `"Sampling"`):
            Text of the progress bar.

    Returns:
        `list[list[int]]`: one completion per prompt, including the token that ended it, without padding.

    Raises:
        ValueError: If `top_p` is no mass.
    """
    check_mass("top_p", top_p)
    eos_token_ids = _eos_token_ids(model) if eos_token_ids is None else list(eos_token_ids)
    sampling = Sampling(max_completion_length=max_new_tokens, top_p=top_p)
    completions = []
    with eval_mode(model):
        for index, batch in enumerate(batches(prompts, batch_size, description, progress)):
            # Any id can fill the batch: completions are cut by length and EOS, not by the filler
            completions += generate_completions(
                model,
                list(batch),
                sampling,
                pad_token_id=0,
                eos_token_ids=eos_token_ids,
                seed=rollout_seed(seed, index),
            )
    return completions


def _compare(*arguments, **options) -> dict[str, float]:
    """Token means of all comparisons over the states of the completions."""
    sums: dict[str, float] = defaultdict(float)
    tokens = 0
    for row in compare_rows(*arguments, **options):
        tokens += len(row["nll"])
        for name, value in row.items():
            sums[name] += value.sum().item()
    return {name: value / tokens for name, value in sums.items()}


def _describe(completions: Sequence[list[int]], eos_token_ids: Sequence[int]) -> dict[str, float]:
    """What can be said of rollouts without a model."""
    return {
        "distinct_2": distinct_n(completions, 2),
        "completion_length": sum(map(len, completions)) / len(completions),
        "eos_rate": sum(ids[-1] in eos_token_ids for ids in completions) / len(completions),
    }


def _check(prompts: Sequence[list[int]], references: Sequence[list[int]] | None) -> None:
    if not len(prompts) or not all(map(len, prompts)):
        raise ValueError(
            f"`prompts` has {len(prompts)} prompts, of which {sum(not len(ids) for ids in prompts)} are empty, but a "
            "rollout needs at least one token to start from. Pass token ids that begin with the BOS token."
        )
    if references is None:
        return
    if len(references) != len(prompts):
        raise ValueError(
            f"`references` has {len(references)} rows but `prompts` has {len(prompts)}. Each reference continues the "
            "prompt at its own index. Pass as many references as prompts."
        )
    if not all(map(len, references)):
        raise ValueError(
            f"`references` has {sum(not len(ids) for ids in references)} empty rows, which have no token to compare. "
            "Leave these rows out, with their prompts."
        )


def evaluate_fidelity(
    student: "PreTrainedModel",
    teacher: "PreTrainedModel",
    prompts: Sequence[list[int]],
    references: Sequence[list[int]] | None = None,
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    seed: int = 0,
    top_p: float = 1.0,
    student_completions: Sequence[list[int]] | None = None,
    teacher_completions: Sequence[list[int]] | None = None,
    eos_token_ids: Sequence[int] | None = None,
    progress: bool = True,
) -> dict[str, float]:
    r"""
    Compares a student with a teacher of the same vocabulary.

    With p the teacher, q the student and s a state, each value below is a mean over the tokens of one set of states.
    Expectations over the next token are exact; rollouts are drawn at temperature 1.

    With `top_p` below 1, p' and q' are the models as they are then sampled from: each cut to its own nucleus and
    renormalised. Rollouts, total variation and entropies are theirs. A KL divergence between them is infinite wherever
    one nucleus is not within the other, so `reverse_kl` is KL(q' || p) and `forward_kl` is KL(p' || q), what is
    sampled from one model under the other in full; neither is 0 for the teacher itself. NLLs are those of p and q.

    The imitation gap is the teacher log-likelihood that is lost by acting as the student instead of as the teacher,

        gap = E_{s ~ teacher} sum_y p'(y|s) log p(y|s) - E_{s ~ student} sum_y q'(y|s) log p(y|s)
            = E_{s ~ student} [ KL(q' || p) + H(q') ] - E_{s ~ teacher} [ KL(p' || p) + H(p') ].

    It is 0 for the teacher itself, and rewards sharpness: a student that only writes what the teacher finds likely has
    a negative gap. Read it beside the entropies. The same seed draws both sets of rollouts, so the teacher's gap to
    itself is 0 without sampling error.

    Args:
        student ([`~transformers.PreTrainedModel`]):
            Model to be judged. Like the teacher, it is put into eval mode and gets its own mode back.
        teacher ([`~transformers.PreTrainedModel`]):
            Model to be imitated. Where one head is padded further than the other, both are cut to the shared size.
        prompts (`Sequence[list[int]]`):
            Token ids, with the BOS token if the models expect one.
        references (`Sequence[list[int]]`, *optional*):
            Continuations of the prompts, such as held-out human text; with the EOS token where they are complete.
        max_new_tokens (`int`):
            Length at which rollouts are cut.
        batch_size (`int`, *optional*, defaults to `16`):
            Rows per batch. Logits of one batch are in memory at a time.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the rollouts. Students that are compared should share it, and the batch size.
        top_p (`float`, *optional*, defaults to `1.0`):
            Probability mass of the nucleus that both models are sampled from.
        student_completions (`Sequence[list[int]]`, *optional*):
            Rollouts of the student from [`sample_completions`], where they are needed for other measures too. Drawn
            here if not given.
        teacher_completions (`Sequence[list[int]]`, *optional*):
            Rollouts of the teacher from [`sample_completions`] with the same seed, so that an expensive teacher writes
            them once for many students. Drawn here if not given.
        eos_token_ids (`Sequence[int]`, *optional*):
            Ids that end a rollout, for both models. Defaults to those of the teacher's generation config.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.

    Returns:
        `dict[str, float]`: divergences, entropies and likelihoods in nats per token, lengths in tokens.

            - `student_states/`, `teacher_states/` and, with references, `reference_states/`, each followed by
              `total_variation`, `forward_kl`, `reverse_kl`, `student_entropy`, `teacher_entropy`, `nll` and
              `teacher_nll` (of the tokens that were in fact written there).
            - `student_states/` and `teacher_states/` followed by `distinct_2`, `completion_length` and `eos_rate`.
            - `imitation_gap`.
            - With `top_p` below 1, for all states, `outside` and `teacher_cut`: the mass of q' outside of the
              teacher's nucleus, and KL(p' || p), -log of the teacher's mass within it.

    Raises:
        ValueError: If there are no prompts, a prompt or a reference is empty, their numbers differ, or `top_p` is no
            mass.
    """
    _check(prompts, references)
    check_mass("top_p", top_p)
    eos_token_ids = _eos_token_ids(teacher) if eos_token_ids is None else list(eos_token_ids)
    sampling = {
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "seed": seed,
        "top_p": top_p,
        "eos_token_ids": eos_token_ids,
        "progress": progress,
    }
    if teacher_completions is None:
        teacher_completions = sample_completions(teacher, prompts, **sampling, description="Teacher rollouts")
    if student_completions is None:
        student_completions = sample_completions(student, prompts, **sampling, description="Student rollouts")

    states = {"student_states": student_completions, "teacher_states": teacher_completions}
    if references is not None:
        states["reference_states"] = references
    metrics = {}
    for source, completions in states.items():
        values = _compare(
            *(student, teacher, prompts, completions),
            batch_size=batch_size,
            top_p=top_p,
            progress=progress,
            description=f"Comparing on {source}",
        )
        if source != "reference_states":
            values |= _describe(completions, eos_token_ids)
        metrics |= {f"{source}/{name}": value for name, value in values.items()}
    metrics["imitation_gap"] = (
        metrics["student_states/reverse_kl"]
        + metrics["student_states/student_entropy"]
        - metrics["teacher_states/teacher_entropy"]
        - metrics.get("teacher_states/teacher_cut", 0.0)
    )
    return metrics


def fidelity_table(
    models: Mapping[str, Mapping[str, float | tuple[float, float]]], title: str = "Student against teacher"
) -> "Table":
    """
    Table of a few models, for a terminal: a column for each model, a row for each metric.

    Args:
        models (`Mapping[str, Mapping[str, float | tuple[float, float]]]`):
            Name of a model and what [`evaluate_fidelity`] said of it. A pair is a mean and a standard deviation.
        title (`str`, *optional*, defaults to `"Student against teacher"`):
            Line above the table.

    Returns:
        [`rich.table.Table`]: the metrics of `FIDELITY_METRICS` that some model has.
    """
    from rich.table import Table

    table = Table(title=title, caption="TV in [0, 1]; entropies on student states; all but TV and distinct-2 in nats")
    table.add_column("per token", no_wrap=True)
    for model in models:
        table.add_column(model, justify="right")
    for key, name in FIDELITY_METRICS.items():
        if any(key in metrics for metrics in models.values()):
            table.add_row(name, *(format_metric(metrics.get(key)) for metrics in models.values()))
    return table


def format_metric(value: float | tuple[float, float] | None) -> str:
    """
    A metric for a table, to three decimals.

    Args:
        value (`float`, `tuple[float, float]` or `None`):
            A value, a mean with its standard deviation, or nothing.

    Returns:
        `str`: such as `0.334`, `0.334 ± 0.003` or an empty string.
    """
    if value is None:
        return ""
    if isinstance(value, tuple | list):
        return f"{value[0]:.3f} ± {value[1]:.3f}"
    return f"{value:.3f}"
