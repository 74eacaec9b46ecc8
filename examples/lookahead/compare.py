"""
Asks whether a temporal-difference term helps a student that cannot see as far as its teacher, on the tasks of
`tasks.py`.

    OMP_NUM_THREADS=1 python examples/lookahead/compare.py --output_dir out/lookahead
    OMP_NUM_THREADS=1 python examples/lookahead/compare.py --output_dir out/lookahead --tasks note --seeds 0

Teachers, students and data are made here, on a CPU. All forms of a seed start from the same warm-started student and
are given the same number of optimizer steps and of sequences in a step. The learning rates are chosen for the forms
without the term, each for its own success; a form with the term takes that of `expected`, untried. Each finished run
is kept in `results.json` and is not repeated. Several processes may share a folder: each takes the next run that is
free.

A surer student breaks fewer rules without having learned anything, so controls are shown once more with their logits
multiplied by the number that makes them as sure (in entropy, on their own texts) as a student with the term.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from tasks import (
    TASKS,
    Task,
    as_rows,
    encode,
    is_right,
    make_prompts,
    make_tokenizer,
    new_student,
    new_teacher,
    task_rows,
)
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed
from trl import SFTConfig, SFTTrainer

from trl_kd import AMMConfig, AMMTrainer, KDConfig, SparseTDConfig, SparseTDTrainer
from trl_kd.evaluation import evaluate_fidelity, sample_completions
from trl_kd.generation import distinct_n


# The example next door, before this folder
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stories"))

from compare import (  # noqa: E402
    ForwardKLTrainer,
    ReverseKLTrainer,
    differences,
    load_results,
    markdown,
    sharper,
    summarise,
)


Run = Callable[[dict[str, Any], dict[str, Any]], Any]


def kd(trainer_class: type, config_class: type, **options) -> Run:
    """One of our trainers, half of the rows of a step on-policy."""

    def make(arguments: dict[str, Any], common: dict[str, Any]) -> Any:
        longest = max(len(labels) - labels.count(-100) for labels in common["train_dataset"][:64]["labels"])
        options_of_run = {"lmbda": 0.5, "max_completion_length": longest, **options}
        return trainer_class(args=config_class(**arguments, **options_of_run), **common)

    return make


def sft(arguments: dict[str, Any], common: dict[str, Any]) -> Any:
    """SFT on the teacher's texts."""
    return SFTTrainer(args=SFTConfig(**arguments), **{k: v for k, v in common.items() if k != "teacher_model"})


def expected(objectives: dict[str, float] | None = None, **options) -> Run:
    """Forward KL to the teacher's nucleus, and what is added to it."""
    objectives = {"expected_inverse_soft_q": 1.0} | (objectives or {})
    return kd(SparseTDTrainer, SparseTDConfig, objectives=objectives, action_top_p=0.95, **options)


def path(weight: float, returns: str = "monte_carlo", **options) -> Run:
    """With the path-consistency term, undiscounted, to the end of the text if nothing else is said."""
    return expected({"path_consistency": weight}, gamma=1.0, returns=returns, **options)


def reward(gamma: float) -> Run:
    """With a regression to returns of the teacher's reward."""
    return expected({"teacher_reward": 0.1}, gauge="max", gamma=gamma)


FORMS: dict[str, Run] = {
    "SFT": sft,
    "forward KL": kd(ForwardKLTrainer, KDConfig),
    "reverse KL": kd(ReverseKLTrainer, KDConfig),
    "total variation": kd(AMMTrainer, AMMConfig, critic="exact"),
    "expected": expected(),
    "expected + path 0.3, 1 token": path(0.3, "one_step"),
    "expected + path 0.3, 4 tokens": path(0.3, "n_step", n_steps=4),
    "expected + path 0.03": path(0.03),
    "expected + path 0.1": path(0.1),
    "expected + path 0.3": path(0.3),
    "expected + reward 0.1, gamma 0": reward(0.0),
    "expected + reward 0.1, gamma 0.99": reward(0.99),
}
# Each with learning rates of its own; all others are `expected` and a term, and take its rate
TUNED = ("SFT", "forward KL", "reverse KL", "total variation", "expected")
TUNING_SEED = 100

# Shown once more, at the entropy of another
SHARPENED = [
    ("expected", "expected + path 0.03"),
    ("expected", "expected + path 0.1"),
    ("expected", "expected + path 0.3"),
    ("reverse KL", "expected + path 0.3"),
    ("total variation", "expected + path 0.3"),
]
# Pairs whose differences are shown, seed by seed
COMPARED = [
    ("expected + path 0.3, 1 token", "expected"),
    ("expected + path 0.3, 4 tokens", "expected"),
    *(
        (f"expected + path {weight}", control)
        for weight in (0.03, 0.1, 0.3)
        for control in ("expected", sharper("expected", f"expected + path {weight}"))
    ),
    ("expected + path 0.3", "expected + path 0.3, 1 token"),
    ("expected + path 0.3", "expected + path 0.3, 4 tokens"),
    ("expected + path 0.3", sharper("reverse KL", "expected + path 0.3")),
    ("expected + path 0.3", "total variation"),
    ("expected + path 0.3", sharper("total variation", "expected + path 0.3")),
    ("expected + reward 0.1, gamma 0.99", "expected + reward 0.1, gamma 0"),
]

COLUMNS = {
    "success": "success",
    "success_top_p": "success, top-p .8",
    "choice": "choice",
    "sequence_kl": "sequence KL",
    "student_states/total_variation": "TV, own states",
    "student_states/reverse_kl": "RKL, own states",
    "imitation_gap": "gap",
    "teacher_states/total_variation": "TV, teacher's states",
    "teacher_states/forward_kl": "FKL, teacher's states",
    "student_states/student_entropy": "entropy",
    "distinct_4": "distinct-4",
    "student_states/completion_length": "length",
}
COSTS = {"train_seconds": "seconds"}

# What must be the same for all runs of a results file
SETTINGS = ("teacher_steps", "warm_start_steps", "max_steps", "batch_size", "learning_rates", "num_texts")


def training_arguments(folder: str | Path, steps: int, batch_size: int, learning_rate: float, seed: int) -> dict:
    """What all runs here share: optimizer and schedule, a cosine down to a tenth."""
    return {
        "output_dir": str(folder),
        "seed": seed,
        "max_steps": steps,
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
        "logging_steps": 100,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }


@dataclass
class Bench:
    r"""
    A task with its teacher, its warm-started students, the teacher's texts and how students are judged.

    Args:
        task (`Task`):
            One of `tasks.TASKS`.
        args (`argparse.Namespace`):
            The command line.
    """

    task: Task
    args: argparse.Namespace

    def __post_init__(self):
        self.folder = Path(self.args.output_dir) / self.task.name
        self.tokenizer = make_tokenizer(self.task)
        self.length = self.task.length + 1

    def _trained(
        self, folder: Path, model: PreTrainedModel, steps: int, batch_size: int, rate: float, seed: int
    ) -> None:
        """Trains a model by SFT on texts of the task, and saves it."""
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**training_arguments(folder, steps, batch_size, rate, seed) | {"warmup_steps": 50}),
            train_dataset=task_rows(self.task, steps * batch_size, seed),
            processing_class=self.tokenizer,
        )
        trainer.train()
        trainer.save_model(str(folder))

    def _once(self, folder: Path, make: Callable[[], Any]) -> str:
        """A folder, made by one process if it is not there."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / "config.json").exists():
                make()
        return str(folder)

    @cached_property
    def teacher_path(self) -> str:
        """The teacher: a Llama, trained on the task's texts."""
        folder = self.folder / "teacher"

        def make() -> None:
            set_seed(0)
            self._trained(folder, new_teacher(self.task), self.args.teacher_steps, 64, 3e-3, seed=1000)

        return self._once(folder, make)

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The same, in memory."""
        return AutoModelForCausalLM.from_pretrained(self.teacher_path).eval()

    def student_path(self, seed: int) -> str:
        """A student of a seed, trained on other texts of the task until that brings no more."""
        folder = self.folder / f"student_{seed}"

        def make() -> None:
            set_seed(seed)
            self._trained(folder, new_student(self.task), self.args.warm_start_steps, 32, 1e-2, seed=2000 + seed)

        return self._once(folder, make)

    def sample(self, model: PreTrainedModel, prompts: list[list[int]], seed: int, top_p: float = 1.0) -> list:
        """Completions; models that share a seed share their noise."""
        options = {"max_new_tokens": self.length, "batch_size": 2000, "progress": False}
        return sample_completions(model, prompts, seed=seed, top_p=top_p, **options)

    def rows(self, seed: int) -> Dataset:
        """What the teacher wrote for a seed."""
        prompts = encode(self.task, make_prompts(self.task, self.args.max_steps * self.args.batch_size, seed))
        return as_rows(prompts, self.sample(self.teacher, prompts, seed=3000 + seed))

    def train(self, form: str, learning_rate: float, seed: int, folder: Path) -> tuple[PreTrainedModel, float]:
        """A student, and the seconds that it took."""
        args = self.args
        common = {
            "model": self.student_path(seed),
            "teacher_model": self.teacher_path,
            "train_dataset": self.rows(seed),
            "processing_class": self.tokenizer,
        }
        arguments = training_arguments(folder, args.max_steps, args.batch_size, learning_rate, seed)
        trainer = FORMS[form](arguments, common)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        trainer.model.save_pretrained(folder)
        return trainer.model, seconds

    @cached_property
    def prompts(self) -> dict[str, list[list[str]]]:
        """Of what students are judged by: for results, and for the learning rates."""
        seeds = {"test": 5000, "validation": 5001}
        return {name: make_prompts(self.task, self.args.num_texts, seed) for name, seed in seeds.items()}

    @cached_property
    def teacher_texts(self) -> dict[str, list[list[int]]]:
        """The teacher's answers to them."""
        return {
            name: self.sample(self.teacher, encode(self.task, prompts), seed=0)
            for name, prompts in self.prompts.items()
        }

    def describe(self, prompts: list[list[str]], completions: list[list[int]]) -> dict[str, float]:
        """What the rules say of texts."""
        texts = [self.tokenizer.convert_ids_to_tokens(ids) for ids in completions]
        right = [is_right(self.task, *pair) for pair in zip(prompts, texts, strict=True)]
        chosen = [self.task.choice(text) for text in texts]
        return {"success": sum(right) / len(right), "choice": sum(chosen) / len(chosen)}

    def evaluate(self, student: PreTrainedModel, split: str = "test") -> dict[str, float]:
        """All measures; all students meet the same prompts and the same noise."""
        prompts = self.prompts[split]
        ids = encode(self.task, prompts)
        completions = self.sample(student, ids, seed=0)
        metrics = evaluate_fidelity(
            student,
            self.teacher,
            ids,
            max_new_tokens=self.length,
            batch_size=500,
            student_completions=completions,
            teacher_completions=self.teacher_texts[split],
            progress=False,
        )
        metrics |= self.describe(prompts, completions)
        nucleus = self.describe(prompts, self.sample(student, ids, seed=0, top_p=0.8))
        metrics |= {"success_top_p": nucleus["success"], "distinct_4": distinct_n(completions[:500], 4)}
        # Of whole texts, by the chain rule
        per_token, length = metrics["student_states/reverse_kl"], metrics["student_states/completion_length"]
        return metrics | {"sequence_kl": per_token * length}

    @torch.no_grad()
    def entropy(self, model: PreTrainedModel) -> float:
        """Of a student, on its own texts: those of `evaluate`."""
        ids = encode(self.task, self.prompts["test"])
        texts = self.sample(model, ids, seed=0)
        rows = [prompt + text + [0] * (self.length - len(text)) for prompt, text in zip(ids, texts, strict=True)]
        logits = model(input_ids=torch.tensor(rows), use_cache=False).logits[:, len(ids[0]) - 1 : -1]  # (B, K, V)
        written = torch.arange(self.length) < torch.tensor([len(text) for text in texts]).unsqueeze(1)  # (B, K)
        return torch.distributions.Categorical(logits=logits[written]).entropy().mean().item()


@torch.no_grad()
def scale_to_entropy(model: PreTrainedModel, entropy: float, measure: Callable[[PreTrainedModel], float]) -> float:
    """Multiply the logits of a model with a head of its own until its entropy is `entropy`; returns the factor."""
    weight = model.get_output_embeddings().weight
    original = weight.clone()
    low, high = 0.5, 4.0
    for _ in range(10):
        factor = (low * high) ** 0.5
        weight.copy_(factor * original)
        low, high = (factor, high) if measure(model) > entropy else (low, factor)
    return factor


class Study:
    """Results of a folder, and what is still to be run."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.file = Path(args.output_dir) / "results.json"
        self.locks = Path(args.output_dir) / "locks"
        self.locks.mkdir(parents=True, exist_ok=True)
        self.benches = {name: Bench(TASKS[name], args) for name in args.tasks}

    def load(self) -> dict[str, Any]:
        """Finished runs."""
        return load_results(self.file, {name: getattr(self.args, name) for name in SETTINGS})

    def make(self, name: str, make: Callable[[], dict[str, float] | None], waits: bool = False) -> None:
        """A run, unless it has been made or another process makes it, which can be waited for."""
        try:
            # Free again when its process is gone
            with FileLock(self.locks / name.replace(" / ", "_").replace(" ", "-"), timeout=-1 if waits else 0):
                if name in self.load()["runs"]:
                    return
                metrics = make()
                if metrics is None:
                    return
                with FileLock(f"{self.file}.lock"):
                    results = self.load()
                    results["runs"][name] = metrics
                    self.file.with_suffix(".unfinished").write_text(json.dumps(results, indent=2))
                    self.file.with_suffix(".unfinished").replace(self.file)
                print(name, {title: round(metrics[key], 3) for key, title in COLUMNS.items()}, flush=True)
        except Timeout:
            print(f"{name}: made by another process", flush=True)

    def trained(self, bench: Bench, form: str, rate: float, seed: int, split: str) -> dict[str, float]:
        """Trains and judges a student."""
        folder = self.folder_of(bench, form, seed) if split == "test" else bench.folder / "tuning"
        model, seconds = bench.train(form, rate, seed, folder)
        return bench.evaluate(model, split) | {"train_seconds": seconds, "learning_rate": rate}

    @staticmethod
    def folder_of(bench: Bench, form: str, seed: int) -> Path:
        """Where a student is kept."""
        return bench.folder / "students" / f"{form} {seed}".replace(" ", "-")

    def rate_of(self, bench: Bench, form: str) -> float:
        """The learning rate with which a form, or the one it adds to, did best with one more seed."""
        form = form if form in TUNED else "expected"
        names = {rate: f"tuning {bench.task.name}, {form} / {rate:g}" for rate in self.args.learning_rates}
        for rate, name in names.items():
            self.make(name, partial(self.trained, bench, form, rate, TUNING_SEED, "validation"), waits=True)
        runs = self.load()["runs"]
        if bench.task.can_fail:
            return max(names, key=lambda rate: runs[names[rate]]["success"])
        return min(names, key=lambda rate: runs[names[rate]]["sequence_kl"])

    def scaled(self, bench: Bench, form: str, example: str, seed: int) -> dict[str, float] | None:
        """A trained student, judged at the entropy of another."""
        target = self.load()["runs"].get(f"{bench.task.name}, {example} / {seed}")
        folder = self.folder_of(bench, form, seed)
        if target is None or not (folder / "config.json").exists():
            return None
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        factor = scale_to_entropy(model, target["student_states/student_entropy"], bench.entropy)
        return bench.evaluate(model) | {"factor": factor}

    def run(self) -> None:
        """Everything that was asked for."""
        for task, bench in self.benches.items():
            self.make(f"{task}, teacher / 0", lambda bench=bench: bench.evaluate(bench.teacher))
            for seed in self.args.seeds:
                before = partial(AutoModelForCausalLM.from_pretrained, bench.student_path(seed))
                self.make(f"{task}, before / {seed}", lambda bench=bench, before=before: bench.evaluate(before()))
                for form in self.args.forms:
                    rate = self.rate_of(bench, form)
                    self.make(f"{task}, {form} / {seed}", partial(self.trained, bench, form, rate, seed, "test"))
                for form, example in SHARPENED:
                    if {form, example} <= set(self.args.forms):
                        name = f"{task}, {sharper(form, example)} / {seed}"
                        self.make(name, partial(self.scaled, bench, form, example, seed))

    def write_tables(self) -> None:
        """All tables, to the terminal and to a file."""
        results = self.load()
        runs, rows = results["runs"], [*FORMS, *(sharper(*pair) for pair in SHARPENED)]
        text = f"Mean ± standard deviation over seeds. Settings: {results['settings']}.\n"
        for task in self.args.tasks:
            own = [f"{task}, {form}" for form in ("teacher", "before", *rows)]
            table = {name.removeprefix(f"{task}, "): row for name, row in summarise(runs, own).items()}
            text += f"\n## {task}\n\n{markdown(table, COLUMNS | COSTS)}"
            pairs = [(f"{task}, {left}", f"{task}, {right}") for left, right in COMPARED]
            against = {name.replace(f"{task}, ", ""): row for name, row in differences(runs, pairs, COLUMNS).items()}
            if against:
                text += f"\nDifferences, paired by seed:\n\n{markdown(against, COLUMNS)}"
            tuning = {name: run for name, run in runs.items() if name.startswith(f"tuning {task}, ")}
            text += f"\nChoice of the learning rates:\n\n{markdown(tuning, COLUMNS)}"
        file = Path(self.args.output_dir) / "results.md"
        file.write_text(text)
        print(f"\n{text}\nWritten: {file}, beside results.json.")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="out/lookahead", help="Folder of everything that is made.")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS, help="Tasks to run.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Seeds, each with its own start.")
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=FORMS, help="Forms to run.")
    parser.add_argument("--teacher_steps", type=int, default=2000, help="Steps of SFT that make the teacher.")
    parser.add_argument("--warm_start_steps", type=int, default=1500, help="Steps of SFT that make a student.")
    parser.add_argument("--max_steps", type=int, default=200, help="Optimizer steps of each form.")
    parser.add_argument("--batch_size", type=int, default=64, help="Sequences of each optimizer step.")
    parser.add_argument("--num_texts", type=int, default=2000, help="Texts by which a student is judged.")
    parser.add_argument(
        "--learning_rates", type=float, nargs="+", default=[2e-3, 5e-3, 1e-2, 2e-2], help="Peak rates to choose from."
    )
    return parser.parse_args()


def main() -> None:
    study = Study(parse_arguments())
    study.run()
    study.write_tables()


if __name__ == "__main__":
    main()
