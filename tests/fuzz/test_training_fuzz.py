"""Spoiled runs, shards, builds and models through the commands that read them: they work, or one line says why."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from typer.testing import CliRunner

from hsa_ultralong.cli import train
from hsa_ultralong.cli.main import app
from hsa_ultralong.data import TokenShards, build, load_tokenizer
from hsa_ultralong.files.checksum import file_digest, file_record
from hsa_ultralong.files.strict_json import sealed
from hsa_ultralong.models import HSAConfig, HSAForCausalLM, HSAModel
from tests.fuzz.harness import Target, faults_of, make_outside, seeds_of
from tests.fuzz.mutators import Mutation, other_bytes, other_json, other_kind, swapped

WORDS = [a + b + c for a in ("ba", "ce", "di", "fo") for b in ("lo", "mu", "na", "pe", "ro") for c in ("nd", "rs")]
SHORT = ["--device", "cpu", "--set", "warmup.mixture={'text': 1.0}", "--set", "long.mixture={'text': 1.0}", "--set",
         "probe_every=100000", "--set", "probe_rows=1", "--set", "warmup.tokens=1536", "--set", "tensorboard=false",
         "--set", "checkpoint_minutes=0.0", "--until", "warmup"]  # fmt: skip


def hsa(*arguments: object) -> None:
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `shards`, `run` (of three steps, two checkpoints), `model` and `build`."""
    room = tmp_path_factory.mktemp("made")
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=400)) for _ in range(3)]
    (room / "corpus.txt").write_text("\n\x1e\n".join(texts), encoding="utf-8")
    hsa("data", room / "corpus.txt", "-o", room / "shards", "--vocab-size", "300", "--validation-fraction", "0")
    hsa("train", "debug", "--data", room / "shards", "-o", room / "run", *SHORT, "--export", room / "model")
    interrupted_build(room)
    return room


def interrupted_build(room: Path) -> None:
    """Folder `build`, in which `hsa data` was stopped after a checkpoint."""
    batches = iter(range(3))

    def stop(*_: int) -> None:
        if next(batches) == 1:
            raise KeyboardInterrupt

    with patch.object(build, "_BATCH_CHARACTERS", 1500), suppress(KeyboardInterrupt):
        build.build_shards(
            room / "corpus.txt",
            load_tokenizer(room / "shards" / "tokenizer"),
            room / "build" / "shards",
            validation_fraction=0.0,
            progress=stop,
            checkpoint_seconds=0,
        )


def opened(data: bytes) -> Any:
    content = json.loads(data)
    content.pop("sha256", None)
    return content


def put_sealed(_: bytes, text: str) -> bytes:
    try:
        return sealed(json.loads(text), None)
    except (ValueError, RecursionError, TypeError, AttributeError):
        return text.encode("utf-8", "surrogatepass")


def seal_checkpoint(folder: Path, file: Path) -> None:
    """state.json of a checkpoint after one of its files changed."""
    state = file.parent / "state.json"
    if file.suffix != ".safetensors" or not state.is_file():
        return
    with suppress(ValueError):
        content = opened(state.read_bytes())
        content["files"][file.name] = file_record(file)
        state.write_bytes(sealed(content))


def seal_shards(folder: Path, file: Path) -> None:
    """The manifest after a file changed."""
    if file.name in ("tokens.bin", "documents.npy", "words.txt"):
        with suppress(ValueError):
            content = opened((folder / "manifest.json").read_bytes())
            content["files"][file.name] = file_record(file)
            (folder / "manifest.json").write_bytes(sealed(content))


def seal_model(folder: Path, file: Path) -> None:
    """checksums.json after a file changed."""
    if file.name != "checksums.json":
        with suppress(ValueError):
            table = json.loads((folder / "checksums.json").read_bytes())
            (folder / "checksums.json").write_text(json.dumps({**table, file.name: file_digest(file)}))


def header_of(data: bytes) -> Any:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def with_header(data: bytes, text: str) -> bytes:
    header = text.encode("utf-8", "surrogatepass")
    return len(header).to_bytes(8, "little") + header + data[8 + int.from_bytes(data[:8], "little") :]


def line_of(data: bytes) -> Any:
    return json.loads(data.splitlines()[0])


def with_line(data: bytes, text: str) -> bytes:
    return b"\n".join([text.encode("utf-8", "surrogatepass"), *data.splitlines()[1:]]) + b"\n"


STATE, TENSORS, SETTINGS, LOG = "checkpoints/*/state.json", "checkpoints/*/*.safetensors", "config.json", "log.jsonl"
MUTATIONS: dict[str, tuple[Mutation, ...]] = {
    "run": (
        *4 * (other_json(STATE, take=opened, put=put_sealed),),
        other_json(STATE),
        *2 * (other_json(TENSORS, seal=seal_checkpoint, take=header_of, put=with_header),),
        other_json(SETTINGS),
        other_json(LOG, take=line_of, put=with_line),
        other_bytes(STATE),
        *2 * (other_bytes(TENSORS, seal=seal_checkpoint),),
        other_bytes(SETTINGS, LOG),
        swapped(STATE, TENSORS, SETTINGS, LOG, seal=seal_checkpoint),
        *2
        * (
            other_kind(
                STATE, TENSORS, SETTINGS, LOG, "checkpoints", "checkpoints/*", "train.lock", "summary.json", "loss.png",
                "log.jsonl.tmp", "config.json.tmp", "summary.json.tmp",
                "checkpoints/.partial-step-00000003",
            ),
        ),
    ),
    "shards": (
        *4 * (other_json("manifest.json", take=opened, put=put_sealed),),
        other_json("manifest.json"),
        other_json(".verified.json"),
        other_json("tokenizer/*.json"),
        other_bytes("manifest.json"),
        *3 * (other_bytes("*.bin", "*.npy", "words.txt", seal=seal_shards),),
        other_bytes(".verified.json", "tokenizer/*.json"),
        swapped("*", "tokenizer/*", seal=seal_shards),
        *2 * (other_kind("*", ".verified.json", ".verified.json.tmp", "tokenizer/*", "run"),),
    ),
    "build": (
        *4 * (other_json(".shards.partial/state.json", take=opened, put=put_sealed),),
        other_json(".shards.partial/state.json"),
        other_json(".shards.partial/tokenizer/*.json"),
        *3 * (other_bytes(".shards.partial/*"),),
        swapped(".shards.partial/*"),
        *2
        * (
            other_kind(
                ".shards.partial", ".shards.partial/*", ".shards.partial/lock", ".shards.partial/tokenizer/*",
                ".shards.partial/state.json.tmp", ".shards.partial/manifest.json", ".shards.partial/words.txt",
                ".shards.partial/documents.npy",
            ),
        ),
    ),
    "model": (
        *4 * (other_json("config.json", seal=seal_model),),
        *2 * (other_json("generation_config.json", "tokenizer_config.json", seal=seal_model),),
        other_json("checksums.json"),
        other_json("tokenizer.json", seal=seal_model),
        *2 * (other_json("*.safetensors", seal=seal_model, take=header_of, put=with_header),),
        *2 * (other_bytes("*.safetensors", seal=seal_model),),
        other_bytes("*.json", seal=seal_model),
        swapped("*", seal=seal_model),
        *2 * (other_kind("*", "model.safetensors.index.json", "pytorch_model.bin", "adapter_config.json"),),
    ),
}  # fmt: skip


def commands(kind: str, made: Path) -> Callable[[Path, random.Random], list[list[str]]]:
    def all_of_them(folder: Path, rng: random.Random) -> list[list[str]]:
        path = str(folder)
        if kind == "run":
            # the first command goes on for a step, the second to the end
            train = [
                "train",
                "debug",
                "--data",
                str(made / "shards"),
                "-o",
                path,
                *SHORT,
                "--set",
                "warmup.tokens=2048",
            ]
            return [[*train, "--max-minutes", "0"], train, ["plot", path]]
        if kind == "build":
            return [["data", str(made / "corpus.txt"), "-o", f"{path}/shards", "--validation-fraction", "0"]]
        if kind == "shards":
            return [["train", "debug", "--data", path, "-o", f"{path}/run", *SHORT, "--max-minutes", "0"]]
        generate = ["generate", "balond cemurs", "--model", path, "--max-new-tokens", "2", "--device", "cpu"]
        return [generate, ["average", path, path, "-o", f"{path}/mean"]]

    return all_of_them


def calls(kind: str) -> Callable[[Path], dict[str, Callable[[], object]]]:
    """What people write in Python with such a folder."""
    if kind == "model":
        return lambda folder: {
            "HSAConfig.from_pretrained(folder)": lambda: HSAConfig.from_pretrained(folder),
            "HSAForCausalLM.from_pretrained(folder)": lambda: HSAForCausalLM.from_pretrained(folder),
            "HSAModel.from_pretrained(folder)": lambda: HSAModel.from_pretrained(folder),
            "load_tokenizer(folder)": lambda: load_tokenizer(folder),
        }
    if kind == "shards":
        return lambda folder: {"TokenShards.open(folder)": lambda: TokenShards.open(folder).data[:].sum()}
    return lambda folder: {}


@pytest.fixture
def room() -> Iterator[Path]:
    """A folder in RAM where there is one: nothing here is about disks."""
    root = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=root) as name:
        yield Path(name)


@pytest.fixture
def curves_of_runs_unpainted(unpainted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hsa train` makes its figure without painting it; `hsa plot` paints the same one."""
    draw = train._draw

    def draw_unpainted(run: Path) -> None:
        with unpainted():
            draw(run)

    monkeypatch.setattr(train, "_draw", draw_unpainted)


def fuzz(kind: str, made: Path, room: Path, seeds: list[int]) -> None:
    pristine, work = room / "made" / kind, room / "work"
    for folder in (pristine.parent, work):
        folder.mkdir()
    shutil.copytree(made / kind, pristine)
    target = Target(f"training {kind}", lambda folder: None, MUTATIONS[kind], commands(kind, made), calls=calls(kind))
    outside = make_outside(room / "outside", pristine)
    faults = [fault for seed in seeds for fault in faults_of(target, pristine, outside, work, seed)]
    assert not faults, f"{len(faults)} faults\n" + "\n\n".join(faults[:5])


@pytest.mark.usefixtures("curves_of_runs_unpainted")
@pytest.mark.parametrize("kind", MUTATIONS)
def test_no_spoiled_run_shards_or_model_ends_in_a_traceback_or_harms_another_file(kind, made, room):
    fuzz(kind, made, room, seeds_of(0, 1, 15))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", MUTATIONS)
@pytest.mark.parametrize("block", range(5))
def test_none_of_two_thousand_spoiled_ones_does(kind, block, made, room):
    fuzz(kind, made, room, seeds_of(block, 5, 500))
