"""`hsa average`: one model out of several that began as one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from hsa_ultralong.cli.terminal import echo


def register(app: typer.Typer) -> None:
    app.command("average")(average)


def average(
    models: Annotated[list[Path], typer.Argument(help="Two model folders or more, of one shape and tokenizer.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New model folder.")],
    weights: Annotated[
        str | None, typer.Option(help="A weight for each, adding up to 1.", show_default="all alike")
    ] = None,
) -> None:
    """Average the weights of models: a model before and after a stage, or of several stages that began alike.

    Between a model and what a stage made of it lies much of what both can do. Memories must be built again with the
    new model.

    Examples:

      hsa average checkpoints/nano models/pool -o models/mine

      hsa average checkpoints/nano models/pool --weights 0.7,0.3 -o models/mine
    """
    from hsa_ultralong.cli.common import load_model
    from hsa_ultralong.cli.places import removed_on_failure, require_folder
    from hsa_ultralong.files.checksum import file_digest
    from hsa_ultralong.train.averaging import average_models
    from hsa_ultralong.train.export import export_model

    require_folder(output, is_new=True)
    shares = _shares(weights, len(models))
    loaded = [load_model(folder, "cpu", "fp32") for folder in models]
    digests = {file_digest(folder / "tokenizer.json") for folder in models}
    if len(digests) > 1:
        raise ValueError("the models have different tokenizers: the same number means another token to each")
    mean = average_models([model for model, _ in loaded], shares)
    with removed_on_failure(output.with_name(f".partial-{output.name}")):
        export_model(mean, loaded[0][1], output, topk=mean.config.chunk_topk)
    parts = " + ".join(f"{share:g} x {folder}" for share, folder in zip(shares, models, strict=True))
    echo(f"Written: {output} = {parts}")


def _shares(text: str | None, count: int) -> list[float]:
    if text is None:
        return [1 / count] * count
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = [math.nan]
    if not all(map(math.isfinite, shares)):
        raise ValueError(f"--weights must be numbers such as 0.7,0.3, got {text!r}")
    if len(shares) != count:
        raise ValueError(f"--weights must be {count} numbers, one for each model, got {len(shares)}")
    return shares
