"""Adversarial moment matching."""

import textwrap
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn

from trl_kd.losses import (
    LinearLoss,
    Term,
    cross_entropy,
    discount_weights,
    entropy,
    exact_moment,
    exact_penalised_moment,
    forward_kl,
    top1_agreement,
    total_variation,
    weighted_sum,
)
from trl_kd.teachers import TeacherGroup
from trl_kd.trainer.amm_config import AMMConfig
from trl_kd.trainer.amm_warnings import DriftWatch, warn_of_settings
from trl_kd.trainer.critics import SOURCES, MomentCritics, critic_terms, make_critics, merge
from trl_kd.trainer.kd_trainer import _KDTrainer
from trl_kd.trainer.later_states import StateValue, later_advantages
from trl_kd.trainer.tokens import TokenBatch


_MOMENTS = {"exact": exact_moment, "exact_penalised": exact_penalised_moment}


class AMMTrainer(_KDTrainer):
    r"""
    Trainer for adversarial moment-matching distillation.

    Implements the on- and off-policy action-value moment-matching objective of
    [Adversarial Moment-Matching Distillation of Large Language Models](https://huggingface.co/papers/2406.02959). A
    critic values the actions (next tokens) so that teacher and student differ most in expected value; the student
    lowers the difference, on text of the dataset or the teacher (off-policy) and on its own (on-policy).

    Note:
        The paper's critic is learned, in a form that is not known to us. Ours is a value head (`modules/critic.py`);
        the default is the exact optimum over a class of functions (`losses/moments.py`). Hyperparameters are ours.

    Examples:

    ```python
    from datasets import load_dataset
    from trl_kd import AMMConfig, AMMTrainer

    trainer = AMMTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        teacher_model="Qwen/Qwen2.5-7B-Instruct",
        args=AMMConfig(output_dir="out"),
        train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student: path, Hub name or model. Best a model that was fine-tuned already: tokens that it gives almost no
            probability get almost no gradient.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Teacher: path, Hub name or model with the student's tokenizer. Defaults to
            `args.teacher_model_name_or_path`.
        args ([`AMMConfig`], *optional*):
            Configuration of this trainer.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `prompt` and `completion`, `messages`, `prompt` alone, or `text` (off-policy only).
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them, *optional*):
            The same for evaluation. `eval_loss` is the total variation on it.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The student's tokenizer.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler of the student.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantisation of a student given by path or name.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train in place of the student's own weights.
        kwargs (`dict`, *optional*):
            Further arguments of [`~trl.SFTTrainer`].
    """

    _tag_names = ["trl", "trl-kd", "amm"]
    _name = "AMM"
    _config_class = AMMConfig
    _eval_value = "total_variation"
    _auxiliary_class = MomentCritics
    _objective = (
        "adversarial moment matching: the difference between teacher and student in the expected value of the next "
        "token, under the worst critic, on off-policy and on the student's own text"
    )
    _paper = {
        "title": "Adversarial Moment-Matching Distillation of Large Language Models",
        "id": "2406.02959",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{jia2024adversarial,
                title        = {{Adversarial Moment-Matching Distillation of Large Language Models}},
                author       = {Chen Jia},
                year         = 2024,
                booktitle    = {Advances in Neural Information Processing Systems (NeurIPS)},
                eprint       = {arXiv:2406.02959}
            }"""),
    }

    def __init__(self, *arguments: Any, **kwargs: Any):
        super().__init__(*arguments, **kwargs)
        # Of the current optimizer step, for an ascent after it: tokens, and what the critics' first pass has found
        self._seen: list[TokenBatch] = []
        self._first_values: dict[str, list[dict[str, torch.Tensor]]] = {source: [] for source in SOURCES}
        warn_of_settings(self.args)
        self.add_callback(DriftWatch(self.args))

    # Critics

    @property
    def learns_critic(self) -> bool:
        """Whether the critics are value heads."""
        return self.args.critic == "value_head"

    def auxiliary_modules(self) -> dict[str, nn.Module]:
        """The critics, and the baseline of later costs if it is learned."""
        args, modules = self.args, {}
        needs_teacher = self.learns_critic or args.on_policy_gradient == "full"
        if needs_teacher and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise NotImplementedError(
                f'`critic="{args.critic}"` with `on_policy_gradient="{args.on_policy_gradient}"` needs the output '
                "heads outside of a forward, where DeepSpeed and FSDP may have put their weights away; this has not "
                'been run. Use DDP, or `critic="exact"` with `on_policy_gradient="direct"`.'
            )
        if needs_teacher and args.teacher_cache is not None:
            raise ValueError(
                f'`teacher_cache` is set with `critic="{args.critic}"` and `on_policy_gradient='
                f'"{args.on_policy_gradient}"`, but these need the teacher\'s states, of which a cache has none. Take '
                '`critic="exact"` and `on_policy_gradient="direct"`, or train with the teacher itself.'
            )
        if not needs_teacher:
            return modules
        if isinstance(self.teacher, TeacherGroup):
            raise NotImplementedError(
                f'`critic="{args.critic}"` with `on_policy_gradient="{args.on_policy_gradient}"` compares the student '
                "with one teacher over the whole optimizer step, but there are several. Take "
                '`critic="exact"` and `on_policy_gradient="direct"`, or one teacher.'
            )
        teacher_head, width = self.teacher.head, self.model.get_output_embeddings().in_features
        if self.learns_critic:
            modules |= make_critics(args, width, teacher_head, self.accelerator.device)
        if args.on_policy_gradient == "full" and args.later_baseline == "value":
            modules["state_value"] = StateValue(width + teacher_head.weight.shape[1] + 5)
        return modules

    # One optimizer step

    def looks_ahead(self) -> bool:
        """Whether critics rise, or later costs are compared, before the student's first loss."""
        args = self.args
        return (self.learns_critic and args.critic_order == "before") or args.on_policy_gradient == "full"

    def get_batch_samples(self, *arguments: Any, **kwargs: Any) -> tuple[list, Any]:
        """As the base's; what a step that was cut off has seen is forgotten."""
        self._forget()
        return super().get_batch_samples(*arguments, **kwargs)

    def prepare_step(self, tokens: list[TokenBatch]) -> list[dict[str, torch.Tensor]]:
        """The critics' ascent, and the advantages of the later states."""
        args = self.args
        if self.learns_critic and args.critic_order == "before":
            self.ascend(tokens)
        if args.on_policy_gradient != "full":
            return [{} for _ in tokens]
        state_value = self.auxiliary.modules["state_value"] if args.later_baseline == "value" else None
        advantages = later_advantages(tokens, args, self.accelerator, state_value)
        for batch, part in zip(tokens, advantages, strict=True):
            self._sums["train"].add("kd/on_policy/advantage_size", part.abs().sum(), batch.is_on_policy.sum())
        return [{"advantage": part} for part in advantages]

    def ascend(self, tokens: list[TokenBatch], first_values: dict[str, Any] | None = None) -> None:
        """The critics look for the worst case on these tokens."""
        for name, (total, weight) in self.auxiliary.ascend(tokens, first_values).items():
            self._sums["train"].add(name, total, weight)

    def _before_optimizer_step(self) -> None:
        super()._before_optimizer_step()
        if self.learns_critic and self.args.critic_order == "after":
            self.ascend(self._seen, self._first_values)
            self._forget()

    def _forget(self) -> None:
        self._seen, self._first_values = [], {source: [] for source in SOURCES}
        if self.learns_critic:
            for parameter in self.auxiliary.critic_parameters():
                parameter.grad = None

    def token_loss(self, tokens: TokenBatch) -> LinearLoss:
        """Both moments of one micro-batch, and the additional losses, on the same logits."""
        if not self.learns_critic:
            return self._game(tokens, {"moment": Term(_MOMENTS[self.args.critic], weights=self._discounted(tokens))})
        if self.model.training and self.args.critic_order == "after":
            self._seen.append(tokens.detach())
        if not len(tokens.labels):  # a zero that is connected to every parameter, as DDP requires
            return self._game(tokens, {"moment": Term(exact_moment, weights=self._discounted(tokens))})
        # d_off and d_on have a critic each
        parts = {source: tokens.of_source(source == "on_policy") for source in SOURCES}
        results = {source: self._game_of(source, part) for source, part in parts.items() if len(part.labels)}
        return merge(results, tokens.is_on_policy)

    def _game_of(self, source: str, tokens: TokenBatch) -> LinearLoss:
        """The student's side of the game on the tokens of one source, against its learned critic."""
        if source not in self.auxiliary.modules:  # evaluation, after training on rollouts alone
            return self._game(tokens, {})
        states, head = self.auxiliary.pair(source, tokens)
        terms = critic_terms(self._discounted(tokens))
        rises = self.model.training and self.args.critic_order == "after"
        if rises:  # both sides meet the same critic, so that its first gradient comes from the same pass
            terms["critic_objective"] = self.auxiliary.objective(tokens)
        else:
            states, head = states.detach(), head.detach()
        result = self._game(replace(tokens, pairs=tokens.pairs | {"critic": (states, head)}), terms)
        if rises:
            self._first_values[source].append(dict(result.values))
            del result.values["critic_objective"]  # the ascent logs it
        # Share of the largest moment, 2 B TV, that this critic sees
        largest = 2 * self.args.critic_bound * result.values["total_variation"].sum()
        sums = self._sums["train" if self.model.training else "eval"]
        sums.add(f"kd/{source}/tightness", result.values["moment"].sum(), largest)
        return result

    def _discounted(self, tokens: TokenBatch) -> torch.Tensor:
        """Weights of d_off and d_on: they mix the sources."""
        if self.args.gamma == 1.0:
            return tokens.weights
        return tokens.weights * discount_weights(tokens.positions, self.args.gamma).to(tokens.weights.dtype)

    def _game(self, tokens: TokenBatch, terms: dict[str, Term]) -> LinearLoss:
        """What every critic's terms are joined by."""
        args = self.args
        terms = terms | {
            "total_variation": Term(total_variation),
            "top1_agreement": Term(top1_agreement),
            "student_entropy": Term(entropy, ("student",)),
            "teacher_entropy": Term(entropy, ("teacher",)),
        }
        if args.sft_loss_weight > 0:
            reference = args.sft_loss_weight * tokens.reference_weights
            terms["nll"] = Term(cross_entropy, ("student", "labels"), reference)
        if args.kl_loss_weight > 0:
            terms["forward_kl"] = Term(forward_kl, weights=args.kl_loss_weight * tokens.weights)
        if "advantage" in tokens.step_values:
            # later_weight * mean_t A_t log pi_S(y_t | s_t) as a part of the on-policy moment, ramped in
            share = args.later_weight * min(1.0, (self.state.global_step + 1) / max(args.later_warmup_steps, 1))
            weights = -share * self._discounted(tokens) * tokens.step_values["advantage"]
            terms["later_states"] = Term(cross_entropy, ("student", "labels"), weights)
        result = tokens.linear_loss(terms, args.loss_chunk_size)
        # The gradient of these is meant, their value says nothing: the loss stays the moments'
        loss, values = result.loss, dict(result.values)
        for name in ("later_states", "critic_objective"):  # always in this order: it is rounded
            if name in terms:
                loss = loss - weighted_sum(values[name], terms[name].weights)
        values.pop("later_states", None)
        return LinearLoss(loss, values)
