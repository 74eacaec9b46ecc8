"""Adversarial moment matching."""

import textwrap

from trl_kd.losses import (
    LinearLoss,
    Term,
    cross_entropy,
    discount_weights,
    entropy,
    exact_moment,
    exact_penalised_moment,
    forward_kl,
    linear_loss,
    total_variation,
)
from trl_kd.trainer.amm_config import AMMConfig
from trl_kd.trainer.kd_trainer import _KDTrainer
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
        The paper's critic is learned. The critics here are the exact optima over two classes of functions (see
        `losses/moments.py`); hyperparameters are ours.

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

    def token_loss(self, tokens: TokenBatch) -> LinearLoss:
        """Both moments of one micro-batch, and the additional losses, on the same logits."""
        args = self.args
        weights = tokens.weights
        if args.gamma != 1.0:
            weights = weights * discount_weights(tokens.positions, args.gamma).to(weights.dtype)
        terms = {
            # d_off and d_on: the weights mix the sources
            "moment": Term(_MOMENTS[args.critic], weights=weights),
            "total_variation": Term(total_variation),
            "student_entropy": Term(entropy, ("student",)),
            "teacher_entropy": Term(entropy, ("teacher",)),
        }
        if args.sft_loss_weight > 0:
            reference = args.sft_loss_weight * tokens.reference_weights
            terms["nll"] = Term(cross_entropy, ("student", "labels"), reference)
        if args.kl_loss_weight > 0:
            terms["forward_kl"] = Term(forward_kl, weights=args.kl_loss_weight * tokens.weights)
        return linear_loss(tokens.pairs, terms, tokens.labels, args.loss_chunk_size)
