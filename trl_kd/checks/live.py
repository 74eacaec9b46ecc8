"""What only the models themselves can say: who knows the text better, what is written, and how long a run takes."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from trl_kd.checks.finding import Finding
from trl_kd.generation import distinct_n
from trl_kd.losses import Term, cross_entropy, linear_loss
from trl_kd.modules.lm_head import LMHead


# A difference counts from so many standard errors on: one in twenty by chance
_STANDARD_ERRORS = 2.0
# Share of the nats of a guess among all tokens from which on a model knows next to nothing of a text
_GUESSING = 0.9
# Lower share of completions that end, and upper share of n-grams that were there before, of a sound student
# Share of the teacher's that end, from which the limit is no reason for the student's
_MOST_END = 0.9
_FEW_ENDS, _MANY_REPEATS = 0.5, 0.3
_NGRAM = 4
_DAY = 86_400.0


@dataclass(frozen=True)
class RowLikelihoods:
    r"""
    How unlikely the completions of some rows are under a model.

    Args:
        nats (`list[float]`):
            Negative log-likelihood of each row's completion.
        units (`list[float]`):
            Its length, in tokens or bytes.
    """

    nats: list[float]
    units: list[float]

    @property
    def rate(self) -> float:
        """Nats per unit, over all rows."""
        return sum(self.nats) / max(sum(self.units), 1e-9)


@torch.no_grad()
def token_nll(
    hidden_states: torch.Tensor, head: LMHead, labels: torch.Tensor, chunk_size: int | None = None
) -> torch.Tensor:
    r"""
    Negative log-likelihood of tokens, in nats; logits exist for some rows at a time.

    Args:
        hidden_states (`torch.Tensor` of shape `(N, H)`):
            Last hidden states at the positions that predict the tokens.
        head ([`LMHead`]):
            The model's output head.
        labels (`torch.Tensor` of shape `(N,)`):
            The tokens.
        chunk_size (`int`, *optional*):
            Rows per chunk, as in [`linear_loss`].

    Returns:
        `torch.Tensor` of shape `(N,)`.
    """
    term = {"nll": Term(cross_entropy, ("model", "labels"))}
    return linear_loss({"model": (hidden_states, head.detach())}, term, labels, chunk_size).values["nll"]


def likelihood_finding(
    student: RowLikelihoods,
    teacher: RowLikelihoods,
    *,
    unit: str = "token",
    written_by_teacher: bool = False,
    known: float = 1.0,
    vocab_size: int | None = None,
    name: str = "likelihood",
) -> Finding:
    r"""
    Whether the teacher knows the text better than the student does, row by row.

    The difference is that of the rates (nats per unit over all rows); its standard error is that of a ratio of sums
    over rows.

    Args:
        student ([`RowLikelihoods`]):
            The student's, before training.
        teacher ([`RowLikelihoods`]):
            The teacher's, on the same rows.
        unit (`str`, *optional*, defaults to `"token"`):
            `"token"`; or `"byte"` where the two have different tokens.
        written_by_teacher (`bool`, *optional*, defaults to `False`):
            Whether the teacher wrote the text itself, for want of completions.
        known (`float`, *optional*, defaults to `1.0`):
            Share of the tokens that the comparison is on: of a cache, those in its sets.
        vocab_size (`int`, *optional*):
            Number of tokens to guess among.
        name (`str`, *optional*, defaults to `"likelihood"`):
            Name of the finding.

    Returns:
        [`Finding`]: stop if the teacher is worse, careful if neither is better or both know next to nothing.
    """
    gap, error = _paired_gap(student, teacher)
    values = {
        "student_nats": student.rate,
        "teacher_nats": teacher.rate,
        "gap": gap,
        "standard_error": error,
        "unit": unit,
        "rows": len(student.nats),
        "known_share": known,
    }
    text = (
        f"On the completions of {len(student.nats)} rows the teacher needs {teacher.rate:.3f} nats per {unit}, the "
        f"student {student.rate:.3f}"
    )
    text += "" if known == 1.0 else f" (on the {known:.0%} of tokens that the cache knows)"
    if written_by_teacher:
        text += ". The teacher wrote them itself, since the data has prompts alone, so it can hardly lose"
    for side, part in (("student", student), ("teacher", teacher)):
        if not math.isfinite(part.rate):
            text = f"The {side}'s likelihoods are not finite (NaN or infinite), so a step would destroy the student."
            fix = f"Load the {side} in bfloat16 or float32 instead of float16, and check its weights."
            return Finding(name, "stop", text, fix, values)
    if error is None:
        fix = "Look at more rows (`samples`)."
        return Finding(name, "careful", f"{text}. One row says nothing about the next.", fix, values)
    if gap < -_STANDARD_ERRORS * error:
        text += f": the teacher is worse, by {-gap:.3f} ± {error:.3f}, and would teach the student to be worse too."
        return Finding(name, "stop", text, _WORSE_TEACHER, values)
    if gap == 0.0 and error == 0.0:
        text += ": not a digit differs, so they are one model, and there is nothing to learn."
        return Finding(name, "careful", text, _SAME_MODEL, values)
    if gap <= _STANDARD_ERRORS * error:
        text += f": the difference, {gap:.3f} ± {error:.3f}, is within noise, so there is little to learn here."
        fix = "Take a stronger teacher, or data on which it knows more than the student; `samples` looks at more rows."
        return Finding(name, "careful", text, fix, values)
    if vocab_size is not None and unit == "token" and teacher.rate > _GUESSING * math.log(vocab_size):
        text += f". The teacher is better, but a guess among {vocab_size} tokens needs {math.log(vocab_size):.3f}."
        return Finding(name, "careful", text, _WORSE_TEACHER, values)
    return Finding(name, "fine", f"{text}: the teacher is better by {gap:.3f} ± {error:.3f}.", "", values)


_SAME_MODEL = (
    "Take a stronger teacher. If the student's own base is the teacher (`teacher_adapter='base'`), let it read more "
    "than the student: `teacher_system_prompt`, or a column `teacher_prompt`."
)
_WORSE_TEACHER = (
    "Check that `teacher_model_name_or_path` is the model that is meant, that it writes in the chat template of the "
    "data (see the templates above), that its tokenizer is the one that it was trained with, and that it is not "
    "damaged by quantisation (try `teacher_model_init_kwargs={'dtype': 'bfloat16'}`). If the student was trained on "
    "this very text and the teacher was not, train the teacher on it first, or take other data."
)


def _paired_gap(student: RowLikelihoods, teacher: RowLikelihoods) -> tuple[float, float | None]:
    """How much better the teacher is, in nats per unit, and the standard error; `None` of a single row."""
    gap, count = student.rate - teacher.rate, len(student.nats)
    if count < 2:
        return gap, None
    # Linearised ratio of sums: what a row adds to the difference, beside what its length lets expect
    squares = 0.0
    for own, theirs in zip(
        zip(student.nats, student.units, strict=True), zip(teacher.nats, teacher.units, strict=True), strict=True
    ):
        parts = [
            (nats - side.rate * units) / max(sum(side.units), 1e-9)
            for (nats, units), side in ((own, student), (theirs, teacher))
        ]
        squares += (parts[0] - parts[1]) ** 2
    return gap, math.sqrt(squares * count / (count - 1))


@dataclass(frozen=True)
class Written:
    r"""
    What a model wrote for some prompts.

    Args:
        completions (`list[list[int]]`):
            Token ids, up to and with the first end.
        eos_token_ids (`list[int]`):
            Ids that end a completion.
    """

    completions: list[list[int]]
    eos_token_ids: list[int]

    @property
    def length(self) -> float:
        """Mean length, in tokens."""
        return sum(map(len, self.completions)) / len(self.completions)

    @property
    def eos_rate(self) -> float:
        """Share of completions that end."""
        return sum(self._ended(ids) for ids in self.completions) / len(self.completions)

    @property
    def empty_share(self) -> float:
        """Share of completions that are nothing but an end."""
        return sum(len(ids) <= 1 and self._ended(ids) for ids in self.completions) / len(self.completions)

    @property
    def repeated_share(self) -> float:
        """Share of the n-grams of a completion that were in it before, over those long enough to have several."""
        long = [ids for ids in self.completions if len(ids) > _NGRAM]
        return sum(1.0 - distinct_n([ids], _NGRAM) for ids in long) / len(long) if long else 0.0

    def _ended(self, ids: list[int]) -> bool:
        return bool(ids) and ids[-1] in self.eos_token_ids

    def values(self) -> dict[str, float]:
        """All of these by name."""
        return {
            "length": self.length,
            "eos_rate": self.eos_rate,
            "empty_share": self.empty_share,
            "repeated_share": self.repeated_share,
        }


def rollout_finding(
    student: Written | None, teacher: Written | None, *, max_completion_length: int, lmbda: float, sample: str = ""
) -> Finding:
    r"""
    Whether the student's rollouts end and say something.

    Args:
        student ([`Written`], *optional*):
            The student's completions by the run's own sampling; `None` if it writes none in this run.
        teacher ([`Written`], *optional*):
            The teacher's for the same prompts; `None` if it writes nothing.
        max_completion_length (`int`):
            Where completions are cut off.
        lmbda (`float`):
            Share of rows that the student writes.
        sample (`str`, *optional*):
            A completion to look at.

    Returns:
        [`Finding`]: stop if no rollout ends and the student trains on rollouts alone; careful if none or few end, many
        are empty, or they run in circles.
    """
    written = {"student": student, "teacher": teacher}
    values = {name: part.values() for name, part in written.items() if part is not None}
    values["max_completion_length"] = max_completion_length
    text = " ".join(_described(name, part, max_completion_length) for name, part in written.items() if part)
    if student is None and teacher is None:
        return Finding("rollouts", "fine", "Nobody writes completions in this run.", "", values)
    verdict, problems, fixes = "fine", [], []
    for name, part in written.items():
        if part is None:
            continue
        of_part = _problem(name, part, teacher, max_completion_length)
        if of_part is not None:
            problems.append(of_part[0])
            fixes.append(of_part[1])
            alone = name == "student" and part.eos_rate == 0.0 and lmbda == 1.0
            verdict = "stop" if alone or verdict == "stop" else "careful"
    return Finding("rollouts", verdict, " ".join([text, *problems]), " ".join(dict.fromkeys(fixes)), values, sample)


def _described(name: str, part: Written, limit: int) -> str:
    return (
        f"Of {len(part.completions)} completions of the {name}, {part.eos_rate:.0%} end within "
        f"`max_completion_length` ({limit}); their mean length is {part.length:.0f} tokens, and "
        f"{part.repeated_share:.0%} of their {_NGRAM}-grams are repeated."
    )


def _problem(name: str, part: Written, teacher: Written | None, limit: int) -> tuple[str, str] | None:
    """What is wrong with completions, and what to do."""
    if part.eos_rate == 0.0:
        what = f"Not one of the {name}'s has an end"
        if name == "student" and teacher is not None and teacher.eos_rate > 0:
            return (
                f"{what}, where the teacher's do: the student does not know how to stop in this template.",
                "Train it on completions first (`trl sft`, or `lmbda=0` for some steps), check that its chat template "
                "and EOS are those of the data, or lower `lmbda` so that reference text shows it where to stop.",
            )
        return (
            f"{what}, so nothing shows where to stop.",
            f"Raise `max_completion_length` (now {limit}), check the chat template and the EOS of the {name}, or "
            "train it on completions first (`trl sft`).",
        )
    if part.empty_share > _FEW_ENDS:
        return (
            f"Most of the {name}'s end at once, without a word.",
            f"Check that the prompts end where the {name}'s chat template lets an answer begin.",
        )
    if part.eos_rate < _FEW_ENDS:
        if name == "student" and teacher is not None and teacher.eos_rate >= _MOST_END:
            return (
                "Most of the student's are cut off, where the teacher's end: the student has yet to learn to stop.",
                "Train it on completions first (`trl sft`, or `lmbda=0` for some steps), or lower `lmbda` so that "
                "reference text shows it where to stop.",
            )
        return (
            f"Most of the {name}'s are cut off.",
            f"Raise `max_completion_length` (now {limit}), or shorten what the prompts ask for.",
        )
    if part.repeated_share > _MANY_REPEATS:
        return (
            f"The {name}'s run in circles.",
            "Sample with `temperature=1.0` and `top_p=1.0`, train the student on completions first (`trl sft`), or "
            "lower `lmbda`.",
        )
    return None


def time_finding(
    seconds: dict[str, float], num_steps: int | None, *, measured: int = 1, of: int = 1, device: str = ""
) -> Finding:
    r"""
    How long a step and the run take.

    Args:
        seconds (`dict[str, float]`):
            Seconds of one optimizer step by part, such as rollouts, and forward and backward.
        num_steps (`int`, *optional*):
            Optimizer steps of the run; `None` if that is not known.
        measured (`int`, *optional*, defaults to `1`):
            Micro-batches that were timed.
        of (`int`, *optional*, defaults to `1`):
            Micro-batches of an optimizer step.
        device (`str`, *optional*):
            Where.

    Returns:
        [`Finding`]: careful from a day on.
    """
    step = sum(seconds.values())
    values: dict[str, Any] = {"seconds_per_step": step, "steps": num_steps, "parts": dict(seconds)}
    values |= {"micro_batches_measured": measured, "micro_batches": of, "device": device}
    parts = ", ".join(f"{name} {in_words(value)}" for name, value in seconds.items())
    where = f" on {device}" if device else ""
    text = f"An optimizer step takes about {in_words(step)}{where} ({parts})"
    text += f", from {measured} of its {of} micro-batches" if measured < of else ""
    if num_steps is None:
        return Finding("time", "fine", f"{text}. How many steps the run has is not known.", "", values)
    total = values["seconds"] = step * num_steps
    text += f"; the {num_steps} steps of the run take about {in_words(total)}, without evaluation and saving."
    if total <= _DAY:
        return Finding("time", "fine", text, "", values)
    slow = max(seconds, key=seconds.__getitem__)
    fix = "Set `max_steps` to what the run needs, or take fewer rows."
    if slow == "rollouts":
        fix = f"Most of it is rollouts: lower `max_completion_length` or `lmbda`, or set `use_vllm`. {fix}"
    return Finding("time", "careful", text, fix, values)


def in_words(seconds: float) -> str:
    """A duration as people say it: `"0.25 s"`, `"12 minutes"`, `"3.5 hours"`, `"2.1 days"`."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 2 * _DAY else f"{seconds / _DAY:.1f} days"
