"""The one way in which commands load a model folder: every file is checked first, before memory is taken.

What a configuration asks for is compared with the headers of the weights, so that no number in it is believed. Nothing
is unpickled. Called by cli/common.py and cli/train.py; tests/cli/test_model_folder.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

CHECKSUMS = "checksums.json"
_CONFIG, _GENERATION = "config.json", "generation_config.json"
_ADAPTER = "adapter_config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LARGEST = 2**31 - 1
_JSON_BYTES = 2**28
_DEPTH = 50
_FLOATS = ("F64", "F32", "F16", "BF16")
# of a number in the smallest form that weights are kept in, half a bit
_LEAST_BYTES = 1 / 16
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_GENERATION_KINDS: Mapping[str, tuple[str, ...]] = {
    "a whole number": (
        "max_length", "max_new_tokens", "min_length", "min_new_tokens", "top_k", "num_beams", "num_return_sequences",
        "no_repeat_ngram_size", "prompt_lookup_num_tokens",
    ),
    "a number": ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty", "max_time"),
    "true or false": ("do_sample", "use_cache", "renormalize_logits"),
}  # fmt: skip


def load_folder(folder: Path, dtype: Any) -> tuple[Any, Any]:
    """Model on the CPU in eval mode, and tokenizer, of a model folder.

    Raises:
        ValueError: the folder is no model, or damaged, or its files do not fit one another.
    """
    model = load_checkpoint(folder, dtype)
    return model, _load_tokenizer(folder, model.config)


def load_checkpoint(folder: Path, dtype: Any) -> Any:
    """Model on the CPU in eval mode, of a folder with or without a tokenizer; errors as in `load_folder`."""
    import torch
    from transformers.utils import logging as transformers_logging

    from hsa_ultralong.models import HSAForCausalLM

    config = check_model_folder(folder)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model, info = HSAForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    missing = [*info["missing_keys"], *info.get("mismatched_keys", [])]
    if missing:
        raise ValueError(f"checkpoint {folder} lacks weights, e.g. {missing[0]}; export the model again")
    for name, weight in model.state_dict().items():
        for tensor in _parts(weight):
            # a finite sum has finite parts, and takes one pass; an infinite one may have overflowed
            if tensor.is_floating_point() and not (
                bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())
            ):
                raise ValueError(f"checkpoint {folder} holds weights that are not finite ({name}); get it again")
    return model.eval()


def _parts(weight: Any) -> Iterator[Any]:
    """The plain tensors of a weight; those of torchao consist of several."""
    if not hasattr(weight, "__tensor_flatten__"):
        yield weight
        return
    for name in weight.__tensor_flatten__()[0]:
        yield from _parts(getattr(weight, name))


def check_model_folder(folder: Path) -> Any:
    """The configuration of a model folder whose files fit it and one another; the weights are not read yet.

    Raises:
        ValueError: they do not; naming the file.
    """
    if os.path.lexists(folder / _ADAPTER):
        raise ValueError(
            f"{folder} holds an adapter ({_ADAPTER}), which commands do not load: merge it into its model "
            "(merge_and_unload of peft, then save_pretrained)"
        )
    if not folder.is_dir() or not os.path.lexists(folder / _CONFIG):
        raise ValueError(f"{folder} is no model folder: it has no {_CONFIG}")
    for file in folder.iterdir():
        if file.exists() and not file.is_file() and not file.is_dir():
            raise ValueError(f"{file} is no regular file")
        if file.suffix == ".json" and file.is_file() and file.stat().st_size > _JSON_BYTES:
            raise ValueError(f"{file} has {file.stat().st_size:,} bytes, which no file of a model has")
    config = _check_config(folder)
    files = weight_files(folder)
    _check_weights(folder, config, files)
    _check_generation(folder, config)
    _verify_checksums(folder, [file.name for file in files])
    return config


def _check_config(folder: Path) -> Any:
    from hsa_ultralong.files.messages import reason
    from hsa_ultralong.files.strict_json import read_json
    from hsa_ultralong.models import HSAConfig

    file = folder / _CONFIG
    content = read_json(file)
    if content.get("model_type") != HSAConfig.model_type:
        raise ValueError(f"{folder} holds another kind of model, not {HSAConfig.model_type}")
    _check_leaves(file, content)
    try:
        return HSAConfig.from_dict(content)
    # whatever a value of the wrong kind makes a library stumble over
    except Exception as error:
        raise ValueError(f"{file} cannot be used: {reason(error)}") from error


def _check_leaves(file: Path, content: Any, name: str = "", depth: int = 0) -> None:
    """No number of a file is beyond what any model needs, and it is not nested deeper than libraries can copy."""
    from hsa_ultralong.files.messages import shown

    if depth > _DEPTH:
        raise ValueError(f"{file}: {shown(name)} is nested too deeply")
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else ((name, value) for value in content):
            _check_leaves(file, value, name or str(key), depth + 1)
    elif (type(content) is int and abs(content) > _LARGEST) or (type(content) is float and not math.isfinite(content)):
        raise ValueError(f"{file}: {shown(name)} is {shown(content)}, which is beyond any model")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the weights, which all lie in the folder.

    Raises:
        ValueError: there are none, or the index names files elsewhere.
    """
    from hsa_ultralong.files.fields import is_plain_name
    from hsa_ultralong.files.messages import shown
    from hsa_ultralong.files.strict_json import read_json

    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if not os.path.lexists(folder / _INDEX):
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        if pickles:
            raise ValueError(
                f"{folder} holds its weights as {pickles[0]} only, a pickle, which could run any program and is never "
                f"opened here; if you trust it, load it once with from_pretrained and write it with save_pretrained, "
                f"which makes {_WEIGHTS}"
            )
        raise ValueError(f"{folder} is no model folder: it has no {_WEIGHTS}")
    table = read_json(folder / _INDEX).get("weight_map")
    names = set(table.values()) if isinstance(table, dict) and all(map(_is_text, table.values())) else set()
    if not names:
        raise ValueError(f"{folder / _INDEX}: weight_map must name a file for every tensor")
    for name in sorted(names):
        if not is_plain_name(name) or not name.endswith(".safetensors"):
            raise ValueError(f"{folder / _INDEX} names {shown(name)}, which is no safetensors file of the folder")
        if not (folder / name).is_file():
            raise ValueError(f"checkpoint {folder} is incomplete: {name} is missing")
    return [folder / name for name in sorted(names)]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _check_weights(folder: Path, config: Any, files: list[Path]) -> None:
    """The tensors in the files are those of a model of this configuration, by name, shape and kind."""
    stored = _stored(files)
    layers = config.num_hidden_layers + config.num_encoder_layers
    # building a model, even without memory, takes time for every layer
    if layers > len(stored):
        raise ValueError(
            f"{folder / _CONFIG} asks for {layers:,} layers, but there are {len(stored):,} tensors of weights"
        )
    expected, tied = _expected(folder, config)
    size, least = sum(file.stat().st_size for file in files), sum(math.prod(shape) for shape, _ in expected.values())
    if least * _LEAST_BYTES > size:
        raise ValueError(f"{folder / _CONFIG} asks for {least:,} weights, more than {size:,} bytes can hold")
    if getattr(config, "quantization_config", None):
        # quantised weights have other names, shapes and kinds
        return
    if not any(name.startswith("model.") for name in stored):
        # of a model without a head
        stored = {f"model.{name}": entry for name, entry in stored.items()}
    if missing := sorted(expected.keys() - stored.keys() - tied):
        raise ValueError(f"checkpoint {folder} lacks weights, e.g. {missing[0]}; export the model again")
    if unexpected := sorted(stored.keys() - expected.keys()):
        raise ValueError(
            f"checkpoint {folder} has weights that its {_CONFIG} has no place for, e.g. {unexpected[0]!a}; export the "
            "model again"
        )
    for name, (shape, kind) in stored.items():
        wanted, is_float = expected[name]
        if shape != wanted:
            raise ValueError(f"checkpoint {folder}: {name} has the shape {shape}, its {_CONFIG} asks for {wanted}")
        if is_float != (kind in _FLOATS):
            raise ValueError(f"checkpoint {folder}: {name} is of the kind {kind}, which is no kind of weights here")


def _stored(files: list[Path]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and kind of every tensor, from the headers of the files."""
    from safetensors import SafetensorError, safe_open

    from hsa_ultralong.files.messages import reason

    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118
                    entry = weights.get_slice(name)
                    if name in found:
                        raise ValueError(f"{file} holds {name!a}, which another file of the model holds too")
                    found[name] = tuple(entry.get_shape()), str(entry.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged: {reason(error)}") from error
    return found


def _expected(folder: Path, config: Any) -> tuple[dict[str, tuple[tuple[int, ...], bool]], set[str]]:
    """Shape of every tensor of a model, and whether it is a float, without memory for any; and names of tied ones."""
    import copy

    import torch

    from hsa_ultralong.files.messages import reason
    from hsa_ultralong.models import HSAForCausalLM

    try:
        with torch.device("meta"):
            model = HSAForCausalLM(copy.deepcopy(config))
    # sizes whose product no tensor can have
    except (RuntimeError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / _CONFIG} describes no model that can be built: {reason(error)}") from error
    table = model.state_dict()
    own = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    return {name: (tuple(part.shape), part.is_floating_point()) for name, part in table.items()}, table.keys() - own


def _check_generation(folder: Path, config: Any) -> None:
    """Values of generation_config.json are of the right kind, and its and config.json's tokens in the vocabulary."""
    from hsa_ultralong.files.fields import is_finite, is_whole
    from hsa_ultralong.files.messages import shown
    from hsa_ultralong.files.strict_json import read_json

    content: dict[str, Any] = {}
    if os.path.lexists(folder / _GENERATION):
        content = read_json(folder / _GENERATION)
        _check_leaves(folder / _GENERATION, content)
    tests = {
        "a whole number": lambda value: is_whole(value, 0, _LARGEST),
        "a number": is_finite,
        "true or false": lambda value: isinstance(value, bool),
    }
    for kind, names in _GENERATION_KINDS.items():
        for name in names:
            value = content.get(name)
            if value is not None and not tests[kind](value):
                raise ValueError(f"{folder / _GENERATION}: {name} must be {kind}, got {shown(value)}")
    for file, settings in ((_CONFIG, config.to_dict()), (_GENERATION, content)):
        for name in _TOKEN_IDS:
            value = settings.get(name)
            for one in value if isinstance(value, list) else [] if value is None else [value]:
                if not is_whole(one, 0, config.vocab_size - 1):
                    raise ValueError(
                        f"{folder / file}: {name} must be below vocab_size={config.vocab_size:,}, got {shown(one)}"
                    )


def _verify_checksums(folder: Path, weights: list[str]) -> None:
    """Compare every file named in checksums.json; a folder without one is taken as it is."""
    from hsa_ultralong.files.checksum import file_digest
    from hsa_ultralong.files.fields import is_digest, is_plain_name
    from hsa_ultralong.files.messages import shown
    from hsa_ultralong.files.strict_json import read_json

    if not os.path.lexists(folder / CHECKSUMS):
        return
    table = read_json(folder / CHECKSUMS)
    for name, digest in table.items():
        if not is_plain_name(name) or not is_digest(digest):
            raise ValueError(f"{folder / CHECKSUMS}: {shown(name)} must be a file of the folder with its SHA-256")
        if not (folder / name).is_file():
            raise ValueError(f"checkpoint {folder} is incomplete: {name} is missing")
    if left_out := [name for name in weights if name not in table]:
        raise ValueError(f"{folder / CHECKSUMS} says nothing about {left_out[0]}; export the model again")
    for name, digest in table.items():
        if file_digest(folder / name) != digest:
            raise ValueError(
                f"checkpoint file {folder / name} is corrupt (its SHA-256 is not that of {CHECKSUMS}); get it again"
            )


def _load_tokenizer(folder: Path, config: Any) -> Any:
    from hsa_ultralong.data import load_tokenizer

    tokenizer = load_tokenizer(folder)
    # ids may have gaps
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= config.vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} has token {largest:,}, but the model's vocab_size is {config.vocab_size:,}: "
            "they do not belong together"
        )
    return tokenizer
