"""The methods of a bench: who builds each, from the same student, rows and settings."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from trl_kd import _compat


class NotAvailable(Exception):
    """A method that cannot be run here, with the reason."""


@dataclass
class Material:
    """
    What all methods are given.

    The rows are the same in each form: `rows` as token ids with labels, `marked` as token ids with a mask of the
    completion, `texts` as text or messages, `prompts` without their completions.
    """

    student: str
    teacher: str
    tokenizer: Any
    same_vocabulary: bool
    rows: Any
    marked: Any
    texts: Any
    prompts: Any
    max_completion_length: int
    lmbda: float


def divergence_trainer(divergence: Callable) -> type:
    """A trainer whose loss is one divergence on all tokens, each with its weight."""
    from trl_kd.losses import LinearLoss, Term
    from trl_kd.trainer.kd_trainer import _KDTrainer
    from trl_kd.trainer.tokens import TokenBatch

    class DivergenceTrainer(_KDTrainer):
        def token_loss(self, tokens: TokenBatch) -> LinearLoss:
            term = Term(divergence, weights=tokens.weights)
            return tokens.linear_loss({"divergence": term}, self.args.loss_chunk_size)

    return DivergenceTrainer


def _divergence(name: str) -> tuple[type, type]:
    from trl_kd import KDConfig, losses

    return divergence_trainer(getattr(losses, name)), KDConfig


def _ours(name: str) -> tuple[type, type]:
    import trl_kd

    return getattr(trl_kd, f"{name}Trainer"), getattr(trl_kd, f"{name}Config")


def _trl(name: str) -> tuple[type, type]:
    import trl

    return getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")


def _configured(config_class: type, arguments: dict[str, Any], options: dict[str, Any], **defaults: Any) -> Any:
    """A configuration; the method's own options win."""
    return config_class(**(defaults | arguments | options))


def _build_sft(classes: Any, material: Material, arguments: dict[str, Any], options: dict[str, Any]) -> Any:
    """Supervised fine-tuning on the completions of the data."""
    trainer_class, config_class = classes()
    return trainer_class(
        model=material.student,
        args=_configured(config_class, arguments, options, max_length=None),
        train_dataset=material.rows,
        processing_class=material.tokenizer,
    )


def _build_kd(classes: Any, material: Material, arguments: dict[str, Any], options: dict[str, Any]) -> Any:
    """One of our trainers, partly on rows that the student writes."""
    trainer_class, config_class = classes()
    own = {"max_length": None, "max_completion_length": material.max_completion_length, "lmbda": material.lmbda}
    return trainer_class(
        model=material.student,
        teacher_model=material.teacher,
        args=_configured(config_class, arguments, options, **own),
        # The teacher reads the text again, in tokens of its own
        train_dataset=material.rows if material.same_vocabulary else material.texts,
        processing_class=material.tokenizer,
    )


def _build_distillation(classes: Any, material: Material, arguments: dict[str, Any], options: dict[str, Any]) -> Any:
    """TRL's distillation, whose rows are all written by the student."""
    trainer_class, config_class = classes()
    own = {"max_completion_length": material.max_completion_length}
    return trainer_class(
        model=material.student,
        teacher_model=material.teacher,
        args=_configured(config_class, arguments, options, **own),
        train_dataset=material.prompts,
        processing_class=material.tokenizer,
    )


def _build_gkd(classes: Any, material: Material, arguments: dict[str, Any], options: dict[str, Any]) -> Any:
    """TRL's GKD: `lmbda` is the chance of a step, not the share of its rows, that the student writes."""
    trainer_class, config_class = classes()
    own = {"max_new_tokens": material.max_completion_length, "lmbda": material.lmbda, "temperature": 1.0}
    return trainer_class(
        model=material.student,
        teacher_model=material.teacher,
        args=_configured(config_class, arguments, options, max_length=_longest(material), **own),
        train_dataset=material.marked,
        processing_class=material.tokenizer,
    )


def _build_gold(classes: Any, material: Material, arguments: dict[str, Any], options: dict[str, Any]) -> Any:
    """TRL's GOLD: GKD's loss where the vocabularies are one, else its alignment of text."""
    trainer_class, config_class = classes()
    own = {"max_completion_length": material.max_completion_length, "lmbda": material.lmbda, "temperature": 1.0}
    own |= {"use_uld_loss": not material.same_vocabulary}
    return trainer_class(
        model=material.student,
        teacher_model=material.teacher,
        args=_configured(config_class, arguments, options, max_length=_longest(material), **own),
        train_dataset=material.marked if material.same_vocabulary else material.texts,
        processing_class=material.tokenizer,
    )


def _longest(material: Material) -> int:
    """Length at which nothing is cut; both trainers need one that is longer than a rollout."""
    return max(max(map(len, material.rows["input_ids"])), 2 * material.max_completion_length) + 1


@dataclass(frozen=True)
class Method:
    r"""
    One way to train a student.

    Args:
        title (`str`):
            Name in tables.
        classes (`Callable`):
            Gives the trainer's class and that of its configuration, and imports them only then.
        build (`Callable`):
            Makes the trainer.
        across_tokenizers (`bool`, *optional*, defaults to `False`):
            Whether the teacher may have another vocabulary.
    """

    title: str
    classes: Callable[[], tuple[type, type]]
    build: Callable[..., Any]
    across_tokenizers: bool = False

    def reason_against(self, same_vocabulary: bool) -> str | None:
        """Why the method cannot be run here, or `None`."""
        if not same_vocabulary and not self.across_tokenizers:
            return "it compares distributions over one vocabulary, and teacher and student have two"
        try:
            self.classes()
        except ImportError as error:
            return f"it cannot be imported ({error})"
        return None

    def check_options(self, options: dict[str, Any]) -> None:
        """Refuse an option that the method's configuration does not have."""
        _, config_class = self.classes()
        known = {each.name for each in fields(config_class) if each.init}
        if unknown := sorted(options.keys() - known):
            raise ValueError(
                f"{unknown} are no fields of {config_class.__name__}, so nothing would come of them. Remove them from "
                "`method_options` and `training`."
            )

    def trainer(self, material: Material, arguments: dict[str, Any], options: dict[str, Any]) -> Any:
        r"""
        The trainer of one run.

        Args:
            material ([`Material`]):
                Student, teacher and rows.
            arguments (`dict[str, Any]`):
                Fields of [`~transformers.TrainingArguments`] that all methods share.
            options (`dict[str, Any]`):
                Fields of the method's own configuration.

        Returns:
            [`~transformers.Trainer`]

        Raises:
            NotAvailable: If it cannot be run here.
            ValueError: If an option does not exist.
        """
        if (reason := self.reason_against(material.same_vocabulary)) is not None:
            raise NotAvailable(reason)
        self.check_options(arguments | options)
        return self.build(self.classes, material, arguments, options)


def _by_divergence(title: str, name: str) -> Method:
    return Method(title, partial(_divergence, name), _build_kd)


METHODS: dict[str, Method] = {
    "sft": Method("SFT", partial(_trl, "SFT"), _build_sft, across_tokenizers=True),
    "forward_kl": _by_divergence("forward KL", "forward_kl"),
    "reverse_kl": _by_divergence("reverse KL", "reverse_kl"),
    "jsd": _by_divergence("JSD", "generalized_jsd"),
    "total_variation": _by_divergence("total variation", "total_variation"),
    "trl_distillation": Method("TRL Distillation", partial(_trl, "Distillation"), _build_distillation),
    "gkd": Method("TRL GKD", _compat.gkd_trainer, _build_gkd),
    "gold": Method("TRL GOLD", _compat.gold_trainer, _build_gold, across_tokenizers=True),
    "amm": Method("AMM", partial(_ours, "AMM"), _build_kd),
    "dskd": Method("DSKD", partial(_ours, "DSKD"), _build_kd, across_tokenizers=True),
    "sparse_td": Method("SparseTD", partial(_ours, "SparseTD"), _build_kd),
}
"""Methods of a bench, by name."""
