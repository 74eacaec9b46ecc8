"""Evaluation of models on a suite: completions of several seeds, measured, and kept as they come."""

import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from trl_kd._compat import context_length
from trl_kd.evaluation.measures import LIKELIHOOD_MEASURES, MEASURES, TEACHER_MEASURES
from trl_kd.evaluation.metrics import load_metric, text_values
from trl_kd.evaluation.models import EvalModel, Reader, library_versions
from trl_kd.evaluation.per_token import compare_rows, likelihood_rows
from trl_kd.evaluation.store import ResultStore, Run, Sample
from trl_kd.evaluation.suite import EvalRow, Suite, digest_of
from trl_kd.generation import Sampling, generate_completions, rollout_seed


logger = logging.get_logger(__name__)

# Measures that compare a completion with references
_WITH_REFERENCES = ("rouge_l", "exact_match", "chrf")
# What is kept of a model's own completions, by its name in [`compare_rows`]
_OWN = {
    "own_forward_kl": "forward_kl",
    "own_reverse_kl": "reverse_kl",
    "own_total_variation": "total_variation",
    "own_entropy": "student_entropy",
    "own_teacher_nll": "teacher_nll",
}
_NOT_FINITE = (
    "its weights hold NaN or infinity, or its dtype overflows. Look at the loss of its training, or load it in "
    "bfloat16 or float32. What was finished before is kept."
)
_DATA = ("forward_kl", "reverse_kl", "total_variation", "nll")


def _text_metrics(suite: Suite, with_references: bool) -> list[str]:
    """Metrics of texts that can be had; each is loaded once, so that a missing one is found before any work."""
    names = [name for name in suite.metrics if name not in TEACHER_MEASURES | LIKELIHOOD_MEASURES]
    for name in names:
        load_metric(name)
    if not with_references:
        left_out = [name for name in names if name in _WITH_REFERENCES or name not in MEASURES]
        if left_out:
            logger.warning(f"The dataset has no references, so {', '.join(left_out)} cannot be measured.")
        names = [name for name in names if name not in left_out]
    return names


def _options(name: str, suite: Suite) -> dict[str, Any]:
    """What a metric is told beside the texts."""
    return {"pattern": suite.answer_pattern} if name == "exact_match" else {}


def _fitting_rows(models: Sequence[EvalModel], rows: Sequence[EvalRow], suite: Suite) -> list[EvalRow]:
    """Rows whose prompt is short enough for every model."""
    if suite.max_prompt_length is None:
        return list(rows)
    kept = list(rows)
    for model in models:
        reader = Reader(None, model.tokenizer, suite.chat)
        kept = [row for row in kept if len(reader.prompt(row)) <= suite.max_prompt_length]
    if not kept:
        raise ValueError(
            f"All {len(rows)} prompts are longer than `max_prompt_length` ({suite.max_prompt_length} tokens), so none "
            "is left to answer. Raise it."
        )
    if len(kept) < len(rows):
        logger.warning(
            f"{len(rows) - len(kept)} of {len(rows)} prompts are longer than `max_prompt_length` "
            f"({suite.max_prompt_length} tokens) for some model and are left out for all."
        )
    return kept


@dataclass
class Evaluation:
    r"""
    An evaluation of several models on one suite. `run` does the work; what is finished stays in the store.

    Args:
        models (`Sequence[EvalModel]`):
            The models, at most one of them a teacher.
        rows (`Sequence[EvalRow]`):
            Prompts and references, from [`read_rows`].
        suite ([`Suite`]):
            How completions are drawn and what is measured.
        dataset (`str`):
            Name of the dataset.
        name (`str`, *optional*):
            Name of the run in the store. Defaults to that of the suite.
        batch_size (`int`, *optional*, defaults to `16`):
            Prompts per batch. It decides which completions share a seed, so a run goes on only with the same.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Raises:
        ValueError: If names repeat, there are several teachers, a metric does not exist or no prompt is left.
    """

    models: Sequence[EvalModel]
    rows: Sequence[EvalRow]
    suite: Suite
    dataset: str
    name: str | None = None
    batch_size: int = 16
    progress: bool = True

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` is {self.batch_size}, so no batch holds a prompt. Set it to 1 or more.")
        names = [model.name for model in self.models]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"The models are called {names}, but there must be at least one, and each needs a name of its own. "
                "Give names, as in `name=path`."
            )
        teachers = [model.name for model in self.models if model.role == "teacher"]
        if len(teachers) > 1:
            raise ValueError(f"{teachers} are all teachers, but models are compared with one. Keep one of them.")
        # The teacher comes first: others are measured against what it wrote
        self.models = sorted(self.models, key=lambda model: model.role != "teacher")
        self.with_references = bool(self.rows) and bool(self.rows[0].references)
        self.text_metrics = _text_metrics(self.suite, self.with_references)
        if not self.measurable():
            raise ValueError(
                f"None of the metrics {', '.join(self.suite.metrics)} can be measured: the dataset has "
                f"{'' if self.with_references else 'no '}references, and there is {'a' if teachers else 'no'} "
                "teacher. Name others by `metrics`, or give what they need."
            )
        self._try_metrics()
        self.rows = _fitting_rows(self.models, self.rows, self.suite)

    def _try_metrics(self) -> None:
        """Measure the references themselves: what a metric cannot take is found before anything is written."""
        if self.with_references:
            references = [list(row.references) for row in self.rows]
            for name in self.text_metrics:
                if name not in ("length", "eos_share"):
                    text_values(name, [texts[0] for texts in references], references, **_options(name, self.suite))

    def measurable(self) -> list[str]:
        """Metrics of the suite that references and teacher allow; those of token by token need its vocabulary too."""
        found = list(self.text_metrics)
        if self.with_references:
            found += LIKELIHOOD_MEASURES
        if any(model.role == "teacher" for model in self.models):
            found += [name for name in TEACHER_MEASURES if self.with_references or name not in _DATA]
        return [name for name in self.suite.metrics if name in found]

    def begin(self, store: ResultStore) -> Run:
        """The run in the store: a new one, or one that was cut off."""
        return store.begin(
            "eval",
            self.name or self.suite.name,
            settings=self.suite.settings() | {"batch_size": self.batch_size, "loading": self._loading()},
            data=digest_of(self.rows),
            dataset=self.dataset,
            models=[model.entry() for model in self.models],
            versions=library_versions(),
        )

    def _loading(self) -> dict[str, dict[str, str]]:
        """How each model is loaded, as far as that decides what it writes."""
        hidden = ("token", "cache_dir")
        return {
            model.name: {key: str(value) for key, value in model.init_kwargs.items() if key not in hidden}
            for model in self.models
        }

    def run(self, run: Run) -> None:
        r"""
        Evaluate all models; what `run` has already is not done again.

        Args:
            run ([`Run`]):
                From `begin`. It is not finished here, as more may be added to it.

        Raises:
            ValueError: If a model's logits are not finite, or it writes nothing.
        """
        teacher = None
        batches = len(range(0, len(self.rows), self.batch_size))
        total = len(self.models) * batches * (len(self.suite.seeds) + self.with_references)
        with tqdm(total=total, desc="Evaluating", disable=not self.progress) as bar:
            for model in self.models:
                bar.set_postfix_str(model.name)
                examined = _Examined.of(model, self.suite, teacher)
                if model.role == "teacher":
                    teacher = examined
                    examined.teacher = examined
                _examine(self, examined, run, bar)
                del examined
                _free_memory()
        if teacher is not None:
            teacher.teacher = None  # it stands for itself there, which would keep it in memory
        del teacher
        _free_memory()


def _free_memory() -> None:
    """Give a model's memory back, to this process and to those that measure what serving takes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class _Examined:
    """A model in memory, with what it reads and writes by."""

    name: str
    model: Any
    reader: Reader
    teacher: "_Examined | None"

    @classmethod
    def of(cls, model: EvalModel, suite: Suite, teacher: "_Examined | None") -> "_Examined":
        loaded = model.load()
        return cls(model.name, loaded, Reader(loaded, model.tokenizer, suite.chat), teacher)

    @cached_property
    def positions(self) -> int:
        """Number of tokens that it was made for."""
        own = context_length(self.model.config) or sys.maxsize
        if self.teacher in (None, self) or not self.shares_vocabulary:
            return own
        return min(own, self.teacher.positions)

    @cached_property
    def shares_vocabulary(self) -> bool:
        """Whether it can be compared with the teacher token by token."""
        if self.teacher is None:
            return False
        return self.reader.tokenizer.get_vocab() == self.teacher.reader.tokenizer.get_vocab()


def _examine(task: Evaluation, examined: _Examined, run: Run, bar: tqdm) -> None:
    """All seeds of one model."""
    suite, missing = task.suite, []
    for seed in suite.seeds:
        samples = {sample.index: sample for sample in run.samples(examined.name, seed)}
        if len(samples) == len(task.rows) and all(_is_measured(task, sample) for sample in samples.values()):
            _check_written(examined.name, list(samples.values()))
            bar.update(len(range(0, len(task.rows), task.batch_size)))
        else:
            missing.append((seed, samples))
    on_data = _on_references(task, examined, bar) if missing and task.with_references else {}
    for seed, samples in missing:
        for number, start in enumerate(range(0, len(task.rows), task.batch_size)):
            batch = task.rows[start : start + task.batch_size]
            if not all(row.index in samples for row in batch):
                written = _write(task, examined, batch, seed, rollout_seed(seed, number))
                for row, sample in zip(batch, written, strict=True):
                    sample.values |= on_data.get(row.index, {})
                    samples[row.index] = sample
                run.add_samples(examined.name, seed, written)
            bar.update()
        finished = [samples[row.index] for row in task.rows]
        _check_written(examined.name, finished)
        _measure_texts(task, examined, finished)
        run.add_samples(examined.name, seed, finished)
    _summarise(task, examined, run)


def _is_measured(task: Evaluation, sample: Sample) -> bool:
    return all(name in sample.values for name in task.text_metrics)


def _checked(name: str, index: int, values: torch.Tensor) -> torch.Tensor:
    if not values.isfinite().all():
        raise ValueError(f"The logits of '{name}' are not finite at row {index}: {_NOT_FINITE}")
    return values


def _on_references(task: Evaluation, examined: _Examined, bar: tqdm) -> dict[int, dict[str, tuple[float, float]]]:
    """What the model makes of the references, by row; `(value, weight)` by measure."""
    found = {}
    for start in range(0, len(task.rows), task.batch_size):
        batch = task.rows[start : start + task.batch_size]
        prompts, answers = zip(*(examined.reader.answer(row, row.references[0]) for row in batch), strict=True)
        _check_length(examined, batch, prompts, task.suite)
        whole = [len(answer) for answer in answers]
        answers = [answer[: examined.positions - len(prompt)] for prompt, answer in zip(prompts, answers, strict=True)]
        if examined.shares_vocabulary:
            models = (examined.model, examined.teacher.model)
            values = list(compare_rows(*models, prompts, answers, batch_size=len(batch)))
        else:
            values = [{"nll": nll} for nll in likelihood_rows(examined.model, prompts, answers, batch_size=len(batch))]
        for row, value, length, prompt, answer in zip(batch, values, whole, prompts, answers, strict=True):
            tokens = len(value["nll"])
            nll = _checked(examined.name, row.index, value["nll"]).sum().item()
            read = row.references[0] if tokens == length else examined.reader.text(prompt, answer)
            num_bytes = len(read.encode())
            found[row.index] = {name: (value[name].mean().item(), tokens) for name in _DATA if name in value}
            found[row.index]["bits_per_byte"] = (nll / log(2) / num_bytes, num_bytes)
        bar.update()
    return found


def _write(task: Evaluation, examined: _Examined, batch: Sequence[EvalRow], seed: int, noise: int) -> list[Sample]:
    """Completions of one batch, and how the teacher sees them."""
    reader, suite = examined.reader, task.suite
    prompts = [reader.prompt(row) for row in batch]
    _check_length(examined, batch, prompts, suite)
    _check_logits(examined, batch, prompts)
    sampling = Sampling(suite.max_completion_length, suite.temperature, suite.top_p, suite.top_k)
    try:
        completions = generate_completions(
            *(examined.model, prompts, sampling, reader.pad_token_id, reader.eos_token_ids),
            seed=noise,
            vocab_size=reader.vocab_size,
        )
    except RuntimeError as error:
        if "probability tensor contains" in str(error):  # NaN that only some text leads to
            raise ValueError(f"The logits of '{examined.name}' are not finite: {_NOT_FINITE}") from error
        raise
    if suite.temperature == 0.0 and not examined.shares_vocabulary:
        # Nothing has been drawn that would have failed on NaN, and nobody else reads these states
        for row, values in zip(
            batch, likelihood_rows(examined.model, prompts, completions, batch_size=len(batch)), strict=True
        ):
            _checked(examined.name, row.index, values)
    samples = []
    for row, prompt, ids in zip(batch, prompts, completions, strict=True):
        ended = ids[-1] in reader.eos_token_ids
        samples.append(
            Sample(
                index=row.index,
                prompt=row.text,
                references=list(row.references),
                completion=reader.text(prompt, ids),
                # One text of a prompt is enough to be looked at
                tokens=reader.pieces(ids) if seed == suite.seeds[0] else [],
                divergence=None,
                ended=ended,
                values={},
                token_ids=list(ids),
            )
        )
    if examined.teacher is not None:
        _compare_own(examined, batch, samples, prompts)
    return samples


def _check_length(examined: _Examined, batch: Sequence[EvalRow], prompts: Sequence[list[int]], suite: Suite) -> None:
    for row, prompt in zip(batch, prompts, strict=True):
        if len(prompt) + suite.max_completion_length > examined.positions:
            raise ValueError(
                f"The prompt of row {row.index} has {len(prompt)} tokens, which with `max_completion_length` "
                f"({suite.max_completion_length}) is more than the {examined.positions} positions of "
                f"'{examined.name}'. Set `max_prompt_length` in the template to leave such rows out for all, or "
                "lower `max_completion_length`."
            )


def _check_logits(examined: _Examined, batch: Sequence[EvalRow], prompts: Sequence[list[int]]) -> None:
    """Find NaN before it is drawn from, where `generate` would speak of a probability tensor."""
    lasts = likelihood_rows(
        examined.model, [ids[:-1] or ids for ids in prompts], [ids[-1:] for ids in prompts], batch_size=len(prompts)
    )
    for row, values in zip(batch, lasts, strict=True):
        _checked(examined.name, row.index, values)


def _compare_own(
    examined: _Examined, batch: Sequence[EvalRow], samples: Sequence[Sample], prompts: Sequence[list[int]]
) -> None:
    """Add what the teacher says of a model's own completions, token by token or as text."""
    teacher = examined.teacher
    if examined.shares_vocabulary:
        completions = [sample.token_ids for sample in samples]
        found = compare_rows(examined.model, teacher.model, prompts, completions, batch_size=len(batch))
        for sample, values in zip(samples, found, strict=True):
            means = {name: _checked(examined.name, sample.index, values[key]).mean() for name, key in _OWN.items()}
            sample.values |= {name: (mean.item(), len(sample.token_ids)) for name, mean in means.items()}
            sample.divergence = [round(value, 4) for value in values["total_variation"].tolist()]
        return
    # The teacher reads the text in tokens of its own; what is empty is nothing but an end
    for row, sample in zip(batch, samples, strict=True):
        sample.values["own_teacher_nll"] = (0.0, 0)
        if sample.completion.strip():
            prompt, ids = teacher.reader.answer(row, sample.completion, sample.ended)
        else:
            prompt, ids = teacher.reader.prompt(row), teacher.reader.eos_token_ids[:1] * sample.ended
        ids = ids[: max(0, teacher.positions - len(prompt))]
        if ids:
            (values,) = likelihood_rows(teacher.model, [prompt], [ids], batch_size=1)
            mean = _checked(teacher.name, row.index, values).mean().item()
            sample.values["own_teacher_nll"] = (mean, len(ids))


def _check_written(name: str, samples: Sequence[Sample]) -> None:
    if all(len(sample.token_ids) == 1 and sample.ended for sample in samples):
        raise ValueError(
            f"Every completion of '{name}' ends at its first token, so there is no text to judge. It has learned to "
            "say nothing, or the prompts end with its EOS token: look at a prompt with its tokenizer, and at `chat` "
            "and the chat template. What was finished before is kept."
        )


def _measure_texts(task: Evaluation, examined: _Examined, samples: Sequence[Sample]) -> None:
    """Add the metrics of texts."""
    predictions, references = [sample.completion for sample in samples], [sample.references for sample in samples]
    for name in task.text_metrics:
        if name == "length":
            values = [float(len(sample.token_ids)) for sample in samples]
        elif name == "eos_share":
            values = [100.0 * sample.ended for sample in samples]
        else:
            values = text_values(name, predictions, references, **_options(name, task.suite))
        for sample, value in zip(samples, values, strict=True):
            sample.values[name] = (value, 1.0)


def _summarise(task: Evaluation, examined: _Examined, run: Run) -> None:
    """The row per metric and seed, and the divergence by position."""
    sums, counts = [], []
    for seed in task.suite.seeds:
        samples = run.samples(examined.name, seed)
        results = {}
        for name in samples[0].values:
            pairs = [sample.values[name] for sample in samples]
            weight = sum(weight for _, weight in pairs)
            results[name] = sum(value * weight for value, weight in pairs) / weight if weight else 0.0
        if examined.teacher is not None:
            own = [sample.values["own_teacher_nll"] for sample in run.samples(examined.teacher.name, seed)]
            reached = sum(value * weight for value, weight in own) / sum(weight for _, weight in own)
            results["imitation_gap"] = results["own_teacher_nll"] - reached
        run.add_results(examined.name, seed, results)
        for sample in samples:
            for position, value in enumerate(sample.divergence or ()):
                if position == len(sums):
                    sums.append(0.0)
                    counts.append(0)
                sums[position] += value
                counts[position] += 1
    if sums:
        means = [total / count for total, count in zip(sums, counts, strict=True)]
        run.set_details(examined.name, "by_position", {"total_variation": means, "count": counts})
