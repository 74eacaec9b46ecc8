"""
What `compare.py` works on: a task in which the first word decides how hard the later ones are, a teacher and a student
for it, made from nothing, and what is measured of them.

A prompt is eight dice. The answer is their running totals, in either order; its first word says in which:

    <s> 3 1 6 2 2 5 4 1 forward 3 4 10 12 14 19 23 24 </s>
    <s> 3 1 6 2 2 5 4 1 backward 24 23 19 14 12 10 4 3 </s>

Forward, a total follows from the one before it and from one die, always the same number of words back. Backward, the
first total needs all dice at once, and each later one a die at another distance. Both are right, equally long and
equally frequent in the data: after a last die of 1, 2 or 3 there are 70 % forward, after the others 30 %.
"""

import json
import random
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from trl_kd.evaluation import evaluate_fidelity, sample_completions
from trl_kd.generation import Sampling, generate_completions


NUM_DICE, NUM_FACES = 8, 6
CHOICES = ("forward", "backward")
# The choice, the totals, `</s>`
COMPLETION_LENGTH = NUM_DICE + 2

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
# A die of 3 and a total of 3 are one word
WORDS = [PAD, BOS, EOS, *CHOICES, *(str(number) for number in range(1, NUM_DICE * NUM_FACES + 1))]
IDS = {word: index for index, word in enumerate(WORDS)}

NUM_HELD_OUT = 1000

TEACHER = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 6}
STUDENT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One id per word."""
    backend = Tokenizer(models.WordLevel(IDS, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def make_prompts(number: int) -> dict[str, list[list[int]]]:
    """Prompts of three splits, `"test"`, `"validation"` and `"train"` (`number` of them), no two the same."""
    rolls = random.Random(0).sample(range(NUM_FACES**NUM_DICE), 2 * NUM_HELD_OUT + number)
    prompts = [
        [IDS[BOS], *(IDS[str(roll // NUM_FACES**i % NUM_FACES + 1)] for i in range(NUM_DICE))] for roll in rolls
    ]
    return {
        "test": prompts[:NUM_HELD_OUT],
        "validation": prompts[NUM_HELD_OUT : 2 * NUM_HELD_OUT],
        "train": prompts[2 * NUM_HELD_OUT :],
    }


def answer(prompt: list[int], choice: str) -> list[int]:
    """The right completion of a prompt after one choice."""
    totals = list(accumulate(int(WORDS[index]) for index in prompt[1:]))
    totals = totals if choice == "forward" else totals[::-1]
    return [IDS[choice], *(IDS[str(total)] for total in totals), IDS[EOS]]


def is_correct(prompt: list[int], completion: list[int]) -> bool:
    """Whether a completion is right from its first word to its last."""
    return any(completion == answer(prompt, choice) for choice in CHOICES)


def as_rows(prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> Dataset:
    """Tokenised rows whose completion is trained."""
    return Dataset.from_list(
        [
            {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
    )


def forward_share(prompt: list[int]) -> float:
    """How often the data answers a prompt forward."""
    return 0.7 if int(WORDS[prompt[-1]]) <= NUM_FACES // 2 else 0.3


def right_answers(prompts: Sequence[list[int]]) -> Dataset:
    """Rows with a right completion, in an order drawn as the data has it."""
    draw = random.Random(1).random
    return as_rows(
        prompts, [answer(prompt, CHOICES[0] if draw() < forward_share(prompt) else CHOICES[1]) for prompt in prompts]
    )


def training_arguments(
    output_dir: str | Path, max_steps: int, batch_size: int, learning_rate: float, seed: int = 0
) -> dict[str, Any]:
    """What all runs here share: optimizer and schedule, a cosine down to a tenth."""
    return {
        "output_dir": str(output_dir),
        "seed": seed,
        "max_steps": max_steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
        "warmup_steps": 10,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 50,
        "dataloader_pin_memory": False,
    }


def trained_model(
    folder: str | Path,
    sizes: dict[str, int],
    prompts: Sequence[list[int]],
    max_steps: int,
    batch_size: int,
    learning_rate: float,
) -> Path:
    """Trains a random Llama on right answers and saves it; a folder that is already there is used as it is."""
    folder = Path(folder)
    if (folder / "config.json").exists():
        print(f"Using the model in {folder}")
        return folder
    start = time.perf_counter()
    set_seed(0)
    special = {"bos_token_id": IDS[BOS], "eos_token_id": IDS[EOS], "pad_token_id": IDS[PAD]}
    config = LlamaConfig(
        vocab_size=len(WORDS), max_position_embeddings=32, tie_word_embeddings=True, **sizes, **special
    )
    trainer = SFTTrainer(
        model=LlamaForCausalLM(config),
        args=SFTConfig(**training_arguments(folder, max_steps, batch_size, learning_rate) | {"warmup_steps": 50}),
        train_dataset=right_answers(prompts[: max_steps * batch_size]),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    trainer.save_model(str(folder))
    size = trainer.model.num_parameters()
    print(f"{size} parameters, {max_steps} steps in {time.perf_counter() - start:.0f} s, saved in {folder}")
    return folder


def teacher_texts(file: str | Path, teacher: PreTrainedModel, prompts: Sequence[list[int]]) -> list[list[int]]:
    """The teacher's completions of the prompts; written to a file and read from it next time."""
    file = Path(file)
    if file.exists():
        completions = json.loads(file.read_text())
        if len(completions) != len(prompts):
            raise ValueError(
                f"{file} has {len(completions)} texts, but {len(prompts)} are wanted: it was made for other settings. "
                "Remove it, or choose another `--output_dir`."
            )
        return completions
    completions = sample_completions(
        teacher, prompts, max_new_tokens=COMPLETION_LENGTH, batch_size=500, seed=1, description="Teacher writes"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(completions))
    return completions


def describe_answers(
    prompts: Sequence[list[int]], completions: Sequence[list[int]], greedy: Sequence[list[int]]
) -> dict[str, float]:
    """
    What can be said of answers without a teacher.

    `prompts` may hold a prompt several times: `distinct_answers` counts the different right answers to each prompt
    (two exist), averaged over prompts. `greedy` answers the different prompts.
    """
    right = [is_correct(*pair) for pair in zip(prompts, completions, strict=True)]
    distinct = {tuple(prompt): set() for prompt in prompts}
    for prompt, completion, is_right in zip(prompts, completions, right, strict=True):
        if is_right:
            distinct[tuple(prompt)].add(tuple(completion))
    metrics = {
        "exact_match": sum(right) / len(right),
        "exact_match_greedy": sum(map(is_correct, distinct, greedy)) / len(greedy),
        "distinct_answers": sum(map(len, distinct.values())) / len(distinct),
    }
    for choice in CHOICES:
        chosen = [r for completion, r in zip(completions, right, strict=True) if completion[0] == IDS[choice]]
        metrics[f"{choice}_share"] = len(chosen) / len(right)
        metrics[f"{choice}_exact_match"] = sum(chosen) / max(len(chosen), 1)
        metrics[f"{choice}_share_greedy"] = sum(ids[0] == IDS[choice] for ids in greedy) / len(greedy)
    return metrics


def held_out_evaluation(
    teacher: PreTrainedModel, prompts: Sequence[list[int]], draws: int
) -> Callable[[PreTrainedModel], dict[str, float]]:
    """A function that judges a student; each student meets the same prompts and the same noise."""
    repeated = [*prompts] * draws
    sampling = {"max_new_tokens": COMPLETION_LENGTH, "batch_size": 500, "seed": 0, "progress": False}
    written = sample_completions(teacher, repeated, **sampling)

    def evaluate(student: PreTrainedModel) -> dict[str, float]:
        greedy = generate_completions(
            student, [*prompts], Sampling(COMPLETION_LENGTH, temperature=0.0), IDS[PAD], [IDS[EOS]], seed=0
        )
        # Those that `evaluate_fidelity` draws again: the same seed, the same texts
        completions = sample_completions(student, repeated, **sampling)
        fidelity = evaluate_fidelity(student, teacher, repeated, teacher_completions=written, **sampling)
        return describe_answers(repeated, completions, greedy) | fidelity

    return evaluate


@torch.no_grad()
def choice_probabilities(model: PreTrainedModel, prompts: Sequence[list[int]]) -> torch.Tensor:
    """Probability of each choice after each prompt, `(B, 2)`."""
    logits = model(input_ids=torch.tensor([*prompts])).logits[:, -1]
    return logits.softmax(dim=-1)[:, [IDS[choice] for choice in CHOICES]]


def own_entropy(model: PreTrainedModel, prompts: Sequence[list[int]]) -> float:
    """Mean entropy of a model's words on its own answers, one to each prompt."""
    sampling = {"max_new_tokens": COMPLETION_LENGTH, "batch_size": 500, "seed": 0, "progress": False}
    written = sample_completions(model, prompts, **sampling)
    metrics = evaluate_fidelity(model, model, prompts, teacher_completions=written, **sampling)
    return metrics["student_states/student_entropy"]
