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


@gluon.jit
def split(number, steps, heads):
    """Number of a program's work among that of its row and key head, key head and row of the batch."""
    other = number // steps
    return number - other * steps, other % heads, other // heads


@gluon.jit
def advance(step, head, b, by_step, by_head, by_b, steps, heads):
    """split of the sum of two numbers from that of each, without divisions."""
    step += by_step
    head += by_head + (step >= steps).to(gl.int32)
    b += by_b + (head >= heads).to(gl.int32)
    return gl.where(step >= steps, step - steps, step), gl.where(head >= heads, head - heads, head), b
