"""What every measured number carries: command, commit, date, hardware, versions, seed (docs/results.md)."""

from __future__ import annotations

import datetime
import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hsa_ultralong.files.durable import write_whole
from hsa_ultralong.files.strict_json import as_lines


def hardware() -> str:
    """The GPU's name, or the processor with its number of usable cores."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return torch.cuda.get_device_name() + (f" x{count}" if count > 1 else "")
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def commit() -> str:
    """Commit of the checkout that holds this package, with "+changes" if it is not clean; "unknown" outside one.
    The variable HSA_COMMIT names it for a copy that came without its history."""
    if os.environ.get("HSA_COMMIT"):
        return os.environ["HSA_COMMIT"]
    folder = Path(__file__).resolve().parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    if head.returncode != 0:
        return "unknown"
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def peak_host_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def command_line() -> str:
    """The `hsa` command of this process."""
    return "hsa " + " ".join(sys.argv[1:])


def run_metadata(command: str, seed: int, **more: Any) -> dict[str, Any]:
    """The `meta` part of a results file."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "none"
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {
        "command": command,
        "commit": commit(),
        "date": date,
        "hardware": hardware(),
        "versions": versions,
        "seed": seed,
        **more,
    }


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all, a record a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, as_lines(value))
