"""Work over several processes with torch.distributed; knows no model."""

from hsa_ultralong.distributed.context import ContextRanks
from hsa_ultralong.distributed.memory_ranks import RankedMemory
from hsa_ultralong.distributed.pool import PoolRanks

__all__ = ["ContextRanks", "PoolRanks", "RankedMemory"]
