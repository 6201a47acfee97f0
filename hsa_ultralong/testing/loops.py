"""What the loops of kernels consist of, in machine code, for a card that is not there: instructions of a warp by kind.

    TRITON_INTERPRET=0 python -m hsa_ultralong.testing.loops --only "hsa_attention training"
        [--capability 90] [--kernel NAME]

A loop with matrix products is shown, one pass of it. Few instructions beside few products say where a kernel may gain
before a card times it; they say nothing of what waits. Compiled and recorded as in aot.py, read by nvdisasm, which
Triton brings along. tests/testing/test_loops.py.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hsa_ultralong.testing.aot import HOPPER, Launch, collect, cubin_of, tool
from hsa_ultralong.testing.cards import CARDS
from hsa_ultralong.testing.processes import HANG_SECONDS

# kind -> beginnings of the names of its instructions
KINDS = {
    "matrix": ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "IGMMA", "IMMA", "QGMMA"),
    "exp, 1/x": ("MUFU",),
    "fp32": ("FADD", "FMUL", "FFMA", "FMNMX", "FSETP", "FSEL"),
    "convert": ("F2FP", "F2F", "I2F", "F2I", "I2FP"),
    "shuffle": ("SHFL",),
    "shared": ("LDS", "STS", "LDSM", "STSM"),
    "spilled": ("LDL", "STL"),
    "global": ("LDG", "STG", "LDGSTS", "UBLKCP", "UTMALDG", "RED", "ATOM"),
}
_INSTRUCTION = re.compile(
    r"^/\*[0-9a-f]+\*/\s+(?:@!?U?P(?:\d|T)\s+)?(\S+?)(?:\.\S*)?\s.*;|^/\*[0-9a-f]+\*/\s+(\w+)\s*;"
)
_LABEL = re.compile(r"^(\.L_\w+):")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")


def loops(text: str) -> list[Counter[str]]:
    """Instructions by kind ("other" for the rest) of every loop with matrix products, outer ones with what they hold.

    Args:
        text: what `nvdisasm -c` prints.
    """
    labels: dict[str, int] = {}
    names: list[str] = []
    found: list[tuple[int, int]] = []
    for line in (one.strip() for one in text.split("\n")):
        if label := _LABEL.match(line):
            labels[label[1]] = len(names)
        elif instruction := _INSTRUCTION.match(line):
            names.append(instruction[1])
            branch = _BRANCH.search(line)
            if branch and branch[1] in labels:
                found.append((labels[branch[1]], len(names)))
    counted = [Counter(map(_kind, names[first:stop])) for first, stop in found]
    return [one for one in counted if one["matrix"]]


def _kind(name: str) -> str:
    return next((kind for kind, names in KINDS.items() if name in names), "other")


def loops_of(launch: Launch) -> list[Counter[str]]:
    """Compile a recorded launch for its card and read its loops."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin_of(launch))
        command = [str(tool("nvdisasm")), "-c", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANG_SECONDS).stdout
    return loops(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hsa_ultralong.testing.loops", description="Loops of kernels")
    parser.add_argument("--only", default="hsa_attention training", help="cases of aot.py whose name contains this")
    parser.add_argument("--kernel", default="", help="kernels whose name contains this")
    parser.add_argument("--capability", type=int, choices=[*CARDS], default=HOPPER.capability)
    options = parser.parse_args(arguments)
    from hsa_ultralong.testing.aot_cases import operator_cases

    chosen = [case for case in operator_cases() if options.only in case[0]]
    if not chosen:
        parser.error(f"no case has {options.only!r} in its name: {', '.join(name for name, _ in operator_cases())}")
    launches, failures, _ = collect(chosen, CARDS[options.capability])
    columns = [*KINDS, "other"]
    sys.stdout.write(f"{'kernel':<32}{'all':>7}" + "".join(f"{name:>10}" for name in columns) + "  constexprs\n")
    for launch in (launch for launch in launches if options.kernel in launch.name):
        for one in loops_of(launch):
            values = "".join(f"{one[name]:>10,}" for name in columns)
            sys.stdout.write(f"{launch.name:<32}{one.total():>7,}{values}  {launch.describe()}\n")
    for failure in failures:
        sys.stdout.write(f"FAILED: {failure}\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
