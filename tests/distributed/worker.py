"""One rank of a two-process run on CPUs (gloo); started by `torch.distributed.run`, writes what happened as JSON."""

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests import conftest  # noqa: F401  (environment and threads)
from tests.tiny import make_tokenizer
from tests.trainer.dual import dual_pair, make_other_tokenizer, make_trainer, short_rows
from tests.trainer.runs import ProjectingTrainer, config, logged, pair, state_of, tiny_dataset
from tests.trainer.sparse import make_trainer as make_sparse_trainer
from tests.vllm import install
from trl_kd import AMMTrainer, DSKDTrainer, SparseTDTrainer


NUMBERS = ["loss", "grad_norm", "kd/aux_grad_norm", "kd/on_policy/completion_length"]
NUMBERS += [
    f"kd/{source}/{name}" for source in ("off_policy", "on_policy") for name in ("tokens", "moment", "distance")
]
VLLM_MODES = {
    "generate": {},
    "server": {"use_vllm": True, "vllm_mode": "server"},
    "colocate": {"use_vllm": True},
    "tensor parallel": {"use_vllm": True, "vllm_tensor_parallel_size": 2},
}
# Mode, share of the student, temperature; a step has four rows
VLLM_RUNS = [(mode, 0.75, 0.0) for mode in VLLM_MODES]
VLLM_RUNS += [(mode, 0.5, 0.0) for mode in ("generate", "server")]
VLLM_RUNS += [(mode, 0.75, 1.0) for mode in ("colocate", "tensor parallel")]
CRITIC_NUMBERS = ["loss", "grad_norm", "kd/critic_grad_norm", "kd/on_policy/advantage_size"]
CRITIC_NUMBERS += [
    f"kd/{source}/{name}"
    for source in ("off_policy", "on_policy")
    for name in ("moment", "saturation", "tightness", "unseen_moment", "unseen_tightness", "critic_objective")
]
# Learned critics and the gradient of later states, with each baseline: all that ranks must add up. Critics rise in the
# only forward of the step, or in a look ahead
CRITICS = {"critic": "value_head", "on_policy_gradient": "full", "later_warmup_steps": 2}
GAMES = [
    CRITICS | {"later_baseline": "position", "per_device_train_batch_size": 2},
    CRITICS | {"later_baseline": "value", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    # All rollouts are on one rank, so that the other has no gradient for their critic
    CRITICS | {"critic_order": "after", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
]
CRITIC_KIND = (AMMTrainer, CRITIC_NUMBERS)
DUAL_NUMBERS = ["loss", "grad_norm", "kd/aux_grad_norm", "kd/aligned_share"]
DUAL_NUMBERS += [
    f"kd/{source}/{name}"
    for source in ("off_policy", "on_policy")
    for name in ("tokens", "student_ce", "projector_ce", "student_space_kd", "teacher_space_kd", "gate")
]
# Gates are divided by their number over ranks, and sizes of keys and values are those of all ranks
DUAL = {"lmbda": 0.5, "temperature": 0.0, "learning_rate": 1e-3, "aux_learning_rate": 0.03, "max_steps": 3}
DUAL_RUNS = [
    DUAL | {"alignment": "eta", "per_device_train_batch_size": 2},
    # All rollouts are on one rank
    DUAL
    | {"alignment": "cma", "preset": "v1", "gate_normalization": "gated"}
    | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 7},
]
SPARSE_NUMBERS = ["loss", "grad_norm", "kd/set_size_max", "kd/off_policy/second_nll"]
SPARSE_NUMBERS += [
    f"kd/{source}/{name}"
    for source in ("off_policy", "on_policy")
    for name in ("tokens", "set_size", "label_in_set", "student_mass", "set_forward_kl", "value", "sqil")
]
SPARSE = {"lmbda": 0.5, "temperature": 0.0, "max_steps": 3, "learning_rate": 1e-3}
SPARSE_RUNS = [
    SPARSE | {"second": True, "lm_weight": 0.5, "per_device_train_batch_size": 2},
    # All rollouts are on one rank
    SPARSE
    | {"objectives": {"sqil": 1.0}, "returns": "lambda", "truncation": "bootstrap", "target_ema": 0.5}
    | {"second": True, "lm_weight": 0.5, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
]
TEACHERS = ["base", "routed"]
TEACHER_NUMBERS = ["loss", "grad_norm", "kd/off_policy/total_variation", "kd/on_policy/total_variation"]
SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "train_sampling_strategy": "random"}


class KilledTrainer(ProjectingTrainer):
    """Dies in its last save: weights and optimizer are written, auxiliary modules and random states are not."""

    def save_state_to(self, folder: str) -> None:
        if folder.endswith("checkpoint-6"):
            raise KeyboardInterrupt
        super().save_state_to(folder)


def run(
    folder: Path,
    lora: bool = False,
    resume: str | bool = False,
    killed: bool = False,
    kind: tuple[type, list[str]] = (ProjectingTrainer, NUMBERS),
    **overrides,
) -> dict:
    """Train on this rank; what it logged and ended with."""
    trainer_class, names = kind
    tokenizer = make_tokenizer()
    student, teacher = pair(tokenizer)
    peft_config = LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear") if lora else None
    args = config(folder, **({"per_device_train_batch_size": 2} | overrides))
    trainer = (KilledTrainer if killed else trainer_class)(
        student, teacher, args, tiny_dataset(), processing_class=tokenizer, peft_config=peft_config
    )
    if killed:
        try:
            trainer.train()
        except KeyboardInterrupt:
            return {}
        raise AssertionError("the run was not killed")
    trainer.train(resume_from_checkpoint=resume)
    return report_of(trainer, names)


def report_of(trainer: AMMTrainer | DSKDTrainer | SparseTDTrainer, names: list[str]) -> dict:
    """What was logged under these names, and what the run ended with."""
    digest = hashlib.sha256()
    for part in state_of(trainer):
        for _, value in sorted(part.items()):
            digest.update(value.contiguous().numpy().tobytes())
    report = {name: logged(trainer, name) for name in names}
    rank, written = trainer.accelerator.process_index, trainer.rollouts.last_completions
    return report | {"rank": rank, "rollouts": len(written), "weights": digest.hexdigest()}


def run_dual(folder: Path, **overrides) -> dict:
    """Train with two vocabularies on this rank, or alone; what it logged and ended with."""
    tokenizers = make_tokenizer(), make_other_tokenizer()
    trainer = make_trainer(dual_pair(*tokenizers), tokenizers, folder, short_rows(), **overrides)
    trainer.train()
    return report_of(trainer, DUAL_NUMBERS)


def run_sparse(folder: Path, second: bool = False, **overrides) -> dict:
    """Train on sets of tokens on this rank, or alone; what it logged and ended with."""
    texts = ["The fox is red.", "A green bird said hello", "apples", "The sky is blue. The grass is green.", "pears"]
    options = {"lm_dataset": Dataset.from_list([{"text": text} for text in texts])} if second else None
    trainer = make_sparse_trainer(make_tokenizer(), folder, options=options, **overrides)
    trainer.train()
    return report_of(trainer, SPARSE_NUMBERS)


def run_teachers(folder: Path, source: str, **overrides) -> dict:
    """Train with the student's base as the teacher, or with a teacher for each row; what it logged and ended with."""
    tokenizer = make_tokenizer()
    student, teacher = pair(tokenizer)
    options = {"temperature": 0.0, "learning_rate": 1e-3, "max_steps": 3, "lmbda": 0.5} | overrides
    rows, teachers = list(tiny_dataset()), None
    if source == "base":
        options["teacher_adapter"] = "base"
        with torch.random.fork_rng():
            torch.manual_seed(3)
            lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
            student = get_peft_model(student, lora)
    else:  # rank 0 has rows of the first teacher alone, rank 1 of the second
        options |= {"teacher_column": "source"}
        rows = [row | {"source": index // 2 % 2} for index, row in enumerate(rows)]
        teachers = [teacher, pair(tokenizer, teacher_seed=5)[1]]
    args = config(folder, **options)
    trainer = AMMTrainer(student, teachers, args, Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return report_of(trainer, TEACHER_NUMBERS)


def run_vllm(folder: Path, mode: str, lmbda: float, temperature: float = 0.0) -> dict:
    """Train with a stand-in for vLLM, two rows per step; what this rank asked for, and what its engine wrote."""
    tokenizer = make_tokenizer()
    student, teacher = pair(tokenizer)
    path = folder / f"student-{os.environ['RANK']}"
    student.save_pretrained(path)
    student = AutoModelForCausalLM.from_pretrained(path)
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "learning_rate": 5e-2}
    args = config(folder, lmbda=lmbda, temperature=temperature, **options, **VLLM_MODES[mode])
    with pytest.MonkeyPatch.context() as patch:
        install(patch.setattr, str(path))
        trainer = ProjectingTrainer(student, teacher, args, tiny_dataset(), processing_class=tokenizer)
        write, asked = trainer.write_with_student, []
        trainer.write_with_student = lambda prompts, seed: asked.append(len(prompts)) or write(prompts, seed)
        trainer.train()
    parts = vars(write.generation) if args.use_vllm else {}
    engine = parts.get("llm") or parts.get("vllm_client")  # the client of the first rank alone
    report = {"rank": trainer.accelerator.process_index, "asked": asked}
    report |= {"written": engine.written, "seeds": engine.seeds} if engine else {}
    return report | {name: logged(trainer, name) for name in NUMBERS}


def main(scenario: str, folder: Path) -> None:
    if scenario == "vllm":
        reports = [run_vllm(folder, *run) for run in VLLM_RUNS]
    elif scenario == "dual":
        reports = [run_dual(folder, **options) for options in DUAL_RUNS]
    elif scenario == "sparse":
        reports = [run_sparse(folder, **options) for options in SPARSE_RUNS]
    elif scenario == "teachers":
        reports = [run_teachers(folder, source, per_device_train_batch_size=2) for source in TEACHERS]
    elif scenario == "norm":
        reports = [run(folder, max_steps=2, temperature=0.0, learning_rate=1e-3)]
        reports += [run(folder, kind=CRITIC_KIND, temperature=0.0, learning_rate=1e-4, **game) for game in GAMES]
    else:
        reports = []
        for name, lora in (("full", False), ("lora", True)):
            reports.append(run(folder / name, lora, **SAVING))
            reports.append(run(folder / name, lora, str(folder / name / "checkpoint-3"), **SAVING))
        run(folder / "killed", killed=True, **SAVING)
        reports.append(run(folder / "killed", resume=True, **SAVING))
        settings = SAVING | GAMES[1]
        reports.append(run(folder / "critics", kind=CRITIC_KIND, **settings))
        reports.append(
            run(folder / "critics", resume=str(folder / "critics" / "checkpoint-3"), kind=CRITIC_KIND, **settings)
        )
    (folder / f"{scenario}-{reports[0]['rank']}.json").write_text(json.dumps(reports))
    # An interpreter that ends while the other rank still talks to its threads may abort
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
