"""What `hsa convert` starts from: folder, GGUF file, authors' checkpoint. tests/cli/test_convert.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

_TOKENIZER_FILES = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template")
# a document of a model without such tokens begins and is padded with the token that ends one
_STAND_INS = {"bos_token": ("<|endoftext|>", "eos_token"), "pad_token": ("<|endoftext|>", "eos_token")}


class PretrainedSource(NamedTuple):
    """A pretrained transformer on disk; nothing of it is in memory but `config`.

    config: of transformers; of a kind that is not converted, the bare keys; of the authors' checkpoints, ours. files:
        those that hold the weights.
    load: its model. save_tokenizer: writes the tokenizer's files into a folder.
    """

    name: str
    config: Any
    files: list[Path]
    load: Callable[[], Any]
    save_tokenizer: Callable[[Path], None]


def open_source(path: Path, tokenizer: Path | None = None) -> PretrainedSource:
    """The source at `path`; a tokenizer folder takes the place of its own tokenizer.

    Raises:
        ValueError: it is neither a folder nor a GGUF file of a model, or the tokenizer cannot be read.
    """
    found = _gguf_source(path, tokenizer is None) if path.is_file() else _folder_source(path)
    if tokenizer is not None:
        from hsa_ultralong.data import load_tokenizer

        load_tokenizer(tokenizer)
        found = found._replace(save_tokenizer=lambda folder: copy_tokenizer(tokenizer, folder))
    return found


def _folder_source(path: Path) -> PretrainedSource:
    from hsa_ultralong.files.strict_json import read_json
    from hsa_ultralong.models.authors import MODEL_TYPES
    from hsa_ultralong.models.convert import SOURCES
    from hsa_ultralong.models.folder import weight_files

    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is no model folder: it has no config.json")
    keys = read_json(path / "config.json")
    if keys.get("model_type") in MODEL_TYPES:
        return _authors_source(path, keys)
    config = _bare(keys)
    if keys.get("model_type") in SOURCES:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(path)

    def load() -> Any:
        from hsa_ultralong.models.folder import load_pretrained

        return load_pretrained(path, dtype="auto")

    files = [path / name for name in ("model.safetensors", "model.safetensors.index.json")]
    listed = weight_files(path) if any(file.is_file() for file in files) else []
    return PretrainedSource(path.name, config, listed, load, lambda folder: copy_tokenizer(path, folder))


def _authors_source(path: Path, keys: dict[str, Any]) -> PretrainedSource:
    """A checkpoint of the authors' code, whose configuration is ours from the start."""
    from hsa_ultralong.models.authors import authors_config, read_authors
    from hsa_ultralong.models.folder import weight_files

    config, files = authors_config(keys), weight_files(path)

    def load() -> Any:
        from safetensors.torch import load_file

        return read_authors(keys, {name: part for file in files for name, part in load_file(file).items()})

    return PretrainedSource(path.name, config, files, load, lambda folder: copy_tokenizer(path, folder))


def _bare(keys: dict[str, Any]) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(**{"model_type": "unnamed", **keys})


def _gguf_source(path: Path, has_own_tokenizer: bool) -> PretrainedSource:
    from hsa_ultralong.data.gguf_tokenizer import gguf_tokenizer
    from hsa_ultralong.files.gguf import read_gguf
    from hsa_ultralong.models.gguf import gguf_config, load_gguf

    file = read_gguf(path)
    config = gguf_config(file)
    if has_own_tokenizer:
        # before minutes of other work
        own = gguf_tokenizer(file.fields)

    def save_tokenizer(folder: Path) -> None:
        own.save_pretrained(folder)

    return PretrainedSource(path.name, config, [path], lambda: load_gguf(path), save_tokenizer)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer."""
    import shutil

    for file in sorted(source.iterdir()):
        if file.name.startswith(_TOKENIZER_FILES) and file.is_file():
            shutil.copy(file, folder / file.name)


def complete_tokenizer(folder: Path) -> dict[str, str]:
    """Settle what a tokenizer's settings lack for a model with a memory; returns the tokens that were named.

    The length of the source's context is none of the new model's: tools would cut texts to it. Documents begin with
    bos, and rows are padded, which Qwen's tokenizers have no token for.
    """
    import json

    from hsa_ultralong.files.durable import write_whole
    from hsa_ultralong.files.strict_json import read_json

    settings = folder / "tokenizer_config.json"
    if not settings.is_file():
        return {}
    table = read_json(settings)
    kept = {key: value for key, value in table.items() if key not in ("model_max_length", "max_len")}
    named: dict[str, str] = {}
    if (folder / "tokenizer.json").is_file():
        stored = read_json(folder / "tokenizer.json")
        added = {token.get("content") for token in stored.get("added_tokens", []) if isinstance(token, dict)}
        for name, (first, other) in _STAND_INS.items():
            if not kept.get(name) and (token := first if first in added else kept.get(other)):
                kept[name] = token
                named[name] = token if isinstance(token, str) else token.get("content", "")
    if kept != table:
        write_whole(settings, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
    return named
