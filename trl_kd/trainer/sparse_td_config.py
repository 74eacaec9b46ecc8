"""Configuration of temporal-difference distillation on the teacher's most likely tokens."""

import json
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import logging

from trl_kd.losses.action_sets import check_mass
from trl_kd.losses.returns import check_share
from trl_kd.trainer.kd_config import KDConfig, check_choice, check_range


logger = logging.get_logger(__name__)

# What a form of the method decides
PRESETS = {
    "expected": {
        "objectives": {"expected_inverse_soft_q": 1.0},
        "tail_weight": 1.0,
        "chi2_alpha": float("inf"),
        "gauge": "raw",
        "q_min": float("-inf"),
        "lm_weight": 0.0,
        "train_eos": True,
    },
    "paper": {
        "objectives": {"inverse_soft_q": 1.0},
        "tail_weight": 0.0,
        "chi2_alpha": 0.1,
        "gauge": "max",
        "q_min": -10.0,
        "lm_weight": 1.0,
        "train_eos": True,
    },
    "released": {
        "objectives": {"released": 1.0},
        "tail_weight": 0.0,
        "chi2_alpha": 0.1,
        "gauge": "max",
        "q_min": -10.0,
        "lm_weight": 1.0,
        "train_eos": False,
    },
}
OBJECTIVES = (
    *("expected_inverse_soft_q", "inverse_soft_q", "teacher_reward", "sqil"),
    *("large_margin", "soft_actor_critic", "path_consistency", "released"),
)


@dataclass
class SparseTDConfig(KDConfig):
    r"""
    Configuration class for the [`SparseTDTrainer`].

    This class includes only the parameters that are specific to temporal-difference distillation. For a full list of
    training arguments, please refer to the [`KDConfig`], [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`]
    documentation.

    Parameters:
        > Parameters that control the form of the method

        preset (`str`, *optional*, defaults to `"expected"`):
            Form of the method, which decides all options that are `None`: `"expected"`, ours, the forward
            Kullback-Leibler divergence to the teacher's renormalised nucleus; `"paper"`, the objective of the paper;
            or `"released"`, what the authors' code computes. The trainer's page has a table of them.
        objectives (`dict[str, float]`, *optional*):
            Losses by name, with their weights: `"expected_inverse_soft_q"` (expected), `"inverse_soft_q"` (paper),
            `"teacher_reward"`, `"sqil"`, `"large_margin"`, `"soft_actor_critic"`, `"path_consistency"` and
            `"released"` (released).
        tail_weight (`float`, *optional*):
            Weight of -log of the student's mass on the set: 1 in expected, 0 in paper and released. Without it, and
            without `lm_weight`, nothing keeps the student from tokens outside of the set.

        > Parameters that control the set of actions

        action_set (`str`, *optional*, defaults to `"top_p"`):
            Which of the teacher's tokens are looked at in a state: `"top_p"`, `"top_k"`, `"min_p"`, `"threshold"`, or
            `"full"`, as many as `max_actions`.
        action_top_p (`float`, *optional*, defaults to `0.8`):
            Probability mass of the set, for `"top_p"`.
        action_top_k (`int`, *optional*, defaults to `50`):
            Number of tokens, for `"top_k"`.
        action_min_p (`float`, *optional*, defaults to `0.1`):
            Smallest probability relative to the most likely token's, for `"min_p"`.
        action_threshold (`float`, *optional*, defaults to `0.01`):
            Smallest probability, for `"threshold"`.
        max_actions (`int`, *optional*, defaults to `256`):
            Most tokens of a set.
        label_outside (`str`, *optional*, defaults to `"skip"`):
            What becomes of a token of the data that is not in the set: `"skip"`, its position has no loss that needs
            it; `"union"`, the set gets it; or `"zero"`, its Q-value is 0, as in the authors' code.

        > Parameters that control values, returns and the end of a text

        gamma (`float`, *optional*, defaults to `0.99`):
            Discount of the value of the next state.
        chi2_alpha (`float`, *optional*):
            alpha of the chi-square regularisation (r - c)^2 / (4 alpha) of the implied reward, of (expected) inverse
            soft-Q: off (`inf`, not `None`) in expected, 0.1 in paper and released.
        chi2_center (`str`, *optional*, defaults to `"zero"`):
            c: `"zero"`, or `"teacher"`, the reward that the teacher's own logits imply.
        gauge (`str`, *optional*):
            What Q-values are: the logits (`"raw"`, expected), less the largest of the vocabulary (`"max"`, paper and
            released), or log-probabilities (`"logsoftmax"`).
        q_min (`float`, *optional*):
            Smallest Q-value; clipped ones have no gradient: -10 in paper and released, none (`-inf`) in expected.
        backup (`str`, *optional*, defaults to `"soft"`):
            Value of a state: `"soft"`, a log-sum-exp over the set; `"hard"`, the largest; `"student"` or `"teacher"`,
            the expectation under that policy.
        entropy_weight (`float`, *optional*, defaults to `1.0`):
            Weight tau of the policy's entropy in a value.
        returns (`str`, *optional*, defaults to `"one_step"`):
            How far a return looks: `"one_step"`, `"n_step"`, `"lambda"` or `"monte_carlo"`.
        n_steps (`int`, *optional*, defaults to `4`):
            Tokens of an n-step return.
        td_lambda (`float`, *optional*, defaults to `0.9`):
            lambda of a lambda-return.
        detach_next (`bool`, *optional*, defaults to `False`):
            Whether the value of the next state has no gradient.
        target_ema (`float`, *optional*):
            Decay per step of a copy of the student that gives the values of the next states. By default the student
            itself does.
        truncation (`str`, *optional*, defaults to `"drop"`):
            The last token of a text that was cut: `"drop"`, no loss that needs the next state; `"bootstrap"`, the
            value of the state after it; or `"terminal"`, 0.
        train_eos (`bool`, *optional*):
            Whether the end of a text is an action like others. Not in released, where the state before it has value 0.

        > Parameters that control single losses

        lm_weight (`float`, *optional*):
            Weight of the language-model term, `(1 - kd_ratio)` times the cross-entropy of the data and `kd_ratio`
            times the forward Kullback-Leibler divergence to the teacher: 0 in expected, 1 in paper and released. On
            the trainer's `lm_dataset`, if there is one.
        kd_ratio (`float`, *optional*, defaults to `0.5`):
            Share of the divergence in it.
        margin (`float`, *optional*, defaults to `0.5`):
            Distance that `"large_margin"` asks for.
    """

    _VALID_DICT_FIELDS = KDConfig._VALID_DICT_FIELDS + ["objectives"]

    preset: str = field(
        default="expected",
        metadata={
            "help": "Form of the method, which decides all options that are `None`: 'expected', ours, the forward "
            "Kullback-Leibler divergence to the teacher's renormalised nucleus; 'paper', the objective of the paper; "
            "or 'released', what the authors' code computes. The trainer's page has a table of them.",
            "choices": list(PRESETS),
        },
    )
    objectives: dict[str, float] | str | None = field(
        default=None,
        metadata={
            "help": "Losses by name, with their weights: 'expected_inverse_soft_q' (expected), 'inverse_soft_q' "
            "(paper), 'teacher_reward', 'sqil', 'large_margin', 'soft_actor_critic', 'path_consistency' and "
            "'released' (released)."
        },
    )
    tail_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of -log of the student's mass on the set: 1 in expected, 0 in paper and released. Without "
            "it, and without `lm_weight`, nothing keeps the student from tokens outside of the set."
        },
    )
    action_set: str = field(
        default="top_p",
        metadata={
            "help": "Which of the teacher's tokens are looked at in a state: 'top_p', 'top_k', 'min_p', 'threshold', "
            "or 'full', as many as `max_actions`.",
            "choices": ["top_p", "top_k", "min_p", "threshold", "full"],
        },
    )
    action_top_p: float = field(default=0.8, metadata={"help": "Probability mass of the set, for 'top_p'."})
    action_top_k: int = field(default=50, metadata={"help": "Number of tokens, for 'top_k'."})
    action_min_p: float = field(
        default=0.1, metadata={"help": "Smallest probability relative to the most likely token's, for 'min_p'."}
    )
    action_threshold: float = field(default=0.01, metadata={"help": "Smallest probability, for 'threshold'."})
    max_actions: int = field(default=256, metadata={"help": "Most tokens of a set."})
    label_outside: str = field(
        default="skip",
        metadata={
            "help": "What becomes of a token of the data that is not in the set: 'skip', its position has no loss "
            "that needs it; 'union', the set gets it; or 'zero', its Q-value is 0, as in the authors' code.",
            "choices": ["skip", "union", "zero"],
        },
    )
    gamma: float = field(default=0.99, metadata={"help": "Discount of the value of the next state."})
    chi2_alpha: float | None = field(
        default=None,
        metadata={
            "help": "alpha of the chi-square regularisation (r - c)^2 / (4 alpha) of the implied reward, of "
            "(expected) inverse soft-Q: off (`inf`, not `None`) in expected, 0.1 in paper and released."
        },
    )
    chi2_center: str = field(
        default="zero",
        metadata={
            "help": "c: 'zero', or 'teacher', the reward that the teacher's own logits imply.",
            "choices": ["zero", "teacher"],
        },
    )
    gauge: str | None = field(
        default=None,
        metadata={
            "help": "What Q-values are: the logits ('raw', expected), less the largest of the vocabulary ('max', "
            "paper and released), or log-probabilities ('logsoftmax')."
        },
    )
    q_min: float | None = field(
        default=None,
        metadata={
            "help": "Smallest Q-value; clipped ones have no gradient: -10 in paper and released, none (`-inf`) in "
            "expected."
        },
    )
    backup: str = field(
        default="soft",
        metadata={
            "help": "Value of a state: 'soft', a log-sum-exp over the set; 'hard', the largest; 'student' or "
            "'teacher', the expectation under that policy.",
            "choices": ["soft", "hard", "student", "teacher"],
        },
    )
    entropy_weight: float = field(default=1.0, metadata={"help": "Weight tau of the policy's entropy in a value."})
    returns: str = field(
        default="one_step",
        metadata={
            "help": "How far a return looks: 'one_step', 'n_step', 'lambda' or 'monte_carlo'.",
            "choices": ["one_step", "n_step", "lambda", "monte_carlo"],
        },
    )
    n_steps: int = field(default=4, metadata={"help": "Tokens of an n-step return."})
    td_lambda: float = field(default=0.9, metadata={"help": "lambda of a lambda-return."})
    detach_next: bool = field(default=False, metadata={"help": "Whether the value of the next state has no gradient."})
    target_ema: float | None = field(
        default=None,
        metadata={
            "help": "Decay per step of a copy of the student that gives the values of the next states. By default the "
            "student itself does."
        },
    )
    truncation: str = field(
        default="drop",
        metadata={
            "help": "The last token of a text that was cut: 'drop', no loss that needs the next state; 'bootstrap', "
            "the value of the state after it; or 'terminal', 0.",
            "choices": ["drop", "bootstrap", "terminal"],
        },
    )
    train_eos: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the end of a text is an action like others. Not in released, where the state before it "
            "has value 0."
        },
    )
    lm_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the language-model term, `(1 - kd_ratio)` times the cross-entropy of the data and "
            "`kd_ratio` times the forward Kullback-Leibler divergence to the teacher: 0 in expected, 1 in paper and "
            "released. On the trainer's `lm_dataset`, if there is one."
        },
    )
    kd_ratio: float = field(default=0.5, metadata={"help": "Share of the divergence in it."})
    margin: float = field(default=0.5, metadata={"help": "Distance that 'large_margin' asks for."})

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.objectives, str):
            self.objectives = _read_weights(self.objectives)
        for name in ("preset", "action_set", "label_outside", "chi2_center", "backup", "returns", "truncation"):
            check_choice(name, vars(self)[name], tuple(self.__dataclass_fields__[name].metadata["choices"]))
        if self.gauge is not None:
            check_choice("gauge", self.gauge, ("raw", "max", "logsoftmax"))
        self._check_numbers()
        self._check_objectives()

    def _check_numbers(self) -> None:
        """Numbers outside of what they mean."""
        for name in ("action_top_p", "action_min_p", "action_threshold"):
            check_mass(name, vars(self)[name])
        for name, meaning in (
            ("action_top_k", "a number of tokens"),
            ("max_actions", "a number of tokens"),
            ("n_steps", "a number of tokens"),
        ):
            check_range(name, vars(self)[name], 1, float("inf"), meaning)
        for name, meaning in (
            ("gamma", "discounts what follows"),
            ("td_lambda", "is a share of what was seen"),
            ("kd_ratio", "is a share of the language-model term"),
        ):
            check_share(name, vars(self)[name], meaning)
        for name in ("tail_weight", "lm_weight", "margin"):
            check_range(name, vars(self)[name] or 0.0, 0.0, float("inf"), "a weight" if name != "margin" else name)
        for name in ("chi2_alpha", "entropy_weight"):
            if vars(self)[name] is not None and not vars(self)[name] > 0.0:
                raise ValueError(f"`{name}` is {vars(self)[name]}, but values are divided by it. Set it above 0.")
        if self.target_ema is not None:
            check_share("target_ema", self.target_ema, "is the share of the copy that a step keeps")

    def _check_objectives(self) -> None:
        """Losses that do not exist, and settings that train nothing."""
        if self.objectives is None:
            return
        if unknown := sorted(set(self.objectives) - set(OBJECTIVES)):
            raise ValueError(
                f"`objectives` names {', '.join(map(repr, unknown))}, which do not exist. Choose among "
                f"{', '.join(map(repr, OBJECTIVES))}, or pass the trainer an `objective` of your own."
            )
        for name, weight in self.objectives.items():
            check_range(f"objectives['{name}']", weight, 0.0, float("inf"), "a weight")
        if self.objectives.get("path_consistency") and self.lmbda == 0:
            raise ValueError(
                "`objectives` has 'path_consistency' with `lmbda` 0, but it learns from the student's own text, of "
                "which there is none. Set `lmbda=0.5`."
            )
        if not any(self.objectives.values()):
            raise ValueError(
                f"`objectives` is {self.objectives}, so nothing of the teacher's choice among its tokens would be "
                "learned. Give one of them a weight, or None for the preset's."
            )

    def decided(self, name: str) -> Any:
        """Value of an option, the preset's if it is `None`."""
        value = vars(self)[name]
        return PRESETS[self.preset].get(name) if value is None else value

    def resolve(self) -> None:
        """Fill in what the preset decides."""
        for name in PRESETS[self.preset]:
            setattr(self, name, self.decided(name))

    def check_cache(self, cache: Any) -> None:
        """Refuse a teacher cache in which sets would be smaller than the teacher's own."""
        held = f"the cache `{cache.path}` holds a mass of {cache.top_p:g} and {cache.settings['max_tokens']} tokens"
        wanted = {"top_k": min(self.action_top_k, self.max_actions), "full": self.max_actions}.get(self.action_set)
        is_short = wanted is not None and (cache.top_p < 1.0 or cache.settings["max_tokens"] < wanted)
        if is_short or (self.action_set == "threshold" and self.action_threshold < 1.0 - cache.top_p):
            raise ValueError(
                f"`action_set` is '{self.action_set}', but {held} at most of each state, so sets would be smaller "
                "than the teacher's own. Write a cache with `--top_p 1` and enough `--max_tokens`, or take "
                "`action_set='top_p'`."
            )
        capped = cache.header["counts"]["capped_states"]
        if self.action_set == "min_p" or (self.max_actions > cache.settings["max_tokens"] and capped):
            logger.warning(
                f"`action_set` is '{self.action_set}' with `max_actions` {self.max_actions}, and {held} at most of "
                "each state: some sets may be smaller than the teacher's own. `trl-kd cache --inspect` shows them."
            )

    def cached_sets(self) -> tuple[float | None, int | None]:
        """The action set, unless a term on both models takes all that the cache has."""
        takes_all = self.decided("lm_weight") * self.kd_ratio > 0
        top_p = self.action_top_p if self.action_set == "top_p" and not takes_all else None
        return top_p, None if takes_all else self.max_actions

    def unread(self) -> tuple[str, ...]:
        """Prefixes of fields that nothing reads under these settings."""
        sizes = {"top_p", "top_k", "min_p", "threshold"} - {self.action_set}
        names = super().unread() + tuple(f"action_{name}" for name in sorted(sizes))
        if self.returns != "n_step":
            names += ("n_steps",)
        return names if self.returns == "lambda" else (*names, "td_lambda")


def _read_weights(text: str) -> dict[str, float]:
    """Losses and weights of a command line."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"`objectives` is {text!r}, but losses have weights. Write them as JSON, such as "
            '\'{"expected_inverse_soft_q": 1.0, "teacher_reward": 0.01}\'.'
        )
    return found
