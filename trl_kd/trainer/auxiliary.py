"""Trainable modules beside the student (critics, projectors): their optimizer, schedule, and place in a checkpoint."""

import os
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import save_file
from transformers import TrainerCallback, get_scheduler


AUXILIARY_FILE = "trl_kd_auxiliary.pt"


class AuxiliaryModules:
    r"""
    Modules that a method trains jointly with the student, but that are no part of it.

    They live outside of the student's wrapper (DDP, FSDP, DeepSpeed), in float32, the same on every rank: broadcast at
    the start, gradients averaged before each step. The student's optimizer, clipping and files never see them.

    Args:
        modules (`dict[str, torch.nn.Module]`):
            The modules by name; may be empty.
        args ([`KDConfig`]):
            Configuration with the `aux_*` fields.
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's accelerator.
    """

    def __init__(self, modules: dict[str, nn.Module], args: Any, accelerator: Any):
        self.modules = nn.ModuleDict(modules).float().to(accelerator.device)
        self.args = args
        self.accelerator = accelerator
        self.optimizer = None
        self.scheduler = None
        if accelerator.num_processes > 1:
            from accelerate.utils import broadcast

            for tensor in [*self.modules.parameters(), *self.modules.buffers()]:
                tensor.data.copy_(broadcast(tensor.data, from_process=0))

    def __bool__(self) -> bool:
        return len(self.modules) > 0

    def joint_parameters(self) -> list[nn.Parameter]:
        """What steps with the student, on the gradients that its backward passes leave."""
        return [parameter for parameter in self.modules.parameters() if parameter.requires_grad]

    def optimizers(self) -> dict[str, Any]:
        """Optimizers and schedules by name, as a checkpoint keeps them."""
        found = {"optimizer": self.optimizer, "scheduler": self.scheduler}
        return {name: part for name, part in found.items() if part is not None}

    def start(self, num_training_steps: int) -> None:
        """Make optimizer and schedule, once the number of optimizer steps is known."""
        args, parameters = self.args, self.joint_parameters()
        if not parameters:
            return
        self.optimizer = torch.optim.AdamW(
            parameters,
            lr=args.aux_learning_rate,
            betas=(args.aux_adam_beta1, args.aux_adam_beta2),
            weight_decay=args.aux_weight_decay,
        )
        self.scheduler = get_scheduler(
            args.aux_lr_scheduler_type, self.optimizer, args.aux_warmup_steps, num_training_steps
        )

    def step(self) -> dict[str, torch.Tensor]:
        r"""
        One optimizer step on the gradients that the student's backward passes left.

        Returns:
            `dict[str, torch.Tensor]`: gradient norm before clipping and learning rate; empty without such modules.
        """
        if self.optimizer is None:
            return {}
        parameters = self.joint_parameters()
        for parameter in parameters:
            # Every rank takes part in the average, also one whose micro-batches did not reach a module
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self.accelerator.num_processes > 1:
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        bound = self.args.aux_max_grad_norm or float("inf")
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, bound)
        learning_rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return {"aux_grad_norm": grad_norm, "aux_learning_rate": torch.tensor(learning_rate)}

    def save(self, folder: str) -> None:
        """Write modules, optimizer and schedule to a checkpoint, whole or not at all."""
        if not self:
            return
        parts = {"modules": self.modules} | self.optimizers()
        state = {name: part.state_dict() for name, part in parts.items()}
        path = os.path.join(folder, AUXILIARY_FILE)
        torch.save(state, path + ".tmp")
        os.replace(path + ".tmp", path)

    def export(self, folder: str) -> None:
        """Write the modules alone, for other programs."""
        os.makedirs(folder, exist_ok=True)
        save_file(self.modules.state_dict(), os.path.join(folder, "auxiliary.safetensors"))

    def load(self, folder: str) -> None:
        r"""
        Restore what `save` wrote.

        Args:
            folder (`str`):
                A checkpoint.

        Raises:
            ValueError: If the file is missing, damaged, or belongs to other modules.
        """
        if not self:
            return
        path = os.path.join(folder, AUXILIARY_FILE)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in ({"modules": self.modules} | self.optimizers()).items():
                part.load_state_dict(state[name])
        except (OSError, RuntimeError, KeyError, ValueError, EOFError) as error:
            raise ValueError(
                f"The auxiliary modules {sorted(self.modules)} could not be restored from `{path}`: {error}. Without "
                "them the run would go on with untrained ones. Resume from a checkpoint of the same method that was "
                "saved with its optimizer (`save_only_model=False`)."
            ) from error


class StepHooks(TrainerCallback):
    """Calls the trainer back right before the student's optimizer steps."""

    def __init__(self, before_optimizer_step: Any):
        self.before_optimizer_step = before_optimizer_step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before_optimizer_step()
