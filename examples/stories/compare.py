"""
Compares AMM and DSKD with other ways to spend the same tokens, and AMM's critics and gradients with each other, over
several seeds, on the pair of `distil.py`.

    python examples/stories/compare.py --output_dir out/stories
    python examples/stories/compare.py --output_dir out/stories --methods "AMM" "AMM, full gradient"

All methods start from the same warm-started student and are given the same number of optimizer steps, of sequences in
a step and of tokens in a sequence, and the same learning rate. Each finished run is kept in `results.json` and is not
repeated; the table goes to the terminal and to `results.md`.

A sharper student is nearer to a teacher on its own text for free, so some methods are shown once more with
their logits scaled until the student is as sure of itself (in entropy, on its own text) as that of a sharper method of
the same seed.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
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
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer

from trl_kd import AMMConfig, AMMTrainer, DSKDConfig, DSKDTrainer, KDConfig
from trl_kd.evaluation import FIDELITY_METRICS, format_metric
from trl_kd.losses import LinearLoss, Term, forward_kl, generalized_jsd, reverse_kl
from trl_kd.modules import ValueHead
from trl_kd.trainer.kd_trainer import _KDTrainer
from trl_kd.trainer.tokens import TokenBatch


class ForwardKLTrainer(_KDTrainer):
    """Token-level KL(teacher || student): a method is one loss on the tokens of a micro-batch."""

    divergence = staticmethod(forward_kl)

    def token_loss(self, tokens: TokenBatch) -> LinearLoss:
        """The divergence on all tokens, each with its weight."""
        term = Term(self.divergence, weights=tokens.weights)
        return tokens.linear_loss({"divergence": term}, self.args.loss_chunk_size)


class JSDTrainer(ForwardKLTrainer):
    """The same with the Jensen-Shannon divergence."""

    divergence = staticmethod(generalized_jsd)


class ReverseKLTrainer(ForwardKLTrainer):
    """The same with KL(student || teacher)."""

    divergence = staticmethod(reverse_kl)


@dataclass
class Material:
    """What the methods train on."""

    student_path: str
    teacher_path: str
    tokenizer: PreTrainedTokenizerBase
    teacher_rows: Dataset
    gold_rows: Dataset
    prompts: Dataset


def run_kd(trainer_class: type, config_class: type, material: Material, arguments: dict[str, Any], **options) -> Any:
    """One of our trainers, off-policy on the teacher's texts and on-policy on its own."""
    return trainer_class(
        model=material.student_path,
        teacher_model=material.teacher_path,
        args=config_class(**arguments, max_completion_length=COMPLETION_LENGTH, **options),
        train_dataset=material.teacher_rows,
        processing_class=material.tokenizer,
    )


def run_sft(rows: str, material: Material, arguments: dict[str, Any]) -> Any:
    """Continued SFT, on the texts that the teacher wrote or on the stories themselves."""
    return SFTTrainer(
        model=material.student_path,
        args=SFTConfig(**arguments),
        train_dataset=getattr(material, rows),
        processing_class=material.tokenizer,
    )


def run_trl(beta: float, material: Material, arguments: dict[str, Any]) -> Any:
    """TRL's own distillation, on-policy only, from the same prompts."""
    return DistillationTrainer(
        model=material.student_path,
        teacher_model=material.teacher_path,
        args=DistillationConfig(**arguments, max_completion_length=COMPLETION_LENGTH, beta=beta),
        train_dataset=material.prompts,
        processing_class=material.tokenizer,
    )


def run_amm(material: Material, arguments: dict[str, Any], **options) -> Any:
    """AMM with half of the rows on-policy."""
    return run_kd(AMMTrainer, AMMConfig, material, arguments, lmbda=0.5, **options)


def run_learned(*arguments, **options) -> Any:
    """AMM with a learned critic."""
    return run_amm(*arguments, critic="value_head", **options)


def run_dskd(preset: str, material: Material, arguments: dict[str, Any], lmbda: float = 0.0, **options) -> Any:
    """Dual-space distillation, as the authors published it (v1) or with the changes of their second paper (v2)."""
    return run_kd(DSKDTrainer, DSKDConfig, material, arguments, preset=preset, lmbda=lmbda, **options)


def full(later_cost: str, later_weight: float = 0.3, **options) -> dict[str, Any]:
    """Options of AMM that also follows what a token does to the later states."""
    return {"on_policy_gradient": "full", "later_cost": later_cost, "later_weight": later_weight, **options}


METHODS: dict[str, Callable[[Material, dict[str, Any]], Any]] = {
    "AMM": lambda *a: run_amm(*a, critic="exact"),
    "SFT, teacher's texts": lambda *a: run_sft("teacher_rows", *a),
    "SFT, stories": lambda *a: run_sft("gold_rows", *a),
    "forward KL": lambda *a: run_kd(ForwardKLTrainer, KDConfig, *a, lmbda=0.5),
    "forward KL, off-policy": lambda *a: run_kd(ForwardKLTrainer, KDConfig, *a, lmbda=0.0),
    "JSD": lambda *a: run_kd(JSDTrainer, KDConfig, *a, lmbda=0.5),
    "TRL, beta 0.5": lambda *a: run_trl(0.5, *a),
    "TRL, beta 1": lambda *a: run_trl(1.0, *a),
    # Learned critics: as they are by default, and what becomes of them with one setting changed
    "AMM, learned": lambda *a: run_learned(*a),
    "AMM, learned, 1 step": lambda *a: run_learned(*a, critic_steps=1),
    "AMM, learned, after": lambda *a: run_learned(*a, critic_order="after"),
    "AMM, learned, teacher's features": lambda *a: run_learned(*a, critic_features="teacher"),
    "AMM, learned, student's features": lambda *a: run_learned(*a, critic_features="student"),
    "AMM, learned, low rank": lambda *a: run_learned(*a, critic_head="low_rank"),
    "AMM, learned, full": lambda *a: run_learned(*a, critic_head="full"),
    # The effect on later states, with the exact critics
    "AMM, full gradient": lambda *a: run_amm(*a, **full("total_variation")),
    "AMM, full gradient, JSD": lambda *a: run_amm(*a, **full("jsd")),
    "AMM, full gradient, reverse KL": lambda *a: run_amm(*a, **full("reverse_kl")),
    "AMM, full gradient, reverse KL, 0.1": lambda *a: run_amm(*a, **full("reverse_kl", later_weight=0.1)),
    "AMM, full gradient, value": lambda *a: run_amm(*a, **full("total_variation", later_baseline="value")),
    "AMM, penalised": lambda *a: run_amm(*a, critic="exact_penalised"),
    "AMM, penalised, full gradient": lambda *a: run_amm(*a, **full("total_variation", critic="exact_penalised")),
    "reverse KL": lambda *a: run_kd(ReverseKLTrainer, KDConfig, *a, lmbda=0.5),
    "reverse KL, off-policy": lambda *a: run_kd(ReverseKLTrainer, KDConfig, *a, lmbda=0.0),
    # Dual-space distillation: off-policy as in its papers, half on-policy, and with other divergences
    "DSKD v1, off-policy": lambda *a: run_dskd("v1", *a),
    "DSKD v2, off-policy": lambda *a: run_dskd("v2", *a),
    "DSKD v1": lambda *a: run_dskd("v1", *a, lmbda=0.5),
    "DSKD v2": lambda *a: run_dskd("v2", *a, lmbda=0.5),
    "DSKD v1, off-policy, reverse KL": lambda *a: run_dskd("v1", *a, divergence="reverse_kl"),
    "DSKD v2, off-policy, reverse KL": lambda *a: run_dskd("v2", *a, divergence="reverse_kl"),
    "DSKD v2, off-policy, JSD": lambda *a: run_dskd("v2", *a, divergence="jsd"),
    "DSKD v2, off-policy, adaptive KL": lambda *a: run_dskd("v2", *a, divergence="adaptive_kl"),
    "DSKD v2, off-policy, total variation": lambda *a: run_dskd("v2", *a, divergence="total_variation"),
    "DSKD v2, reverse KL": lambda *a: run_dskd("v2", *a, lmbda=0.5, divergence="reverse_kl"),
    "DSKD v2, JSD": lambda *a: run_dskd("v2", *a, lmbda=0.5, divergence="jsd"),
}


# Pairs whose differences are shown, run by run of the same seed
COMPARED = [
    *(("AMM", method) for method in METHODS if method != "AMM" and not method.startswith("DSKD")),
    *(
        (f"DSKD {preset}, off-policy", method)
        for preset in ("v1", "v2")
        for method in ("SFT, teacher's texts", "SFT, stories", "forward KL, off-policy", "reverse KL, off-policy")
    ),
    *((f"DSKD {preset}", method) for preset in ("v1", "v2") for method in ("forward KL", "reverse KL")),
]


# Methods that are shown once more, at the entropy of another
SHARPENED = [
    ("SFT, teacher's texts", "AMM"),
    ("JSD", "AMM"),
    ("AMM", "AMM, full gradient"),
    ("AMM", "AMM, full gradient, reverse KL, 0.1"),
    ("SFT, teacher's texts", "DSKD v1, off-policy"),
    ("SFT, teacher's texts", "DSKD v2, off-policy"),
    ("forward KL, off-policy", "DSKD v2, off-policy"),
]


def sharper(method: str, example: str) -> str:
    """Name of a method at the entropy of another."""
    return f"{method}, as sure as {example}"


@torch.no_grad()
def sharpen(model: PreTrainedModel, entropy: float, measure: Callable[[PreTrainedModel], float]) -> float:
    """
    Scale a model's logits until its entropy is `entropy`, by bisection; returns the factor.

    The logits of a Llama are linear in the weight of its last norm.
    """
    norm = model.get_decoder().norm.weight
    original = norm.clone()
    low, high = 1.0, 2.0
    for _ in range(7):
        factor = (low + high) / 2
        norm.copy_(factor * original)
        low, high = (factor, high) if measure(model) > entropy else (low, factor)
    return factor


def critic_bytes(trainer: Any) -> int:
    """What learned critics take in training."""
    if not isinstance(trainer, AMMTrainer):
        return 0
    return sum(module.num_bytes for module in trainer.auxiliary.modules.values() if isinstance(module, ValueHead))


def summarise(results: dict[str, dict[str, float]], methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Rows of the table: mean and standard deviation over the seeds of a method, in the order of `methods`."""
    rows = {name: results[name] for name in ("teacher", "before") if name in results}
    for method in methods:
        runs = [run for name, run in results.items() if name.startswith(f"{method} / ")]
        if len(runs) == 1:
            rows[method] = runs[0]
        elif runs:
            values = {key: [run[key] for run in runs] for key in runs[0] if all(key in run for run in runs)}
            rows[method] = {key: (statistics.mean(v), statistics.stdev(v)) for key, v in values.items()}
    return rows


def differences(
    results: dict[str, dict[str, float]], pairs: Iterable[tuple[str, str]], metrics: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """One method minus another, run by run of the same seed: mean and standard deviation over two seeds or more."""
    rows = {}
    for left, right in pairs:
        seeds = [name.removeprefix(f"{left} / ") for name in results if name.startswith(f"{left} / ")]
        runs = [(results[f"{left} / {s}"], results[f"{right} / {s}"]) for s in seeds if f"{right} / {s}" in results]
        if len(runs) > 1:
            values = {key: [one[key] - other[key] for one, other in runs] for key in metrics}
            rows[f"{left} - {right}"] = {key: (statistics.mean(v), statistics.stdev(v)) for key, v in values.items()}
    return rows


def markdown(rows: dict[str, dict[str, Any]], columns: dict[str, str]) -> str:
    """A table with a row for each model."""
    lines = [["model", *columns.values()], ["---", *["---:"] * len(columns)]]
    lines += [[name, *(format_metric(row.get(key)) for key in columns)] for name, row in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def load_results(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Finished runs, if they were made with the same settings."""
    if not file.exists():
        return {"settings": settings, "runs": {}}
    results = json.loads(file.read_text())
    if results["settings"] != settings:
        changed = {key: (results["settings"].get(key), value) for key, value in settings.items()}
        changed = {key: pair for key, pair in changed.items() if pair[0] != pair[1]}
        raise ValueError(
            f"{file} holds runs with other settings (there, now): {changed}. One table cannot mix them. Choose "
            "another `--output_dir`, or remove the file."
        )
    return results


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--output_dir", default="out/stories", help="Folder of everything that is made.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Seeds of the runs.")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="Methods to run.")
    parser.add_argument("--draws", type=int, default=2, help="Rollouts of each model per held-out story.")
    return parser.parse_args()


def make_material(args: argparse.Namespace, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Material:
    """Warm-started student and all training data, made once per output folder."""
    output_dir = Path(args.output_dir)
    stories = load_stories(args.train_file, tokenizer)
    student_path = warm_start(args.warm_start or output_dir / "warm_start", tokenizer, stories, args.warm_start_steps)
    gold_prompts, gold = split_stories(stories)
    prompts, completions = teacher_texts(
        output_dir / "teacher_texts.json", teacher, gold_prompts, args.texts_per_story
    )
    return Material(
        student_path=str(student_path),
        teacher_path=args.teacher,
        tokenizer=tokenizer,
        teacher_rows=as_rows(prompts, completions),
        gold_rows=as_rows(gold_prompts, gold),
        # TRL takes text and tokenises it: these prompts come back token by token, `<s>` included
        prompts=Dataset.from_dict({"prompt": tokenizer.batch_decode(prompts, skip_special_tokens=True)}),
    )


def write_table(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Both tables, to the terminal and to a file."""
    sharpened = [(example, sharper(method, example)) for method, example in SHARPENED]
    against = differences(results["runs"], COMPARED + sharpened, FIDELITY_METRICS)
    tokens = args.max_steps * 8 * COMPLETION_LENGTH
    text = f"Mean ± standard deviation over seeds; at most {tokens} trained tokens per run. "
    text += f"Settings: {results['settings']}.\n\n"
    costs = {"train_seconds": "seconds", "critic_bytes": "bytes of critics"}
    methods = [*METHODS, *(name for _, name in sharpened)]
    text += markdown(summarise(results["runs"], methods), FIDELITY_METRICS | costs)
    if against:
        text += f"\nDifferences, paired by seed:\n\n{markdown(against, FIDELITY_METRICS)}"
    file = Path(args.output_dir) / "results.md"
    file.write_text(text)
    print(f"\n{text}\nWritten: {file}, beside results.json.")


def main() -> None:
    args = parse_arguments()
    output_dir = Path(args.output_dir)
    names = ("warm_start_steps", "max_steps", "learning_rate", "texts_per_story", "num_test_stories", "draws")
    results = load_results(output_dir / "results.json", {name: getattr(args, name) for name in names})
    runs: dict[str, dict[str, float]] = results["runs"]

    teacher, tokenizer = load_teacher(args.teacher)
    material = make_material(args, teacher, tokenizer)
    test_stories = load_stories(args.test_file, tokenizer)[: args.num_test_stories]
    evaluate = held_out_evaluation(teacher, test_stories, args.draws)

    def keep(name: str, model: PreTrainedModel, **costs: float) -> None:
        """Evaluates a model and adds it to the results file."""
        runs[name] = evaluate(model) | costs
        file = output_dir / "results.json"
        file.with_suffix(".unfinished").write_text(json.dumps(results, indent=2))
        file.with_suffix(".unfinished").replace(file)

    before = AutoModelForCausalLM.from_pretrained(material.student_path)
    for name, model in {"teacher": teacher, "before": before}.items():
        if name not in runs:
            keep(name, model)
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
        costs = {"train_seconds": time.perf_counter() - start, "critic_bytes": critic_bytes(trainer)}
        if name not in runs:
            keep(name, trainer.model, **costs)
        for example in examples:
            norm = trainer.model.get_decoder().norm.weight
            original = norm.detach().clone()
            target = runs[f"{example} / {seed}"]["student_states/student_entropy"]
            factor = sharpen(trainer.model, target, lambda m: evaluate(m)["student_states/student_entropy"])
            keep(f"{sharper(method, example)} / {seed}", trainer.model, **costs)
            norm.data.copy_(original)
            print(f"{method}, seed {seed}: logits times {factor:.3f}, as sure as {example}")
    write_table(args, results)


if __name__ == "__main__":
    main()
