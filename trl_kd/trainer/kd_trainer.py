"""The base of all trainers: what Transformers requires, and nothing that a paper says."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from trl_kd import _compat
from trl_kd.checks.finding import Finding
from trl_kd.data import KDCollator
from trl_kd.generation import Sampling, eos_token_ids
from trl_kd.losses import LinearLoss
from trl_kd.modules.lm_head import LMHead, check_head
from trl_kd.trainer import checkpoints, model_card, setup, sources
from trl_kd.trainer.auxiliary import AuxiliaryModules, StepHooks
from trl_kd.trainer.completions import log_completions, with_teacher_completions
from trl_kd.trainer.health import Health
from trl_kd.trainer.kd_config import KDConfig
from trl_kd.trainer.lookahead import look_ahead
from trl_kd.trainer.metrics import MetricSums
from trl_kd.trainer.micro_batch import micro_batch_loss, student_states
from trl_kd.trainer.teacher_columns import teacher_columns
from trl_kd.trainer.tokens import (
    SelectedTokens,
    TokenBatch,
    count_step,
    count_tokens,
    model_inputs,
    select_tokens,
    teachers,
    token_weights,
)
from trl_kd.trainer.writers import rollout_writer, student_writer


class _KDTrainer(_compat.hooked_sft_trainer()):
    """
    Distils a teacher into a student. A method overrides `token_loss`, and may declare `auxiliary_modules`.

    The arguments are those of [`~trl.SFTTrainer`], with `teacher_model` second.
    """

    loss_is_scaled_for_ga = True  # by `token_weights`, over the whole optimizer step
    _config_class = KDConfig
    _objective = ""  # one sentence for the model card
    _eval_value = ""  # per-token value of `token_loss` that `eval_loss` averages over off-policy tokens
    _auxiliary_class = AuxiliaryModules

    def __init__(
        self,
        model: Any,
        teacher_model: Any = None,
        args: KDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        data_collator: Any = None,
        formatting_func: Callable | None = None,
        **kwargs: Any,
    ):
        args = setup.own_arguments(args, self._config_class, model, self._name)
        setup.refuse_own_loss(kwargs)
        # The teacher first: it is what fails most often
        self.teacher = sources.own_teacher(teacher_model, args, model)
        source = setup.student_source(args)
        tokenizer = setup.own_tokenizer(processing_class, model, args, source)
        self.eos_token_ids = eos_token_ids(model, tokenizer, **source)
        self.prepare_data, collator = self.set_up_text(args, tokenizer, formatting_func, train_dataset)
        collator = sources.own_collator(data_collator, collator, self.teacher, args, train_dataset)
        self.row_format = collator if isinstance(collator, KDCollator) else KDCollator(tokenizer.pad_token_id)
        train_dataset = self.prepare_data(train_dataset, "train", is_training=True)
        eval_dataset = self.prepare_data(eval_dataset, "eval")
        with setup.prepared_elsewhere(args):
            super().__init__(
                model=model,
                args=args,
                data_collator=collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=tokenizer,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                **kwargs,
            )
        self._set_up_models()
        self.sampling = Sampling.of(self.args)
        self.write_with_student = student_writer(self)
        self.rollouts = rollout_writer(self, train_dataset, collator)
        self.auxiliary = self._auxiliary_class(self.auxiliary_modules(), self.args, self.accelerator)
        self.add_callback(StepHooks(self._before_optimizer_step))
        self._sums = {"train": MetricSums(), "eval": MetricSums()}
        self._health = Health(self.accelerator)
        if eval_dataset is not None:
            self.eval_dataset = with_teacher_completions(self, self.eval_dataset)

    # What a method overrides

    def token_loss(self, tokens: TokenBatch) -> LinearLoss:
        """Loss of the trained tokens of a micro-batch, weighted by `tokens.weights`, and the values to log."""
        raise NotImplementedError

    def set_up_text(self, args: Any, tokenizer: Any, formatting_func: Any, train_dataset: Any) -> tuple:
        """What prepares datasets, and what collates their rows; completes `eos_token_ids`."""
        # The teacher's too: it ends its completions its own way
        self.eos_token_ids = sorted({*self.eos_token_ids, *self.teacher.ends(tokenizer)})
        columns = teacher_columns(self.teacher, args, tokenizer, self.eos_token_ids)
        prepare = setup.dataset_preparer(args, tokenizer, self.eos_token_ids, formatting_func, columns)
        collator = KDCollator(tokenizer.pad_token_id, args.pad_to_multiple_of)
        return prepare, sources.with_cache(collator, self.teacher, args)

    def match_heads(self) -> tuple[int, int]:
        """Sizes that the student's and the teacher's heads are cut to."""
        size = self.model.get_output_embeddings().out_features
        return (sources.vocab_size(self.teacher, size, self.processing_class),) * 2

    def select(self, inputs: dict) -> SelectedTokens:
        """The trained tokens of a batch."""
        return select_tokens(inputs)

    def read_teacher(self, inputs: dict, selected: SelectedTokens) -> torch.Tensor | sources.TopTokens:
        """The teacher's hidden states at the trained tokens, `(N, H_t)`; of a cache, its most likely tokens."""
        if "teacher_input_ids" in inputs:  # it reads the same completions after a prompt of its own
            inputs = teachers(inputs)
            selected = self.select(inputs)
        return sources.read(self.teacher, inputs, selected)

    def auxiliary_modules(self) -> dict[str, nn.Module]:
        """Modules that are trained jointly with the student but are no part of it."""
        return {}

    def auxiliary_steps(self, num_training_steps: int) -> int:
        """Steps that their schedule spans, in a run of so many optimizer steps."""
        return num_training_steps

    def looks_ahead(self) -> bool:
        """Whether `prepare_step` must see all tokens of an optimizer step before its first `token_loss`."""
        return False

    def prepare_step(self, tokens: list[TokenBatch]) -> list[dict[str, torch.Tensor]]:
        """Per-token values of each micro-batch that `token_loss` finds in `tokens.step_values`."""
        raise NotImplementedError

    # Set-up

    def _set_up_models(self) -> None:
        setup.warn_of_unused_balance(self.aux_loss_enabled)
        _compat.check_one_device(self.model)
        _compat.keep_4bit_layout(self.model)
        if not self.is_deepspeed_enabled:  # ZeRO-3 has sharded the student already
            with self.accelerator.autocast():  # some attention kernels take half dtypes only
                check_head(self.model, "student")
        sources.attach(self.teacher, self.model)
        self.vocab_size, teacher_size = self.match_heads()
        self.teacher.prepare(self.accelerator, teacher_size)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.auxiliary.start(self.auxiliary_steps(num_training_steps))
        return super().create_scheduler(num_training_steps, optimizer)

    # One optimizer step

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Micro-batches of one optimizer step with their rollouts, counted after these are in place."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(batches) < num_batches:
            # The end of a stream: the Trainer would keep this gradient for the next epoch's first step
            return [], None
        if self.rollouts is not None:
            batches = self.rollouts.replace(
                batches, self.state.global_step, self.write_with_student, self.write_with_teacher
            )
            self._sums["train"].add_rollouts(self.rollouts.last_completions, self.eos_token_ids)
        counts = count_step(batches, self.accelerator, device)
        for source, count in zip(("off_policy", "on_policy"), counts, strict=True):
            self._sums["train"].add(f"kd/{source}/tokens", count)
        for batch in batches:
            batch["token_counts"] = counts
        if len(batches) > 1 and self.looks_ahead():
            look_ahead(self, batches)
        return batches, counts.sum()

    def write_with_teacher(self, prompts: list[list[int]], seed: int) -> list[list[int]]:
        """Completions that the teacher writes."""
        pad_token_id = self.processing_class.pad_token_id
        return self.teacher.generate(prompts, self.sampling, pad_token_id, self.eos_token_ids, seed)

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = micro_batch_loss(self, model, inputs)
        if return_outputs:  # `compute_metrics` of the caller
            with torch.no_grad():
                return loss, model(**model_inputs(inputs))
        return loss

    def observe(self, loss: torch.Tensor, hidden: torch.Tensor, said: Any, values: dict, on_policy: Any) -> None:
        """Keep what a micro-batch has shown, for the log and against numbers that are not finite."""
        self._health.watch(loss, hidden, said)
        self._sums["train" if self.model.training else "eval"].add_by_source(values, on_policy)

    def read_tokens(self, student: nn.Module, inputs: dict, selected: SelectedTokens, teacher_said: Any) -> TokenBatch:
        """The student's forward; only valid inside of the forward of its wrapper."""
        counts = inputs.get("token_counts")  # evaluation counts its own batch
        own = count_tokens(inputs.get("whole", inputs)) if counts is None else counts
        shares = token_weights(selected.is_on_policy, own, self.args.on_policy_weight)
        if counts is not None:
            # DDP averages gradients over ranks, and the counts are those of all ranks
            shares = tuple(share * self.accelerator.num_processes for share in shares)
        hidden = selected.of(student_states(student, inputs))
        head = LMHead.of(student).cut(self.vocab_size)
        pairs = {"student": (hidden, head)} | sources.pair_of(inputs.get("teacher", self.teacher), teacher_said)
        known = inputs.get("step_values", {}), sources.top_of(teacher_said)
        return TokenBatch(pairs, selected.labels, *shares, selected.is_on_policy, selected.positions, *known)

    def _before_optimizer_step(self) -> None:
        self._health.check(self.teacher)
        for name, value in self.auxiliary.step().items():
            self._sums["train"].add(f"kd/{name}", value)

    # Evaluation

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = with_teacher_completions(self, self.prepare_data(eval_dataset, metric_key_prefix))
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset: Any, ignore_keys: Any = None, metric_key_prefix: str = "test") -> Any:
        test_dataset = with_teacher_completions(self, self.prepare_data(test_dataset, metric_key_prefix))
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._sums["eval"] = MetricSums()  # an evaluation that was cut off leaves nothing behind
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self._health.check(self.teacher)
        averages = self._sums["eval"].pop()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in averages.items()})
        value = averages.get(f"kd/off_policy/{self._eval_value}")
        if value is not None:
            # Over tokens, not over batches: the same for every evaluation batch size
            output.metrics[f"{metric_key_prefix}_loss"] = value
        return output

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            # Not in the summary at the end, whose step has been shown
            shows = self.args.log_completions and self.rollouts is not None and "loss" in logs
            logs = logs | self._sums["train"].pop()
            if shows and self.is_world_process_zero():
                log_completions(self, self.rollouts.last_prompts, self.rollouts.last_completions)
        super().log(logs, start_time)

    def check(self, **kwargs: Any) -> list[Finding]:
        """What `trl-kd check` says of this run, as of [`check.run_check`]; everything stays as it is."""
        from trl_kd.trainer.check import run_check

        return run_check(self, **kwargs)

    # Saving and resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        resume_from_checkpoint = checkpoints.resolve(resume_from_checkpoint, self.args)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        with sources.student_alone(self.teacher):
            super().save_model(*args, **kwargs)

    def checkpoint(self, folder: str, save: Callable[[], None]) -> None:
        """Save by `save`, then declare the folder complete, and only then delete older ones."""
        checkpoints.save_whole(self, folder, save)

    def save_state_to(self, folder: str) -> None:
        """Save what this package trains beside the student."""
        if self.args.should_save:
            self.auxiliary.save(folder)

    def load_state_from(self, folder: str) -> None:
        """Restore what `save_state_to` saved."""
        self.auxiliary.load(folder)

    def save_auxiliary(self, folder: str) -> None:
        """Export the auxiliary modules as `auxiliary.safetensors`; a saved or pushed student holds none of them."""
        if self.args.should_save and self.auxiliary:
            self.auxiliary.export(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        model_card.add_distillation_section(self)
