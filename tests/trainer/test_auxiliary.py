"""The optimizer of auxiliary modules, step by step against one that is written out."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from trl_kd.trainer.auxiliary import AuxiliaryModules


def make(**overrides):
    settings = {
        "aux_learning_rate": 0.1,
        "aux_adam_beta1": 0.5,
        "aux_adam_beta2": 0.8,
        "aux_weight_decay": 0.3,
        "aux_max_grad_norm": 0.7,
        "aux_lr_scheduler_type": "linear",
        "aux_warmup_steps": 2,
    }
    module = torch.nn.Linear(3, 1, bias=False).bfloat16()
    args = SimpleNamespace(**(settings | overrides))
    return AuxiliaryModules({"m": module}, args, Accelerator(cpu=True)), args


def test_step_is_adamw_with_own_clipping_and_schedule():
    auxiliary, args = make()
    assert auxiliary.modules["m"].weight.dtype == torch.float32
    auxiliary.start(num_training_steps=6)
    weight = auxiliary.modules["m"].weight.detach().double().clone()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(5):
        gradient = torch.tensor([[1.0, -2.0, float(step)]])
        auxiliary.modules["m"].weight.grad = gradient.clone()
        logged = auxiliary.step()
        assert logged["aux_grad_norm"].item() == pytest.approx(gradient.norm().item())
        rate = 0.1 * (step / 2 if step < 2 else (6 - step) / 4)
        assert logged["aux_learning_rate"].item() == pytest.approx(rate)
        clipped = gradient.double() * min(1.0, args.aux_max_grad_norm / gradient.norm().item())
        first = 0.5 * first + 0.5 * clipped
        second = 0.8 * second + 0.2 * clipped**2
        weight = weight * (1 - rate * 0.3)
        update = (first / (1 - 0.5 ** (step + 1))) / ((second / (1 - 0.8 ** (step + 1))).sqrt() + 1e-8)
        weight = weight - rate * update
        torch.testing.assert_close(auxiliary.modules["m"].weight.detach().double(), weight, rtol=1e-4, atol=1e-6)
        assert auxiliary.modules["m"].weight.grad is None


def test_step_without_a_gradient_and_without_clipping():
    auxiliary, _ = make(aux_max_grad_norm=0.0, aux_weight_decay=0.0, aux_lr_scheduler_type="constant")
    auxiliary.start(num_training_steps=2)
    before = auxiliary.modules["m"].weight.detach().clone()
    assert auxiliary.step()["aux_grad_norm"] == 0
    assert torch.equal(auxiliary.modules["m"].weight, before)


def test_no_modules_do_nothing():
    auxiliary = AuxiliaryModules({}, SimpleNamespace(), Accelerator(cpu=True))
    auxiliary.start(3)
    assert auxiliary.step() == {} and not auxiliary
    auxiliary.save("nowhere")
    auxiliary.load("nowhere")
