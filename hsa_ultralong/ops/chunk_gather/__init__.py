from hsa_ultralong.ops.chunk_gather.api import gather_chunks
from hsa_ultralong.ops.chunk_gather.blocks import ChunkBlocks

__all__ = ["ChunkBlocks", "gather_chunks"]
