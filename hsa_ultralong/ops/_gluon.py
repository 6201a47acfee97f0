"""What kernels in Gluon share. Imported only where gluon runs."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def begin_block(zero):
    """A branch that is never taken, so that what follows is not moved before: the assembler would wait for products at
    the front of a block, before what runs beside them."""
    gl.inline_asm_elementwise(
        "{ .reg .pred again; here: setp.ne.u32 again, $1, 0; @again nanosleep.u32 20; @again bra here; "
        "mov.u32 $0, $1; }",
        "=r,r", [zero], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
