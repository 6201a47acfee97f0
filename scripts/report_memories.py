"""What a memory costs by its length, for a figure of docs/report.md: reading, a step of decoding, a question.

Called by report_figures.py; tests/test_report.py.
"""

from __future__ import annotations

from pathlib import Path

from hsa_ultralong.files.strict_json import read_json

QUESTION_TOKENS = 32
# curve -> its preset and files; of a length twice the first counts
_CURVES = {
    "nano, H200": ("nano", ("benchmarks/results/memory-h200.json",)),
    "small_345m, H200": ("small_345m", ("benchmarks/results/memory-h200.json",)),
    "nano, 2 CPU cores": ("nano", ("benchmarks/results/memory-cpu2.json",)),
}
_SPEEDS = ("read_s", "read_tokens_per_s", "decode_ms")
Values = dict[str, dict[int, float]]


def memory_speed(root: Path) -> dict[str, Values]:
    """Metric -> curve -> its values by tokens of the memory, one sequence, the whole memory on one device.

    `read_s`, `read_tokens_per_s`, `decode_ms`, `question_s` (QUESTION_TOKENS steps) and `anew_s` (reading before them).
    """
    found: dict[str, Values] = {}
    for name, (preset, files) in _CURVES.items():
        own: Values = {}
        for path in (root / file for file in files):
            for record in read_json(path)["records"] if path.is_file() else []:
                is_plain = record.get("batch") == 1 and record["dtype"] in ("bf16", "fp32")
                is_whole = record["store"] in ("device", "device, tuned")
                if is_plain and is_whole and record["preset"] == preset and record["metric"] in _SPEEDS:
                    own.setdefault(record["metric"], {}).setdefault(record["tokens"], record["value"])
        if "decode_ms" in own:
            own["question_s"] = {length: QUESTION_TOKENS * ms / 1000 for length, ms in own["decode_ms"].items()}
            read = own.get("read_s", {})
            own["anew_s"] = {
                length: read[length] + seconds for length, seconds in own["question_s"].items() if length in read
            }
        for metric, values in own.items():
            if values:
                found.setdefault(metric, {})[name] = values
    return found
