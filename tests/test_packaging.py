"""What a user gets who has no checkout: a wheel that answers, an sdist that holds the same, extras that are true."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from hsa_ultralong import default_checkpoint

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NANO = ROOT / "checkpoints" / "nano"
# name in Python -> name in registries, where they differ
DISTRIBUTIONS = {
    "PIL": "pillow",
    "docx": "python-docx",
    "bs4": "beautifulsoup4",
    "backports": "backports.zstd",
    "fla": "flash-linear-attention",
}

FOR_DEVELOPERS = {"browser", "dev", "docs"}  # extras of which the library imports nothing

# for benchmarks alone, built for a card and its CUDA: a message says what to install
BY_HAND = {"flash-attn"}

# the last of Python 3.14
STANDARD = {*sys.stdlib_module_names, "compression"}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(extra: str | None = None) -> set[str]:
    """Names that core or an extra installs."""
    listed = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    return {normalized(re.match(r"[\w.-]+", line)[0]) for line in listed} - {normalized(PROJECT["name"])}


def imported() -> dict[str, str]:
    """Third-party packages that the library imports, anywhere -> a file that does."""
    found = {}
    for path in sorted((ROOT / "hsa_ultralong").rglob("*.py")):
        if path.name == "common_suite_case.py":
            # runs inside the tests of transformers, which it imports
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                function = getattr(node.func, "attr", getattr(node.func, "id", ""))
                names = [node.args[0].value] if function in ("import_module", "find_spec", "__import__") else []
            for name in names:
                top = str(name).split(".")[0]
                if top not in STANDARD and top != "hsa_ultralong":
                    found[normalized(DISTRIBUTIONS.get(top, top))] = str(path.relative_to(ROOT))
    return found


def test_every_package_that_the_library_imports_is_in_core_or_in_an_extra_for_users():
    extras = set(PROJECT["optional-dependencies"]) - FOR_DEVELOPERS
    known = requirements().union(*(requirements(extra) for extra in extras))
    missing = {name: file for name, file in imported().items() if name not in known | BY_HAND}
    assert not missing, f"add to pyproject.toml: {missing}"


def test_every_package_of_core_and_extras_is_imported_or_its_use_is_documented():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
    pages, used = normalized(pages), set(imported())
    for extra in [None, *sorted(set(PROJECT["optional-dependencies"]) - {*FOR_DEVELOPERS, "all"})]:
        for name in requirements(extra) - used:
            assert name in pages, f"{extra or 'core'}: nothing uses or documents {name}"


def test_the_extra_all_holds_every_extra_for_users():
    (line,) = PROJECT["optional-dependencies"]["all"]
    named = set(re.search(r"\[(.*)\]", line)[1].split(","))
    assert named == set(PROJECT["optional-dependencies"]) - {*FOR_DEVELOPERS, "all"}


def test_messages_name_extras_that_exist():
    named = set()
    for path in [*(ROOT / "hsa_ultralong").rglob("*.py"), *ROOT.glob("docs/*.md"), ROOT / "README.md"]:
        named |= set(re.findall(r"hsa-ultralong\[([\w,-]+)\]", path.read_text(encoding="utf-8")))
    assert {extra for group in named for extra in group.split(",")} <= set(PROJECT["optional-dependencies"])


def test_the_default_checkpoint_is_found_beside_the_package_and_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_checkpoint() == NANO
    (tmp_path / "checkpoints" / "nano").mkdir(parents=True)
    assert default_checkpoint() == NANO
    (tmp_path / "checkpoints" / "nano" / "config.json").write_text("{}")
    assert default_checkpoint().resolve() == tmp_path / "checkpoints" / "nano"


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **environment}
    result = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def build(kind: str, source: Path, output: Path) -> Path:
    """The sdist or wheel of a source folder, by setuptools alone."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(output)!r})"
    python("-W", "ignore", "-c", code, cwd=source)
    (file,) = [file for file in output.iterdir() if file.name.endswith(".whl" if kind == "wheel" else ".tar.gz")]
    return file


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """An sdist of a copy of the checkout (building writes beside the sources), and the wheel made from that sdist."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("packaging")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("hsa_ultralong", "checkpoints"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "mine"))
    output = folder / "out"
    output.mkdir()
    sdist = build("sdist", folder, output)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return sdist, build("wheel", source, output)


def test_a_wheel_from_the_sdist_holds_the_whole_library_and_the_shipped_model(distributions):
    _, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        weights = archive.read("hsa_ultralong/checkpoints/nano/model.safetensors")
    assert weights == (NANO / "model.safetensors").read_bytes()
    listed = subprocess.run(
        ["git", "ls-files", "-z", "hsa_ultralong", "checkpoints/nano"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    tracked = {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}
    expected = {re.sub("^checkpoints/", "hsa_ultralong/checkpoints/", name) for name in tracked}
    assert expected <= names, sorted(expected - names)[:5]
    assert not [name for name in names if name.startswith(("tests/", "checkpoints/", "docs/"))]


def test_the_shipped_model_stays_small_and_is_stored_once(distributions):
    for file in distributions:
        assert file.stat().st_size < 20 * 2**20, file


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory):
    """The wheel alone in a folder that comes first on the path."""
    target = tmp_path_factory.mktemp("installed")
    python(
        "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", str(target),
        str(distributions[1]), cwd=target,
    )  # fmt: skip
    return target


def test_an_installed_wheel_finds_its_own_model(installed, tmp_path):
    code = "import hsa_ultralong; print(hsa_ultralong.__file__); print(hsa_ultralong.default_checkpoint())"
    library, model = python("-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert Path(library).parent == installed / "hsa_ultralong" and Path(model).parents[1] == Path(library).parent
    assert json.loads((Path(model) / "config.json").read_text())["model_type"] == "hsa_ultralong"


@pytest.mark.slow
def test_with_the_wheel_alone_every_first_command_answers(installed, tmp_path):
    (tmp_path / "text.txt").write_text("The sea is wide and the road is long. " * 200)
    fact = "The secret code of the silver lantern is 4821937."
    question = "What is the secret code of the silver lantern?"

    def hsa(*arguments: str, module: str = "hsa_ultralong") -> str:
        return python("-m", module, *arguments, cwd=tmp_path, PYTHONPATH=str(installed))

    assert "4821937" in hsa("ask", "--text", "text.txt", "--hide", fact, question)
    assert hsa("generate", "def main():", "--max-new-tokens", "5", module="hsa_ultralong.cli.main")
    shown = hsa("quickstart", "-o", "report", "--lengths", "4K", "--needles", "2", "--controls", "1")
    assert "100.0%" in shown and (tmp_path / "report" / "needles.png").is_file()
