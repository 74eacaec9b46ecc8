"""How the student writes: by its own `generate`, or by vLLM."""

from functools import partial
from typing import Any

from accelerate.utils import gather_object
from trl.models import unwrap_model_for_generation

from trl_kd import _compat
from trl_kd.data import has_completions
from trl_kd.generation.rollouts import RolloutWriter, Writer, cut_at_eos, forked_rng, generate_completions


def student_writer(trainer: Any) -> Writer:
    r"""
    What writes the student's completions, as the configuration says.

    Args:
        trainer ([`_KDTrainer`]):
            The trainer, with its models and `sampling` in place.

    Returns:
        `Callable`: takes prompts and a seed, returns completions.
    """
    return VLLMWriter(trainer) if trainer.args.use_vllm else partial(_generate, trainer)


def rollout_writer(trainer: Any, train_dataset: Any, collator: Any) -> RolloutWriter | None:
    """What replaces rows of an optimizer step by rollouts; `None` if none ever is."""
    args = trainer.args
    complete = args.packing or has_completions(train_dataset)  # a packed row may begin with a prompt
    if args.lmbda == 0 and args.off_policy_source != "teacher" and complete:
        return None
    ranks = trainer.accelerator.process_index, trainer.accelerator.num_processes
    return RolloutWriter(collator, args.lmbda, args.off_policy_source == "teacher", args.seed, *ranks)


def _generate(trainer: Any, prompts: list[list[int]], seed: int) -> list[list[int]]:
    """Completions by the student's `generate`, in one batch."""
    checkpointing = {"gradient_checkpointing_kwargs": trainer.args.gradient_checkpointing_kwargs}
    with (
        unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator, **checkpointing) as student,
        trainer.accelerator.autocast(),
    ):
        special = (trainer.processing_class.pad_token_id, trainer.eos_token_ids)
        return generate_completions(student, prompts, trainer.sampling, *special, seed, trainer.vocab_size)


class VLLMWriter:
    r"""
    Writes completions by vLLM, with the weights that the student has at the time of the call.

    All ranks call it together, with prompts or without: sending the weights is collective, and TRL's engine takes the
    same number of prompts from every rank. So the prompts of all ranks are dealt out evenly.

    Note:
        vLLM's `seed` is not set: it would give every prompt of a call the same noise, and equal prompts equal
        completions. Torch's generators, from which a colocated vLLM may draw, are seeded around the call instead, and
        the run's come back; a server draws as it does.

    Args:
        trainer ([`_KDTrainer`]):
            The trainer, with its models and `sampling` in place.

    Raises:
        NotImplementedError: If the student is quantised.
        ValueError: If vLLM runs in this process and the student has no files to load from.
    """

    def __init__(self, trainer: Any):
        args, sampling = trainer.args, trainer.sampling
        _check_student(trainer.model, args.vllm_mode)
        self.trainer = trainer
        # vLLM seeds torch's generators when it starts, and the run has seeded them already
        with forked_rng(trainer.accelerator.device, args.seed):
            self.generation = _compat.vllm_generation(
                model=trainer.model,
                accelerator=trainer.accelerator,
                processing_class=trainer.processing_class,
                mode=args.vllm_mode,
                server_base_url=args.vllm_server_base_url,
                server_host=args.vllm_server_host,
                server_port=args.vllm_server_port,
                server_timeout=args.vllm_server_timeout,
                group_port=args.vllm_group_port,
                tensor_parallel_size=args.vllm_tensor_parallel_size,
                gpu_memory_utilization=args.vllm_gpu_memory_utilization,
                max_model_length=args.vllm_max_model_length,
                # All prompts of an optimizer step at a time
                max_num_seqs=args.per_device_train_batch_size
                * args.gradient_accumulation_steps
                * args.vllm_tensor_parallel_size,
                enable_sleep_mode=args.vllm_enable_sleep_mode,
                model_impl=args.vllm_model_impl,
                trust_remote_code=args.trust_remote_code,
                repetition_penalty=sampling.repetition_penalty,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                max_completion_length=sampling.max_completion_length,
                logprobs=None,
                generation_kwargs=_ends(trainer) | sampling.generation_kwargs,
            )

    def __call__(self, prompts: list[list[int]], seed: int) -> list[list[int]]:
        accelerator, args = self.trainer.accelerator, self.trainer.args
        rank, num_ranks = accelerator.process_index, accelerator.num_processes
        ranks = gather_object([(seed, prompts)])
        everyone = [prompt for _, theirs in ranks for prompt in theirs]
        if not everyone:
            return []
        share = -(-len(everyone) // num_ranks)
        filled = everyone + everyone[-1:] * (share * num_ranks - len(everyone))
        with _compat.kept_base_weights(self.trainer.model):
            self.generation.sync_weights()
        # Ranks that run one vLLM together must draw the same
        seed, _ = ranks[rank - rank % args.vllm_tensor_parallel_size]
        with forked_rng(accelerator.device, seed):
            own = filled[rank * share : (rank + 1) * share]
            _, written, _, _ = self.generation.generate(prompts=own, images=None, num_generations=1)
        written = gather_object([list(ids) for ids in written])
        start = sum(len(theirs) for _, theirs in ranks[:rank])
        completions = cut_at_eos(written[start : start + len(prompts)], self.trainer.eos_token_ids)
        self._check_tokens(completions)
        return completions

    def _check_tokens(self, completions: list[list[int]]) -> None:
        highest, size = max((max(ids) for ids in completions if ids), default=0), self.trainer.vocab_size
        if highest >= size:
            raise ValueError(
                f"vLLM wrote token {highest}, but student and teacher share {size} tokens only. See that a server "
                "runs the student, and that `generation_kwargs` does not choose tokens."
            )


def _check_student(model: Any, mode: str) -> None:
    """Refuse a student whose weights vLLM cannot get."""
    if _compat.is_quantised(model):
        raise NotImplementedError(
            "`use_vllm` is True, but the student is quantised. vLLM gets weights with the adapter merged, and merging "
            "rounds quantised weights anew at every step. Load the student unquantised (the teacher may be in 4 bit), "
            "or set `use_vllm=False`."
        )
    if mode == "colocate" and not _compat.config_model_id(model):
        raise ValueError(
            "`use_vllm` is True with `vllm_mode` 'colocate', but the student is a model built in memory, and vLLM "
            "loads it from files before it gets its weights. Save the student and its tokenizer, and pass the path."
        )


def _ends(trainer: Any) -> dict[str, Any]:
    """Options that end completions as `generate` does here, and keep to the tokens that the models share."""
    # vLLM's own EOS ids are those of the student's files; the trainer's may be others
    options = {"stop_token_ids": trainer.eos_token_ids, "ignore_eos": True}
    if trainer.vocab_size < trainer.model.get_output_embeddings().out_features:
        # vLLM accepts ids of the tokenizer alone, so not all rows that the heads share
        options["allowed_token_ids"] = sorted(trainer.processing_class.get_vocab().values())
    return options
