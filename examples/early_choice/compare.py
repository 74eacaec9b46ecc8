"""
Asks whether a student learns to choose its first word by what the word leads to, on the task of `totals.py`.

    OMP_NUM_THREADS=1 python examples/early_choice/compare.py --output_dir out/early_choice

Teacher, student and data are made here, on a CPU, in about four minutes. All methods start from the same warm-started
student and are given the same number of optimizer steps, of sequences in a step, of tokens in a sequence, and the same
learning rate: the one with which AMM's direct gradient answers most validation prompts correctly. Half and twice
that rate are tried too. Each finished run is kept in `results.json` and is not repeated; the tables go to the terminal
and to `results.md`.

A surer student answers better without having learned anything, so the direct gradient is shown once more beside each
full one: with its logits scaled until it is as sure of itself (in entropy, on its own answers).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from totals import (
    COMPLETION_LENGTH,
    STUDENT,
    TEACHER,
    as_rows,
    held_out_evaluation,
    make_prompts,
    make_tokenizer,
    own_entropy,
    teacher_texts,
    trained_model,
    training_arguments,
)
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import SFTConfig, SFTTrainer

from trl_kd import AMMConfig, AMMTrainer, KDConfig
from trl_kd.evaluation import format_metric
from trl_kd.losses import LinearLoss, Term, generalized_jsd
from trl_kd.trainer.kd_trainer import _KDTrainer
from trl_kd.trainer.tokens import TokenBatch


class JSDTrainer(_KDTrainer):
    """Jensen-Shannon divergence on all tokens, each with its weight."""

    def token_loss(self, tokens: TokenBatch) -> LinearLoss:
        """The loss of a micro-batch."""
        term = Term(generalized_jsd, weights=tokens.weights)
        return tokens.linear_loss({"divergence": term}, self.args.loss_chunk_size)


def full(later_cost: str, later_weight: float = 0.3, **options) -> dict[str, Any]:
    """AMM that also follows what a token does to the later states."""
    return {"on_policy_gradient": "full", "later_cost": later_cost, "later_weight": later_weight, **options}


# Options of `AMMConfig`; what is not named has its default: the exact critic, later states at 0.3, discounted by 0.9
AMM = {
    "AMM": {},
    "AMM full, TV": full("total_variation"),
    "AMM full, JSD": full("jsd"),
    "AMM full, RKL": full("reverse_kl"),
    "AMM full, TV, gamma 1": full("total_variation", later_gamma=1.0),
    "AMM full, JSD, gamma 1": full("jsd", later_gamma=1.0),
    "AMM full, RKL, gamma 1": full("reverse_kl", later_gamma=1.0),
    "AMM full, RKL, weight 0.1": full("reverse_kl", later_weight=0.1),
    "AMM full, TV, weight 1": full("total_variation", later_weight=1.0),
    "AMM, value head": {"critic": "value_head", "critic_features": "both"},
    "AMM, value head, teacher's states": {"critic": "value_head", "critic_features": "teacher"},
    "AMM, Le Cam": {"critic": "exact_penalised"},
    "AMM full, Le Cam, TV": full("total_variation", critic="exact_penalised"),
}
METHODS = ["SFT", "JSD", *AMM]
# Those that are tried once more at half and twice the learning rate
MAIN = [
    *("SFT", "JSD", "AMM", "AMM full, TV", "AMM full, JSD", "AMM full, RKL", "AMM full, RKL, weight 0.1"),
    *("AMM, value head", "AMM, value head, teacher's states"),
]
FACTORS = (1.0, 0.5, 2.0)

COLUMNS = {
    "exact_match": "exact match",
    "exact_match_greedy": "greedy",
    "forward_share": "forward",
    "forward_share_greedy": "forward, greedy",
    "forward_exact_match": "exact match, forward",
    "backward_exact_match": "exact match, backward",
    "distinct_answers": "distinct answers",
    "student_states/total_variation": "TV, student states",
    "student_states/reverse_kl": "RKL, student states",
    "teacher_states/total_variation": "TV, teacher states",
    "teacher_states/forward_kl": "FKL, teacher states",
    "student_states/student_entropy": "student entropy",
    "student_states/completion_length": "length",
}


def train(method: str, student_path: str, teacher_path: str, rows: Dataset, arguments: dict[str, Any]) -> Any:
    """One run, on teacher-written rows and, but for SFT, half of them with the student's own completions instead."""
    common = {"model": student_path, "train_dataset": rows, "processing_class": make_tokenizer()}
    if method == "SFT":
        trainer = SFTTrainer(args=SFTConfig(**arguments), **common)
    else:
        common["teacher_model"] = teacher_path
        arguments = arguments | {"max_completion_length": COMPLETION_LENGTH, "lmbda": 0.5}
        if method == "JSD":
            trainer = JSDTrainer(args=KDConfig(**arguments), **common)
        else:
            trainer = AMMTrainer(args=AMMConfig(**arguments, **AMM[method]), **common)
    trainer.train()
    return trainer


def control_of(method: str) -> str:
    """Name of the direct gradient's row that is as sure of itself as a full one's."""
    return f"AMM at the entropy of {method.removeprefix('AMM ')}"


@torch.no_grad()
def scale_to_entropy(model: PreTrainedModel, entropy: float, measure: Callable[[PreTrainedModel], float]) -> float:
    """
    Scale a model's logits until its entropy is `entropy`, by bisection; returns the factor.

    The logits of a Llama are linear in the weight of its last norm.
    """
    norm = model.get_decoder().norm.weight
    original = norm.clone()
    low, high = 0.25, 4.0
    for _ in range(12):
        factor = (low * high) ** 0.5
        norm.copy_(factor * original)
        low, high = (factor, high) if measure(model) > entropy else (low, factor)
    return factor


class Study:
    """Everything that is made in `output_dir`, and the results that are in it already."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.folder = Path(args.output_dir)
        self.file = self.folder / "results.json"
        names = ("teacher_steps", "student_steps", "max_steps", "batch_size", "learning_rates", "draws")
        settings = {name: getattr(args, name) for name in names}
        self.results = json.loads(self.file.read_text()) if self.file.exists() else {"settings": settings, "runs": {}}
        if self.results["settings"] != settings:
            raise ValueError(
                f"{self.file} holds runs with the settings {self.results['settings']}, but these are {settings}. One "
                "table cannot mix them. Choose another `--output_dir`, or remove the file."
            )
        self.runs: dict[str, dict[str, float]] = self.results["runs"]
        self._make_material()

    def _make_material(self) -> None:
        args = self.args
        prompts = make_prompts(64 * args.teacher_steps)
        teacher_path = trained_model(self.folder / "teacher", TEACHER, prompts["train"], args.teacher_steps, 64, 3e-3)
        student_path = trained_model(self.folder / "student", STUDENT, prompts["train"], args.student_steps, 32, 5e-3)
        self.teacher_path, self.student_path = str(teacher_path), str(student_path)
        teacher = AutoModelForCausalLM.from_pretrained(teacher_path)
        chosen = prompts["train"][: args.max_steps * args.batch_size]
        self.rows = as_rows(chosen, teacher_texts(self.folder / "teacher_texts.json", teacher, chosen))
        self.prompts = prompts["test"]
        self.evaluate = held_out_evaluation(teacher, prompts["test"], args.draws)
        self.validate = held_out_evaluation(teacher, prompts["validation"], args.draws)
        for name, path in {"teacher": teacher_path, "before": student_path}.items():
            if name not in self.runs:
                self.keep(name, self.evaluate(AutoModelForCausalLM.from_pretrained(path)))

    def keep(self, name: str, metrics: dict[str, float]) -> None:
        """Adds a finished run to the results file."""
        self.runs[name] = metrics
        unfinished = self.file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.results, indent=2))
        unfinished.replace(self.file)
        print(name, {key: round(metrics[key], 3) for key in COLUMNS})

    def run(self, name: str, method: str, learning_rate: float, seed: int, evaluate: Callable) -> None:
        """Trains and evaluates, unless it has been done."""
        if name in self.runs:
            return
        folder = self.model_folder(name)
        arguments = training_arguments(folder, self.args.max_steps, self.args.batch_size, learning_rate, seed)
        start = time.perf_counter()
        trainer = train(method, self.student_path, self.teacher_path, self.rows, arguments)
        seconds = time.perf_counter() - start
        trainer.save_model()
        self.keep(name, evaluate(trainer.model) | {"train_seconds": seconds})

    def model_folder(self, name: str) -> Path:
        """Where the model of a run is saved."""
        return self.folder / "runs" / name.replace(" / ", "_").replace(",", "").replace(" ", "-")

    def choose_learning_rate(self) -> float:
        """The rate with which the direct gradient answers most validation prompts correctly."""
        names = {rate: f"validation, AMM / {rate:g}" for rate in self.args.learning_rates}
        for rate, name in names.items():
            self.run(name, "AMM", rate, seed=100, evaluate=self.validate)
        return max(names, key=lambda rate: self.runs[names[rate]]["exact_match"])

    def control(self, method: str, seed: int) -> None:
        """The direct gradient at the entropy of a full one."""
        name = f"{control_of(method)} / 1 / {seed}"
        if name in self.runs:
            return
        model = AutoModelForCausalLM.from_pretrained(self.model_folder(f"AMM / 1 / {seed}"))
        entropy = self.runs[f"{method} / 1 / {seed}"]["student_states/student_entropy"]
        factor = scale_to_entropy(model, entropy, lambda model: own_entropy(model, self.prompts))
        self.keep(name, self.evaluate(model) | {"logits_factor": factor})


def over_seeds(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and standard deviation of each metric."""
    if len(runs) == 1:
        return runs[0]
    values = {key: [run[key] for run in runs] for key in runs[0]}
    return {key: (statistics.mean(v), statistics.stdev(v)) for key, v in values.items()}


def summarise(runs: dict[str, dict[str, float]], factor: str = "1") -> dict[str, dict[str, Any]]:
    """Rows of a table: every method at one multiple of the learning rate."""
    kept = [name for name in runs if name.split(" / ")[1:2] == [factor] and not name.startswith("validation")]
    methods = dict.fromkeys(name.split(" / ")[0] for name in kept)
    order = [name for method in METHODS for name in (method, control_of(method))]
    return {
        method: over_seeds([runs[name] for name in kept if name.split(" / ")[0] == method])
        for method in sorted(methods, key=order.index)
    }


def differences(runs: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Each method minus the direct gradient and, if full, minus its control; paired by seed."""
    rows = {}
    for method in METHODS:
        against = {"AMM": "AMM", "control": control_of(method)}
        for title, other in against.items():
            seeds = [name.rsplit(" / ", 1)[1] for name in runs if name.startswith(f"{method} / 1 / ")]
            seeds = [seed for seed in seeds if f"{other} / 1 / {seed}" in runs and other != method]
            pairs = [(runs[f"{method} / 1 / {seed}"], runs[f"{other} / 1 / {seed}"]) for seed in seeds]
            if pairs:
                rows[f"{method} - {title}"] = over_seeds([{key: a[key] - b[key] for key in COLUMNS} for a, b in pairs])
    return rows


def markdown(rows: dict[str, dict[str, Any]], columns: dict[str, str]) -> str:
    """A table with a row for each model."""
    lines = [["model", *columns.values()], ["---", *["---:"] * len(columns)]]
    lines += [[name, *(format_metric(row.get(key)) for key in columns)] for name, row in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_tables(study: Study, learning_rate: float) -> None:
    """All tables, to the terminal and to a file."""
    runs = study.runs
    models = {name: runs[name] for name in ("teacher", "before")} | summarise(runs)
    rates = {
        f"{method}, {title} the rate": row
        for factor, title in {"0.5": "half", "2": "twice"}.items()
        for method, row in summarise(runs, factor).items()
    }
    validation = {name: run for name, run in runs.items() if name.startswith("validation")}
    text = f"Mean ± standard deviation over seeds. Learning rate {learning_rate:g}. Settings: "
    text += f"{study.results['settings']}.\n\n{markdown(models, COLUMNS | {'train_seconds': 'seconds'})}"
    text += f"\nDifferences, paired by seed:\n\n{markdown(differences(runs), COLUMNS)}"
    text += f"\nOther learning rates:\n\n{markdown(rates, COLUMNS)}"
    text += f"\nChoice of the learning rate, on validation prompts:\n\n{markdown(validation, COLUMNS)}"
    file = study.folder / "results.md"
    file.write_text(text)
    print(f"\n{text}\nWritten: {file}, beside results.json.")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="out/early_choice", help="Folder of everything that is made.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Seeds of the runs.")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, help="Methods to run.")
    parser.add_argument("--teacher_steps", type=int, default=2500, help="Steps of SFT that make the teacher.")
    parser.add_argument("--student_steps", type=int, default=1500, help="Steps of SFT that make the student.")
    parser.add_argument("--max_steps", type=int, default=300, help="Optimizer steps of each method.")
    parser.add_argument("--batch_size", type=int, default=16, help="Sequences of each optimizer step.")
    parser.add_argument("--draws", type=int, default=4, help="Answers of each model per held-out prompt.")
    parser.add_argument(
        "--learning_rates",
        type=float,
        nargs="+",
        default=[1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2],
        help="Peak learning rates to choose from.",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    study = Study(args)
    learning_rate = study.choose_learning_rate()
    for factor in FACTORS:
        for seed in args.seeds:
            for method in args.methods:
                if factor == 1.0 or method in MAIN:
                    name = f"{method} / {factor:g} / {seed}"
                    study.run(name, method, factor * learning_rate, seed, study.evaluate)
                if factor == 1.0 and method.startswith("AMM full"):
                    study.control(method, seed)
    write_tables(study, learning_rate)


if __name__ == "__main__":
    main()
