"""
All of it on a CPU, offline, in about two minutes: makes a text, a tokenizer and a teacher, fine-tunes a small student,
distils it with AMM, and compares the two students with the teacher.

```bash
trl-kd demo
```
"""

import logging
import os
import random
import re
import tempfile
import time
import warnings
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import Console
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Size:
    """Width and depth of a model, and how it is fine-tuned."""

    hidden_size: int
    layers: int
    steps: int
    learning_rate: float


TEACHER = Size(hidden_size=128, layers=2, steps=450, learning_rate=4e-3)
STUDENT = Size(hidden_size=64, layers=2, steps=200, learning_rate=3e-3)
AMM_STEPS = 300
AMM_LEARNING_RATE = 3e-3
BATCH_SIZE = 32
MAX_COMPLETION_LENGTH = 48
TRAIN_STORIES = 8000
TEST_STORIES = 96

NAMES = {"Mia": "she", "Ben": "he", "Zoe": "she", "Tom": "he", "Ida": "she", "Max": "he", "Eva": "she", "Leo": "he"}
THINGS = ("marbles", "apples", "stamps", "shells", "pencils", "buttons")
COLOURS = ("red", "blue", "green", "white", "yellow")
PLACES = ("near the old well", "under the bridge", "behind the barn", "at the market", "on the beach", "in the attic")
GLAD, SORRY = ("happy", "proud", "full of plans"), ("sad", "tired", "not sorry at all")
NUMBERS = "none one two three four five six seven eight nine ten eleven twelve".split()


def make_story(rng: random.Random) -> dict[str, str]:
    """One story with a sum in it: the first sentence is the prompt, the rest the completion."""
    name, friend = rng.sample(list(NAMES), 2)
    pronoun, thing, colour = NAMES[name], rng.choice(THINGS), rng.choice(COLOURS)
    first, second = rng.randint(2, 6), rng.randint(1, 6)
    # Each thing has its usual place.
    usual = THINGS.index(thing)
    place = rng.choices(PLACES, weights=[6 if index == usual else 1 for index in range(len(PLACES))])[0]
    is_gain = second > first or rng.random() < 0.5
    if is_gain:
        events = (f"finds {NUMBERS[second]} more {place}", f"gets {NUMBERS[second]} more from {friend}")
    else:
        events = (f"loses {NUMBERS[second]} of them {place}", f"gives {NUMBERS[second]} of them to {friend}")
    event = rng.choices(events, weights=(2, 1))[0]
    total = NUMBERS[first + second if is_gain else first - second]
    mood = rng.choices(GLAD if is_gain else SORRY, weights=(3, 2, 1))[0]
    end = rng.choices((f"{pronoun} is {mood}", f"{friend} is {mood}", f"{pronoun} goes home"), weights=(3, 2, 1))[0]
    sentences = [f"{pronoun} {event}", f"now {pronoun} has {total}", end]
    return {
        "prompt": f"{name} has {NUMBERS[first]} {colour} {thing}.",
        "completion": "".join(f" {sentence[0].upper()}{sentence[1:]}." for sentence in sentences),
    }


def make_stories(count: int, seed: int) -> "Dataset":
    """Dataset of stories with the columns `prompt` and `completion`."""
    from datasets import Dataset

    rng = random.Random(seed)
    return Dataset.from_list([make_story(rng) for _ in range(count)])


def sum_is_right(story: str) -> bool:
    """Whether a story keeps its own accounts."""
    match = re.match(r"\w+ has (\w+) \w+ \w+\. \w+ (finds|gets|loses|gives) (\w+) .*?\. Now \w+ has (\w+)\.", story)
    if match is None or not {match[1], match[3], match[4]} <= set(NUMBERS):
        return False
    before, change, after = (NUMBERS.index(match[group]) for group in (1, 3, 4))
    return after == (before + change if match[2] in ("finds", "gets") else before - change)


def train_tokenizer(stories: "Dataset") -> "PreTrainedTokenizerFast":
    """Byte-level BPE on the stories themselves."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["prompt"] + row["completion"] for row in stories), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_model(size: Size, tokenizer: "PreTrainedTokenizerFast", seed: int) -> "LlamaForCausalLM":
    """Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=3 * size.hidden_size,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def training_settings(folder: str, steps: int, learning_rate: float, seed: int) -> dict[str, Any]:
    """What fine-tuning and distillation have in common."""
    return {
        "output_dir": folder,
        "max_steps": steps,
        "learning_rate": learning_rate,
        "per_device_train_batch_size": BATCH_SIZE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(10, steps // 2),
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": seed,
    }


def fine_tune(size: Size, stories: "Dataset", tokenizer: "PreTrainedTokenizerFast", folder: str, seed: int) -> None:
    """Train a new model of this size by plain supervised fine-tuning, and save it."""
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=make_model(size, tokenizer, seed),
        args=SFTConfig(**training_settings(folder, size.steps, size.learning_rate, seed)),
        train_dataset=stories,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(folder)


def distil(student: str, teacher: str, stories: "Dataset", folder: str, seed: int) -> None:
    """Train the student by adversarial moment matching, half on the stories and half on its own, and save it."""
    from trl_kd import AMMConfig, AMMTrainer

    settings = training_settings(folder, AMM_STEPS, AMM_LEARNING_RATE, seed)
    trainer = AMMTrainer(
        model=student,
        teacher_model=teacher,
        args=AMMConfig(**settings, max_completion_length=MAX_COMPLETION_LENGTH),
        train_dataset=stories,
    )
    trainer.train()
    trainer.save_model(folder)


def tokenized(stories: "Dataset", tokenizer: "PreTrainedTokenizerFast") -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and completions of held-out stories as token ids."""
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in stories]
    completions = [tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id] for row in stories]
    return prompts, completions


@dataclass(frozen=True)
class Judgement:
    """A model's fidelity to the teacher, and the stories that it writes."""

    parameters: int
    values: dict[str, float]
    stories: list[str]


def judge(folder: str, teacher_folder: str, stories: "Dataset", seed: int) -> Judgement:
    """Compare a saved model with the saved teacher on held-out stories."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_kd.evaluation import evaluate_fidelity, sample_completions

    model, teacher = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, teacher_folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts, references = tokenized(stories, tokenizer)
    settings = {"max_new_tokens": MAX_COMPLETION_LENGTH, "batch_size": len(prompts), "seed": seed, "progress": False}
    values = evaluate_fidelity(model, teacher, prompts, references, **settings)
    completions = sample_completions(model, prompts, **settings)
    written = [
        tokenizer.decode(prompt + completion, skip_special_tokens=True)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    values["sums_right"] = sum(map(sum_is_right, written)) / len(written)
    return Judgement(model.num_parameters(), values, written)


COLUMNS = {
    "student_states/total_variation": "TV, own text",
    "reference_states/total_variation": "TV, data",
    "reference_states/nll": "NLL, data",
    "imitation_gap": "imitation gap",
    "sums_right": "sums right",
}


LEGEND = """\
TV: total variation between the next-token distributions of model and teacher (0 to 1), on the model's own stories
and on the data. NLL: nats per token. Imitation gap: teacher log-likelihood per token that is lost by acting as the
model. Sums right: stories that count correctly. "After" has also seen more stories than "before": the comparison
with as much plain fine-tuning, on real stories, is in examples/stories.
"""


def show(console: "Console", judgements: dict[str, Judgement]) -> None:
    """Print the table, and what each model makes of the same prompts."""
    from rich.table import Table

    table = Table(title="Held-out stories: how far is each model from the teacher?", title_justify="left")
    table.add_column("model")
    for title in ("parameters", *COLUMNS.values()):
        table.add_column(title, justify="right")
    for name, judgement in judgements.items():
        cells = [
            f"{judgement.values[key]:.0%}" if key == "sums_right" else f"{judgement.values[key]:.3f}"
            for key in COLUMNS
        ]
        table.add_row(name, f"{judgement.parameters:,}", *cells)
    console.print(table)
    console.print(LEGEND, highlight=False)
    for index in range(2):
        for name, judgement in judgements.items():
            console.print(f"[bold]{name}[/bold]: {judgement.stories[index]}", highlight=False)
        console.print()


def main(folder: str, seed: int) -> dict[str, dict[str, float]]:
    """
    Run the demonstration.

    Args:
        folder (`str`):
            Where the models are saved: `teacher`, `before` and `after`.
        seed (`int`):
            Seed of data, weights and samples.

    Returns:
        `dict[str, dict[str, float]]`: metrics of the teacher, and of the student before and after.
    """
    from rich.console import Console

    console, start = Console(width=119), time.monotonic()

    def say(text: str) -> None:
        console.print(f"\n[bold]{time.monotonic() - start:4.0f} s  {text}[/bold]", highlight=False)

    say(f"Writing {TRAIN_STORIES:,} stories, and training a tokenizer on them")
    stories, held_out = make_stories(TRAIN_STORIES, seed), make_stories(TEST_STORIES, seed + 1)
    tokenizer = train_tokenizer(stories)
    console.print(f"For example: {stories[0]['prompt']}{stories[0]['completion']}", highlight=False)

    teacher, before, after = (str(Path(folder) / name) for name in ("teacher", "before", "after"))
    say("Training the teacher: plain fine-tuning from random weights")
    fine_tune(TEACHER, stories, tokenizer, teacher, seed)
    say("Training the student the same way, shorter")
    fine_tune(STUDENT, stories, tokenizer, before, seed + 1)
    say("Distilling the student with AMM: half of the rows are stories of its own")
    distil(before, teacher, stories, after, seed)
    say("Comparing")
    models = {"teacher": teacher, "student before": before, "student after": after}
    judgements = {name: judge(path, teacher, held_out, seed) for name, path in models.items()}
    show(console, judgements)
    say("Done")
    return {name: judgement.values for name, judgement in judgements.items()}


def quiet() -> None:
    """Leave the terminal to the training bars and the table; the libraries' hints are for longer runs."""
    import datasets
    import torch
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # Models of this size lose more to the switching between threads than they gain.
    torch.set_num_threads(1)


def run(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse the command line and run the demonstration."""
    parser = ArgumentParser(prog=prog, description=__doc__.split("```")[0].strip(), allow_abbrev=False)
    parser.add_argument("--output_dir", help="where the models are saved (default: a temporary folder, removed)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, weights and samples (default: 0)")
    args = parser.parse_args(arguments)
    # Read by the libraries when they are imported: nothing here has a name on the Hub.
    os.environ["HF_HUB_OFFLINE"] = "1"
    quiet()
    if args.output_dir is not None:
        main(args.output_dir, args.seed)
        return
    with tempfile.TemporaryDirectory(prefix="trl-kd-demo-") as folder:
        main(folder, args.seed)


if __name__ == "__main__":
    run()
