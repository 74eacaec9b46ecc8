"""Modules of torch alone: the output head. Critics, projectors and attention will live here."""

from trl_kd.modules.lm_head import LMHead, last_hidden_states


__all__ = ["LMHead", "last_hidden_states"]
