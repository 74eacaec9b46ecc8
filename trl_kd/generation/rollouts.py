"""Sampling completions, and putting them in the place of dataset rows before the tokens of a step are counted."""

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from trl_kd._compat import input_device, swapped_generation_config
from trl_kd.data.collator import KDCollator


# Writes one completion (token ids, EOS included) for each prompt, under a seed
Writer = Callable[[list[list[int]], int], list[list[int]]]


@dataclass(frozen=True)
class Sampling:
    r"""
    How completions are drawn. The defaults sample from the model itself.

    Args:
        max_completion_length (`int`, *optional*, defaults to `256`):
            Longest completion, in tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature. `0.0` decodes greedily.
        top_p (`float`, *optional*, defaults to `1.0`):
            Probability mass of the tokens to draw from.
        top_k (`int`, *optional*, defaults to `0`):
            Number of tokens to draw from; `0` for all.
        min_p (`float`, *optional*):
            Smallest probability of a token, relative to the most likely one.
        repetition_penalty (`float`, *optional*, defaults to `1.0`):
            Penalty on tokens that occurred already; `1.0` for none.
        generation_kwargs (`dict[str, Any]`, *optional*):
            Further fields of [`~transformers.GenerationConfig`], or of vLLM's `SamplingParams` where vLLM writes; they
            win over the fields above.
        rollout_batch_size (`int`, *optional*):
            Prompts that `generate` continues at a time; all of a call by default.
    """

    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    generation_kwargs: dict[str, Any] = field(default_factory=dict)
    rollout_batch_size: int | None = None

    @classmethod
    def of(cls, args: Any) -> "Sampling":
        """From a configuration that has fields of these names; what is unset there has its default here."""
        given = {name: vars(args).get(name) for name in cls.__dataclass_fields__}
        return cls(**{name: value for name, value in given.items() if value is not None})

    def to_generation_config(self, pad_token_id: int, eos_token_ids: list[int]) -> GenerationConfig:
        """The whole truth about a rollout, with the KV cache on whatever the training forward does."""
        greedy = self.temperature == 0.0
        settings = {
            "max_new_tokens": self.max_completion_length,
            "do_sample": not greedy,
            "repetition_penalty": self.repetition_penalty,
            "pad_token_id": pad_token_id,
            "eos_token_id": eos_token_ids,
            "use_cache": True,
            "disable_compile": True,
        }
        if not greedy:
            settings |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
            if self.min_p is not None:
                settings["min_p"] = self.min_p
        return GenerationConfig(**(settings | self.generation_kwargs))


def eos_token_ids(model: Any, tokenizer: Any, **source: Any) -> list[int]:
    """
    All ids that end a completion: the tokenizer's EOS, and those of the generation config of a model, or of a path
    (`source`: its revision and the like).
    """
    if isinstance(model, str):
        try:
            config = GenerationConfig.from_pretrained(model, **source)
        except OSError:  # a model without one generates as its config says
            config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(model, **source))
    else:
        config = model.generation_config
    ids = config.eos_token_id
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return sorted({*own, *listed})


def rollout_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers, such as (seed, step, rank, micro-batch)."""
    digest = hashlib.sha256(repr(tuple(int(number) for number in numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def forked_rng(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the generators that sampling uses; give them back as they were."""
    # `manual_seed` seeds every device of the kind, so all of them are kept
    kind = "cuda" if device.type == "cpu" else device.type
    # (MPS has one generator without an index, which `fork_rng` cannot keep)
    devices = [] if kind == "mps" else range(torch.get_device_module(kind).device_count())
    with torch.random.fork_rng(devices=devices, device_type=kind):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def generate_completions(
    model: Any,
    prompts: list[list[int]],
    sampling: Sampling,
    pad_token_id: int,
    eos_token_ids: list[int],
    seed: int,
    vocab_size: int | None = None,
) -> list[list[int]]:
    r"""
    Sample one completion for each prompt, in one batch or in several of `sampling.rollout_batch_size`.

    The model's mode, its generation config and the global random state are the same afterwards.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, unwrapped.
        prompts (`list[list[int]]`):
            Token ids of the prompts.
        sampling ([`Sampling`]):
            How tokens are drawn.
        pad_token_id (`int`):
            Filler for the batch. It may equal an EOS id.
        eos_token_ids (`list[int]`):
            Ids that end a completion.
        seed (`int`):
            Seed of all draws.
        vocab_size (`int`, *optional*):
            Number of tokens that may be drawn: rows of a padded head beyond it are never written.

    Returns:
        `list[list[int]]`: completion ids, up to and with the first EOS; without EOS where the limit cut them off.
    """
    if not prompts:
        return []
    device = input_device(model)
    config = sampling.to_generation_config(pad_token_id, eos_token_ids)
    if vocab_size is not None and vocab_size < (num_rows := model.get_output_embeddings().out_features):
        config.suppress_tokens = [*(config.suppress_tokens or []), *range(vocab_size, num_rows)]
    size, completions = sampling.rollout_batch_size or len(prompts), []
    was_training = model.training
    model.eval()
    try:
        with forked_rng(device, seed), swapped_generation_config(model, config):
            for start in range(0, len(prompts), size):
                inputs = _left_padded(prompts[start : start + size], pad_token_id, device)
                output = model.generate(**inputs, generation_config=config)
                completions += output[:, inputs["input_ids"].shape[1] :].tolist()
    finally:
        model.train(was_training)
    return cut_at_eos(completions, eos_token_ids)


def _left_padded(prompts: list[list[int]], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    length = max(len(prompt) for prompt in prompts)
    padded = [[pad_token_id] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    masks = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.tensor(padded, device=device),
        "attention_mask": torch.tensor(masks, device=device),
    }


def cut_at_eos(completions: list[list[int]], eos_token_ids: list[int]) -> list[list[int]]:
    """Each completion up to and with its first EOS; whole, where it has none."""
    ends = set(eos_token_ids)
    lengths = [next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids)) for ids in completions]
    return [ids[:length] for ids, length in zip(completions, lengths, strict=True)]


def draw_on_policy(num_rows: int, lmbda: float, seed: int, step: int) -> list[bool]:
    r"""
    Which rows of an optimizer step are replaced by rollouts.

    Systematic sampling (ours): one uniform offset per step, then every 1/lmbda-th row. Each row is drawn with
    probability `lmbda`, the number of rows is `lmbda * num_rows` rounded up or down, and the rows spread evenly over
    micro-batches and ranks, so that none waits for another.

    Args:
        num_rows (`int`):
            Rows of the step, over all micro-batches and ranks, in dataset order.
        lmbda (`float`):
            Share of on-policy rows.
        seed (`int`):
            Seed of the run.
        step (`int`):
            Optimizer step.

    Returns:
        `list[bool]` of length `num_rows`; the same on every rank and after a resume.
    """
    offset = random.Random(rollout_seed(seed, step)).random()
    # Rounded, or 0.1 + 0.2 would draw a row more or less than 0.3
    ticks = [int(round(index * lmbda + offset, 9)) for index in range(num_rows + 1)]
    return [after > before for before, after in zip(ticks, ticks[1:], strict=False)]


def distinct_n(completions: list[list[int]], n: int = 2) -> float:
    """Share of different n-grams among all n-grams of the completions; 0 if there are none."""
    ngrams = [tuple(ids[i : i + n]) for ids in completions for i in range(len(ids) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def completion_text(tokenizer: Any, prompt_ids: list[int], completion_ids: list[int]) -> str:
    """
    Text of a completion, with the space that joins it to its prompt.

    SentencePiece tokenizers drop the space in front of a text that is decoded on its own, so the prompt is decoded
    with it and cut off.
    """
    prompt = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    text = tokenizer.decode([*prompt_ids, *completion_ids], skip_special_tokens=True)
    if text.startswith(prompt):
        return text[len(prompt) :]
    return tokenizer.decode(completion_ids, skip_special_tokens=True)


class RolloutWriter:
    r"""
    Replaces rows of an optimizer step by rollouts of their own prompts.

    Args:
        collator ([`KDCollator`]):
            Makes batches of rows again.
        lmbda (`float`):
            Share of rows that the student writes.
        rewrite_off_policy (`bool`):
            Whether the teacher writes the completion of every other row, or only of those that have none.
        seed (`int`):
            Seed of the run.
        rank (`int`):
            Index of this process.
        world_size (`int`):
            Number of processes.
    """

    def __init__(
        self,
        collator: KDCollator,
        lmbda: float,
        rewrite_off_policy: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.collator = collator
        self.row_format = collator if isinstance(collator, KDCollator) else KDCollator(0)
        self.lmbda = lmbda
        self.rewrite_off_policy = rewrite_off_policy
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.last_prompts: list[list[int]] = []
        self.last_completions: list[list[int]] = []

    def replace(
        self, batches: list[dict[str, torch.Tensor]], step: int, student: Writer, teacher: Writer
    ) -> list[dict[str, torch.Tensor]]:
        r"""
        Micro-batches of one optimizer step, with their rollouts in place.

        Args:
            batches (`list[dict[str, torch.Tensor]]`):
                Collated micro-batches of this rank.
            step (`int`):
                Optimizer step, the seed of all draws.
            student (`Callable`):
                Writes completions for prompts, under a seed. If it has a share, it is called once on every rank, with
                prompts or without, since its weights may have to be gathered or sent.
            teacher (`Callable`):
                The same for the teacher; called once if it has anything to write.

        Returns:
            `list[dict[str, torch.Tensor]]`
        """
        self.last_prompts, self.last_completions = [], []
        sizes = [len(batch["prompt_length"]) for batch in batches]
        drawn = draw_on_policy(sum(sizes) * self.world_size, self.lmbda, self.seed, step)
        # The loader deals micro-batches out to the ranks in turn
        firsts = [sum(sizes[:i]) * self.world_size + self.rank * size for i, size in enumerate(sizes)]
        on_policies = [drawn[first : first + size] for first, size in zip(firsts, sizes, strict=True)]
        rows = [self.row_format.rows_of(batch) for batch in batches]
        flat = list(zip(sum(rows, []), sum(on_policies, []), strict=True))
        by_student = [row for row, is_on_policy in flat if is_on_policy]
        by_teacher = [row for row, is_on_policy in flat if not is_on_policy and self._needs_teacher(row)]
        if self.lmbda > 0:
            self._write(by_student, "student", student, rollout_seed(self.seed, step, self.rank, 0))
            self.last_prompts = [row["input_ids"][: row["prompt_length"]] for row in by_student]
            self.last_completions = [row["input_ids"][row["prompt_length"] :] for row in by_student]
        if by_teacher:
            self._write(by_teacher, "teacher", teacher, rollout_seed(self.seed, step, self.rank, 1))
        written = {id(row) for row in by_student + by_teacher}
        return [
            self._collate(part, batch) if any(id(row) in written for row in part) else batch
            for part, batch in zip(rows, batches, strict=True)
        ]

    def _needs_teacher(self, row: dict[str, Any]) -> bool:
        return self.rewrite_off_policy or all(label == -100 for label in row["labels"])

    def _write(self, rows: list[dict[str, Any]], name: str, writer: Writer, seed: int) -> None:
        """Completions in place of those that the rows have."""
        prompts = [self.row_format.prompt(row, name) for row in rows]
        for row, completion in zip(rows, writer(prompts, seed), strict=True):
            row |= self.row_format.complete(row, completion, name) | {"is_on_policy": name == "student"}

    def _collate(self, rows: list[dict[str, Any]], like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        device = like["input_ids"].device
        return {name: tensor.to(device) for name, tensor in self.collator(rows).items()}
