"""Kernels that start while the one before them ends (programmatic dependent launch, from compute capability 9 on).

A launch on the same stream waits until the kernel before it has ended, and then takes one to two microseconds to start:
1% of a row of 8K tokens. With `launch_pdl` its programs start earlier and wait themselves. `begin` must be the first
statement of such a kernel: nothing may be read, or written over, before it. Imports triton: for kernels only.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hsa_ultralong.ops._triton import starts_early


@triton.jit
def begin(OVERLAPS: tl.constexpr):
    """Wait for all earlier kernels of the stream and what they wrote; let the next one come."""
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()


def overlap(index: int | None) -> dict[str, bool]:
    """Constants of a launch of a kernel that calls `begin`, on CUDA device `index`."""
    is_early = starts_early(index)
    return {"OVERLAPS": is_early, "launch_pdl": is_early}
