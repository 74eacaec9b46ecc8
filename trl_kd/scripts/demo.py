"""
All of it on a CPU, offline, in about two minutes: fine-tunes a small student on stories, distils the small teacher
that comes with the package into it by AMM, compares it with its teacher and with as much plain fine-tuning, measures
what each costs to serve, and writes the report.

```bash
trl-kd demo
```
"""

import logging
import os
import time
import warnings
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

    from trl_kd.evaluation import Comparison


TEACHER = Path(__file__).with_name("demo_teacher")

# Half of the teacher's width and depth
HIDDEN_SIZE, LAYERS = 64, 2
WARM_UP_STEPS, WARM_UP_RATE, WARM_UP_BATCH = 600, 5e-3, 32
STEPS, LEARNING_RATE, BATCH_SIZE = 240, 2e-3, 16
MAX_COMPLETION_LENGTH = 48
TRAIN_STORIES, TEST_STORIES = 12000, 120
SEEDS = (0, 1)

METRICS = (
    *("own_total_variation", "exact_match", "total_variation", "own_reverse_kl", "imitation_gap", "own_entropy"),
    *("nll", "bits_per_byte", "rouge_l", "eos_share"),
)


def make_student(tokenizer: "PreTrainedTokenizerBase", seed: int) -> "LlamaForCausalLM":
    """Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=3 * HIDDEN_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def training_settings(folder: str, steps: int, learning_rate: float, batch_size: int, seed: int) -> dict[str, Any]:
    """What fine-tuning and distillation have in common."""
    return {
        "output_dir": folder,
        "max_steps": steps,
        "learning_rate": learning_rate,
        "per_device_train_batch_size": batch_size,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(10, steps // 2),
        "logging_steps": max(1, steps // 40),
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": seed,
    }


def train(trainer: Any) -> None:
    """Train with a bar and without a line for each log entry; save the model with its log, which the report shows."""
    from transformers import PrinterCallback, ProgressCallback

    class Bar(ProgressCallback):
        """The bar alone."""

        def on_log(self, *arguments: Any, **options: Any) -> None:
            """Leave the terminal as it is."""

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Bar)
    trainer.train()
    trainer.save_model()
    trainer.save_state()


def fine_tune(model: Any, stories: "Dataset", tokenizer: Any, settings: dict[str, Any]) -> None:
    """Plain supervised fine-tuning on the stories."""
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=stories,
        processing_class=tokenizer,
    )
    train(trainer)


def distil(student: str, stories: "Dataset", settings: dict[str, Any]) -> None:
    """Adversarial moment matching, half on the stories and half on the student's own."""
    from trl_kd import AMMConfig, AMMTrainer

    trainer = AMMTrainer(
        model=student,
        teacher_model=str(TEACHER),
        # The critic with a penalty costs less likelihood than `exact`, which is total variation
        args=AMMConfig(**settings, critic="exact_penalised", max_completion_length=MAX_COMPLETION_LENGTH),
        train_dataset=stories,
    )
    train(trainer)


def evaluate(folder: Path, models: dict[str, tuple[str, str]], stories: "Dataset") -> "Comparison":
    """Measure all models and their cost, keep it in a store, and write the report and the card of the last."""
    from trl_kd.evaluation import (
        EvalModel,
        Evaluation,
        ResultStore,
        compare_run,
        measure_cost,
        plain_suite,
        read_rows,
        update_model_card,
        write_report,
    )
    from trl_kd.evaluation.cost import QUICK

    changes = {"metrics": METRICS, "seeds": SEEDS, "max_completion_length": MAX_COMPLETION_LENGTH}
    suite = plain_suite(changes | {"name": "demo", "answer_pattern": r"The answer is (\d+)"})
    evaluated = [
        EvalModel(name, path, role, init_kwargs={"dtype": "float32"}) for name, (path, role) in models.items()
    ]
    task = Evaluation(evaluated, read_rows(stories, suite), suite, "stories with sums", batch_size=60)
    store = ResultStore(folder / "results.sqlite")
    with task.begin(store) as run:
        task.run(run)
        for name, (path, _) in models.items():
            run.set_details(name, "cost", measure_cost(path, dtype="float32", device="cpu", threads=1, **QUICK))
        run.finish()
    comparison = compare_run(store, run.id)
    samples = {name: store.samples(run.id, name, SEEDS[0]) for name in models}
    write_report(comparison, samples, folder / "report.html", command="trl-kd demo")
    *_, last = models
    update_model_card(models[last][0], comparison, last)
    return comparison


def main(folder: Path, seed: int) -> "Comparison":
    """
    Run the demonstration.

    Args:
        folder (`Path`):
            Where the models, the store and the report are written.
        seed (`int`):
            Seed of the student's weights and of its training.

    Returns:
        [`Comparison`]: of the teacher, the student before, with more fine-tuning, and distilled.
    """
    from rich.console import Console
    from transformers import AutoTokenizer

    from trl_kd.scripts.stories import make_stories

    console, start = Console(width=140), time.monotonic()

    def say(text: str) -> None:
        console.print(f"\n[bold]{time.monotonic() - start:4.0f} s  {text}[/bold]", highlight=False)

    say(f"Writing {TRAIN_STORIES:,} stories with sums in them")
    stories, held_out = make_stories(TRAIN_STORIES, seed + 1), make_stories(TEST_STORIES, seed + 2)
    console.print(f"For example: {stories[0]['prompt']}{stories[0]['completion']}", highlight=False)
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)

    before, tuned, after = (str(folder / name) for name in ("before", "fine-tuned", "distilled"))
    budget = (STEPS, LEARNING_RATE, BATCH_SIZE, seed)
    say("Training a student from random weights by plain fine-tuning")
    warm_up = training_settings(before, WARM_UP_STEPS, WARM_UP_RATE, WARM_UP_BATCH, seed)
    fine_tune(make_student(tokenizer, seed), stories, tokenizer, warm_up)
    say("Distilling it with AMM: half of the rows are stories of its own")
    distil(before, stories, training_settings(after, *budget))
    say("For comparison, as many steps of plain fine-tuning")
    fine_tune(before, stories, tokenizer, training_settings(tuned, *budget))
    say("Comparing them with the teacher, and measuring what each costs to serve")
    models = {
        "teacher": (str(TEACHER), "teacher"),
        "before": (before, "before"),
        "fine-tuned": (tuned, "student"),
        "distilled": (after, "student"),
    }
    comparison = evaluate(folder, models, held_out)
    console.print(comparison.table())
    for sentence in comparison.sentences():
        console.print(sentence, highlight=False)
    say("Done")
    console.print(f"Report: {(folder / 'report.html').absolute()}", highlight=False, soft_wrap=True)
    return comparison


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
    parser.add_argument(
        "--output_dir", default="trl-kd-demo", help="where models, store and report are written (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the student and its training (default: 0)")
    args = parser.parse_args(arguments)
    # Read by the libraries when they are imported: nothing here has a name on the Hub.
    os.environ["HF_HUB_OFFLINE"] = "1"
    quiet()
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    main(folder, args.seed)


if __name__ == "__main__":
    run()
