"""Models to compare with, made of the same parts."""

from hsa_ultralong.baselines.full_attention import FullAttentionLM

__all__ = ["FullAttentionLM"]
