"""Configuration of dual-space distillation."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from trl_kd.losses import (
    adaptive_kl,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    total_variation,
)
from trl_kd.trainer.kd_config import KDConfig, check_choice, check_range


# Name -> divergence, and the options of it that are fields
DIVERGENCES = {
    "forward_kl": (forward_kl, {}),
    "reverse_kl": (reverse_kl, {}),
    "jsd": (generalized_jsd, {}),
    "skewed_forward_kl": (skewed_forward_kl, {"skew": "skew"}),
    "skewed_reverse_kl": (skewed_reverse_kl, {"skew": "skew"}),
    "adaptive_kl": (adaptive_kl, {"head": "adaptive_head"}),
    "total_variation": (total_variation, {}),
}
_PAPERS = {
    "eta_pairs": "token",
    "divergence": "forward_kl",
    "kd_temperature": 2.0,
    "teacher_space": True,
    "projector_hidden_size": 0,
    "projector_pretraining_steps": 0,
    "aux_lr_scheduler_type": "constant",
}
# What a version of the method decides
PRESETS = {
    "v1": _PAPERS
    | {
        "teacher_space_divergence": "forward_kl",
        "projector_label": "gold",
        "gate": "none",  # "agreement" with cross-model attention
        "gate_normalization": "tokens",
        "projector_init": "random",
        "projector_bias": True,
        "student_to_teacher": "learned",
    },
    "v2": _PAPERS
    | {
        "projector_label": "teacher_top1",
        "gate": "agreement",
        "gate_normalization": "gated",
        "projector_init": "logit_invariant",
        "projector_bias": False,
        "student_to_teacher": "recomputed",
    },
    "context": {
        "eta_pairs": "context",
        "divergence": "reverse_kl",
        "kd_temperature": 1.0,
        "teacher_space": False,
        "projector_label": "gold",
        "gate": "none",
        "gate_normalization": "tokens",
        "projector_init": "logit_invariant",
        "projector_bias": False,
        "student_to_teacher": "recomputed",
        "projector_hidden_size": 256,
        "projector_pretraining_steps": 1000,
        "aux_lr_scheduler_type": "cosine",
    },
}


@dataclass
class DSKDConfig(KDConfig):
    r"""
    Configuration class for the [`DSKDTrainer`].

    This class includes only the parameters that are specific to dual-space distillation. For a full list of training
    arguments, please refer to the [`KDConfig`], [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`]
    documentation. `aux_*` there concerns the projectors.

    Parameters:
        > Parameters that control how the two vocabularies meet

        alignment (`str`, *optional*, defaults to `"auto"`):
            How the tokens of student and teacher are matched. `"same"`: one vocabulary, token by token; `"eta"`: exact
            token alignment, the tokens that both tokenizers cut at the same places of the text; `"cma"`: cross-model
            attention, learned; `"auto"`: `"same"` for one vocabulary, else `"eta"` if it reaches `min_coverage` of the
            student's tokens, else `"cma"`.
        eta_pairs (`str`, *optional*):
            Which tokens exact alignment takes for partners: `"token"`, those with the same bytes at the same place
            (v1, v2); or `"context"`, all before which the same text stands, whatever they are themselves (ours).
        min_coverage (`float`, *optional*, defaults to `0.3`):
            Share of the student's tokens that exact alignment has to reach for `alignment="auto"` to choose it.
        teacher_max_length (`int`, *optional*):
            Longest row that the teacher reads, in its own tokens; what the student reads beyond has no partner. By
            default the teacher's longest context. Not used for one vocabulary.

        > Parameters that control the loss

        objective (`str`, *optional*, defaults to `"dual_space"`):
            What is compared. `"dual_space"`: the method; `"simple"`: a baseline without projectors, the divergence
            between teacher and student over the tokens that both vocabularies have, at exactly aligned positions;
            `"uld"`: another baseline, the distance between sorted probabilities (universal logit distillation),
            position by position.
        preset (`str`, *optional*, defaults to `"v2"`):
            Version of the method, which decides all options that are `None`: `"v1"` or `"v2"` of the papers; or
            `"context"`, ours for two vocabularies. The trainer's page has a table of them.
        kd_rate (`float`, *optional*, defaults to `0.5`):
            Weight `r` of the distillation terms: the loss is `(1 - r) * cross_entropy + r * distillation`. The
            cross-entropy is taken on reference text alone, never on rollouts.
        divergence (`str`, *optional*):
            Divergence between student and (projected) teacher: `"forward_kl"` (v1, v2), `"reverse_kl"` (context),
            `"jsd"`, `"skewed_forward_kl"`, `"skewed_reverse_kl"`, `"adaptive_kl"` or `"total_variation"`.
        kd_temperature (`float`, *optional*):
            Temperature of both distributions in a divergence: 2 in v1 and v2, 1 in context.
        teacher_temperature (`float`, *optional*, defaults to `1.0`):
            Further divisor of the projected teacher's logits in the student's space. Other values than 1 cost one more
            product with the student's head.
        skew (`float`, *optional*, defaults to `0.1`):
            Share of the skewed divergences' first distribution in the mixture that it is compared with.
        adaptive_head (`float`, *optional*, defaults to `0.5`):
            Mass of the teacher's most likely tokens that count as the head of the adaptive divergence.
        student_space (`bool`, *optional*, defaults to `True`):
            Whether the projected teacher teaches the student in the student's space.
        teacher_space (`bool`, *optional*):
            Whether the projected student is compared with the teacher in the teacher's space: in v1 and v2.
        teacher_space_divergence (`str`, *optional*):
            Divergence in the teacher's space. If `None`, the forward Kullback-Leibler divergence in v1, and
            `divergence` in v2.
        teacher_space_denominator (`str`, *optional*, defaults to `"student"`):
            By which tokens the teacher's space is divided under `alignment="cma"`, where it sums over the teacher's:
            the number of the `"student"`'s, as the authors do, or of the `"teacher"`'s.
        projector_label (`str`, *optional*):
            What the projected teacher learns to predict. `"gold"`: the next token of the text (v1, context);
            `"teacher_top1"`: the teacher's own most likely token (v2). On rollouts it is the latter, or nothing where
            partners are by context.
        gate (`str`, *optional*):
            Which tokens teach in the student's space. `"none"`: all (v1 with one vocabulary, context); `"agreement"`:
            those whose projected teacher predicts its label (v1 with `"cma"`, v2).
        gate_normalization (`str`, *optional*):
            What divides the gated divergence: the number of all `"tokens"` (v1, context), which warms it up while the
            projector learns, or of the `"gated"` ones (v2).

        > Parameters that control the projectors

        projector_init (`str`, *optional*):
            Where projectors start: `"random"` (v1), or `"logit_invariant"` (v2, context): the least-squares map that
            keeps the logits, from the output heads of both models.
        projector_bias (`bool`, *optional*):
            Whether projectors have a bias. If `None`, in v1 only.
        student_to_teacher (`str`, *optional*):
            The map from the student's space to the teacher's: `"learned"` (v1), or `"recomputed"` (v2, context): the
            map that keeps the logits, found again from the student's output head after each step that changed it.
        init_vocab_size (`int`, *optional*):
            Number of shared tokens, the lowest of the student's ids, from which maps that keep the logits are found.
            By default all.
        cma_norm_scope (`str`, *optional*, defaults to `"valid"`):
            Over what keys and values of cross-model attention are normalised: the trained (`"valid"`) tokens of the
            optimizer step, or all positions of a micro-batch with its padding (`"padded"`), as the authors do.
        projector_hidden_size (`int`, *optional*):
            Width of a small network beside each learned projector, which starts at zero: 0, for linear projectors, in
            v1 and v2; 256 in context.
        projector_pretraining_steps (`int`, *optional*):
            Batches of the training data on which the projectors learn alone, before the student's first step: 0 in v1
            and v2, 1000 in context. The teacher reads these batches, the student does not.
        aux_lr_scheduler_type (`str`, *optional*):
            Schedule of that learning rate, over pretraining and training: `"constant"` in v1 and v2, `"cosine"` in
            context, or another name of [`~transformers.SchedulerType`].
        aux_learning_rate (`float`, *optional*):
            Learning rate of the projectors' own AdamW. By default ten times `learning_rate`: at the student's own rate
            they lag behind and harm.

    > [!NOTE]
    > These parameters have default values different from [`KDConfig`]:
    > - `aux_learning_rate`: Defaults to `None`, which stands for ten times `learning_rate`.
    > - `aux_lr_scheduler_type`: Defaults to `None`, which leaves it to the preset.
    """

    alignment: str = field(
        default="auto",
        metadata={
            "help": "How the tokens of student and teacher are matched. 'same': one vocabulary, token by token; "
            "'eta': exact token alignment, the tokens that both tokenizers cut at the same places of the "
            "text; 'cma': cross-model attention, learned; 'auto': 'same' for one vocabulary, else 'eta' "
            "if it reaches `min_coverage` of the student's tokens, else 'cma'.",
            "choices": ["auto", "same", "eta", "cma"],
        },
    )
    eta_pairs: str | None = field(
        default=None,
        metadata={
            "help": "Which tokens exact alignment takes for partners: 'token', those with the same bytes at the "
            "same place (v1, v2); or 'context', all before which the same text stands, whatever they "
            "are themselves (ours).",
        },
    )
    min_coverage: float = field(
        default=0.3,
        metadata={
            "help": "Share of the student's tokens that exact alignment has to reach for `alignment='auto'` to "
            "choose it.",
        },
    )
    teacher_max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest row that the teacher reads, in its own tokens; what the student reads beyond has no "
            "partner. By default the teacher's longest context. Not used for one vocabulary.",
        },
    )
    objective: str = field(
        default="dual_space",
        metadata={
            "help": "What is compared. 'dual_space': the method; 'simple': a baseline without projectors, the "
            "divergence between teacher and student over the tokens that both vocabularies have, at "
            "exactly aligned positions; 'uld': another baseline, the distance between sorted "
            "probabilities (universal logit distillation), position by position.",
            "choices": ["dual_space", "simple", "uld"],
        },
    )
    preset: str = field(
        default="v2",
        metadata={
            "help": "Version of the method, which decides all options that are `None`: 'v1' or 'v2' of the "
            "papers; or 'context', ours for two vocabularies. The trainer's page has a table of them.",
            "choices": ["v1", "v2", "context"],
        },
    )
    kd_rate: float = field(
        default=0.5,
        metadata={
            "help": "Weight `r` of the distillation terms: the loss is `(1 - r) * cross_entropy + r * "
            "distillation`. The cross-entropy is taken on reference text alone, never on rollouts.",
        },
    )
    divergence: str | None = field(
        default=None,
        metadata={
            "help": "Divergence between student and (projected) teacher: 'forward_kl' (v1, v2), 'reverse_kl' "
            "(context), 'jsd', 'skewed_forward_kl', 'skewed_reverse_kl', 'adaptive_kl' or "
            "'total_variation'.",
        },
    )
    kd_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Temperature of both distributions in a divergence: 2 in v1 and v2, 1 in context.",
        },
    )
    teacher_temperature: float = field(
        default=1.0,
        metadata={
            "help": "Further divisor of the projected teacher's logits in the student's space. Other values than "
            "1 cost one more product with the student's head.",
        },
    )
    skew: float = field(
        default=0.1,
        metadata={
            "help": "Share of the skewed divergences' first distribution in the mixture that it is compared with.",
        },
    )
    adaptive_head: float = field(
        default=0.5,
        metadata={
            "help": "Mass of the teacher's most likely tokens that count as the head of the adaptive divergence.",
        },
    )
    student_space: bool = field(
        default=True,
        metadata={
            "help": "Whether the projected teacher teaches the student in the student's space.",
        },
    )
    teacher_space: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the projected student is compared with the teacher in the teacher's space: in v1 and v2.",
        },
    )
    teacher_space_divergence: str | None = field(
        default=None,
        metadata={
            "help": "Divergence in the teacher's space. If `None`, the forward Kullback-Leibler divergence in v1, "
            "and `divergence` in v2.",
        },
    )
    teacher_space_denominator: str = field(
        default="student",
        metadata={
            "help": "By which tokens the teacher's space is divided under `alignment='cma'`, where it sums over "
            "the teacher's: the number of the 'student's, as the authors do, or of the 'teacher's.",
            "choices": ["student", "teacher"],
        },
    )
    projector_label: str | None = field(
        default=None,
        metadata={
            "help": "What the projected teacher learns to predict. 'gold': the next token of the text (v1, "
            "context); 'teacher_top1': the teacher's own most likely token (v2). On rollouts it is the "
            "latter, or nothing where partners are by context.",
        },
    )
    gate: str | None = field(
        default=None,
        metadata={
            "help": "Which tokens teach in the student's space. 'none': all (v1 with one vocabulary, context); "
            "'agreement': those whose projected teacher predicts its label (v1 with 'cma', v2).",
        },
    )
    gate_normalization: str | None = field(
        default=None,
        metadata={
            "help": "What divides the gated divergence: the number of all 'tokens' (v1, context), which warms "
            "it up while the projector learns, or of the 'gated' ones (v2).",
        },
    )
    projector_init: str | None = field(
        default=None,
        metadata={
            "help": "Where projectors start: 'random' (v1), or 'logit_invariant' (v2, context): the "
            "least-squares map that keeps the logits, from the output heads of both models.",
        },
    )
    projector_bias: bool | None = field(
        default=None,
        metadata={
            "help": "Whether projectors have a bias. If `None`, in v1 only.",
        },
    )
    student_to_teacher: str | None = field(
        default=None,
        metadata={
            "help": "The map from the student's space to the teacher's: 'learned' (v1), or 'recomputed' (v2, "
            "context): the map that keeps the logits, found again from the student's output head after "
            "each step that changed it.",
        },
    )
    init_vocab_size: int | None = field(
        default=None,
        metadata={
            "help": "Number of shared tokens, the lowest of the student's ids, from which maps that keep the "
            "logits are found. By default all.",
        },
    )
    cma_norm_scope: str = field(
        default="valid",
        metadata={
            "help": "Over what keys and values of cross-model attention are normalised: the trained ('valid') "
            "tokens of the optimizer step, or all positions of a micro-batch with its padding ('padded'), "
            "as the authors do.",
            "choices": ["valid", "padded"],
        },
    )
    projector_hidden_size: int | None = field(
        default=None,
        metadata={
            "help": "Width of a small network beside each learned projector, which starts at zero: 0, for "
            "linear projectors, in v1 and v2; 256 in context.",
        },
    )
    projector_pretraining_steps: int | None = field(
        default=None,
        metadata={
            "help": "Batches of the training data on which the projectors learn alone, before the student's "
            "first step: 0 in v1 and v2, 1000 in context. The teacher reads these batches, the student "
            "does not.",
        },
    )
    aux_lr_scheduler_type: str | None = field(
        default=None,
        metadata={
            "help": "Schedule of that learning rate, over pretraining and training: 'constant' in v1 and v2, 'cosine' "
            "in context, or another name of `transformers.SchedulerType`.",
        },
    )
    aux_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the projectors' own AdamW. By default ten times `learning_rate`: at the "
            "student's own rate they lag behind and harm.",
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("alignment", "objective", "preset", "teacher_space_denominator", "cma_norm_scope"):
            check_choice(name, vars(self)[name], tuple(self.__dataclass_fields__[name].metadata["choices"]))
        for name, choices in (
            ("eta_pairs", ("token", "context")),
            ("divergence", tuple(sorted(DIVERGENCES))),
            ("teacher_space_divergence", tuple(sorted(DIVERGENCES))),
            ("projector_label", ("gold", "teacher_top1")),
            ("gate", ("none", "agreement")),
            ("gate_normalization", ("tokens", "gated")),
            ("projector_init", ("random", "logit_invariant")),
            ("student_to_teacher", ("learned", "recomputed")),
        ):
            if vars(self)[name] is not None:
                check_choice(name, vars(self)[name], choices)
        self._check_numbers()
        self._check_combinations()

    def _check_numbers(self) -> None:
        """Numbers outside of what they mean."""
        check_range("min_coverage", self.min_coverage, 0.0, 1.0, "a share of tokens")
        for name, meaning in (
            ("projector_hidden_size", "the width of a network"),
            ("projector_pretraining_steps", "a number of steps"),
        ):
            check_range(name, vars(self)[name] or 0, 0, float("inf"), meaning)
        check_range("kd_rate", self.kd_rate, 0.0, 1.0, "a share of the loss")
        check_range("adaptive_head", self.adaptive_head, 0.0, 1.0, "a mass of the teacher's distribution")
        for name in ("kd_temperature", "teacher_temperature"):
            if vars(self)[name] is not None and not 0.0 < vars(self)[name] < float("inf"):
                raise ValueError(f"`{name}` is {vars(self)[name]}, but logits are divided by it. Set it above 0.")
        if not 0.0 <= self.skew < 1.0:
            raise ValueError(f"`skew` is {self.skew}, but it is a share of a mixture. Set it in [0, 1).")
        for name in ("init_vocab_size", "teacher_max_length"):
            if vars(self)[name] is not None and vars(self)[name] < 1:
                raise ValueError(
                    f"`{name}` is {vars(self)[name]}, but it counts tokens. Set it to 1 or more, or None."
                )

    def _check_combinations(self) -> None:
        """Options that contradict each other."""
        if self.objective == "dual_space" and not (self.student_space or self.decided("teacher_space")):
            raise ValueError(
                "`student_space` and `teacher_space` are both False, so nothing of the teacher is left to learn from. "
                "Set one of them to True, or use SFTTrainer."
            )
        if self.objective != "dual_space" and self.alignment == "cma":
            raise ValueError(
                f"`objective` is '{self.objective}' with `alignment` 'cma', but attention works on projected states, "
                "which this baseline has not. Set `alignment` to 'auto'."
            )
        if self.packing and self.alignment in ("eta", "cma"):
            raise ValueError(
                f"`packing` is True with `alignment` '{self.alignment}', but rows of two tokenizers differ in length "
                "and cannot be packed alike. Set `packing=False`."
            )

    def decided(self, name: str) -> Any:
        """Value of an option, the preset's if it is `None`."""
        value = vars(self)[name]
        return PRESETS[self.preset].get(name) if value is None else value

    def resolve(self, alignment: str) -> None:
        """Fill in what the preset decides, once it is known how the vocabularies meet."""
        self.alignment = alignment
        if self.preset == "v1" and alignment == "cma" and self.gate is None:
            self.gate = "agreement"
        for name in PRESETS[self.preset]:
            setattr(self, name, self.decided(name))
        if self.alignment != "eta":
            self.eta_pairs = "token"  # every token meets every other, or its like
        if (self.eta_pairs, self.projector_label) == ("context", "teacher_top1"):
            raise ValueError(
                "`eta_pairs` is 'context' with `projector_label` 'teacher_top1', but before the same text the two "
                "models need not have the same next tokens, so the teacher's is no label for the student. Set "
                "`projector_label='gold'` (and a `gate` that fits), or take `preset='context'`."
            )
        self.teacher_space_divergence = self.teacher_space_divergence or self.divergence
        if self.aux_learning_rate is None:
            self.aux_learning_rate = 10 * self.learning_rate

    def divergence_in(self, space: str) -> Any:
        """The divergence of the `"student"`'s or the `"teacher"`'s space, with its options."""
        function, fields = DIVERGENCES[self.divergence if space == "student" else self.teacher_space_divergence]
        return partial(function, **{option: vars(self)[name] for option, name in fields.items()})

    def unread(self) -> tuple[str, ...]:
        """Prefixes of fields that nothing reads under these settings."""
        names = super().unread()
        if self.objective != "dual_space":
            names += ("preset", "projector_", "gate", "student_to_teacher", "student_space", "teacher_space", "init_")
        if self.alignment != "cma":
            names += ("cma_", "teacher_space_denominator")
        return names
