"""
Distils a 260K-parameter story teller into a student of a third of its size, with AMM, on a CPU.

    python examples/stories/distil.py --output_dir out/stories

The student is warm-started by SFT on the stories, then matched to the teacher on the teacher's continuations of their
first 64 tokens and on its own. Ends with a table of teacher, student before and student after on held-out stories.
"""

import argparse
import json
import time
from pathlib import Path

from rich.console import Console
from stories import (
    COMPLETION_LENGTH,
    add_arguments,
    as_rows,
    held_out_evaluation,
    load_stories,
    load_teacher,
    method_arguments,
    split_stories,
    teacher_texts,
    warm_start,
)
from transformers import AutoModelForCausalLM

from trl_kd import AMMConfig, AMMTrainer
from trl_kd.evaluation import fidelity_table, sample_completions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--output_dir", default="out/stories", help="Folder of everything that is made.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of AMM: order of the data and samples.")
    args = parser.parse_args()
    start = time.perf_counter()
    output_dir = Path(args.output_dir)

    teacher, tokenizer = load_teacher(args.teacher)
    stories = load_stories(args.train_file, tokenizer)
    student_path = warm_start(args.warm_start or output_dir / "warm_start", tokenizer, stories, args.warm_start_steps)
    prompts, completions = teacher_texts(
        output_dir / "teacher_texts.json", teacher, split_stories(stories)[0], args.texts_per_story
    )

    evaluate = held_out_evaluation(teacher, load_stories(args.test_file, tokenizer)[: args.num_test_stories])
    metrics = {
        "teacher": evaluate(teacher),
        "student before": evaluate(AutoModelForCausalLM.from_pretrained(student_path)),
    }

    trainer = AMMTrainer(
        model=str(student_path),
        teacher_model=args.teacher,
        args=AMMConfig(
            **method_arguments(output_dir / "student", args.max_steps, args.learning_rate, args.seed),
            critic="exact",
            lmbda=0.5,
            max_completion_length=COMPLETION_LENGTH,
        ),
        train_dataset=as_rows(prompts, completions),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    student = AutoModelForCausalLM.from_pretrained(output_dir / "student")
    metrics["student after AMM"] = evaluate(student)
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2))

    console = Console()
    prompt = split_stories(load_stories(args.test_file, tokenizer))[0][0]
    for name, model in {"teacher": teacher, "student after AMM": student}.items():
        text = sample_completions(model, [prompt], max_new_tokens=COMPLETION_LENGTH, progress=False)[0]
        console.print(f"\n[bold]{name} continues a story[/bold]", highlight=False)
        console.print(f"{tokenizer.decode(prompt, skip_special_tokens=True)} [...]", style="dim", highlight=False)
        console.print(tokenizer.decode(text, skip_special_tokens=True), markup=False, highlight=False)
    console.print()
    console.print(fidelity_table(metrics, title="Held-out stories"))
    console.print(f"Total: {time.perf_counter() - start:.0f} s. Everything is in {output_dir}.", highlight=False)


if __name__ == "__main__":
    main()
