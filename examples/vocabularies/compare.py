"""
Compares ways to distil a teacher into a student with a vocabulary of its own, at equal tokens, over several seeds.

    python examples/vocabularies/compare.py --output_dir out/vocabularies
    python examples/vocabularies/compare.py --output_dir out/vocabularies --methods "DSKD, eta" "SFT, teacher's texts"

The teacher is that of `examples/stories`, with 512 tokens; the student has a byte-level BPE of 1,024, trained on the
stories. All methods start from the same warm-started student and read the same texts. Each finished run is kept in
`results.json` and is not repeated; the table goes to the terminal and to `results.md`.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from trl_kd import DSKDConfig, DSKDTrainer


# The example next door, before this folder: its `compare.py` has the tables, its `stories.py` teacher and student
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stories"))

from compare import differences, load_results, markdown, sharpen, sharper, summarise  # noqa: E402
from stories import add_arguments, load_stories, load_teacher, method_arguments, warm_start  # noqa: E402
from texts import (  # noqa: E402
    METRICS,
    STUDENT_SAMPLE_LENGTH,
    TEACHER_SAMPLE_LENGTH,
    as_dataset,
    as_tokens,
    byte_level_copy,
    first_tokens,
    held_out_evaluation,
    load_texts,
    split_texts,
    student_tokenizer,
    written_by_teacher,
)


# Student tokens of a rollout: what the teacher's texts take, nearly all of them
STUDENT_COMPLETION_LENGTH = 72


@dataclass
class Material:
    """What the methods train on: the same texts, with columns `prompt`, `completion` and `truncated`."""

    student_path: str
    teacher_path: str
    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase
    byte_level_teacher: str
    teacher_rows: Dataset
    gold_rows: Dataset


def run_dskd(material: Material, arguments: dict[str, Any], **options) -> Any:
    """Our trainer, which takes each text in both vocabularies."""
    return DSKDTrainer(
        model=material.student_path,
        teacher_model=material.teacher_path,
        args=DSKDConfig(**arguments, max_completion_length=STUDENT_COMPLETION_LENGTH, **options),
        train_dataset=material.teacher_rows,
        processing_class=material.tokenizer,
        teacher_processing_class=material.teacher_tokenizer,
    )


def run_sft(rows: str, material: Material, arguments: dict[str, Any]) -> Any:
    """Continued SFT, on the texts that the teacher wrote or on the stories themselves."""
    return SFTTrainer(
        model=material.student_path,
        args=SFTConfig(**arguments),
        # Tokenised here: from text, TRL would end also the continuations that were cut off
        train_dataset=as_tokens(getattr(material, rows), material.tokenizer),
        processing_class=material.tokenizer,
    )


def run_gold(material: Material, arguments: dict[str, Any], byte_level: bool = True, **options) -> Any:
    """
    TRL's GOLD, off-policy.

    It aligns the tokens of byte-level tokenizers only, so it gets the teacher's tokenizer in that form, with the same
    ids; `byte_level=False` is the original one, with which it compares the k-th token with the k-th. It ends every
    text. Its distillation loss leaves that end out; cross-entropy would learn it, so its labels go without.
    """
    from trl.experimental.gold import GOLDConfig, GOLDTrainer
    from trl.experimental.utils import DataCollatorForChatML

    class CutOffCollator(DataCollatorForChatML):
        """Takes the end of a text that was cut off out of the labels."""

        def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch = super().__call__(examples)
            # Padding is on the left
            batch["labels"][torch.tensor([row["truncated"] for row in examples]), -1] = -100
            return batch

    collator = None
    if options.get("uld_crossentropy_weight"):
        collator = CutOffCollator(material.tokenizer)
        options |= {"uld_skip_student_eos": False, "remove_unused_columns": False}
    return GOLDTrainer(
        model=material.student_path,
        teacher_model=material.teacher_path,
        args=GOLDConfig(
            **arguments,
            use_uld_loss=True,
            use_extended_uld=byte_level,
            teacher_tokenizer_name_or_path=material.byte_level_teacher if byte_level else material.teacher_path,
            lmbda=0.0,
            **options,
        ),
        data_collator=collator,
        train_dataset=material.teacher_rows,
        processing_class=material.tokenizer,
    )


# As the example in GOLD's documentation has it
HYBRID = {"uld_use_hybrid_loss": True, "uld_hybrid_matched_weight": 0.6, "uld_hybrid_unmatched_weight": 0.4}

METHODS: dict[str, Callable[[Material, dict[str, Any]], Any]] = {
    "SFT, teacher's texts": lambda *a: run_sft("teacher_rows", *a),
    "SFT, stories": lambda *a: run_sft("gold_rows", *a),
    "GOLD": lambda *a: run_gold(*a, **HYBRID),
    "GOLD, bayesian": lambda *a: run_gold(*a, **HYBRID, uld_token_merge_strategy="bayesian"),
    "GOLD, cross-entropy": lambda *a: run_gold(*a, **HYBRID, uld_crossentropy_weight=1.0),
    "GOLD, bayesian, cross-entropy": lambda *a: run_gold(
        *a, **HYBRID, uld_token_merge_strategy="bayesian", uld_crossentropy_weight=1.0
    ),
    "GOLD, not hybrid": lambda *a: run_gold(*a),
    "GOLD, by position": lambda *a: run_gold(*a, **HYBRID, byte_level=False),
    # Off-policy as in the papers: v2 with exact alignment, v1 with cross-model attention, and two baselines
    "DSKD, eta": lambda *a: run_dskd(*a, alignment="eta"),
    "DSKD, cma": lambda *a: run_dskd(*a, alignment="cma", preset="v1"),
    "DSKD, simple": lambda *a: run_dskd(*a, objective="simple"),
    "DSKD, uld": lambda *a: run_dskd(*a, objective="uld"),
    # Ours: partners by context, and what becomes of it with one setting changed
    "DSKD, context": lambda *a: run_dskd(*a, preset="context"),
    "DSKD, context, total variation": lambda *a: run_dskd(*a, preset="context", divergence="total_variation"),
    "DSKD, context, kd_rate 0.8": lambda *a: run_dskd(*a, preset="context", kd_rate=0.8),
    "DSKD, context, not pretrained": lambda *a: run_dskd(*a, preset="context", projector_pretraining_steps=0),
    "DSKD, context, linear": lambda *a: run_dskd(*a, preset="context", projector_hidden_size=0),
    "DSKD, context, half on-policy": lambda *a: run_dskd(*a, preset="context", lmbda=0.5),
    "DSKD, eta, reverse KL": lambda *a: run_dskd(*a, alignment="eta", divergence="reverse_kl", kd_temperature=1.0),
}

# Methods that are shown once more, at the entropy of another
SHARPENED = [("SFT, teacher's texts", "DSKD, eta"), ("SFT, teacher's texts", "DSKD, context")]

# Pairs whose differences are shown, run by run of the same seed
COMPARED = [(method, "SFT, teacher's texts") for method in METHODS if method != "SFT, teacher's texts"]
COMPARED += [(example, sharper(method, example)) for method, example in SHARPENED]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    # A window of the student's tokens holds half as much text again as one of the teacher's
    parser.set_defaults(warm_start_steps=1800)
    parser.add_argument("--output_dir", default="out/vocabularies", help="Folder of everything that is made.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Seeds of the runs.")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="Methods to run.")
    parser.add_argument("--draws", type=int, default=2, help="Rollouts of each model per held-out story.")
    return parser.parse_args()


def make_material(args: argparse.Namespace, teacher: PreTrainedModel, teacher_tokenizer: Any) -> Material:
    """Tokenizer, warm-started student and all training data, made once per output folder."""
    output_dir = Path(args.output_dir)
    texts = load_texts(args.train_file)
    tokenizer = student_tokenizer(output_dir / "tokenizer", texts)
    student_path = warm_start(
        args.warm_start or output_dir / "warm_start",
        tokenizer,
        load_stories(args.train_file, tokenizer),
        args.warm_start_steps,
    )
    gold = split_texts(texts, teacher_tokenizer)
    written = written_by_teacher(
        output_dir / "teacher_texts.json", teacher, teacher_tokenizer, [r.prompt for r in gold], args.texts_per_story
    )
    return Material(
        student_path=str(student_path),
        teacher_path=args.teacher,
        tokenizer=tokenizer,
        teacher_tokenizer=teacher_tokenizer,
        byte_level_teacher=str(byte_level_copy(output_dir / "byte_level_teacher", teacher_tokenizer)),
        teacher_rows=as_dataset(written),
        gold_rows=as_dataset([first_tokens(row, teacher_tokenizer) for row in gold]),
    )


def count_tokens(material: Material) -> str:
    """What a text of the training data takes in either vocabulary."""
    rows = material.teacher_rows
    lengths = {
        name: sum(map(len, tokenizer(rows["completion"][:], add_special_tokens=False)["input_ids"])) / len(rows)
        for name, tokenizer in (("teacher", material.teacher_tokenizer), ("student", material.tokenizer))
    }
    size = sum(len(text.encode()) for text in rows["completion"]) / len(rows)
    return (
        f"A completion of the {len(rows)} by the teacher has {size:.0f} bytes: {lengths['teacher']:.1f} tokens of the "
        f"teacher, {lengths['student']:.1f} of the student."
    )


def write_table(args: argparse.Namespace, results: dict[str, Any], material: Material) -> None:
    """Both tables, to the terminal and to a file."""
    text = f"Mean ± standard deviation over seeds; {args.max_steps * 8} completions per run. {count_tokens(material)} "
    text += f"Settings: {results['settings']}.\n\n"
    methods = [*METHODS, *(sharper(*pair) for pair in SHARPENED)]
    text += markdown(summarise(results["runs"], methods), METRICS | {"train_seconds": "seconds"})
    against = differences(results["runs"], COMPARED, METRICS)
    if against:
        text += f"\nDifferences, paired by seed:\n\n{markdown(against, METRICS)}"
    file = Path(args.output_dir) / "results.md"
    file.write_text(text)
    print(f"\n{text}\nWritten: {file}, beside results.json.")


def main() -> None:
    args = parse_arguments()
    output_dir = Path(args.output_dir)
    names = ("warm_start_steps", "max_steps", "learning_rate", "texts_per_story", "num_test_stories", "draws")
    results = load_results(output_dir / "results.json", {name: getattr(args, name) for name in names})
    runs: dict[str, dict[str, float]] = results["runs"]

    teacher, teacher_tokenizer = load_teacher(args.teacher)
    material = make_material(args, teacher, teacher_tokenizer)
    stories = load_texts(args.test_file)[: args.num_test_stories]
    evaluate = held_out_evaluation(teacher, teacher_tokenizer, stories, args.draws)
    evaluate_student = partial(evaluate, tokenizer=material.tokenizer, max_new_tokens=STUDENT_SAMPLE_LENGTH)

    def keep(name: str, metrics: dict[str, float]) -> None:
        """Adds an evaluated model to the results file."""
        runs[name] = metrics
        file = output_dir / "results.json"
        file.with_suffix(".unfinished").write_text(json.dumps(results, indent=2))
        file.with_suffix(".unfinished").replace(file)

    if "teacher" not in runs:
        keep("teacher", evaluate(teacher, teacher_tokenizer, TEACHER_SAMPLE_LENGTH))
    if "before" not in runs:
        keep("before", evaluate_student(AutoModelForCausalLM.from_pretrained(material.student_path)))
    for seed, method in itertools.product(args.seeds, args.methods):
        name = f"{method} / {seed}"
        examples = [example for one, example in SHARPENED if one == method and f"{example} / {seed}" in runs]
        examples = [example for example in examples if f"{sharper(method, example)} / {seed}" not in runs]
        if name in runs and not examples:
            continue
        print(f"{method}, seed {seed}")
        trainer = METHODS[method](
            material, method_arguments(output_dir / "runs", args.max_steps, args.learning_rate, seed)
        )
        start = time.perf_counter()
        trainer.train()
        costs = {"train_seconds": time.perf_counter() - start}
        if name not in runs:
            keep(name, evaluate_student(trainer.model) | costs)
        for example in examples:
            norm = trainer.model.get_decoder().norm.weight
            original = norm.detach().clone()
            target = runs[f"{example} / {seed}"]["student_entropy"]
            factor = sharpen(trainer.model, target, lambda m: evaluate_student(m)["student_entropy"])
            keep(f"{sharper(method, example)} / {seed}", evaluate_student(trainer.model) | costs)
            norm.data.copy_(original)
            print(f"{method}, seed {seed}: logits times {factor:.3f}, as sure as {example}")
    write_table(args, results, material)


if __name__ == "__main__":
    main()
