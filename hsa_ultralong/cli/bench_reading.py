"""`hsa bench reading`: how fast model folders read, and what they keep of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hsa_ultralong.cli.numbers import MAX_SEED, parse_sizes
from hsa_ultralong.cli.places import require_folder
from hsa_ultralong.cli.terminal import echo, echo_json


def reading(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="Folders of this library or transformers.")],
    lengths: Annotated[str, typer.Option(help="Tokens.")] = "32K,64K,128K",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for reading.json.", show_default="none")
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Of rivals, as in `hsa eval`: sparse_impl=torch.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bf16, fp32 or auto.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the tokens.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON instead of lines.")] = False,
) -> None:
    """Time reading: a model of this library memorises, any other fills its cache with one prompt.

    bytes_per_token is by how much the memory or the cache grows from one length to the next, so two are needed.

    Examples:

      hsa bench reading models/hsa models/full_rope -o runs/reading

      hsa bench reading checkpoints/nano --lengths 2K,4K --device cpu
    """
    from hsa_ultralong.bench.reading import reading_records
    from hsa_ultralong.cli.common import choose_device
    from hsa_ultralong.cli.evaluate_suite import load_any, own_names
    from hsa_ultralong.eval.metadata import command_line, run_metadata, write_json

    sizes = sorted(set(parse_sizes(lengths, "--lengths")))
    if output is not None:
        require_folder(output)
    records = []
    for name, folder in zip(own_names(models), models, strict=True):
        model, _, is_ours = load_any(folder, device, dtype, changes or [])
        for record in reading_records(model, name, sizes, seed=seed):
            records.append({**record, "dtype": str(model.dtype).removeprefix("torch.")})
            if not as_json:
                kind = "a memory" if is_ours else "a cache"
                echo(f"{record['preset']} {record['metric']} {record['tokens']:,}: {record['value']:,.1f} ({kind})")
        del model
    result = {"meta": run_metadata(command_line(), seed, device=choose_device(device)), "records": records}
    if as_json:
        echo_json(result)
    if output is not None:
        write_json(output / "reading.json", result)
        echo(f"Written: {output / 'reading.json'}", err=as_json)
