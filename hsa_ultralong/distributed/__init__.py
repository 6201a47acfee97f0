"""Work over several processes with torch.distributed; knows no model."""

from hsa_ultralong.distributed.memory_ranks import RankedMemory

__all__ = ["RankedMemory"]
