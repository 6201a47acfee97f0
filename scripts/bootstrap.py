"""Install the library into a virtual environment, torch first: called by the Makefile, standard library only.

Torch comes first because a plain install on Linux fetches several GB of CUDA libraries, GPU or not. A torch that is
already in the environment and in range is kept, so a special build can be installed there by hand beforehand.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TORCH_RANGE = "torch>=2.11,<2.14"
TORCH_CPU = "torch==2.13.0"


def succeeds(*command: str) -> bool:
    """Return whether the command exists and exits with 0; its output is dropped."""
    try:
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def pip(python: str, *arguments: str) -> None:
    """Run pip in the environment, with progress bars in a terminal only; stop with one line if it fails."""
    flags = [] if sys.stdout.isatty() else ["--quiet"]
    if arguments[0] == "install":
        # torch and transformers have thousands of modules of which few are imported: see compile_imports
        flags.append("--no-compile")
    # setuptools warns about every editable install of a package that lies beside its pyproject.toml.
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONWARNINGS": "ignore"}
    if subprocess.run([python, "-m", "pip", *arguments, *flags], env=environment).returncode:
        sys.exit(f"pip {' '.join(arguments)} failed; the lines above say why")


def torch_version(python: str) -> str | None:
    """Return the installed torch version, such as 2.13.0+cpu, or None; torch is not imported."""
    code = "import importlib.metadata as m; print(m.version('torch'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def is_in_range(version: str) -> bool:
    major, minor = (int(part) for part in version.split(".")[:2])
    return (2, 11) <= (major, minor) < (2, 14)


def pip_offers_cpu_build(python: str) -> bool:
    """Return whether pip, as configured here, would install a `+cpu` build for TORCH_CPU."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        flags = ["--dry-run", "--no-deps", "--ignore-installed", "--quiet", "--report", str(report)]
        if not succeeds(python, "-m", "pip", "install", *flags, TORCH_CPU):
            return False
        plan = json.loads(report.read_text(encoding="utf-8"))
    return any(item["metadata"]["version"].endswith("+cpu") for item in plan["install"])


def install_torch(python: str, index: str) -> str:
    """Install a torch that fits this machine and return its version."""
    present = torch_version(python)
    if present and is_in_range(present):
        print(f"torch {present} is already there and is kept", flush=True)
        return present
    if sys.platform == "darwin":
        print("torch: the build for macOS", flush=True)
        pip(python, "install", TORCH_RANGE)
    elif succeeds("nvidia-smi"):
        print("torch: the CUDA build, since nvidia-smi finds a GPU (several GB)", flush=True)
        pip(python, "install", TORCH_RANGE)
    elif pip_offers_cpu_build(python):
        print("torch: the CPU build that pip offers", flush=True)
        pip(python, "install", TORCH_CPU)
    else:
        print(f"torch: the CPU build from {index}", flush=True)
        pip(python, "install", "--index-url", index, TORCH_RANGE)
    version = torch_version(python)
    assert version is not None, "pip installed torch, yet the environment does not list it"
    return version


# modules that the library's functions import when they run, beside those at the head of its files
IMPORTED_LATE = (
    "torch.distributed.tensor",
    "torch.utils.data",
    "transformers.generation",
    "transformers.trainer",
    "matplotlib.pyplot",
    "tokenizers",
    "peft",
    "accelerate",
    "triton.language",
    "uvicorn",
    "openai",
    "tensorboard",
    "pytest",
    "xdist",
    "hypothesis",
)
IMPORT_ALL = """
import importlib, pkgutil, sys, hsa_ultralong
found = [module.name for module in pkgutil.walk_packages(hsa_ultralong.__path__, "hsa_ultralong.")]
for name in (*found, *sys.argv[1:]):
    if name.endswith("__main__"):
        continue
    try:
        importlib.import_module(name)
    except ImportError:
        pass
"""


def compile_imports(python: str) -> None:
    """Import everything once, so that bytecode is there also for processes that may not write it.

    Such a process, as PYTHONDONTWRITEBYTECODE makes it, compiled for 8 s each time that it imported torch.
    """
    print("compiling what is imported", flush=True)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([python, "-c", IMPORT_ALL, *IMPORTED_LATE], env=environment, stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit("the library was installed and cannot be imported; the lines above say why")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, required=True, help="environment to create or update")
    parser.add_argument("--torch-index", required=True, help="package index for CPU builds of torch")
    parser.add_argument("--extras", default="", help="extras of pyproject.toml, such as dev or dev,kernels")
    options = parser.parse_args()

    python = str(options.venv / "bin" / "python")
    if not succeeds(python, "-m", "pip", "--version"):
        print(f"creating {options.venv}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(options.venv)], check=True)
        # Older versions of pip download a whole wheel to find out its version.
        pip(python, "install", "--upgrade", "pip>=24")
    version = install_torch(python, options.torch_index)

    target = f".[{options.extras}]" if options.extras else "."
    print(f"installing the library, {target}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        constraint = Path(folder) / "torch.txt"
        # `torch==2.13.0` accepts an installed 2.13.0+cpu; a constraint with the suffix would ask the index for it.
        constraint.write_text(f"torch=={version.split('+')[0]}\n", encoding="utf-8")
        pip(python, "install", "--constraint", str(constraint), "--editable", target)
    compile_imports(python)


if __name__ == "__main__":
    main()
