from hsa_ultralong.ops.chunk_gather.api import ChunkBlocks, gather_chunks

__all__ = ["ChunkBlocks", "gather_chunks"]
