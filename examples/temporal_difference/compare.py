"""
Compares forms of temporal-difference distillation with SFT, forward KL and total variation at equal tokens, over
several seeds, on the pair of `examples/stories`.

    python examples/temporal_difference/compare.py --output_dir out/temporal_difference
    python examples/temporal_difference/compare.py --output_dir out/temporal_difference --list
    python examples/temporal_difference/compare.py --output_dir out/temporal_difference --only "expected, top-p / 0"

Each form is trained on texts that the teacher wrote in two ways, plainly and with nucleus sampling, and each student
is judged when both models are sampled plainly and when both are sampled with that nucleus. Each finished run is kept
in `results.json` and is not repeated. Started several times at once, each process takes the next run that is free.
"""

import argparse
import itertools
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from filelock import FileLock, Timeout
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from trl_kd import AMMConfig, AMMTrainer, KDConfig, SparseTDConfig, SparseTDTrainer
from trl_kd.evaluation import evaluate_fidelity, sample_completions


# The example next door, before this folder: its `compare.py` has the tables, its `stories.py` teacher and student
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stories"))

from compare import (  # noqa: E402
    ForwardKLTrainer,
    JSDTrainer,
    Material,
    differences,
    load_results,
    make_material,
    markdown,
    run_kd,
    run_sft,
    sharpen,
    sharper,
    summarise,
)
from stories import (  # noqa: E402
    COMPLETION_LENGTH,
    add_arguments,
    as_rows,
    load_stories,
    load_teacher,
    method_arguments,
    split_stories,
)


# How texts are sampled: the teacher's to train on, and those of both models to judge them by
SAMPLING = {"plain": 1.0, "top-p": 0.8}

Run = Callable[[Material, dict[str, Any], float], Any]


def baseline(trainer_class: type, config_class: type = KDConfig, **options) -> Run:
    """One divergence on the teacher's texts."""
    return lambda material, arguments, _: run_kd(trainer_class, config_class, material, arguments, **options)


def sparse_td(preset: str = "expected", objectives: dict[str, float] | None = None, **options) -> Run:
    """A form of the method, by default off-policy; the student's own texts are sampled as the teacher's are."""

    def run(material: Material, arguments: dict[str, Any], top_p: float) -> Any:
        options_of_run = {"preset": preset, "objectives": objectives, "top_p": top_p, **options}
        return run_kd(SparseTDTrainer, SparseTDConfig, material, arguments, **options_of_run)

    return run


def with_reward(weight: float, **options) -> Run:
    """The default and a regression to returns of the teacher's own reward, with Q-values on one scale."""
    objectives = {"expected_inverse_soft_q": 1.0, "teacher_reward": weight}
    return sparse_td(objectives=objectives, gauge="max", **options)


def alone(name: str, **options) -> Run:
    """One loss on the set, and the tail."""
    return sparse_td(objectives={name: 1.0}, **options)


NO_CHI2 = float("inf")

FORMS: dict[str, Run] = {
    "SFT": lambda material, arguments, _: run_sft("teacher_rows", material, arguments),
    "forward KL": baseline(ForwardKLTrainer),
    "expected": sparse_td(),
    "total variation": baseline(AMMTrainer, AMMConfig, critic="exact", lmbda=0.0),
    "JSD": baseline(JSDTrainer),
    "expected, p 0.95": sparse_td(action_top_p=0.95),
    "expected, half on-policy": sparse_td(lmbda=0.5),
    "expected, no tail": sparse_td(tail_weight=0.0),
    # The paper's form, and what becomes of it with one part changed
    "paper": sparse_td("paper"),
    "paper, no LM": sparse_td("paper", lm_weight=0.0),
    "paper, no chi2": sparse_td("paper", chi2_alpha=NO_CHI2),
    "paper, no chi2, tail": sparse_td("paper", chi2_alpha=NO_CHI2, lm_weight=0.0, tail_weight=1.0),
    "paper, no chi2, no LM": sparse_td("paper", chi2_alpha=NO_CHI2, lm_weight=0.0),
    "paper, centred chi2": sparse_td("paper", chi2_center="teacher"),
    "released": sparse_td("released"),
    # A temporal difference on top of the default, and the same without the next state (gamma 0)
    "reward 0.01": with_reward(0.01),
    "reward 0.01, gamma 0": with_reward(0.01, gamma=0.0),
    "reward 0.01, 4 steps": with_reward(0.01, returns="n_step", n_steps=4),
    "reward 0.01, lambda 0.9": with_reward(0.01, returns="lambda", td_lambda=0.9),
    "reward 0.1": with_reward(0.1),
    "reward 0.1, gamma 0": with_reward(0.1, gamma=0.0),
    "reward 0.1, 4 steps": with_reward(0.1, returns="n_step", n_steps=4),
    "reward 0.1, lambda 0.9": with_reward(0.1, returns="lambda", td_lambda=0.9),
    # Other losses of the framework, each with the tail
    "soft actor-critic": alone("soft_actor_critic", gauge="max"),
    "soft actor-critic, gamma 0": alone("soft_actor_critic", gauge="max", gamma=0.0),
    "soft actor-critic, lambda 0.9": alone("soft_actor_critic", gauge="max", returns="lambda", td_lambda=0.9),
    "large margin": alone("large_margin"),
    "SQIL, half on-policy": alone("sqil", lmbda=0.5),
}

# Forms that are shown once more, at the entropy of another on the same texts
SHARPENED = [("SFT", "expected"), ("forward KL", "expected")]

# Pairs whose differences are shown, run by run of the same seed and texts
COMPARED = [("expected", form) for form in FORMS if form != "expected"]
COMPARED += [("expected", sharper(*pair)) for pair in SHARPENED]
COMPARED += [
    (f"{form}{returns}", f"{form}, gamma 0")
    for form in ("reward 0.01", "reward 0.1", "soft actor-critic")
    for returns in ("", ", 4 steps", ", lambda 0.9")
    if f"{form}{returns}" in FORMS
]

METRICS = {
    "student_states/total_variation": "TV, own states",
    "student_states/reverse_kl": "RKL, own states",
    "imitation_gap": "gap",
    "teacher_states/total_variation": "TV, teacher's states",
    "teacher_states/forward_kl": "FKL, teacher's states",
    "student_states/student_entropy": "student's entropy",
    "student_states/teacher_entropy": "teacher's entropy",
    "student_states/distinct_2": "distinct-2",
    "rouge_l": "Rouge-L",
}
# What only one of both evaluations has
OWN_METRICS = {
    "plain": {"reference_states/total_variation": "TV, stories", "reference_states/nll": "NLL, stories"},
    "top-p": {"student_states/outside": "outside"},
}


COSTS = {"train_seconds": "seconds"}

# What must be the same for all runs of a results file
SETTINGS = ("warm_start_steps", "max_steps", "learning_rate", "texts_per_story", "num_test_stories", "draws", "device")


def columns_of(sampling: str) -> dict[str, str]:
    """Metrics of one of both evaluations, by their names in the results file, and their titles."""
    return {f"{sampling}/{name}": title for name, title in (METRICS | OWN_METRICS[sampling]).items()}


def kept(file: Path, make: Callable[[], list]) -> list:
    """What a file holds; made and written if there is none, by one process."""
    with FileLock(f"{file}.lock"):
        if not file.exists():
            file.write_text(json.dumps(make()))
        return json.loads(file.read_text())


@dataclass
class Evaluation:
    r"""
    Compares students with the teacher on held-out stories, in both ways of sampling.

    Args:
        teacher ([`~transformers.PreTrainedModel`]):
            The teacher.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Their tokenizer.
        prompts (`list[list[int]]`), references (`list[list[int]]`):
            Both parts of the stories, once for each draw.
        folder (`Path`):
            Where the teacher's texts are kept.
        device (`str`, *optional*, defaults to `"cpu"`):
            Where both models are run.
    """

    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    references: list[list[int]]
    folder: Path
    device: str = "cpu"

    def __post_init__(self):
        self.teacher.to(self.device)

    def sample(self, model: PreTrainedModel, sampling: str, seed: int = 0) -> list[list[int]]:
        """Completions of the prompts; models that share a seed share their noise."""
        options = {"max_new_tokens": COMPLETION_LENGTH, "batch_size": len(self.prompts), "progress": False}
        eos = {"eos_token_ids": [self.tokenizer.eos_token_id]}
        return sample_completions(model, self.prompts, seed=seed, top_p=SAMPLING[sampling], **options, **eos)

    def by_teacher(self, sampling: str, seed: int = 0) -> list[list[int]]:
        """Those of the teacher, sampled once."""
        return kept(
            self.folder / f"teacher_rollouts_{sampling}_{seed}.json", lambda: self.sample(self.teacher, sampling, seed)
        )

    def __call__(self, student: PreTrainedModel, samplings: Any = tuple(SAMPLING)) -> dict[str, float]:
        """All metrics, each with the way of sampling in front."""
        metrics, student = {}, student.to(self.device)
        for sampling in samplings:
            completions = self.sample(student, sampling)
            values = evaluate_fidelity(
                student,
                self.teacher,
                self.prompts,
                self.references if sampling == "plain" else None,
                max_new_tokens=COMPLETION_LENGTH,
                batch_size=100,
                top_p=SAMPLING[sampling],
                student_completions=completions,
                teacher_completions=self.by_teacher(sampling),
                progress=False,
            )
            values["rouge_l"] = mean(self.rouge_l(completions, self.by_teacher(sampling, seed)) for seed in (1, 2))
            metrics |= {f"{sampling}/{name}": value for name, value in values.items()}
        return metrics

    def rouge_l(self, completions: list[list[int]], references: list[list[int]]) -> float:
        """F-measure of Rouge-L, of 100. The references have noise of their own, so that agreement is no luck."""
        scorer = RougeScorer(["rougeL"])
        texts = (self.tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (references, completions))
        return 100 * mean(scorer.score(*pair)["rougeL"].fmeasure for pair in zip(*texts, strict=True))

    def entropy(self, student: PreTrainedModel, sampling: str) -> float:
        """The student's, on its own texts."""
        return self(student, [sampling])[f"{sampling}/student_states/student_entropy"]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--output_dir", default="out/temporal_difference", help="Folder of everything that is made.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Seeds of the runs.")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS, help="Forms to run.")
    parser.add_argument("--draws", type=int, default=2, help="Rollouts of each model per held-out story.")
    parser.add_argument("--device", default="cpu", help="Where students are judged; they are trained on the CPU.")
    parser.add_argument("--list", action="store_true", help="Print the names of all runs, in their order, and stop.")
    parser.add_argument("--only", nargs="+", help="Make these runs alone, such as 'expected, top-p / 0'.")
    return parser.parse_args()


def all_runs(args: argparse.Namespace) -> dict[str, tuple[str, str, int, str | None]]:
    """Names of all runs, with their form, texts, seed and whose entropy they get."""
    students = [(form, form, None) for form in args.forms]
    students += [(sharper(*pair), *pair) for pair in SHARPENED if set(pair) <= set(args.forms)]
    return {
        f"{name}, {texts} / {seed}": (form, texts, seed, example)
        for (name, form, example), texts, seed in itertools.product(students, SAMPLING, args.seeds)
    }


def file_name(run: str) -> str:
    """Name of a run as that of a file."""
    return re.sub(r"[^\w.]+", "-", run)


def texts_of(args: argparse.Namespace, material: Material, teacher: PreTrainedModel, texts: str) -> Material:
    """The material with the teacher's texts sampled in one of both ways."""
    if texts == "plain":
        return material
    prompts, _ = split_stories(load_stories(args.train_file, material.tokenizer))
    prompts = [prompt for prompt in prompts for _ in range(args.texts_per_story)]
    written = kept(
        Path(args.output_dir) / f"teacher_texts_{texts}.json",
        lambda: sample_completions(
            teacher, prompts, max_new_tokens=COMPLETION_LENGTH, batch_size=200, seed=1, top_p=SAMPLING[texts]
        ),
    )
    return replace(material, teacher_rows=as_rows(prompts, written))


def make_run(
    args: argparse.Namespace, name: str, material: Material, evaluation: Evaluation, results: dict[str, Any]
) -> dict[str, float]:
    """Trains a student and judges it, or takes a trained one and judges it at another's entropy."""
    output_dir = Path(args.output_dir)
    form, texts, seed, example = all_runs(args)[name]
    folder = output_dir / "students" / file_name(f"{form}, {texts} / {seed}")
    if example is None:
        arguments = method_arguments(output_dir / "runs" / folder.name, args.max_steps, args.learning_rate, seed)
        arguments["use_cpu"] = True
        trainer = FORMS[form](texts_of(args, material, evaluation.teacher, texts), arguments, SAMPLING[texts])
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        trainer.model.save_pretrained(folder)
        return evaluation(trainer.model) | {"train_seconds": seconds}
    target, metrics = results["runs"].get(f"{example}, {texts} / {seed}"), {}
    if target is None or not folder.exists():
        raise ValueError(f"{name!r} needs the runs of {form!r} and {example!r} on these texts. Make them first.")
    for sampling in SAMPLING:
        model = AutoModelForCausalLM.from_pretrained(folder)
        entropy = target[f"{sampling}/student_states/student_entropy"]
        factor = sharpen(model, entropy, partial(evaluation.entropy, sampling=sampling))
        metrics |= evaluation(model, [sampling]) | {f"{sampling}/factor": factor}
    return metrics


def write_table(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Tables for both kinds of texts and both evaluations, to the terminal and to a file."""
    tokens = args.max_steps * 8 * COMPLETION_LENGTH
    text = f"Mean ± standard deviation over seeds; at most {tokens} trained tokens per run. "
    text += f"Settings: {results['settings']}.\n"
    forms = [*FORMS, *(sharper(*pair) for pair in SHARPENED)]
    for texts in SAMPLING:
        for sampling in SAMPLING:
            columns = columns_of(sampling)
            rows = summarise(results["runs"], [f"{form}, {texts}" for form in forms])
            text += f"\nTexts {texts}, evaluation {sampling}:\n\n{markdown(rows, columns | COSTS)}"
            pairs = [(f"{left}, {texts}", f"{right}, {texts}") for left, right in COMPARED]
            against = differences(results["runs"], pairs, columns)
            if against:
                text += f"\nDifferences, paired by seed:\n\n{markdown(against, columns)}"
    file = Path(args.output_dir) / "results.md"
    file.write_text(text)
    print(f"\n{text}\nWritten: {file}, beside results.json.")


def main() -> None:
    args = parse_arguments()
    if args.list:
        print("\n".join(all_runs(args)))
        return
    output_dir = Path(args.output_dir)
    file = output_dir / "results.json"
    load = partial(load_results, file, {name: getattr(args, name) for name in SETTINGS})

    teacher, tokenizer = load_teacher(args.teacher)
    locks = output_dir / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / "material"):
        material = make_material(args, teacher, tokenizer)
    prompts, references = split_stories(load_stories(args.test_file, tokenizer)[: args.num_test_stories])
    prompts, references = prompts * args.draws, references * args.draws
    evaluation = Evaluation(teacher, tokenizer, prompts, references, output_dir, args.device)

    def keep(name: str, metrics: dict[str, float]) -> None:
        """Adds a run to the results file, which other processes may write too."""
        with FileLock(f"{file}.lock"):
            results = load()
            results["runs"][name] = metrics
            file.with_suffix(".unfinished").write_text(json.dumps(results, indent=2))
            file.with_suffix(".unfinished").replace(file)

    models = {"teacher": args.teacher, "before": material.student_path}
    for name in args.only or [*models, *all_runs(args)]:
        try:
            # Free again when its process is gone
            with FileLock(locks / file_name(name), timeout=0):
                results = load()
                if name in results["runs"]:
                    continue
                print(name, flush=True)
                if name in models:
                    keep(name, evaluation(AutoModelForCausalLM.from_pretrained(models[name])))
                else:
                    keep(name, make_run(args, name, material, evaluation, results))
        except Timeout:
            print(f"{name}: made by another process", flush=True)
    if not args.only:
        write_table(args, load())


if __name__ == "__main__":
    main()
