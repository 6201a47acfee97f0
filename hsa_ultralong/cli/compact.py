"""`hsa compact`: what a run changed of a converted model, in fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hsa_ultralong.cli.numbers import finite
from hsa_ultralong.cli.terminal import echo

if TYPE_CHECKING:
    import torch


def register(app: typer.Typer) -> None:
    app.command("compact")(compact)


def compact(
    source: Annotated[Path, typer.Argument(help="Difference that hsa train --export-difference wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New file, .safetensors.")],
    bits: Annotated[int, typer.Option(min=2, max=8, help="Bits of a number at most; 64 of them share a scale.")] = 7,
    strength: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            callback=finite,
            help="Part of the change of the source's own layers that stays; with --init-from.",
        ),
    ] = 1.0,
    init_from: Annotated[
        Path | None, typer.Option("--init-from", help="With --strength: the converted folder that the run began with.")
    ] = None,
) -> None:
    """Pack a difference for shipping: SmolLM2-135M at rank 16 takes 12.4 MiB at 7 bits, 28.5 before.

    `hsa convert SOURCE --apply` and `hsa train --from-difference` read it as any other.

    Examples:

      hsa compact smol.safetensors -o difference.safetensors

      hsa compact smol.safetensors -o small.safetensors --bits 5

      hsa compact smol.safetensors -o half.safetensors --strength 0.5 --init-from models/smol-start
    """
    from hsa_ultralong.cli.places import require_file
    from hsa_ultralong.train.difference import read_difference, weakened, write_packed

    require_file(output, suffixes=(".safetensors",))
    if output.exists():
        raise ValueError(f"{output} exists; choose another name")
    if (strength < 1) != (init_from is not None):
        raise ValueError("--strength below 1 and --init-from go together: what the source had stands in that folder")
    tensors, conversion = read_difference(source)
    if init_from is not None:
        tensors = weakened(tensors, _weights(init_from, conversion), strength)
    error = write_packed(output, tensors, conversion, bits)
    echo(
        f"{output.stat().st_size / 2**20:.1f} MiB instead of {source.stat().st_size / 2**20:.1f}; "
        f"rounded, matrices changed by {error:.2%} of their size"
    )


def _weights(folder: Path, conversion: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights of a folder of hsa convert that a difference belongs to."""
    from safetensors.torch import load_file

    from hsa_ultralong.cli.train_start import conversion_of, require_untrained
    from hsa_ultralong.models import HSAForCausalLM
    from hsa_ultralong.models.folder import weight_files
    from hsa_ultralong.train.difference import require_same_source

    HSAForCausalLM.check_folder(folder)
    about = conversion_of(folder)
    if "source_files" not in about:
        raise ValueError(f"--init-from {folder} is no folder of hsa convert: it has no conversion.json")
    require_untrained(about, folder, "--init-from")
    require_same_source(conversion["source_files"], about["source_files"], str(folder))
    if conversion["options"] != about["options"]:
        raise ValueError(f"{folder} was converted with other options than this difference belongs to")
    return {name: part for file in weight_files(folder) for name, part in load_file(file).items()}
