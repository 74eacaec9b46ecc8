"""Modules of torch alone: the output head and the moment critic. Projectors and attention will live here."""

from trl_kd.modules.critic import ValueHead, critic_features, planned_bytes
from trl_kd.modules.lm_head import LMHead, last_hidden_states


__all__ = ["LMHead", "ValueHead", "critic_features", "last_hidden_states", "planned_bytes"]
