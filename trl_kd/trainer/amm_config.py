"""Configuration of adversarial moment matching."""

from dataclasses import dataclass, field

from trl_kd.modules.critic import CRITIC_HEADS
from trl_kd.trainer.kd_config import KDConfig, check_choice, check_range


@dataclass
class AMMConfig(KDConfig):
    r"""
    Configuration class for the [`AMMTrainer`].

    This class includes only the parameters that are specific to adversarial moment matching. For a full list of
    training arguments, please refer to the [`KDConfig`], [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`]
    documentation.

    Parameters:
        > Parameters that control the moments

        critic (`str`, *optional*, defaults to `"exact"`):
            Who plays the worst case. `"exact"`: the worst of all critics bounded by 1, in closed form; the moment is
            twice the total variation. `"exact_penalised"`: the worst under a policy-weighted penalty; the moment is
            the Le Cam divergence. `"value_head"`: a learned one.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount of later tokens: the t-th token of a completion weighs `gamma**(t - 1)` in both moments.

        > Parameters that control a learned critic (`critic="value_head"`)

        critic_head (`str`, *optional*, defaults to `"tied"`):
            Form of a learned critic. `"tied"`: action values from the teacher's output embeddings and one trained
            matrix; `"low_rank"`: two thin matrices; `"full"`: a row for each token of the vocabulary, which takes most
            memory.
        critic_rank (`int`, *optional*, defaults to `32`):
            Rank of the critic head `"low_rank"`.
        critic_features (`str`, *optional*, defaults to `"both"`):
            Whose last hidden states a learned critic sees: `"both"`, `"teacher"`, or `"student"`. What the student has
            learned to tell apart is what it does right: on its own features a critic is nearly blind.
        critic_order (`str`, *optional*, defaults to `"before"`):
            When critics take their steps: `"before"` the student moves, on the tokens it is about to be trained on,
            for which accumulation over micro-batches costs one more forward of the student; or `"after"`, on the same
            tokens, for the next step.
        critic_steps (`int`, *optional*, defaults to `5`):
            Steps of Adam that critics take per optimizer step.
        critic_learning_rate (`float`, *optional*, defaults to `0.1`):
            Learning rate of the critics.
        critic_betas (`list[float]`, *optional*, defaults to `[0.0, 0.9]`):
            Coefficients of the critics' Adam. Momentum would let them lag behind the student.
        critic_bound (`float`, *optional*, defaults to `1.0`):
            Largest absolute value of a learned critic.
        critic_penalty (`float`, *optional*, defaults to `1.0`):
            Weight of the policy-weighted penalty on the square of a learned critic's values. Without it, critics and
            student may run in circles.

        > Parameters that control the effect on later states

        on_policy_gradient (`str`, *optional*, defaults to `"direct"`):
            Gradient of the on-policy moment. `"direct"` takes the student's states as given; `"full"` adds what a
            token does to the later states of its rollout, as a policy gradient.
        later_weight (`float`, *optional*, defaults to `0.1`):
            Weight of the later states in the full gradient; 0.3 for bounded costs. The more, the nearer is a collapse
            into a few easy states.
        later_gamma (`float`, *optional*, defaults to `0.9`):
            Discount of later costs in the full gradient, per token.
        later_cost (`str`, *optional*, defaults to `"reverse_kl"`):
            Cost of a later state: `"reverse_kl"` (in nats: unbounded, so the strongest where the student fails),
            `"total_variation"` (twice it, the moment of the exact critic), or `"jsd"` (the Jensen-Shannon divergence,
            scaled to the same range).
        later_baseline (`str`, *optional*, defaults to `"position"`):
            What is subtracted from later costs: `"position"`, their mean over the other rollouts of the step at the
            same position; or `"value"`, a regression on the state, with generalised advantages.
        later_warmup_steps (`int`, *optional*, defaults to `10`):
            Optimizer steps over which `later_weight` is ramped in.

        > Parameters that control additional losses

        sft_loss_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the negative log-likelihood of off-policy completions.
        kl_loss_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the forward KL divergence to the teacher, on the rows and with the source weights of the moments.

    Note:
        The paper gives no values for `critic_*` and `later_*` that are known to us. Theirs were measured in
        `docs/results.md`: total variation on a student's own states is 0.342 with the default value head, 0.329 with
        the exact critic, 0.322 with that and the full gradient at its defaults, which lift exact match from 0.38 to
        0.71 on a task whose first word decides the rest.

    > [!NOTE]
    > These parameters have default values different from [`KDConfig`]:
    > - `lmbda`: Defaults to `0.5`, as both moments are matched.
    """

    critic: str = field(
        default="exact",
        metadata={
            "help": "Who plays the worst case. 'exact': the worst of all critics bounded by 1, in closed form; the "
            "moment is twice the total variation. 'exact_penalised': the worst under a policy-weighted penalty; the "
            "moment is the Le Cam divergence. 'value_head': a learned one.",
            "choices": ["exact", "exact_penalised", "value_head"],
        },
    )
    gamma: float = field(
        default=1.0,
        metadata={
            "help": "Discount of later tokens: the t-th token of a completion weighs `gamma**(t - 1)` in both moments."
        },
    )
    critic_head: str = field(
        default="tied",
        metadata={
            "help": "Form of a learned critic. 'tied': action values from the teacher's output embeddings and one "
            "trained matrix; 'low_rank': two thin matrices; 'full': a row for each token of the vocabulary, "
            "which takes most memory.",
            "choices": ["full", "low_rank", "tied"],
        },
    )
    critic_rank: int = field(
        default=32,
        metadata={"help": "Rank of the critic head 'low_rank'."},
    )
    critic_features: str = field(
        default="both",
        metadata={
            "help": "Whose last hidden states a learned critic sees: 'both', 'teacher', or 'student'. What the "
            "student has learned to tell apart is what it does right: on its own features a critic is nearly "
            "blind.",
            "choices": ["teacher", "both", "student"],
        },
    )
    critic_order: str = field(
        default="before",
        metadata={
            "help": "When critics take their steps: 'before' the student moves, on the tokens it is about to be "
            "trained on, for which accumulation over micro-batches costs one more forward of the student; or "
            "'after', on the same tokens, for the next step.",
            "choices": ["before", "after"],
        },
    )
    critic_steps: int = field(
        default=5,
        metadata={"help": "Steps of Adam that critics take per optimizer step."},
    )
    critic_learning_rate: float = field(
        default=0.1,
        metadata={"help": "Learning rate of the critics."},
    )
    critic_betas: list[float] = field(
        default_factory=lambda: [0.0, 0.9],
        metadata={"help": "Coefficients of the critics' Adam. Momentum would let them lag behind the student."},
    )
    critic_bound: float = field(
        default=1.0,
        metadata={"help": "Largest absolute value of a learned critic."},
    )
    critic_penalty: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the policy-weighted penalty on the square of a learned critic's values. Without it, "
            "critics and student may run in circles."
        },
    )
    on_policy_gradient: str = field(
        default="direct",
        metadata={
            "help": "Gradient of the on-policy moment. 'direct' takes the student's states as given; 'full' adds "
            "what a token does to the later states of its rollout, as a policy gradient.",
            "choices": ["direct", "full"],
        },
    )
    later_weight: float = field(
        default=0.1,
        metadata={
            "help": "Weight of the later states in the full gradient; 0.3 for bounded costs. The more, the nearer is "
            "a collapse into a few easy states."
        },
    )
    later_gamma: float = field(
        default=0.9,
        metadata={"help": "Discount of later costs in the full gradient, per token."},
    )
    later_cost: str = field(
        default="reverse_kl",
        metadata={
            "help": "Cost of a later state: 'reverse_kl' (in nats: unbounded, so the strongest where the student "
            "fails), 'total_variation' (twice it, the moment of the exact critic), or 'jsd' (the Jensen-Shannon "
            "divergence, scaled to the same range).",
            "choices": ["total_variation", "jsd", "reverse_kl"],
        },
    )
    later_baseline: str = field(
        default="position",
        metadata={
            "help": "What is subtracted from later costs: 'position', their mean over the other rollouts of the step "
            "at the same position; or 'value', a regression on the state, with generalised advantages.",
            "choices": ["position", "value"],
        },
    )
    later_warmup_steps: int = field(
        default=10,
        metadata={"help": "Optimizer steps over which `later_weight` is ramped in."},
    )
    sft_loss_weight: float = field(
        default=0.0, metadata={"help": "Weight of the negative log-likelihood of off-policy completions."}
    )
    kl_loss_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the forward KL divergence to the teacher, on the rows and with the source weights of "
            "the moments."
        },
    )
    lmbda: float = field(
        default=0.5,
        metadata={
            "help": "Share of the rows of an optimizer step whose completion the student writes (on-policy). The "
            "other rows are off-policy."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        check_choice("critic", self.critic, ("exact", "exact_penalised", "value_head"))
        self._check_discount("gamma")
        self._check_critic()
        self._check_later_states()
        check_range("sft_loss_weight", self.sft_loss_weight, 0.0, float("inf"), "the weight of a loss")
        check_range("kl_loss_weight", self.kl_loss_weight, 0.0, float("inf"), "the weight of a loss")

    def unread(self) -> tuple[str, ...]:
        """Prefixes of fields that nothing reads under these settings."""
        used = {"critic_": self.critic == "value_head", "later_": self.on_policy_gradient == "full"}
        return super().unread() + tuple(prefix for prefix, reads in used.items() if not reads)

    def _check_discount(self, name: str) -> None:
        gamma = vars(self)[name]
        if not 0.0 < gamma <= 1.0:
            raise ValueError(f"`{name}` is {gamma}, but it discounts later tokens. Set it in (0, 1].")

    def _check_critic(self) -> None:
        check_choice("critic_head", self.critic_head, CRITIC_HEADS)
        check_choice("critic_features", self.critic_features, ("teacher", "both", "student"))
        check_choice("critic_order", self.critic_order, ("before", "after"))
        positive = float("inf")
        check_range("critic_rank", self.critic_rank, 1, positive, "the width of two matrices")
        check_range("critic_steps", self.critic_steps, 1, positive, "the number of steps of a critic that must answer")
        check_range("critic_penalty", self.critic_penalty, 0.0, positive, "the weight of a penalty")
        for name in ("critic_learning_rate", "critic_bound"):
            if not vars(self)[name] > 0:
                raise ValueError(f"`{name}` is {vars(self)[name]}, so the critic stays zero. Set it above 0.")
        if len(self.critic_betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.critic_betas):
            raise ValueError(
                f"`critic_betas` is {self.critic_betas}, but Adam takes two coefficients in [0, 1). Set both, as in "
                "[0.0, 0.9]."
            )

    def _check_later_states(self) -> None:
        check_choice("on_policy_gradient", self.on_policy_gradient, ("direct", "full"))
        check_choice("later_cost", self.later_cost, ("total_variation", "jsd", "reverse_kl"))
        check_choice("later_baseline", self.later_baseline, ("position", "value"))
        self._check_discount("later_gamma")
        check_range("later_weight", self.later_weight, 0.0, float("inf"), "the weight of a loss")
        check_range("later_warmup_steps", self.later_warmup_steps, 0, float("inf"), "a number of steps")
        if self.on_policy_gradient != "full":
            return
        if not 0.0 < self.lmbda < 1.0 or not 0.0 < self.on_policy_weight < 1.0:
            raise ValueError(
                f"`on_policy_gradient` is 'full' with `lmbda` {self.lmbda} and `on_policy_weight` "
                f"{self.on_policy_weight}. The effect on later states is one of rollouts, and without off-policy rows "
                "to hold it the student collapses into a few easy states. Set both strictly between 0 and 1."
            )
