"""The rules of docs/architecture.md and CONTRIBUTING.md that a program can check."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from hsa_ultralong.testing.processes import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "hsa_ultralong"
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))

# What each part of the package may import from the others. Itself is always allowed.
ALLOWED: dict[str, set[str]] = {
    "ops": set(),
    "nn": {"ops"},
    "models": {"memory", "nn", "ops", "files"},
    "files": set(),
    "memory": {"nn", "ops", "files"},
    "inference": {"models", "memory", "nn", "ops", "distributed", "files"},
    "baselines": {"models", "nn", "ops"},
    "data": {"files"},
    "distributed": {"ops"},
    "train": {"models", "baselines", "data", "distributed", "nn", "ops", "files"},
    "eval": {"inference", "memory", "models", "data", "files"},
    "bench": {"eval", "inference", "memory", "models", "baselines", "files"},
    "recipes": {"train", "eval", "models", "data"},
    "testing": {"ops", "nn", "memory", "models", "baselines"},
}
ANYTHING_BUT_CLI = set(ALLOWED) | {"serve"}
ALLOWED["serve"] = ANYTHING_BUT_CLI
ALLOWED["cli"] = ANYTHING_BUT_CLI
ALLOWED["__init__"] = ANYTHING_BUT_CLI  # the package's own __init__.py
ALLOWED["__main__"] = {"cli"}

# (importing file, imported file), both backends of one operator.
BACKEND_EXCEPTIONS: set[tuple[str, str]] = set()

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 90
MAX_KERNEL_LINES = 150
MIB = 2**20


class Import(NamedTuple):
    file: str  # relative to the package
    line: int
    scope: str  # enclosing classes and functions, "A.f", "" at module level
    target: str  # dotted path below the package, "" for the package itself


def relative(path: Path) -> str:
    return path.relative_to(ROOT / PACKAGE).as_posix()


def part_of(dotted: str) -> str:
    return dotted.split(".")[0]


def imported_modules(node: ast.AST, path: Path) -> Iterator[str]:
    """Yield the full dotted names that one import statement or import_module("...") call may bind."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
            base = ".".join([*parents, *filter(None, [base])])
        # `from package.a import b` may mean the module package.a.b or a name inside package.a.
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            yield node.args[0].value


def imports_of(path: Path, source: str | None = None) -> Iterator[Import]:
    """Yield the imports of our own modules in one file, with the scope in which they stand."""

    def walk(node: ast.AST, scope: tuple[str, ...]) -> Iterator[Import]:
        for name in imported_modules(node, path):
            if name.split(".")[0] == PACKAGE:
                yield Import(relative(path), getattr(node, "lineno", 0), ".".join(scope), name[len(PACKAGE) + 1 :])
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            scope = (*scope, node.name)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, scope)

    yield from walk(ast.parse(path.read_text(encoding="utf-8") if source is None else source), ())


def breaks_direction(item: Import) -> bool:
    part = item.file.split("/")[0].removesuffix(".py")
    target = part_of(item.target)
    of_the_package = ("", "__version__", "default_checkpoint")
    if target in of_the_package or target == part:
        return False
    return target not in ALLOWED.get(part, set())


def is_backend(file: str) -> bool:
    stem = file.rsplit("/", 1)[-1].removesuffix(".py")
    return stem == "reference" or stem.startswith(("torch_", "triton_"))


def breaks_backend_rule(item: Import) -> bool:
    """A backend imports no other backend and no api.py, of its own or another operator."""
    if not (item.file.startswith("ops/") and is_backend(item.file)):
        return False
    parts = item.target.split(".")
    for depth in (len(parts), len(parts) - 1):
        target = "/".join(parts[:depth]) + ".py"
        if (ROOT / PACKAGE / target).is_file() and target != item.file and target.startswith("ops/"):
            is_forbidden = is_backend(target) or target.endswith("/api.py")
            return is_forbidden and (item.file, target) not in BACKEND_EXCEPTIONS
    # A package, such as `from hsa_ultralong.ops import hsa_attention`, leads to its api.
    return (ROOT / PACKAGE / "/".join(parts[:-1])).is_dir() and parts[:2] != ["ops", "_common"]


def test_every_part_of_the_package_has_a_row_in_the_table():
    # Folders without Python files are leftovers of another checkout.
    parts = {relative(path).split("/")[0].removesuffix(".py") for path in FILES}
    assert parts <= set(ALLOWED), f"add to the table of allowed imports: {sorted(parts - set(ALLOWED))}"


def test_imports_point_one_way():
    broken = [item for path in FILES for item in imports_of(path) if breaks_direction(item)]
    assert not broken, "\n".join(f"{i.file}:{i.line} imports {i.target}" for i in broken)


def leads_somewhere(target: str) -> bool:
    """A module of ours, or a name inside one or inside a package."""
    parts = target.split(".")
    places = [Path(ROOT / PACKAGE, *parts[:count]) for count in (len(parts), len(parts) - 1)]
    return any(place.is_dir() or place.with_suffix(".py").is_file() for place in places)


def test_every_import_of_our_own_leads_somewhere():
    """Types are checked with missing imports ignored, so a module that moved would be missed by a user first."""
    assert leads_somewhere("files.lock.FileLock") and not leads_somewhere("memory.files.durable.sync_folder")
    lost = [item for path in FILES for item in imports_of(path) if not leads_somewhere(item.target)]
    assert not lost, "\n".join(f"{i.file}:{i.line} imports {i.target}" for i in lost)


def import_graph() -> dict[str, set[str]]:
    """module -> modules that it imports, inside functions too; imports for type checkers only do not count."""
    names = {".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts): path for path in FILES}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        source = path.read_text(encoding="utf-8")
        for_types = {
            line
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for inner in node.body
            for line in range(inner.lineno, (inner.end_lineno or inner.lineno) + 1)
        }
        found = set()
        for item in imports_of(path, source):
            parts = item.target.split(".")
            module = next((m for n in (len(parts), len(parts) - 1) if (m := ".".join(parts[:n])) in names), "")
            if module and module != name and item.line not in for_types:
                found.add(module)
        graph[name] = found
    return graph


def circles_of(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """The sets of modules that reach each other."""

    def reached(start: str) -> set[str]:
        found, waiting = set(), [start]
        while waiting:
            for target in graph[waiting.pop()] - found:
                found.add(target)
                waiting.append(target)
        return found

    reach = {name: reached(name) for name in graph}
    circles = {frozenset(n for n in graph if n in reach[name] and name in reach[n]) for name in graph}
    return {circle for circle in circles if len(circle) > 1}


def test_files_do_not_import_each_other_in_circles():
    assert circles_of({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == {frozenset("abc")}
    assert circles_of(import_graph()) == set()


def test_no_file_asks_for_one_of_ours_by_its_name():
    """A circle that is closed while the program runs is one: what stands above registers itself below."""
    asked = re.compile(r"(import_module|__import__)\(['\"]hsa_ultralong|sys\.modules\[['\"]hsa_ultralong")
    assert asked.search(ast.unparse(ast.parse('import_module("hsa_ultralong.memory").open_memory(path)')))
    assert [relative(path) for path in FILES if asked.search(path.read_text(encoding="utf-8"))] == []


def test_backends_of_an_operator_never_import_each_other():
    broken = [item for path in FILES for item in imports_of(path) if breaks_backend_rule(item)]
    assert not broken, "\n".join(f"{i.file}:{i.line} imports {i.target}" for i in broken)


def test_the_table_of_imports_in_the_architecture_is_this_one():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text[text.index("| part | may import |") :].split("\n\n")[0]
    written = {
        row[1]: set(re.findall(r"`(\w+)`", row[2])) for row in re.finditer(r"^\| `(\w+)` \| (.*) \|$", table, re.M)
    }
    written.pop("cli")
    assert written == {part: allowed for part, allowed in ALLOWED.items() if part in written}
    assert set(ALLOWED) - set(written) == {"serve", "cli", "__init__", "__main__"}


@pytest.mark.parametrize(
    ("file", "source", "is_broken"),
    [
        ("ops/hsa/api.py", "from hsa_ultralong.ops.hsa.reference import f", False),
        ("ops/hsa/api.py", "from hsa_ultralong import nn", True),
        ("ops/hsa/api.py", "from ...nn import x", True),
        ("ops/hsa/api.py", "def f():\n    import hsa_ultralong.models.presets", True),
        ("nn/__init__.py", "import importlib\nimportlib.import_module('hsa_ultralong.train')", True),
        ("nn/__init__.py", "from hsa_ultralong import __version__", False),
        ("nn/__init__.py", "from hsa_ultralong.ops import hsa", False),
        ("serve/app.py", "from hsa_ultralong.cli.main import main", True),
        ("cli/main.py", "from hsa_ultralong.serve import app", False),
        ("models/modeling_hsa.py", "from hsa_ultralong.inference import read", True),
        (
            "models/causal_lm.py",
            "class HSAForCausalLM:\n    def memorize(self):\n        from hsa_ultralong.inference import read",
            True,
        ),
    ],
)
def test_the_import_rule_sees_every_form_of_import(file, source, is_broken):
    found = [breaks_direction(item) for item in imports_of(ROOT / PACKAGE / file, source)]
    assert any(found) == is_broken


@pytest.mark.parametrize(
    ("source", "is_broken"),
    [
        ("from hsa_ultralong.ops._common import blocks", False),
        ("from hsa_ultralong.ops.chunk_topk.visibility import ChunkVisibility", False),
        ("from hsa_ultralong.ops.hsa.reference import hsa_attention_reference", True),
        ("from .reference import hsa_attention_reference", True),
        ("from . import reference", True),
        ("from hsa_ultralong.ops.hsa.api import hsa_attention", True),
        ("from hsa_ultralong.ops import hsa_attention", True),
    ],
)
def test_the_backend_rule_sees_every_form_of_import(source, is_broken):
    found = [breaks_backend_rule(item) for item in imports_of(ROOT / PACKAGE / "ops/hsa/torch_other.py", source)]
    assert any(found) == is_broken


def public_names(source: str) -> list[str]:
    """Classes and aliases of types at the top of a file, by the form of their names."""
    found = []
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found += [node.name] if isinstance(node, ast.ClassDef) else [t.id for t in targets if isinstance(t, ast.Name)]
    return [name for name in found if re.fullmatch(r"[A-Z]\w*[a-z]\w*", name)]


def test_no_two_public_classes_share_a_name():
    """One word, one concept: what is called alike is taken for alike."""
    assert public_names("class A1b: ...\nRowId = int\nMAX = 3\n_X = 1\nclass _Own: ...") == ["A1b", "RowId"]
    places: dict[str, list[str]] = {}
    for path in FILES:
        for name in public_names(path.read_text(encoding="utf-8")):
            places.setdefault(name, []).append(relative(path))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


# plain `groups` are of other things
_RUN_OVER = re.compile(r"layers|upper_groups|\.groups|enumerate\(groups")


def names_in(*nodes: ast.AST) -> set[str]:
    return {part.id for node in nodes for part in ast.walk(node) if isinstance(part, ast.Name)}


def runs_layers(source: str) -> list[str]:
    """Functions with a loop over layers or groups that passes what one gives on to the next."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        for loop in ast.walk(function):
            if not (isinstance(loop, ast.For) and _RUN_OVER.search(ast.unparse(loop.iter))):
                continue
            inside = [node for statement in loop.body for node in ast.walk(statement)]
            assigned = names_in(*(target for node in inside if isinstance(node, ast.Assign) for target in node.targets))
            part = names_in(loop.target)
            calls = [node for node in inside if isinstance(node, ast.Call) and names_in(node.func, *node.args) & part]
            given = {arg.id for call in calls for arg in call.args if isinstance(arg, ast.Name)}
            if given & (assigned - part):
                found.append(function.name)
    return found


def test_the_loops_over_lower_layers_and_upper_groups_stand_once():
    """Training, reading, decoding, long rows and ranks call models/stack.py."""
    found = {relative(path): runs_layers(path.read_text(encoding="utf-8")) for path in FILES}
    assert {file: functions for file, functions in found.items() if functions} == {
        "models/stack.py": ["run_lower", "run_upper"],
        "nn/upper_group.py": ["forward"],  # the layers of one group
        "nn/chunk_encoder.py": ["run"],
        "baselines/full_attention.py": ["forward"],
        "baselines/modeling.py": ["_run"],
    }


@pytest.mark.parametrize(
    ("loop", "is_found"),
    [
        ("for layer in model.lower_layers:\n  x = layer(x, rotary)", True),
        ("for layer, state in zip(inner.lower_layers, states):\n  x = run(layer)(x, state)", True),
        ("for number, group in enumerate(inner.upper_groups()):\n  out = group(x, views)\n  x = out[-1]", True),
        ("for layer in model.lower_layers:\n  layer.compile(dynamic=False)", False),
        ("for group in model.upper_groups():\n  sums = []\n  group.register(hook(sums))", False),
    ],
)
def test_the_rule_of_one_loop_sees_every_form_of_it(loop, is_found):
    body = "\n".join("  " + line for line in loop.splitlines())
    assert (runs_layers(f"def f(x):\n{body}\n  return x") == ["f"]) == is_found


def test_the_library_hooks_into_no_module():
    """What was retrieved comes by output_retrieval."""
    files = [relative(path) for path in FILES if re.search(r"register_\w*hook\(", path.read_text(encoding="utf-8"))]
    # what is looked for, where cut weights are whole; of a weight, and of FSDP's root; of the transformer that a
    # converted model learns from
    assert files == ["train/evidence.py", "train/parallelize.py", "train/teaching.py"]


def test_the_library_prints_only_in_the_command_line():
    broken = [
        f"{relative(path)}:{node.lineno}"
        for path in FILES
        if not relative(path).startswith("cli/")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not broken, f"use logging instead of print: {broken}"


def test_files_and_functions_stay_short():
    broken = []
    for path in FILES:
        source = path.read_text(encoding="utf-8")
        if (lines := len(source.splitlines())) > MAX_FILE_LINES:
            broken.append(f"{relative(path)}: {lines} lines, at most {MAX_FILE_LINES}")
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            is_kernel = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            limit = MAX_KERNEL_LINES if is_kernel else MAX_FUNCTION_LINES
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > limit:
                broken.append(f"{relative(path)}:{node.lineno} {node.name}: {lines} lines, at most {limit}")
    assert not broken, "split by idea:\n" + "\n".join(broken)


def test_tracked_files_stay_small():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    # as they lie on a disk, in blocks of 4 KiB
    names = [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]
    sizes = {name: -(-(ROOT / name).stat().st_size // 4096) * 4096 for name in names}
    large = {name: size for name, size in sizes.items() if size > 20 * MIB}
    assert not large, f"above 20 MiB: {large}"
    top = sorted(sizes, key=lambda name: -sizes[name])[:5]
    # weights that the first minutes need stand here: nano's 18 MiB, and 12 of what makes smol of its source
    assert sum(sizes.values()) < 44 * MIB, f"{sum(sizes.values()) / MIB:.1f} MiB tracked; the largest: {top}"


def readme_code() -> list[str]:
    """Return the lines of README.md's shell blocks and its inline code, without prompts and paths to programs."""
    path = ROOT / "README.md"
    if not path.is_file():
        pytest.skip("README.md does not exist yet")
    text = path.read_text(encoding="utf-8")
    fence = re.compile(r"^[ ]*```(\w*)[^\n]*\n(.*?)^[ ]*```", re.MULTILINE | re.DOTALL)
    blocks = [body for language, body in fence.findall(text) if language in ("", "bash", "console", "sh", "shell")]
    inline = re.findall(r"`([^`\n]+)`", fence.sub("", text))
    lines = [line for block in blocks for line in block.splitlines()] + inline
    # `a && b; c | d` holds several commands.
    commands = [command.strip() for line in lines for command in re.split(r"&&|;|\|", line)]
    return [re.sub(r"^(\$ )?(\.venv/bin/)?", "", command) for command in commands]


def test_readme_names_only_existing_make_targets():
    named = {match[1] for code in readme_code() if (match := re.match(r"make ([a-z][\w-]*)", code))}
    targets = re.findall(r"^([a-z][\w-]*)\s*:(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert named <= set(targets), f"README.md shows unknown targets: {sorted(named - set(targets))}"


def run_help(monkeypatch: pytest.MonkeyPatch, command: str) -> object:
    """Return the exit code of `hsa COMMAND --help`, run in this process."""
    main = importlib.import_module(f"{PACKAGE}.cli.main").main
    monkeypatch.setattr(sys, "argv", ["hsa", command, "--help"])
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code
    return code or 0


def test_readme_names_only_existing_commands(monkeypatch, capsys):
    named = sorted({match[1] for code in readme_code() if (match := re.match(r"hsa ([a-z][\w-]*)", code))})
    if not named:
        return
    assert run_help(monkeypatch, "no-such-command") != 0, "`hsa` accepts any word, so the check below proves nothing"
    unknown = [command for command in named if run_help(monkeypatch, command) != 0]
    capsys.readouterr()
    assert not unknown, f"README.md shows unknown commands: {unknown}"


def test_documents_name_tests_that_exist():
    named = set()
    for page in [*ROOT.glob("docs/*.md"), *ROOT.glob("hsa_ultralong/**/*.md"), *ROOT.glob("hsa_ultralong/**/*.py")]:
        if not page.name.startswith("common_suite"):  # which names those of transformers
            named |= set(re.findall(r"\btest_[a-z0-9_]+", page.read_text(encoding="utf-8")))
    files = list((ROOT / "tests").rglob("test_*.py"))
    known = {file.stem for file in files}
    for file in files:
        known |= set(re.findall(r"def (test_[a-z0-9_]+)", file.read_text(encoding="utf-8")))
    assert named <= known, f"no such test: {sorted(named - known)}"


def test_limits_of_time_in_tests_guard_against_hangs_only():
    """A limit that a slow or busy machine can reach makes a test fail for no fault: name HANG_SECONDS instead."""
    short = re.compile(r"timeout\s*=\s*(\d+(?:\.\d+)?)|timeout\((\d+)\)|monotonic\(\) \+ (\d+)$")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for match in [short.search(line)]
        if match and 0 < float(next(filter(None, match.groups()))) < HANG_SECONDS
    ]
    assert not found, f"limits below {HANG_SECONDS} s: {', '.join(found)}"
