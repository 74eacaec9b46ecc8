"""Modules of torch alone: the output head, the moment critic, projectors and cross-model attention."""

from trl_kd.modules.critic import ValueHead, critic_features, planned_bytes
from trl_kd.modules.cross_model_attention import CrossModelAttention, scale_of_sums, token_scale
from trl_kd.modules.lm_head import LMHead, last_hidden_states
from trl_kd.modules.projector import RecomputedProjector, ResidualProjector, logit_invariant_map, make_projector


__all__ = [
    "CrossModelAttention",
    "LMHead",
    "RecomputedProjector",
    "ResidualProjector",
    "ValueHead",
    "critic_features",
    "last_hidden_states",
    "logit_invariant_map",
    "make_projector",
    "planned_bytes",
    "scale_of_sums",
    "token_scale",
]
