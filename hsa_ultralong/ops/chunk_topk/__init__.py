from hsa_ultralong.ops.chunk_topk.api import chunk_topk
from hsa_ultralong.ops.chunk_topk.visibility import ChunkVisibility

__all__ = ["ChunkVisibility", "chunk_topk"]
