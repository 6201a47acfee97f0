"""`hsa compact`: what a run changed of a converted model, in fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hsa_ultralong.cli.terminal import echo


def register(app: typer.Typer) -> None:
    app.command("compact")(compact)


def compact(
    source: Annotated[Path, typer.Argument(help="Difference that hsa train --export-difference wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New file, .safetensors.")],
    bits: Annotated[int, typer.Option(min=2, max=8, help="Bits of a number at most; 64 of them share a scale.")] = 7,
) -> None:
    """Pack a difference for shipping: SmolLM2-135M at rank 16 takes 12.3 MiB at 7 bits, 28.5 before.

    `hsa convert SOURCE --apply` and `hsa train --from-difference` read it as any other.

    Examples:

      hsa compact smol.safetensors -o checkpoints/smol/difference.safetensors

      hsa compact smol.safetensors -o small.safetensors --bits 5
    """
    from hsa_ultralong.cli.places import require_file
    from hsa_ultralong.train.difference import read_difference, write_packed

    require_file(output, suffixes=(".safetensors",))
    if output.exists():
        raise ValueError(f"{output} exists; choose another name")
    tensors, conversion = read_difference(source)
    error = write_packed(output, tensors, conversion, bits)
    echo(
        f"{output.stat().st_size / 2**20:.1f} MiB instead of {source.stat().st_size / 2**20:.1f}; "
        f"matrices changed by {error:.2%} of their size"
    )
