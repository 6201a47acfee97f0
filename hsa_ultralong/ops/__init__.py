"""Operators: tensors in, tensors out. Each folder holds api.py, reference.py (the specification) and its backends."""

from hsa_ultralong.ops.chunk_topk import ChunkVisibility, ScoredChunks, chunk_topk, combine_topk
from hsa_ultralong.ops.hsa import hsa_attention, joint_attention
from hsa_ultralong.ops.linear_cross_entropy import linear_cross_entropy
from hsa_ultralong.ops.sliding_window import sliding_window_attention
from hsa_ultralong.ops.swiglu import swiglu_fp8

__all__ = [
    "ChunkVisibility",
    "ScoredChunks",
    "chunk_topk",
    "combine_topk",
    "hsa_attention",
    "joint_attention",
    "linear_cross_entropy",
    "sliding_window_attention",
    "swiglu_fp8",
]
