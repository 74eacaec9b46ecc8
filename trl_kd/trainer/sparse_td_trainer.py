"""Temporal-difference distillation on the teacher's most likely tokens."""

import textwrap
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn

from trl_kd.losses import (
    LinearLoss,
    Term,
    contains,
    cross_entropy,
    entropy,
    forward_kl,
    implied_reward,
    log_normaliser,
    set_forward_kl,
    set_logits,
    tail_nll,
    top1,
    top_tokens,
    total_variation,
    weighted_sum,
)
from trl_kd.modules import LMHead
from trl_kd.teachers import TeacherGroup
from trl_kd.trainer.kd_trainer import _KDTrainer
from trl_kd.trainer.objectives import OBJECTIVES, own_values
from trl_kd.trainer.paths import path_slopes
from trl_kd.trainer.second_text import SecondText
from trl_kd.trainer.sparse_td_config import SparseTDConfig
from trl_kd.trainer.sparse_td_warnings import check_group, check_second_text, say_what_is_trained
from trl_kd.trainer.target import make_target
from trl_kd.trainer.tokens import SelectedTokens, TokenBatch, select_tokens
from trl_kd.trainer.transitions import (
    ActionSet,
    Course,
    StateTokens,
    Transitions,
    make_action_set,
    make_transitions,
    select_states,
    with_labels,
)


class SparseTDTrainer(_KDTrainer):
    r"""
    Trainer for temporal-difference distillation on the teacher's most likely tokens.

    Implements the framework of [Language Model Distillation: A Temporal Difference Imitation Learning
    Perspective](https://huggingface.co/papers/2505.20335): the student's logits are soft Q-values, looked at on the
    teacher's top-p tokens of each state only.

    Note:
        `preset="paper"` is the objective of the paper. The default, `"expected"`, is ours and holds no temporal
        difference: it is the forward Kullback-Leibler divergence to the teacher's renormalised nucleus. The paper's
        form did harm wherever we measured it, since nothing in it keeps the student from the other tokens.

    Examples:

    ```python
    from datasets import load_dataset
    from trl_kd import SparseTDConfig, SparseTDTrainer

    trainer = SparseTDTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        teacher_model="Qwen/Qwen2.5-7B-Instruct",
        args=SparseTDConfig(output_dir="out"),
        train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student: path, Hub name or model.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Teacher: path, Hub name or model with the student's tokenizer. Defaults to
            `args.teacher_model_name_or_path`. Not needed with `args.teacher_cache`.
        args ([`SparseTDConfig`], *optional*):
            Configuration of this trainer.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `prompt` and `completion`, `messages`, `prompt` alone, or `text` (off-policy only).
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them, *optional*):
            The same for evaluation. `eval_loss` is the forward KL to the renormalised nucleus on it.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The student's tokenizer.
        objective (`Callable`, *optional*):
            A loss of your own in place of `args.objectives`: takes [`Transitions`], returns one value per token,
            `(N,)`.
        lm_dataset ([`~datasets.Dataset`], *optional*):
            Text for the language-model term alone, in any of these formats. Without it, the term is on the training
            data.
        kwargs (`dict`, *optional*):
            Further arguments as of [`AMMTrainer`]: callbacks, optimizers, `quantization_config`, `peft_config`, and
            those of [`~trl.SFTTrainer`].
    """

    _tag_names = ["trl", "trl-kd", "sparse-td"]
    _name = "SparseTD"
    _config_class = SparseTDConfig
    _eval_value = "set_forward_kl"
    _objective = (
        "imitation on the teacher's most likely tokens of each state, with the student's logits as soft Q-values; the "
        "settings below say in which form"
    )
    _paper = {
        "title": "Language Model Distillation: A Temporal Difference Imitation Learning Perspective",
        "id": "2505.20335",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{yu2026language,
                title        = {{Language Model Distillation: A Temporal Difference Imitation Learning Perspective}},
                author       = {Zishun Yu and Shangzhe Li and Xinhua Zhang},
                year         = 2026,
                booktitle    = {Proceedings of the AAAI Conference on Artificial Intelligence},
                eprint       = {arXiv:2505.20335}
            }"""),
    }

    def __init__(
        self,
        *arguments: Any,
        objective: Callable[[Transitions], torch.Tensor] | None = None,
        lm_dataset: Any = None,
        **kwargs: Any,
    ):
        self.objective = objective
        super().__init__(*arguments, **kwargs)
        self._ends = torch.tensor(self.eos_token_ids, device=self.accelerator.device)
        self.second_text = None if lm_dataset is None else SecondText(self, lm_dataset)
        check_second_text(self.args, lm_dataset)
        if isinstance(self.teacher, TeacherGroup):
            check_group(self.args, self.looks_ahead(), lm_dataset)
        self.target = make_target(self)
        say_what_is_trained(self.args, self.objective)

    def match_heads(self) -> tuple[int, int]:
        """As the base's; the preset is settled by then."""
        self.args.resolve()
        if self.objective is not None:  # for the model card
            self.args.objectives = {getattr(self.objective, "__name__", type(self.objective).__name__): 1.0}
        return super().match_heads()

    # One optimizer step

    def looks_ahead(self) -> bool:
        """Whether rollouts are compared before the student's first loss."""
        return self.objective is None and self.args.objectives.get("path_consistency", 0.0) > 0

    def prepare_step(self, tokens: list[StateTokens]) -> list[dict[str, torch.Tensor]]:
        """Path consistency of the rollouts of the step."""
        return path_slopes(tokens, self.args, self.accelerator)

    def get_batch_samples(self, *arguments: Any, **kwargs: Any) -> tuple[list, Any]:
        """As the base's, with rows of the second text."""
        batches, count = super().get_batch_samples(*arguments, **kwargs)
        if batches and self.second_text is not None:
            self.second_text.add_to(batches)
        return batches, count

    def select(self, inputs: dict) -> SelectedTokens:
        """The trained tokens, and the states after texts that were cut, if their values count."""
        return select_states(inputs, self._ends) if self.args.truncation == "bootstrap" else select_tokens(inputs)

    def read_tokens(
        self, student: nn.Module, inputs: dict, selected: SelectedTokens, teacher_said: Any
    ) -> StateTokens:
        """The forward of the student, of its slow copy, and of the second text, and what follows what."""
        tokens = super().read_tokens(student, inputs, selected, teacher_said)
        trains = self.model.training and torch.is_grad_enabled()  # and does not only look ahead
        if self.target is not None and trains:
            tokens.pairs["target"] = self.target.read(inputs, selected, self.vocab_size)
        count = len(selected.labels)
        course = Course(
            selected.labels, selected.positions, selected.rows[:count], selected.ends, self._ends, self.args
        )
        own = {name: getattr(tokens, name) for name in TokenBatch.__dataclass_fields__}
        second = self._read_second(student, inputs["second"]) if "second" in inputs and trains else None
        return StateTokens(**own, course=course, second=second)

    def _read_second(self, student: nn.Module, inputs: dict) -> TokenBatch:
        selected = select_tokens(inputs)
        asks_teacher = self.args.kd_ratio > 0
        said = self.read_teacher(inputs, selected) if asks_teacher else (None, None)
        tokens = super().read_tokens(student, inputs, selected, said)
        return tokens if asks_teacher else replace(tokens, top=None)

    def token_loss(self, tokens: StateTokens) -> LinearLoss:
        """The objectives on the teacher's set, the tail, and the language-model term."""
        args, count = self.args, len(tokens.labels)
        with torch.no_grad():
            top = tokens.top or top_tokens(*tokens.pairs["teacher"], args.max_actions, args.loss_chunk_size)
            # The collator has cut what comes from a cache, by masses that were not rounded
            is_cut = tokens.top is not None and args.cached_sets()[0] is not None and self.model.training
            actions = make_action_set(*(part[:, : args.max_actions] for part in top), args, is_cut)
        self._watch_sets(tokens, actions.first(count))
        terms = self._terms(tokens)
        labels = self._set_labels(tokens, actions.first(count))
        result = tokens.linear_loss(terms, args.loss_chunk_size, labels) if terms else None
        if "path_slope" in tokens.step_values:
            result = self._with_paths(tokens, result)
        if tokens.second is not None:
            result = self._with_second(tokens.second, result)
        if result is not None and "tail" in result.values:
            result.values["student_mass"] = torch.exp(-result.values["tail"])
        if self._is_closed or not self.model.training or not (self._on_set or self.objective):
            return result
        moves = self._transitions(tokens, actions)
        loss = self._imitation(tokens, moves)
        return LinearLoss(loss, {}) if result is None else LinearLoss(loss + result.loss, result.values)

    @property
    def _is_closed(self) -> bool:
        """Whether one function of the student's whole distribution, `set_forward_kl`, is all that is asked for."""
        args = self.args
        is_plain = (args.q_min, args.backup, args.entropy_weight, args.train_eos) == (float("-inf"), "soft", 1.0, True)
        is_alone = self.objective is None and set(self._on_set) == {"expected_inverse_soft_q"}
        is_plain = is_plain and args.chi2_alpha == float("inf") and args.label_outside != "union"
        return is_alone and is_plain and args.tail_weight > 0

    @property
    def _on_set(self) -> dict[str, float]:
        """The objectives that are functions of transitions, with their weights."""
        objectives = self.args.objectives.items()
        return {name: weight for name, weight in objectives if weight > 0 and name != "path_consistency"}

    def _terms(self, tokens: StateTokens) -> dict[str, Term]:
        """What needs the student's whole distribution."""
        args, terms = self.args, {}
        on_set, evaluates = ("student", "ids", "set"), not self.model.training
        tail_weight = args.tail_weight
        if self._is_closed:
            # V - E[Q] on the set is set_forward_kl - tail, but for the entropy of the teacher's nucleus
            weight = args.objectives["expected_inverse_soft_q"]
            terms["set_forward_kl"] = Term(set_forward_kl, on_set, weight * tokens.weights)
            tail_weight -= weight
        elif evaluates:
            terms["set_forward_kl"] = Term(set_forward_kl, on_set)
        if args.lm_weight > 0 and (self.second_text is None or evaluates):
            terms |= self._language_model(tokens)
        if args.tail_weight > 0 or evaluates or terms:  # where the whole distribution is there, for the log at least
            weights = tail_weight * tokens.weights if tail_weight != 0 else None
            terms["tail"] = Term(tail_nll, ("student", "ids", "members"), weights)
        if "path_slope" in tokens.step_values:
            terms["paths"] = Term(cross_entropy, ("student", "labels"), -self._path_weights(tokens, "path_slope"))
        if evaluates:
            terms |= {"total_variation": Term(total_variation), "student_entropy": Term(entropy, ("student",))}
            terms["nll"] = Term(cross_entropy, ("student", "labels"))
        return terms

    def _path_weights(self, tokens: TokenBatch, name: str) -> torch.Tensor:
        return self.args.objectives["path_consistency"] * tokens.weights * tokens.step_values[name]

    def _with_paths(self, tokens: TokenBatch, result: LinearLoss) -> LinearLoss:
        """The loss with the value of `path_consistency` in the place of that of the likelihood with its gradient."""
        stand_in = -weighted_sum(result.values.pop("paths"), self._path_weights(tokens, "path_slope"))
        value = self._path_weights(tokens, "path_consistency").sum()
        values = {"path_consistency": tokens.step_values["path_consistency"]}
        self._sums["train"].add_by_source(values, tokens.is_on_policy, tokens.is_on_policy)
        return LinearLoss(result.loss - stand_in + value, result.values)

    def _language_model(self, tokens: TokenBatch) -> dict[str, Term]:
        """lm_weight ((1 - k) CE + k KL(teacher || student)) on the text, k the `kd_ratio`."""
        args, weights = self.args, self.args.lm_weight * tokens.reference_weights
        terms = {"nll": Term(cross_entropy, ("student", "labels"), (1.0 - args.kd_ratio) * weights)}
        if args.kd_ratio > 0:
            terms["forward_kl"] = Term(forward_kl, weights=args.kd_ratio * weights)
        return terms

    def _with_second(self, tokens: TokenBatch, result: LinearLoss | None) -> LinearLoss:
        """The language-model term on the second text, beside what is on the first."""
        second = tokens.linear_loss(self._language_model(tokens), self.args.loss_chunk_size)
        values = {f"second_{name}": value for name, value in second.values.items()}
        self._sums["train"].add_by_source(values, tokens.is_on_policy)
        return LinearLoss(second.loss, {}) if result is None else LinearLoss(result.loss + second.loss, result.values)

    def _set_labels(self, tokens: TokenBatch, actions: ActionSet) -> dict[str, torch.Tensor]:
        if self.args.label_outside == "union":
            actions = with_labels(actions, tokens.labels)
        members = torch.zeros_like(actions.teacher_log_probs).masked_fill(~actions.mask, float("-inf"))
        return {"ids": actions.ids, "set": actions.teacher_on_set, "members": members}

    def _transitions(self, tokens: StateTokens, actions: ActionSet) -> Transitions:
        """Q-values of the actions, by products with their rows of the head alone."""
        args, (hidden, head) = self.args, tokens.pairs["student"]
        if hidden.device.type == "cpu":  # elsewhere, how large the largest set is would have to be waited for
            actions = actions.columns(int(actions.mask.sum(dim=1).max()) if len(actions.mask) else 1)
        target = tokens.pairs.get("target", tokens.pairs["student"])
        ids = torch.where(actions.mask, actions.ids, actions.ids[:, :1])  # fewer different ones
        ids = torch.cat([ids, actions.with_some(tokens.labels).unsqueeze(1)], dim=1)
        found = [self._logits(hidden, head, ids)]
        if target[0] is not hidden:
            with torch.no_grad():
                found.append(self._logits(*target, ids))
        (logits, next_logits), offsets = zip(*(found * 2)[:2], strict=True)
        given = tokens.labels, tokens.is_on_policy, tokens.course, self.vocab_size, args
        moves = make_transitions(logits, next_logits, offsets, actions, *given)
        self._watch(moves)
        return moves

    def _logits(
        self, hidden: torch.Tensor, head: LMHead, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of some tokens, and what the gauge subtracts from them."""
        if self.args.gauge == "raw":
            return set_logits(hidden, head, ids), None
        if self.args.gauge == "logsoftmax":
            return set_logits(hidden, head, ids), log_normaliser(hidden, head, self.args.loss_chunk_size)
        # Of the largest logit only the token has to be looked for among all
        best = top1(hidden.detach(), head.detach(), self.args.loss_chunk_size)
        logits = set_logits(hidden, head, torch.cat([ids, best.unsqueeze(1)], dim=1))
        return logits[:, :-1], logits[:, -1]

    def _imitation(self, tokens: StateTokens, moves: Transitions) -> torch.Tensor:
        """Weighted sum of the objectives; tokens that one has nothing to say of count as zero in it."""
        if self.objective is not None:
            everywhere = torch.ones_like(moves.in_set)
            found = {"objective": (1.0, own_values(self.objective, moves), everywhere)}
        else:
            found = {name: (weight, *OBJECTIVES[name](moves, self.args)) for name, weight in self._on_set.items()}
        loss = moves.q_t.new_zeros(())
        for name, (weight, values, kept) in found.items():
            loss = loss + weighted_sum(torch.where(kept, values, 0.0), weight * tokens.weights)
            self._sums["train"].add_by_source({name: values.detach()}, tokens.is_on_policy, kept)
        return loss

    # Saving and resuming

    def save_state_to(self, folder: str) -> None:
        """As the base's, with the slow copy."""
        super().save_state_to(folder)
        if self.target is not None and self.args.should_save:
            self.target.save(folder)

    def load_state_from(self, folder: str) -> None:
        """As the base's, with the slow copy."""
        super().load_state_from(folder)
        if self.target is not None:
            self.target.load(folder)

    # Logging

    def _watch_sets(self, tokens: TokenBatch, actions: ActionSet) -> None:
        sums = self._sums["train" if self.model.training else "eval"]
        sizes = actions.mask.sum(dim=1)
        values = {
            "set_size": sizes.float(),
            "teacher_mass": actions.teacher_on_set.exp().sum(dim=1),
            "label_in_set": contains(actions.ids, actions.mask, tokens.labels).float(),
        }
        sums.add_by_source(values, tokens.is_on_policy)
        sums.add_largest("kd/set_size_max", torch.cat([sizes, sizes.new_zeros(1)]).max())

    def _watch(self, moves: Transitions) -> None:
        sums, args = self._sums["train"], self.args
        sums.add_by_source({"value": moves.v_t.detach()}, moves.is_on_policy)
        reward = implied_reward(moves.q_t.detach(), moves.v_tp1.detach(), args.gamma)
        sums.add_by_source({"implied_reward": reward}, moves.is_on_policy, moves.in_set & moves.has_next)
        if args.q_min > float("-inf"):
            clipped = ((moves.q <= args.q_min) & moves.actions.mask).sum(dim=1) / moves.actions.mask.sum(dim=1)
            sums.add_by_source({"clipped": clipped}, moves.is_on_policy)
