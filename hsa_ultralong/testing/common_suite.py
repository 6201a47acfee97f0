"""Run transformers' own common tests (ModelTesterMixin, GenerationTesterMixin, ConfigTester) on the debug models.

    python -m hsa_ultralong.testing.common_suite -o DIR [--source CHECKOUT] [--fill CHECKOUT]
    python -m hsa_ultralong.testing.common_suite --table BEFORE AFTER     # Markdown of two such folders

The tests come from the source distribution of the installed transformers, fetched by pip, or from a checkout. Source
distributions of transformers 5 hold the tests of models and configurations but not those of generation; `--fill` names
a checkout, of a version nearby, that supplies what is missing. Writes DIR/MODEL.json: every test with its outcome.
Test: tests/models/test_common_suite.py, which compares the failures with tests/models/common_suite.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import transformers

CASE = Path(__file__).with_name("common_suite_case.py")  # imports from the suite, so it is never imported here
MODELS = {"dense": "DenseTest", "mixture_of_experts": "MixtureOfExpertsTest"}
# modules of the suite that a source distribution may lack, and what its other modules import from them
STUBS = {
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/utils/test_configuration_utils.py": (
        "config_common_kwargs = {'return_dict': False, 'output_hidden_states': True, 'output_attentions': True,\n"
        "    'dtype': 'float16', 'architectures': ['HSAForCausalLM'], 'id2label': {0: 'label'},\n"
        "    'label2id': {'label': '0'}, 'problem_type': 'regression'}\n"
    ),
}


def fetch_source(folder: Path) -> Path:
    """Download and unpack the source distribution of the installed transformers; its root.

    Raises:
        RuntimeError: if pip cannot fetch it.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--no-binary", ":all:", "-d", str(folder), f"transformers=={transformers.__version__}"]
    done = subprocess.run(command, capture_output=True, text=True)
    archives = sorted(folder.glob("transformers-*.tar.gz"))
    if done.returncode or not archives:
        reason = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
        raise RuntimeError(f"pip cannot fetch the source of transformers {transformers.__version__}: {reason}")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"transformers-{transformers.__version__}"


def prepare(root: Path, source: Path, fill: Path | None) -> list[str]:
    """Make root/tests an importable copy of the suite with our case in it; the modules that are stubs.

    Args:
        root: an empty folder. source: root of a transformers source tree. fill: another, for what the first lacks.
    """
    tests = root / "tests"
    shutil.copytree(source / "tests", tests, ignore=shutil.ignore_patterns("models", "fixtures", "__pycache__"))
    stubs = []
    for name, text in STUBS.items():
        place = root / name
        place.parent.mkdir(exist_ok=True)
        if place.exists():
            continue
        if fill is not None and (fill / name).exists():
            place.write_text((fill / name).read_text(encoding="utf-8"), encoding="utf-8")
        else:
            stubs.append(name)
            place.write_text(text, encoding="utf-8")
    # the common kwargs stand in a module that imports a custom model from the repository's tools
    if fill is not None and (fill / "utils").exists() and not (root / "utils").exists():
        shutil.copytree(fill / "utils", root / "utils")
    for folder in {tests, *(place.parent for place in tests.rglob("*.py"))}:
        (folder / "__init__.py").touch()
    (root / "conftest.py").write_text("", encoding="utf-8")
    # `direct_transformers_import` of the suite looks for the package above its tests
    (root / "pytest.ini").write_text("[pytest]\npython_classes = DenseTest MixtureOfExpertsTest\n", encoding="utf-8")
    shutil.copy(CASE, tests / "test_hsa_ultralong.py")
    return stubs


def run(root: Path, model: str, timeout: float = 1800.0) -> dict[str, dict[str, str]]:
    """Run the suite of one model in a process of its own.

    Returns:
        name of the case -> {"function", "outcome": "passed" | "failed" | "skipped", "message": why}.
    """
    report = root / f"{model}.xml"
    here = Path(__file__).resolve().parents[2]
    paths = [str(root), str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:timeout", "--tb=short"]
    command += [f"--junitxml={report}", f"tests/test_hsa_ultralong.py::{MODELS[model]}"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=timeout)
    if not report.exists():
        raise RuntimeError(f"the suite did not run:\n{(done.stdout + done.stderr)[-3000:]}")
    defined = {name for file in root.rglob("*.py") for name in re.findall(r"def (test_\w+)", file.read_text("utf-8"))}
    cases = ElementTree.parse(report).getroot().iter("testcase")
    return {case.get("name", ""): outcome(case, defined) for case in cases}


def outcome(case: ElementTree.Element, defined: set[str]) -> dict[str, str]:
    """Record of one testcase of a JUnit report; a case with parameters is named after its function."""
    name = case.get("name", "")
    function = max((known for known in defined if name.startswith(known)), key=len, default=name)
    for tag, word in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        found = case.find(tag)
        if found is not None:
            message = (found.get("message") or found.text or "").strip().splitlines()
            return {"function": function, "outcome": word, "message": message[0][:200] if message else ""}
    return {"function": function, "outcome": "passed", "message": ""}


def functions(results: dict[str, dict[str, str]], word: str) -> set[str]:
    """Names of the test functions of which some case has this outcome."""
    return {record["function"] for record in results.values() if record["outcome"] == word}


def summary(model: str, results: dict[str, dict[str, str]], stubs: list[str]) -> dict[str, Any]:
    counts = {word: sum(r["outcome"] == word for r in results.values()) for word in ("passed", "failed", "skipped")}
    return {
        "model": model,
        "transformers": transformers.__version__,
        "not_in_the_source": stubs,
        "cases": counts,
        "failing_functions": len(functions(results, "failed")),
        "results": results,
    }


def table(folders: list[Path]) -> str:
    """Markdown: cases by outcome, then every function that fails in one of the folders."""
    lines = []
    for model in MODELS:
        records = [json.loads((folder / f"{model}.json").read_text(encoding="utf-8")) for folder in folders]
        lines += [f"### {model}", "", "| | " + " | ".join(folder.name for folder in folders) + " |"]
        lines.append("|---" * (len(folders) + 1) + "|")
        for word in ("passed", "failed", "skipped"):
            lines.append(f"| cases {word} | " + " | ".join(str(record["cases"][word]) for record in records) + " |")
        failing = [functions(record["results"], "failed") for record in records]
        lines.append("| functions that fail | " + " | ".join(str(len(names)) for names in failing) + " |")
        for name in sorted(set().union(*failing)):
            cells = []
            for record in records:
                outcomes = [r["outcome"] for r in record["results"].values() if r["function"] == name]
                failed = outcomes.count("failed")
                cells.append(f"{failed} of {len(outcomes)} cases fail" if failed else "passes")
            lines.append(f"| {name.removeprefix('test_').replace('_', ' ')} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="folder for MODEL.json")
    parser.add_argument("--table", type=Path, nargs="+", metavar="DIR", help="print a table of such folders and stop")
    parser.add_argument("--source", type=Path, help="a transformers source tree, instead of fetching it by pip")
    parser.add_argument("--fill", type=Path, help="a transformers checkout that supplies what the source lacks")
    parser.add_argument("--model", choices=sorted(MODELS), action="append", help="default: all")
    options = parser.parse_args()
    if options.table:
        sys.stdout.write(table(options.table))
        return
    if options.output is None:
        parser.error("name a folder for the records: -o DIR")
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        source = options.source or fetch_source(Path(folder))
        root = Path(folder) / "suite"
        stubs = prepare(root, source, options.fill)
        for model in options.model or list(MODELS):
            record = summary(model, run(root, model), stubs)
            text = json.dumps(record, indent=1, sort_keys=True) + "\n"
            (options.output / f"{model}.json").write_text(text, encoding="utf-8")
            sys.stdout.write(f"{model}: {record['cases']}, {record['failing_functions']} functions fail\n")


if __name__ == "__main__":
    main()
