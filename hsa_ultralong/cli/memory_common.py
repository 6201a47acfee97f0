"""What the commands of `hsa memory` share: options, a library opened with its model, a progress bar over bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hsa_ultralong.cli.terminal import progress

MemoryPath = Annotated[Path, typer.Argument(metavar="MEMORY", help="Folder of the memory, such as lib.hsa.")]
Model = Annotated[
    Path | None, typer.Option(help="Model folder, or its name in models/.", show_default="checkpoints/nano")
]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto.")]
Dtype = Annotated[str, typer.Option(help="bf16, fp32 or auto; best that of `hsa memorize`.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


class open_to_write:
    """The library at a path with its model and tokenizer; refuses another tokenizer's."""

    def __init__(self, path: Path, model: Path | None, device: str, dtype: str) -> None:
        self.path, self.model, self.device, self.dtype = path, model, device, dtype

    def __enter__(self) -> tuple[Any, Any]:
        from hsa_ultralong.cli.common import load_model
        from hsa_ultralong.inference import Library

        network, tokenizer = load_model(self.model, self.device, self.dtype)
        self.library = Library.open(network, self.path)
        try:
            require_tokenizer(self.library.writer.spec, tokenizer)
        except ValueError:
            self.library.close()
            raise
        return self.library, tokenizer

    def __exit__(self, *_: object) -> None:
        self.library.close()


def require_tokenizer(spec: Any, tokenizer: Any) -> None:
    """Refuse a memory whose token ids are another tokenizer's."""
    from hsa_ultralong.data import tokenizer_fingerprint

    if spec.tokenizer and spec.tokenizer != tokenizer_fingerprint(tokenizer):
        raise ValueError(
            "this memory was built with another tokenizer; use the model folder that built it, or read it again: "
            "hsa memory rebuild MEMORY --model MODEL --old-tokenizer FOLDER"
        )


class bytes_bar:
    """A progress bar over bytes as a callable (done, total); None where silent."""

    def __init__(self, what: str, is_quiet: bool) -> None:
        self.what, self.is_quiet = what, is_quiet
        self.bar: Any = None

    def __enter__(self) -> Any:
        return None if self.is_quiet else self.show

    def show(self, done: int, total: int) -> None:
        from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn

        # what is refused shows no bar
        if self.bar is None:
            self.bar = progress(self.what, BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self.bar.start()
            self.task = self.bar.add_task("", total=None)
        self.bar.update(self.task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
