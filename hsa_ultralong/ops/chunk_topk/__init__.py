from hsa_ultralong.ops.chunk_topk.api import chunk_topk
from hsa_ultralong.ops.chunk_topk.combined import combine_topk
from hsa_ultralong.ops.chunk_topk.lists import ScoredChunks
from hsa_ultralong.ops.chunk_topk.visibility import ChunkVisibility

__all__ = ["ChunkVisibility", "ScoredChunks", "chunk_topk", "combine_topk"]
