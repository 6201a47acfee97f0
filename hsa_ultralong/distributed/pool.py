"""Pooled memory over processes: the rows of all ranks read each other's chunks (docs/pooled-memory.md).

Landmarks are gathered, keys and values too unless foreign chunks only compete; gradients return to the rank that wrote
the chunk. Given to the model as `model.model.pool_ranks`; tests/distributed/test_pool.py.
"""

from __future__ import annotations

from hsa_ultralong.distributed.collectives import Ranks


class PoolRanks(Ranks):
    """Rank r of n holds rows r*B .. (r + 1)*B - 1 of a pool of n*B rows.

    Without `num_items_in_batch` a rank's loss is the mean over its own labels, as in data parallelism. Its gradients
    hold its part in all ranks' losses: they are summed or averaged over the ranks as there.
    """
