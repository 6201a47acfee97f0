"""What several commands share: finding and loading a checkpoint, choosing device and dtype."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Annotated, Any

import typer

MAX_PROMPT_TOKENS = 4096
_COLLECTING = gc.get_threshold()

Encoding = Annotated[
    str, typer.Option(help="Of text that is not UTF-8 and has no byte order mark: cp1252, shift_jis, utf-16-le ...")
]
TextField = Annotated[
    str, typer.Option("--text-field", "--field", help="Field or column of tables that holds the text.")
]


def collect_rarely() -> None:
    """Look for garbage rarely until `collect_as_usual`: importing torch and transformers makes 400,000 objects and no
    garbage, and looking for it a thousand times takes a sixth of the start of a command."""
    gc.set_threshold(50_000, 20, 20)


def collect_as_usual() -> None:
    """Look for garbage as Python does, before any work that takes long."""
    gc.set_threshold(*_COLLECTING)


def wait_asleep() -> None:
    """Threads of torch that wait for one another sleep; call it before torch is imported.

    By default they spin: where other programs use the cores too, a step of many small operations then takes up to
    twenty times as long (docs/log.md, 2026-11-28). An OMP_WAIT_POLICY that is set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def choose_device(name: str) -> str:
    """ "auto" prefers a GPU; an unusable choice is refused."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or auto, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no usable CUDA device; use --device cpu")
    return name


def choose_dtype(name: str, device: str) -> Any:
    """ "auto" is bf16 where the hardware multiplies it fast, fp32 elsewhere."""
    import torch

    if name == "auto":
        fast = device == "cuda" or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    known = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if name not in known:
        raise ValueError(f"--dtype must be bf16, fp32 or auto, got {name!r}")
    return known[name]


def bench_results(
    output: Path, suite: str, hardware_name: str | None, device: str, seed: int
) -> tuple[Path, dict[str, Any]]:
    """Where `hsa bench` writes, SUITE-HARDWARE.json (h200, cpu2), and the meta of this run."""
    import os

    from hsa_ultralong.bench.ops_report import short_hardware
    from hsa_ultralong.eval.metadata import command_line, hardware, run_metadata

    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = hardware_name or (short_hardware(hardware()) if device == "cuda" else f"cpu{count}")
    return output / f"{suite}-{name}.json", run_metadata(command_line(), seed, hardware_name=name, device=device)


def load_model(
    folder: Path | None, device: str = "auto", dtype: str = "auto", *, answers: bool = False
) -> tuple[Any, Any]:
    """Model in eval mode and tokenizer of a checkpoint folder, all of whose files are checked first.

    Args:
        folder: or the name of one, see `model_folder`; None: the shipped model.
        answers: it is loaded for an answer that someone waits for; on a GPU a small model answers beside the loading.

    Raises:
        ValueError: if the folder is no checkpoint, is damaged, or its files do not fit one another.
    """
    from hsa_ultralong import default_checkpoint
    from hsa_ultralong.data import load_tokenizer

    place, folder = choose_device(device), default_checkpoint() if folder is None else model_folder(folder)
    require_model_folder(folder)
    if place == "cuda":
        from hsa_ultralong.inference.rehearsal import prepare_kernels

        prepare_kernels(place, folder if answers else None, choose_dtype(dtype, place))
    model = load_checkpoint(folder, choose_dtype(dtype, place))
    if place == "cuda" and answers:
        from hsa_ultralong.inference import beside

        # its kernels and its room on the card are free then
        beside.wait()
    return model.to(place), load_tokenizer(folder)


def model_folder(named: Path) -> Path:
    """The folder itself; for a bare name that is none, models/NAME, or checkpoints/NAME, of the current folder.

    Raises:
        ValueError: a bare name, and there is no such folder.
    """
    import os

    if len(named.parts) != 1 or named.name in (".", "..") or os.path.lexists(named):
        return named
    for place in (Path("models") / named, Path("checkpoints") / named):
        if (place / "config.json").is_file():
            return place
    advice = "; `make smol` makes it" if named.name == "smol" else ""
    raise ValueError(
        f"{named} is no model folder: there is neither {named}, nor models/{named}, nor checkpoints/{named} with a "
        f"config.json{advice}"
    )


def load_checkpoint(folder: Path, dtype: Any) -> Any:
    """Model on the CPU in eval mode, of a folder with or without a tokenizer; errors as in `load_model`."""
    from hsa_ultralong.models import HSAForCausalLM

    require_model_folder(folder)
    quiet_transformers()
    model = HSAForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    collect_as_usual()
    return model


def quiet_transformers() -> None:
    """No bars and warnings of transformers: commands have their own, and refuse in one line what it would warn of."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_preset_or_model(
    preset_name: str | None, folder: Path | None, device: str, dtype: str, seed: int
) -> tuple[Any, str]:
    """A preset with random weights, or a trained model, and its name in the records."""
    import torch

    if preset_name is None:
        return load_model(folder, device, dtype)[0], "nano" if folder is None else folder.name
    from hsa_ultralong.models import HSAForCausalLM
    from hsa_ultralong.models.presets import preset

    collect_as_usual()
    torch.manual_seed(seed)
    return HSAForCausalLM(preset(preset_name)).to(device, choose_dtype(dtype, device)).eval(), preset_name


def require_model_folder(folder: Path) -> None:
    """Refuse what `from_pretrained` would look for elsewhere: a name of a hub, an adapter.

    Raises:
        ValueError: it is no folder of a whole model.
    """
    import os

    if os.path.lexists(folder / "adapter_config.json"):
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json), which commands do not load: merge it into its model "
            "(merge_and_unload of peft, then save_pretrained)"
        )
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} is no model folder: it has no config.json")


def read_named(paths: list[Path], text_field: str = "text", encoding: str = "auto") -> list[tuple[str, str]]:
    """Names and texts of all documents of files, folders or standard input, for commands that hold them in memory.

    Raises:
        ValueError: what cannot be read.
    """
    from hsa_ultralong.data import Spool, read_sources, source_files

    if not paths:
        return []
    with Spool() as spool:
        files = source_files(paths, spool=spool, field=text_field, encoding=encoding)
        return [(one.name, one.text) for file in files for one in read_sources(file, text_field=text_field)]


def encode_prompt(tokenizer: Any, prompt: Any) -> list[int]:
    """Token ids of a prompt (a text or messages).

    Raises:
        ValueError: if it is empty or longer than MAX_PROMPT_TOKENS.
    """
    from hsa_ultralong.inference.prompts import prompt_ids

    tokens = prompt_ids(tokenizer, prompt)
    if len(tokens) > MAX_PROMPT_TOKENS:
        raise ValueError(
            f"the prompt has {len(tokens)} tokens, at most {MAX_PROMPT_TOKENS} are allowed; "
            "memorise long text with --text FILE"
        )
    return tokens


def haystack(
    tokenizer: Any, text: list[Path] | None, text_field: str, encoding: str, shards: Path | None, longest: int
) -> Any:
    """(n,) int32 token ids, no more than are wanted; of shards the first ones, training documents too."""
    import torch

    if text and shards:
        raise ValueError("give --text or --shards, not both")
    if not text and (text_field, encoding) != ("text", "auto"):
        raise ValueError("--text-field and --encoding go with --text FILE")
    if shards is not None:
        from hsa_ultralong.data import TokenShards

        opened = TokenShards.open(shards, tokenizer)
        return torch.from_numpy(opened.data[:longest].astype("int32"))
    if text:
        from hsa_ultralong.cli.common import read_named

        contents = "\n".join(part for _, part in read_named(text, text_field, encoding))
    else:
        from hsa_ultralong.eval.haystack import opticks

        contents = opticks()
    # no token is shorter than a character
    return torch.tensor(tokenizer(contents[: 16 * longest])["input_ids"][:longest], dtype=torch.int32)


def held_out(tokenizer: Any, shards: Path, *, is_needed: bool) -> Any:
    """(n,) int32 token ids of the validation documents of shards, nothing between them.

    Raises:
        ValueError: without any, if they are needed.
    """
    import torch

    from hsa_ultralong.data import TokenShards
    from hsa_ultralong.eval.tasks.material import without_special

    opened = TokenShards.open(shards, tokenizer)
    parts = [torch.from_numpy(opened.tokens(int(i)).astype("int32")) for i in opened.documents("validation")]
    if is_needed and not parts:
        raise ValueError(
            f"{shards} holds no validation document, and ppl of trained text says nothing; give --text FILE"
        )
    return without_special(torch.cat(parts), tokenizer) if parts else torch.empty(0, dtype=torch.int32)
