"""Time to the first token of processes that have just started: what a user of `hsa ask` waits for.

A process of its own writes a memory; then, for every way of asking, two processes answer from it one after the other.
The first finds empty caches of compiled kernels (Triton's and inductor's, in a folder of their own), the second those
that the first has left. The clock starts when the weights are on the device and what runs beside their loading is over;
kernels are counted from the start. Called by `hsa bench first`;
tests/bench/test_first_token.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROCESSES = ("first", "second")
# what a process says, in the order of its life
METRICS = (
    "loaded_s", "beside_s", "warmup_s", "open_s", "first_token_s", "second_token_s", "answer_s", "kernels_compiled",
    "kernels_from_cache", "compile_s",
)  # fmt: skip
_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class FirstTokenSettings:
    """A model folder, where and in what it computes ("cuda", "bfloat16"), and what is asked; see `hsa bench first`."""

    model: str
    device: str
    dtype: str
    store: str = "file"
    tokens: int = 65_536
    prompt_tokens: int = 16
    new_tokens: int = 24
    seed: int = 0
    is_warm: bool = False


class _Compilations:
    """Counts what Triton compiles and what it finds in its cache, and the seconds of both."""

    def __init__(self) -> None:
        self.compiled = self.from_cache = 0
        self.seconds = 0.0

    def listen(self) -> None:
        try:
            from triton import knobs
        except ImportError:
            return
        knobs.compilation.listener = self

    def __call__(self, *, times: Any, cache_hit: bool, **_: Any) -> None:
        self.from_cache += cache_hit
        self.compiled += not cache_hit
        self.seconds += times.total / 1e6


def measure_first_tokens(
    settings: FirstTokenSettings, folder: Path, ways: tuple[bool, ...] = (False, True)
) -> Iterator[dict[str, Any]]:
    """One dict of METRICS, with "process" and "warm", of every process; `folder` is empty and takes memory and caches.

    Raises:
        RuntimeError: a process failed; its last line of errors.
    """
    memory = folder / "memory.hsa"
    _run(settings, memory, folder / "caches-memorize", "write")
    for is_warm in ways:
        caches = folder / ("caches-warm" if is_warm else "caches")
        for process in PROCESSES:
            asked = FirstTokenSettings(**{**asdict(settings), "is_warm": is_warm})
            yield {"process": process, "warm": is_warm, **_run(asked, memory, caches, "ask")}


def _run(settings: FirstTokenSettings, memory: Path, caches: Path, task: str) -> dict[str, Any]:
    """What a new process prints last."""
    places = {"TRITON_CACHE_DIR": str(caches / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor")}
    work = {"task": task, "memory": str(memory), "began": time.time(), **asdict(settings)}
    command = [sys.executable, "-m", "hsa_ultralong.bench.first_token", json.dumps(work)]
    found = subprocess.run(command, env={**os.environ, **places}, capture_output=True, text=True, timeout=_TIMEOUT_S)
    if found.returncode != 0:
        last = (found.stderr.strip() or found.stdout.strip() or f"exit code {found.returncode}").splitlines()[-1]
        raise RuntimeError(f"a process that should {task} failed: {last}")
    return dict(json.loads(found.stdout.splitlines()[-1]))


def _random_tokens(model: Any, count: int, seed: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (count,), generator=generator)


def write_memory(model: Any, path: Path, settings: FirstTokenSettings) -> None:
    """A memory of random tokens at `path`."""
    from hsa_ultralong.inference import memorize

    memorize(model, _random_tokens(model, settings.tokens, settings.seed)).save(path)


def answer_once(
    model: Any, path: Path, settings: FirstTokenSettings, now: Callable[[], float], counts: _Compilations
) -> dict[str, Any]:
    """Ask once as `hsa ask -m` does, after warming up where that is wanted; METRICS but loaded_s and beside_s."""
    from hsa_ultralong.inference.engine import DecodingEngine
    from hsa_ultralong.inference.warming import small_memories
    from hsa_ultralong.memory import MemoryFile
    from hsa_ultralong.memory.files.reader import require_fingerprint
    from hsa_ultralong.memory.opening import open_memory
    from hsa_ultralong.models.fingerprint import memory_fingerprint

    ids = _random_tokens(model, settings.prompt_tokens, settings.seed + 1)

    def ask(memory: Any) -> list[float]:
        """When each token was there."""
        engine = DecodingEngine(model, memory, max_tokens=len(ids) + settings.new_tokens)
        return [now() for _ in engine.stream([ids], settings.new_tokens)]

    begin = now()
    if settings.is_warm:
        for memory in small_memories(model):
            ask(memory)
    warmed = now()
    file = MemoryFile.open_unverified(path)
    require_fingerprint(file.path, file.spec, memory_fingerprint(model))
    weight = model.model.embed_tokens.weight
    memory = open_memory(file, store=settings.store, device=weight.device, dtype=weight.dtype)
    opened = now()
    times = ask(memory)
    return {
        "warmup_s": warmed - begin, "open_s": opened - warmed, "first_token_s": times[0] - warmed,
        "second_token_s": times[min(1, len(times) - 1)] - warmed, "answer_s": times[-1] - warmed,
        "kernels_compiled": counts.compiled, "kernels_from_cache": counts.from_cache, "compile_s": counts.seconds,
    }  # fmt: skip


def main(text: str) -> int:
    """A process: `text` is the JSON of _run; prints the metrics as its last line."""
    work = json.loads(text)
    task, path, began = work.pop("task"), Path(work.pop("memory")), work.pop("began")
    settings = FirstTokenSettings(**work)
    import torch

    from hsa_ultralong.inference import beside
    from hsa_ultralong.inference.rehearsal import prepare_kernels
    from hsa_ultralong.models import HSAForCausalLM

    device = torch.device(settings.device)
    counts = _Compilations()
    counts.listen()
    prepare_kernels(device, None if task == "write" else Path(settings.model), getattr(torch, settings.dtype))
    model = HSAForCausalLM.from_pretrained(settings.model, dtype=getattr(torch, settings.dtype), local_files_only=True)
    # as load_model of the command line does
    waiting = time.perf_counter()
    beside.wait()
    waited = time.perf_counter() - waiting
    model = model.to(device).eval()

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    now()
    loaded = time.time() - began
    found: dict[str, Any] = {"loaded_s": loaded, "beside_s": waited}
    if task == "write":
        write_memory(model, path, settings)
    else:
        found |= answer_once(model, path, settings, now, counts)
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
