"""Short training runs on tiny models, and the trainer with an auxiliary module that the tests use."""

import copy
from typing import Any

import torch
import torch.nn as nn
from datasets import Dataset

from tests.tiny import make_model
from trl_kd import AMMConfig, AMMTrainer
from trl_kd.losses import LinearLoss
from trl_kd.trainer.tokens import TokenBatch


def pair(tokenizer: Any, kind: str = "llama", student_seed: int = 1, teacher_seed: int = 2) -> tuple[Any, Any]:
    """A tiny student and a wider teacher over one tokenizer."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    student = make_model(kind, len(tokenizer), hidden_size=32, seed=student_seed, **ids)
    return student, make_model(kind, len(tokenizer), hidden_size=48, seed=teacher_seed, **ids)


def config(output_dir: Any, **overrides: Any) -> AMMConfig:
    """Settings of a short run on a CPU that logs every step and saves nothing."""
    settings = {
        "output_dir": str(output_dir),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_completion_length": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "max_grad_norm": 1e6,
        "train_sampling_strategy": "sequential",
    }
    return AMMConfig(**(settings | overrides))


def logged(trainer: Any, name: str) -> list[float]:
    """Values of one logged number, in order."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all weights by name."""
    return copy.deepcopy(module.state_dict())


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether two states are equal bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def state_of(trainer: Any) -> tuple[dict[str, torch.Tensor], ...]:
    """Weights of student and auxiliary modules, and the moments of all optimizers."""
    optimizers = {"student": trainer.optimizer} | trainer.auxiliary.optimizers()
    moments = {
        f"{which}/{index}/{name}": torch.as_tensor(value)
        for which, optimizer in optimizers.items()
        for index, entry in optimizer.state_dict().get("state", {}).items()
        for name, value in entry.items()
    }
    return weights(trainer.model), weights(trainer.auxiliary.modules), moments


class ProjectingTrainer(AMMTrainer):
    """AMM with a jointly trained map from student to teacher states: something for the auxiliary optimizer to do."""

    def auxiliary_modules(self) -> dict[str, nn.Module]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.accelerator.process_index)  # what ranks make differently must be made equal
            projector = nn.Linear(self.model.config.hidden_size, self.teacher.head.weight.shape[1])
        return super().auxiliary_modules() | {"projector": projector}

    def token_loss(self, tokens: TokenBatch) -> LinearLoss:
        result = super().token_loss(tokens)
        (student, _), (teacher, _) = tokens.pairs["student"], tokens.pairs["teacher"]
        distance = (self.auxiliary.modules["projector"](student) - teacher).square().mean(dim=-1)
        values = result.values | {"distance": distance.detach()}
        return LinearLoss(result.loss + 0.01 * (tokens.weights * distance).sum(), values)


def tiny_dataset(num_rows: int = 16) -> Dataset:
    """Prompts and completions of different lengths."""
    words = ["fox", "bird", "river", "sky", "grass", "apple", "forest", "fish"]
    return Dataset.from_list(
        [
            {"prompt": f"What is the {words[i % 8]}" + "?" * (i % 3), "completion": " The sky is blue" * (1 + i % 2)}
            for i in range(num_rows)
        ]
    )
