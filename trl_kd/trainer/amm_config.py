"""Configuration of adversarial moment matching."""

from dataclasses import dataclass, field

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
            the Le Cam divergence.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount of later tokens: the t-th token of a completion weighs `gamma**(t - 1)` in both moments.

        > Parameters that control additional losses

        sft_loss_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the negative log-likelihood of off-policy completions.
        kl_loss_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the forward KL divergence to the teacher, on the rows and with the source weights of the moments.

    > [!NOTE]
    > These parameters have default values different from [`KDConfig`]:
    > - `lmbda`: Defaults to `0.5`, as both moments are matched.
    """

    critic: str = field(
        default="exact",
        metadata={
            "help": "Who plays the worst case. 'exact': the worst of all critics bounded by 1, in closed form; the "
            "moment is twice the total variation. 'exact_penalised': the worst under a policy-weighted penalty; the "
            "moment is the Le Cam divergence.",
            "choices": ["exact", "exact_penalised"],
        },
    )
    gamma: float = field(
        default=1.0,
        metadata={
            "help": "Discount of later tokens: the t-th token of a completion weighs `gamma**(t - 1)` in both moments."
        },
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
        check_choice("critic", self.critic, ("exact", "exact_penalised"))
        if not 0.0 < self.gamma <= 1.0:
            raise ValueError(f"`gamma` is {self.gamma}, but it discounts later tokens. Set it in (0, 1].")
        check_range("sft_loss_weight", self.sft_loss_weight, 0.0, float("inf"), "the weight of a loss")
        check_range("kl_loss_weight", self.kl_loss_weight, 0.0, float("inf"), "the weight of a loss")
