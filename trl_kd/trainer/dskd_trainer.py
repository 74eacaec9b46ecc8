"""Dual-space knowledge distillation."""

import textwrap
from functools import partial
from typing import Any

import torch
import torch.nn as nn

from trl_kd.data import DualCollator, has_completions
from trl_kd.losses import (
    LinearLoss,
    Term,
    cross_entropy,
    linear_loss,
    student_space_terms,
    teacher_space_terms,
    top1_agreement,
    universal_logit_distance,
)
from trl_kd.modules import LMHead, token_scale
from trl_kd.teachers import SharedTeacher, TeacherGroup, shared_vocab_size
from trl_kd.trainer.dskd_config import DSKDConfig
from trl_kd.trainer.dskd_warnings import AgreementWatch, warn_of_settings
from trl_kd.trainer.dual_look import Lookout
from trl_kd.trainer.dual_selection import DualSelection, DualTokens, Look, select_dual
from trl_kd.trainer.dual_text import choose_alignment, dual_text, is_one_vocabulary, shared_vocabulary
from trl_kd.trainer.kd_trainer import _KDTrainer
from trl_kd.trainer.lookahead import teacher_states
from trl_kd.trainer.metrics import MetricSums
from trl_kd.trainer.projection import Projection
from trl_kd.trainer.projector_pretraining import pretrain_projector
from trl_kd.trainer.tokens import TokenBatch, model_inputs, teachers, token_weights


class DSKDTrainer(_KDTrainer):
    r"""
    Trainer for dual-space knowledge distillation, within one vocabulary and across two.

    Implements [Dual-Space Knowledge Distillation for Large Language Models](https://huggingface.co/papers/2406.17328)
    (`preset="v1"`, `alignment="cma"`) and its [second version](https://huggingface.co/papers/2504.11426)
    (`preset="v2"`, `alignment="eta"`). The teacher's hidden states are projected into the student's space and read by
    the student's head, the student's into the teacher's space and read by the teacher's head; in both spaces, the two
    distributions are brought together. Teacher and student may have different tokenizers.

    Examples:

    ```python
    from datasets import load_dataset
    from trl_kd import DSKDConfig, DSKDTrainer

    trainer = DSKDTrainer(
        model="HuggingFaceTB/SmolLM2-360M-Instruct",
        teacher_model="Qwen/Qwen2.5-1.5B-Instruct",
        args=DSKDConfig(output_dir="out"),
        train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student: path, Hub name or model.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Teacher: path, Hub name or model. Defaults to `args.teacher_model_name_or_path`.
        args ([`DSKDConfig`], *optional*):
            Configuration of this trainer.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `prompt` and `completion`, `messages`, `prompt` alone, or `text` (off-policy only). With two
            vocabularies each model reads them by its own tokenizer and chat template.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them, *optional*):
            The same for evaluation. `eval_loss` is the student's cross-entropy on it.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The student's tokenizer.
        teacher_processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The teacher's tokenizer. Defaults to the one saved beside it.
        kwargs (`dict`, *optional*):
            Further arguments as of [`AMMTrainer`]: callbacks, optimizers, `quantization_config`, `peft_config`, and
            those of [`~trl.SFTTrainer`].
    """

    _tag_names = ["trl", "trl-kd", "dskd"]
    _name = "DSKD"
    _config_class = DSKDConfig
    _eval_value = "student_ce"
    _objective = (
        "dual-space distillation: divergences between teacher and student in the student's representation space and "
        "in the teacher's, each read by its own output head, beside the cross-entropy on reference text"
    )
    _paper = {
        "title": "Dual-Space Knowledge Distillation for Large Language Models",
        "id": "2406.17328",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{zhang2024dual,
                title        = {{Dual-Space Knowledge Distillation for Large Language Models}},
                author       = {Songming Zhang and Xue Zhang and Zengkui Sun and Yufeng Chen and Jinan Xu},
                year         = 2024,
                booktitle    = {Proceedings of the Conference on Empirical Methods in Natural Language Processing},
                eprint       = {arXiv:2406.17328}
            }"""),
    }

    def __init__(self, *arguments: Any, teacher_processing_class: Any = None, **kwargs: Any):
        self.teacher_processing_class = teacher_processing_class
        self._is_pretrained = False
        self._step: list[dict] = []  # micro-batches of the current optimizer step
        super().__init__(*arguments, **kwargs)
        warn_of_settings(self.args)
        if self._pretraining_steps and not has_completions(self.train_dataset):
            raise ValueError(
                f"`projector_pretraining_steps` is {self.args.projector_pretraining_steps}, but the dataset has "
                "prompts alone, on which projectors learn nothing before the student writes. Set it to 0, or write "
                "the completions first with `trl-kd generate`."
            )
        if self.projection is not None and self.args.student_space:
            self.add_callback(AgreementWatch())

    # Two tokenizers

    def set_up_text(self, args: Any, tokenizer: Any, formatting_func: Any, train_dataset: Any) -> tuple:
        """As the base's for one vocabulary; else each row and batch in the tokens of both."""
        if args.teacher_cache is not None:
            raise ValueError(
                "`teacher_cache` is set, but the teacher's representation space is in its hidden states, of which a "
                "cache has none. Pass `teacher_model`, or take AMMTrainer or SparseTDTrainer."
            )
        if isinstance(self.teacher, TeacherGroup):
            raise NotImplementedError(
                "There are several teachers, but projectors lead into the space of one. Take one, or AMMTrainer or "
                "SparseTDTrainer."
            )
        if isinstance(self.teacher, SharedTeacher):
            if args.alignment not in ("auto", "same"):
                raise ValueError(
                    f"`alignment` is '{args.alignment}' with a `teacher_adapter`, whose tokens are the student's, so "
                    "there is nothing to align. Leave it at 'auto'."
                )
            self.teacher_processing_class = tokenizer
        if self.teacher_processing_class is None:
            self.teacher_processing_class = self.teacher.tokenizer()
        self.is_dual = not is_one_vocabulary(args, tokenizer, self.teacher_processing_class)
        if not self.is_dual:
            return super().set_up_text(args, tokenizer, formatting_func, train_dataset)
        return dual_text(
            args,
            tokenizer,
            self.teacher,
            self.teacher_processing_class,
            self.eos_token_ids,
            formatting_func,
            train_dataset,
        )

    def match_heads(self) -> tuple[int, int]:
        """Settle the alignment, which needs the data; both heads keep their size if the vocabularies differ."""
        self.shared_ids, self.to_student = None, None
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise NotImplementedError(
                "Projectors read the output heads outside of a forward, where DeepSpeed and FSDP may have put their "
                "weights away; this has not been run. Use DDP, or one GPU with LoRA."
            )
        args, sizes = self.args, (self.model.get_output_embeddings().out_features, self.teacher.vocab_size)
        if not self.is_dual:
            args.resolve("same")
            return (shared_vocab_size(*sizes, self.processing_class, self.teacher_processing_class),) * 2
        if not isinstance(self.row_format, DualCollator):
            raise ValueError(
                f"`data_collator` is a {type(self.data_collator).__name__}, but with two vocabularies a batch has the "
                "tokens of both and their partners. Leave it out: the trainer makes its own."
            )
        # Rows that pad a head stand for no text
        tables = self.row_format.student.tokens.table, self.row_format.teacher.tokens.table
        sizes = tuple(min(size, len(table)) for size, table in zip(sizes, tables, strict=True))
        args.resolve(choose_alignment(args, self.train_dataset, self.row_format))
        if self.row_format.by == "context":
            self.row_format.by = args.eta_pairs
        needs = (args.projector_init, args.student_to_teacher, args.projector_label) != ("random", "learned", "gold")
        if args.objective != "uld" and (needs or args.lmbda > 0 or args.objective == "simple"):
            to_student, shared_ids = shared_vocabulary(self.row_format, sizes)
            device = self.accelerator.device
            self.shared_ids = tuple(ids.to(device) for ids in shared_ids)
            self.to_student = torch.from_numpy(to_student).to(device)
        return sizes

    def write_with_teacher(self, prompts: list[list[int]], seed: int) -> list[list[int]]:
        """Completions in the teacher's tokens, of prompts in these."""
        if not self.is_dual:
            return super().write_with_teacher(prompts, seed)
        side = self.row_format.teacher
        return self.teacher.generate(prompts, self.sampling, side.pad, sorted(side.formatter.eos_token_ids), seed)

    def auxiliary_modules(self) -> dict[str, nn.Module]:
        """The projectors, and cross-model attention."""
        self.projection = None
        if self.args.objective == "dual_space":
            self.projection = Projection(self.args, self.model, self.teacher, self.student_head(), self.shared_ids)
        if self.args.objective == "simple" and self.shared_ids is not None:
            self.shared_teacher_head = self.teacher.head.at(self.shared_ids[1])
        self.look = Lookout(self.args, self.projection, self.teacher, self.to_student, self.accelerator)
        return {} if self.projection is None else self.projection.modules

    def student_head(self, detached: bool = True) -> LMHead:
        """The student's output head as it is now."""
        head = LMHead.of(self.accelerator.unwrap_model(self.model)).cut(self.vocab_size)
        return head.detach() if detached else head

    def auxiliary_steps(self, num_training_steps: int) -> int:
        """The projectors' schedule spans their steps before the student's first one too."""
        return num_training_steps + (0 if self._is_pretrained else self._pretraining_steps)

    @property
    def _pretraining_steps(self) -> int:
        learns = self.projection is not None and self.args.student_space
        return self.args.projector_pretraining_steps if learns else 0

    # One optimizer step

    def select(self, inputs: dict) -> DualSelection:
        """Tokens of both sides, and partners."""
        return inputs["selected"] if "selected" in inputs else select_dual(inputs, self.args.alignment == "cma")

    def read_teacher(self, inputs: dict, selected: DualSelection) -> torch.Tensor:
        """The teacher's hidden states at its own trained tokens, `(N_t, H_t)`."""
        if selected.teacher is None:
            return super().read_teacher(inputs, selected)
        hidden = self.teacher.hidden_states(**model_inputs(teachers(inputs)))
        if self.args.alignment == "cma" and self.args.cma_norm_scope == "padded":
            inputs["hidden_scale"] = token_scale(hidden[:, :-1])
        return selected.teacher.of(hidden)

    def get_batch_samples(self, *arguments: Any, **kwargs: Any) -> tuple[list, Any]:
        """As the base's; then a look at the teacher's side of the whole step."""
        self._head_may_have_changed()
        if self.state.global_step == 0 and self._pretraining_steps and not self._is_pretrained:
            pretrain_projector(self, self._pretraining_steps)
        self._is_pretrained = True
        for batch in self._step:
            batch.clear()  # the Trainer still has them, with all the teacher's states
        batches, count = super().get_batch_samples(*arguments, **kwargs)
        self._step = batches
        for batch in batches:
            batch["selected"] = self.select(batch)
            batch["teacher_hidden"] = teacher_states(self, batch, batch["selected"])
        if batches:
            with self.accelerator.autocast():
                looks = self.look(batches, self.student_head(), is_step=True)
            for batch, look in zip(batches, looks, strict=True):
                batch["look"] = look
        return batches, count

    def evaluation_loop(self, *arguments: Any, **kwargs: Any) -> Any:
        """As the base's, with the student's head as it is now."""
        self._head_may_have_changed()
        return super().evaluation_loop(*arguments, **kwargs)

    def _head_may_have_changed(self) -> None:
        if self.projection is not None and self.student_head(detached=False).weight.requires_grad:
            self.projection.forget()

    def read_tokens(self, student: nn.Module, inputs: dict, selected: Any, teacher_hidden: torch.Tensor) -> DualTokens:
        """The student's forward, and what is known of the teacher's side."""
        tokens = super().read_tokens(student, inputs, selected, teacher_hidden)
        look = inputs.get("look")
        if look is None:  # evaluation
            batch = {**inputs, "selected": selected, "teacher_hidden": teacher_hidden}
            with self.accelerator.autocast():
                (look,) = self.look([batch], tokens.pairs["student"][1].detach(), is_step=False)
        own = {name: getattr(tokens, name) for name in TokenBatch.__dataclass_fields__}
        return DualTokens(**own, selected=selected, look=look)

    def token_loss(self, tokens: DualTokens) -> LinearLoss:
        """(1 - r) * CE + r * (student-space KD + projector CE + teacher-space KD), with r the `kd_rate`."""
        hidden, head = tokens.pairs["student"]
        selected, ce_weights = tokens.selected, (1.0 - self.args.kd_rate) * tokens.reference_weights
        if selected.pairs is not None:
            self._sums_now.add("kd/aligned_share", selected.pairs.shape[1], len(tokens.labels))
        if self.projection is None:
            return self._baseline(tokens, ce_weights)
        projected_teacher, projected_student = self._project(tokens)
        result = self._in_student_space(tokens, projected_teacher, ce_weights)
        loss, values = result.loss, {"student_ce": result.values["student_ce"]}
        if selected.rest is not None:  # tokens without a partner have the text alone
            term = Term(cross_entropy, ("student", "labels"), ce_weights[selected.rest])
            pair, labels = (hidden[selected.rest], head), tokens.labels[selected.rest]
            others = linear_loss({"student": pair}, {"student_ce": term}, labels, self.args.loss_chunk_size)
            ce = torch.empty_like(tokens.weights, dtype=others.values["student_ce"].dtype)
            ce[selected.pairs[0]], ce[selected.rest] = values["student_ce"], others.values["student_ce"]
            loss, values = loss + others.loss, {"student_ce": ce}
        if projected_student is not None:
            loss = loss + self._in_teacher_space(tokens, projected_student)
        return LinearLoss(loss, values)

    def _project(self, tokens: DualTokens) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """h^{t->s} at the student's tokens, and h^{s->t} at the teacher's; `None` for a space that is left out."""
        args, projection, selected = self.args, self.projection, tokens.selected
        (hidden, head), (teacher_hidden, _) = tokens.pairs["student"], tokens.pairs["teacher"]
        projected_student = None
        if args.teacher_space:
            projected_student = projection.into_teacher(selected.met(hidden), head.detach())
        if selected.attends:
            values = hidden[:, :0] if projected_student is None else projected_student
            projected_teacher, projected = projection.attend(selected, teacher_hidden, values, tokens.look)
            projected_student = None if projected_student is None else projected
        elif args.student_space:
            projected_teacher = projection.into_student(selected.met_teacher(teacher_hidden))
        return projected_teacher if args.student_space else None, projected_student

    def _in_student_space(
        self, tokens: DualTokens, projected_teacher: torch.Tensor | None, ce_weights: torch.Tensor
    ) -> LinearLoss:
        """Student CE, projector CE and student-space KD at the tokens that meet, on the student's head."""
        args, selected, look = self.args, tokens.selected, tokens.look
        hidden, head = tokens.pairs["student"]
        pairs, labels = {"student": (selected.met(hidden), head)}, {"labels": selected.met(tokens.labels)}
        ce_weights, is_on_policy = selected.met(ce_weights), selected.met(tokens.is_on_policy)
        if projected_teacher is None:
            terms = {"student_ce": Term(cross_entropy, ("student", "labels"), ce_weights)}
            return linear_loss(pairs, terms, labels, args.loss_chunk_size)
        # This path never updates the student's head
        pairs["projected_teacher"] = (projected_teacher, head.detach())
        labels["projector_labels"] = look.labels
        is_tempered = args.teacher_temperature != 1.0
        if is_tempered:
            tempered = head.detach().tempered(args.teacher_temperature)
            pairs["tempered_teacher"] = (projected_teacher.detach(), tempered)
        terms = student_space_terms(
            divergence=args.divergence_in("student"),
            kd_temperature=args.kd_temperature,
            is_tempered=is_tempered,
            ce_weights=ce_weights,
            projector_weights=self._weights(is_on_policy, look, "labelled") * look.is_labelled,
            kd_weights=self._weights(is_on_policy, look, "taught") * look.gate,
        )
        result = linear_loss(pairs, terms, labels, args.loss_chunk_size)
        shown = {name: result.values[name] for name in ("projector_ce", "projector_agreement", "student_agreement")}
        self._sums_now.add_by_source(shown, is_on_policy, look.is_labelled)
        self._sums_now.add_by_source({"student_space_kd": result.values["student_space_kd"]}, is_on_policy)
        self._sums_now.add_by_source({"gate": look.gate.float()}, is_on_policy)
        return result

    def _in_teacher_space(self, tokens: DualTokens, projected_student: torch.Tensor) -> torch.Tensor:
        """Teacher-space KD at the tokens that meet, on the teacher's head."""
        args, selected = self.args, tokens.selected
        teacher_hidden, head = tokens.pairs["teacher"]
        pairs = {
            "projected_student": (projected_student, head),
            "teacher": (selected.met_teacher(teacher_hidden), head),
        }
        is_on_policy = selected.teacher_is_on_policy
        terms = teacher_space_terms(
            divergence=args.divergence_in("teacher"),
            kd_temperature=args.kd_temperature,
            kd_weights=self._weights(is_on_policy, tokens.look, "teacher"),
        )
        result = linear_loss(pairs, terms, chunk_size=args.loss_chunk_size)
        self._sums_now.add_by_source(result.values, is_on_policy)
        return result.loss

    def _baseline(self, tokens: DualTokens, ce_weights: torch.Tensor) -> LinearLoss:
        """(1 - r) * CE + r * distance of the logits at the tokens that meet, without projectors."""
        args, selected = self.args, tokens.selected
        (hidden, head), (teacher_hidden, teacher_head) = tokens.pairs["student"], tokens.pairs["teacher"]
        ce = {"student_ce": Term(cross_entropy, ("student", "labels"), ce_weights)}
        text = linear_loss({"student": (hidden, head)}, ce, tokens.labels, args.loss_chunk_size)
        function, metrics = universal_logit_distance, {}
        if args.objective == "simple":
            function = partial(args.divergence_in("student"), kd_temperature=args.kd_temperature)
            metrics = {"top1_agreement": Term(top1_agreement)}
            if self.shared_ids is not None:
                head, teacher_head = head.at(self.shared_ids[0]), self.shared_teacher_head
        is_on_policy = selected.met(tokens.is_on_policy)
        terms = {"distance": Term(function, weights=self._weights(is_on_policy, tokens.look, "teacher"))} | metrics
        pairs = {
            "student": (selected.met(hidden), head),
            "teacher": (selected.met_teacher(teacher_hidden), teacher_head),
        }
        result = linear_loss(pairs, terms, chunk_size=args.loss_chunk_size)
        self._sums_now.add_by_source(result.values, is_on_policy)
        return LinearLoss(text.loss + result.loss, text.values)

    def _weights(self, is_on_policy: torch.Tensor, look: Look, name: str) -> torch.Tensor:
        """Shares in the distillation part of the loss: each source over its own tokens of the step, then mixed."""
        mixed, _ = token_weights(is_on_policy, look.counts[name], self.args.on_policy_weight)
        return mixed * (look.ranks * self.args.kd_rate)

    @property
    def _sums_now(self) -> MetricSums:
        return self._sums["train" if self.model.training else "eval"]
