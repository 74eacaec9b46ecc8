"""
What the two story examples share: the stories as token ids, the student, its warm start and the teacher's texts.

The teacher is a 260K-parameter Llama trained on TinyStories, whose `<s>` starts a story and ends it. A student of a
third of its size is first trained on the stories themselves, as a student of a real run has been pretrained.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from trl_kd.evaluation import evaluate_fidelity, sample_completions


DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"

PROMPT_LENGTH = 64
COMPLETION_LENGTH = 96
MIN_STORY_LENGTH = 80
WINDOW_LENGTH = PROMPT_LENGTH + COMPLETION_LENGTH + 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that both scripts have."""
    parser.add_argument("--teacher", default=str(DATA / "models" / "stories260K"), help="Folder of the teacher.")
    parser.add_argument("--train_file", default=str(DATA / "tinystories" / "train.jsonl"), help="Stories to train on.")
    parser.add_argument("--test_file", default=str(DATA / "tinystories" / "test.jsonl"), help="Held-out stories.")
    parser.add_argument(
        "--warm_start", help="Folder of the warm-started student; made there if absent. Default: inside `output_dir`."
    )
    parser.add_argument("--warm_start_steps", type=int, default=2500, help="Steps of SFT that make the student.")
    parser.add_argument("--max_steps", type=int, default=200, help="Optimizer steps of each method.")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="Peak learning rate of each method.")
    parser.add_argument(
        "--texts_per_story", type=int, default=2, help="Teacher-written continuations of each training prompt."
    )
    parser.add_argument("--num_test_stories", type=int, help="Held-out stories to evaluate on. Default: all.")


def load_teacher(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The teacher in float32 and its tokenizer, which is the student's too."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


def load_stories(path: str, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Stories as token ids, `<s>` in front (the tokenizer adds it) and behind."""
    with open(path, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    # Not verbose: a story may be longer than the model's context, but is cut before any model sees it
    return [ids + [tokenizer.eos_token_id] for ids in tokenizer(texts, verbose=False)["input_ids"]]


def split_stories(stories: Sequence[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts (the first tokens of a story) and their continuations, from stories that are long enough."""
    stories = [story for story in stories if len(story) > MIN_STORY_LENGTH]
    end = PROMPT_LENGTH + COMPLETION_LENGTH
    return [story[:PROMPT_LENGTH] for story in stories], [story[PROMPT_LENGTH:end] for story in stories]


def as_rows(prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> Dataset:
    """Tokenised rows whose completion is trained. A continuation cut at its limit gets no end of story."""
    return Dataset.from_list(
        [
            {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
    )


def new_student(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A random Llama with 87K parameters, a third of the teacher's."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=3,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def common_arguments(output_dir: str | Path, seed: int = 0) -> dict[str, Any]:
    """Training arguments that every run shares, whichever trainer makes it."""
    return {
        "output_dir": str(output_dir),
        "seed": seed,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 20,
        "dataloader_pin_memory": False,
    }


def method_arguments(
    output_dir: str | Path, max_steps: int, learning_rate: float = 2e-3, seed: int = 0
) -> dict[str, Any]:
    """The budget and the schedule that all methods are given: 8 sequences a step, cosine down to a tenth."""
    return common_arguments(output_dir, seed) | {
        "max_steps": max_steps,
        "per_device_train_batch_size": 8,
        "learning_rate": learning_rate,
        "warmup_steps": 10,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    }


def warm_start(
    folder: str | Path, tokenizer: PreTrainedTokenizerBase, stories: Sequence[list[int]], max_steps: int
) -> Path:
    """Trains the student on windows of the stories and saves it; a folder that is already there is used as it is."""
    folder = Path(folder)
    if (folder / "config.json").exists():
        print(f"Using the warm-started student in {folder}")
        return folder
    start = time.perf_counter()
    set_seed(0)
    windows = [story[i : i + WINDOW_LENGTH] for story in stories for i in range(0, len(story) - 1, WINDOW_LENGTH)]
    trainer = SFTTrainer(
        model=new_student(tokenizer),
        args=SFTConfig(
            **common_arguments(folder)
            | {
                "max_steps": max_steps,
                "per_device_train_batch_size": 16,
                "learning_rate": 5e-3,
                "warmup_steps": 50,
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
                "logging_steps": 100,
                "max_length": None,
            }
        ),
        train_dataset=Dataset.from_dict({"input_ids": windows}),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder))
    print(f"Warm start: {max_steps} steps in {time.perf_counter() - start:.0f} s, saved in {folder}")
    return folder


def teacher_texts(
    file: str | Path, teacher: PreTrainedModel, prompts: Sequence[list[int]], texts_per_story: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, each several times, and the teacher's continuations; written to a file and read from it next time."""
    file = Path(file)
    prompts = [prompt for prompt in prompts for _ in range(texts_per_story)]
    if file.exists():
        completions = json.loads(file.read_text())
        if len(completions) != len(prompts):
            raise ValueError(
                f"{file} has {len(completions)} texts, but {len(prompts)} are wanted: it was made from other stories, "
                "or with another `--texts_per_story`. Remove it, or choose another `--output_dir`."
            )
        return prompts, completions
    completions = sample_completions(
        teacher, prompts, max_new_tokens=COMPLETION_LENGTH, batch_size=200, seed=1, description="Teacher writes"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(completions))
    return prompts, completions


def held_out_evaluation(
    teacher: PreTrainedModel, stories: Sequence[list[int]], draws: int = 1
) -> Callable[[PreTrainedModel], dict[str, float]]:
    """A function that compares a student with the teacher; each student meets the same prompts and the same noise."""
    prompts, references = split_stories(stories)
    prompts, references = prompts * draws, references * draws
    sampling = {"max_new_tokens": COMPLETION_LENGTH, "batch_size": 128, "seed": 0}
    completions = sample_completions(teacher, prompts, **sampling, description="Teacher rollouts")

    def evaluate(student: PreTrainedModel) -> dict[str, float]:
        return evaluate_fidelity(student, teacher, prompts, references, teacher_completions=completions, **sampling)

    return evaluate
