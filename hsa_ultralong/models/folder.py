"""Model folders are checked before memory is taken: by `from_pretrained`, and so by every command.

What a configuration asks for is compared with the headers of the weights, so that no number in it is believed. Nothing
is unpickled. Called by modeling_hsa.py and cli/; tests/models/test_folder.py.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hsa_ultralong.files.checksum import file_digest
from hsa_ultralong.files.fields import (
    is_digest,
    is_finite,
    is_plain_name,
    is_whole,
    require_modest,
    require_tokens_below,
)
from hsa_ultralong.files.messages import reason, shown
from hsa_ultralong.files.strict_json import read_json
from hsa_ultralong.models.configuration_hsa import CHECKSUMS, HSAConfig

ADAPTER = "adapter_config.json"
_CONFIG, _GENERATION = "config.json", "generation_config.json"
_TOKENIZER = "tokenizer.json"
_BASE, _HEAD = "model.", "lm_head.weight"
_LARGEST = 2**31 - 1
_JSON_BYTES = 2**28
_FLOATS = ("F64", "F32", "F16", "BF16")
# of a number in the smallest form that weights are kept in, half a bit
_LEAST_BYTES = 1 / 16
# what is made up, and reported, where a folder lacks weights and the caller asks for their names
_MADE_UP_LAYERS, _MADE_UP_WEIGHTS = 1000, 2**28
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_GENERATION_KINDS: Mapping[str, tuple[str, ...]] = {
    "a whole number": (
        "max_length", "max_new_tokens", "min_length", "min_new_tokens", "top_k", "num_beams", "num_return_sequences",
        "no_repeat_ngram_size", "prompt_lookup_num_tokens",
    ),
    "a number": ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty", "max_time"),
    "true or false": ("do_sample", "use_cache", "renormalize_logits"),
}  # fmt: skip


class FolderContent(NamedTuple):
    """What a folder must hold: the tensors of a base model, named as in a causal model, and perhaps its head and more.

    base: makes the base model of a configuration.
    """

    base: Callable[[HSAConfig], torch.nn.Module]
    has_head: bool
    may_have_more: bool


class CheckedLoading:
    """`from_pretrained` of a model class, of which a damaged folder is refused in one line."""

    @classmethod
    def folder_content(cls) -> FolderContent:
        raise NotImplementedError

    @classmethod
    def check_folder(cls, folder: Path) -> HSAConfig:
        """The configuration of a folder that this class can load; errors as in `check_model_folder`."""
        return check_model_folder(folder, cls.folder_content())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but from safetensors only unless `use_safetensors=False`, and a folder on this machine is
        checked before memory is taken. With `output_loading_info=True` weights that are missing or unexpected are
        reported, as in transformers, instead of refused.

        Raises:
            ValueError: the folder is damaged, its files do not fit one another, or weights are not finite.
        """
        source, config = pretrained_model_name_or_path, kwargs.get("config")
        if source is None or kwargs.get("state_dict") is not None or kwargs.get("gguf_file"):
            return super().from_pretrained(source, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        with_info, found = kwargs.pop("output_loading_info", False), None
        folder = Path(source, kwargs.get("subfolder") or "")
        # an adapter's folder leads to that of its model
        if folder.is_dir() and not os.path.lexists(folder / ADAPTER):
            found = check_model_folder(
                folder,
                cls.folder_content(),
                config=config if isinstance(config, HSAConfig) else None,
                variant=kwargs.get("variant"),
                reads_weights=kwargs["use_safetensors"],
                reports_keys=with_info,
            )
        model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        # of quantised weights the names are known only now
        missing = sorted(info["missing_keys"]) if getattr(found, "quantization_config", None) else []
        if missing and not with_info and not cls.folder_content().may_have_more:
            raise ValueError(f"checkpoint {folder} lacks weights, e.g. {missing[0]}; export the model again")
        require_finite(model, source)
        return (model, info) if with_info else model


def load_pretrained(folder: Path, **options: Any) -> torch.nn.Module:
    """A causal model of any kind that transformers knows, of whose weights none is made up.

    Args:
        options: of `from_pretrained`.

    Raises:
        ValueError: the folder has no safetensors, lacks weights, or has some of other shapes or that are not finite.
    """
    weight_files(folder)
    # what it warns of is refused below
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **options
        )
    except SafetensorError as error:
        raise ValueError(f"the weights in {folder} are damaged: {reason(error)}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(f"checkpoint {folder} has weights of other shapes than its {_CONFIG} asks for") from error
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"checkpoint {folder} lacks weights, e.g. {missing[0]}; get it again")
    require_finite(model, folder)
    found: torch.nn.Module = model
    return found


def check_model_folder(
    folder: Path,
    content: FolderContent,
    *,
    config: Any = None,
    variant: str | None = None,
    reads_weights: bool = True,
    reports_keys: bool = False,
) -> HSAConfig:
    """The configuration of a model folder whose files fit it and one another; the weights are not read yet.

    Args:
        config: takes the place of a missing config.json. variant: as in transformers, a part of the names of the
            weights. reads_weights: whether those of the folder, in safetensors, are what is loaded. reports_keys:
            the caller is told of weights that are missing or unexpected.

    Raises:
        ValueError: they do not; naming the file.
    """
    if not folder.is_dir() or (config is None and not os.path.lexists(folder / _CONFIG)):
        raise ValueError(f"{folder} is no model folder: it has no {_CONFIG}")
    for file in folder.iterdir():
        if file.exists() and not file.is_file() and not file.is_dir():
            raise ValueError(f"{file} is no regular file")
        if file.suffix == ".json" and file.is_file() and file.stat().st_size > _JSON_BYTES:
            raise ValueError(f"{file} has {file.stat().st_size:,} bytes, which no file of a model has")
    found: HSAConfig = _check_config(folder) if os.path.lexists(folder / _CONFIG) else config
    files = weight_files(folder, variant) if reads_weights else []
    if reads_weights:
        _check_weights(folder, found, files, content, reports_keys)
    _check_generation(folder, found)
    _check_tokenizer(folder, found)
    _verify_checksums(folder, [file.name for file in files])
    return found


def require_finite(model: torch.nn.Module, folder: Path | str) -> None:
    """Refuse a model with a weight that is not finite; weights without memory are passed over.

    Raises:
        ValueError: naming the first.
    """
    for name, weight in model.state_dict().items():
        for tensor in _parts(weight):
            # a finite sum has finite parts, and takes one pass; an infinite one may have overflowed
            if (
                tensor.is_floating_point()
                and not tensor.is_meta
                and not (bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all()))
            ):
                raise ValueError(f"checkpoint {folder} holds weights that are not finite ({name}); get it again")


def _parts(weight: Any) -> Iterator[torch.Tensor]:
    """The plain tensors of a weight; those of torchao consist of several."""
    if isinstance(weight, torch.Tensor) and not hasattr(weight, "__tensor_flatten__"):
        yield weight
    elif hasattr(weight, "__tensor_flatten__"):
        for name in weight.__tensor_flatten__()[0]:
            yield from _parts(getattr(weight, name))


def _check_config(folder: Path) -> HSAConfig:
    file = folder / _CONFIG
    content = read_json(file)
    if content.get("model_type") != HSAConfig.model_type:
        raise ValueError(f"{folder} holds another kind of model, not {HSAConfig.model_type}")
    try:
        return HSAConfig.from_dict(content)
    except ValueError as error:
        raise ValueError(f"{file} cannot be used: {reason(error)}") from error


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of the weights, which all lie in the folder.

    Raises:
        ValueError: there are none, or the index names files elsewhere.
    """
    part = f".{variant}" if variant else ""
    whole, index = f"model{part}.safetensors", folder / f"model.safetensors.index{part}.json"
    if (folder / whole).is_file():
        return [folder / whole]
    if not os.path.lexists(index):
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        if pickles:
            raise ValueError(
                f"{folder} holds its weights as {pickles[0]} only, a pickle, which could run any program and is never "
                "opened here; if you trust it, load it once with from_pretrained(use_safetensors=False) and write it "
                f"with save_pretrained, which makes {whole}"
            )
        raise ValueError(f"{folder} is no model folder: it has no {whole}")
    table = read_json(index).get("weight_map")
    names = set(table.values()) if isinstance(table, dict) and all(map(_is_text, table.values())) else set()
    if not names:
        raise ValueError(f"{index}: weight_map must name a file for every tensor")
    for name in sorted(names):
        if not is_plain_name(name) or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {shown(name)}, which is no safetensors file of the folder")
        if not (folder / name).is_file():
            raise ValueError(f"checkpoint {folder} is incomplete: {name} is missing")
    return [folder / name for name in sorted(names)]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _check_weights(
    folder: Path, config: HSAConfig, files: list[Path], content: FolderContent, reports_keys: bool
) -> None:
    """The tensors in the files are those of a model of this configuration, by name, shape and kind."""
    stored = _stored(files)
    layers = config.num_hidden_layers + config.num_encoder_layers
    # building a model, even without memory, takes time for every layer
    if layers > max(len(stored), _MADE_UP_LAYERS if reports_keys else 0):
        raise ValueError(
            f"{folder / _CONFIG} asks for {layers:,} layers, but there are {len(stored):,} tensors of weights"
        )
    expected = _expected(folder, config, content)
    size, least = sum(file.stat().st_size for file in files), sum(math.prod(shape) for shape, _ in expected.values())
    if least > max(size / _LEAST_BYTES, _MADE_UP_WEIGHTS if reports_keys else 0):
        raise ValueError(f"{folder / _CONFIG} asks for {least:,} weights, more than {size:,} bytes can hold")
    if getattr(config, "quantization_config", None):
        # quantised weights have other names, shapes and kinds
        return
    if not any(name.startswith(_BASE) for name in stored):
        # of a model without a head
        stored = {_BASE + name: entry for name, entry in stored.items()}
    optional = set() if content.has_head and not config.tie_word_embeddings else {_HEAD}
    missing = sorted(expected.keys() - stored.keys() - optional)
    if missing and not reports_keys:
        raise ValueError(f"checkpoint {folder} lacks weights, e.g. {missing[0]}; export the model again")
    unexpected = sorted(stored.keys() - expected.keys())
    if unexpected and not (content.may_have_more or reports_keys):
        raise ValueError(
            f"checkpoint {folder} has weights that its {_CONFIG} has no place for, e.g. {unexpected[0]!a}; export the "
            "model again"
        )
    for name in expected.keys() & stored.keys():
        (shape, form), (right, is_float) = stored[name], expected[name]
        if shape != right:
            raise ValueError(f"checkpoint {folder}: {name} has the shape {shape}, its {_CONFIG} asks for {right}")
        if is_float != (form in _FLOATS):
            raise ValueError(f"checkpoint {folder}: {name} is of the kind {form}, which is no kind of weights here")


def _stored(files: list[Path]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and kind of every tensor, from the headers of the files."""
    from safetensors import safe_open

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


def _expected(folder: Path, config: HSAConfig, content: FolderContent) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Shape of every tensor of a model, and whether it is a float, without memory for any."""
    try:
        with torch.device("meta"):
            table = content.base(copy.deepcopy(config)).state_dict()
    # sizes whose product no tensor can have
    except (RuntimeError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / _CONFIG} describes no model that can be built: {reason(error)}") from error
    shapes = {_BASE + name: (tuple(part.shape), part.is_floating_point()) for name, part in table.items()}
    return {**shapes, _HEAD: ((config.vocab_size, config.hidden_size), True)}


def _check_generation(folder: Path, config: Any) -> None:
    """Values of generation_config.json are of the right kind, and its and config.json's tokens in the vocabulary."""
    content: dict[str, Any] = {}
    if os.path.lexists(folder / _GENERATION):
        content = read_json(folder / _GENERATION)
        require_modest(content, f"{folder / _GENERATION}")
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
                f"checkpoint file {folder / name} is corrupt (its SHA-256 is not that of {CHECKSUMS}); get it again, "
                f"or remove {CHECKSUMS} if you changed it yourself"
            )


def _check_tokenizer(folder: Path, config: HSAConfig) -> None:
    """The tokens of tokenizer.json are in the vocabulary; a file that cannot be read is the tokenizer's matter."""
    if not (folder / _TOKENIZER).is_file():
        return
    try:
        content = read_json(folder / _TOKENIZER)
        words = content["model"]["vocab"]
        ids = [*words.values()] if isinstance(words, dict) else [len(words) - 1]
        largest = max([*ids, *(token["id"] for token in content.get("added_tokens") or [])], default=-1)
    except (ValueError, TypeError, KeyError, AttributeError):
        return
    if is_whole(largest):
        require_tokens_below(largest, config.vocab_size, folder)
