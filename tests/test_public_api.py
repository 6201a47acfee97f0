"""What `import hsa_ultralong` promises: every public name in one import, loaded when it is first used."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import hsa_ultralong
from hsa_ultralong.testing.processes import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[1]


def fresh(code):
    """What a new interpreter prints that runs `code`."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", hsa_ultralong.__all__)
def test_every_public_name_can_be_imported_and_is_listed(name):
    assert getattr(hsa_ultralong, name) is not None
    assert name in dir(hsa_ultralong)


def test_public_names_are_the_objects_of_their_parts():
    from hsa_ultralong import ChunkMemory, HSAForCausalLM, Library, ask, edit, memorize

    assert (ask, edit, memorize, Library) == tuple(
        getattr(import_module("hsa_ultralong.inference"), name) for name in ("ask", "edit", "memorize", "Library")
    )
    assert HSAForCausalLM is import_module("hsa_ultralong.models").HSAForCausalLM
    assert ChunkMemory is import_module("hsa_ultralong.memory").ChunkMemory


def test_importing_and_listing_the_package_load_neither_torch_nor_transformers():
    code = "import sys, hsa_ultralong; dir(hsa_ultralong); hsa_ultralong.__version__; hsa_ultralong.__all__\n"
    assert fresh(code + "print([n for n in ('torch', 'transformers', 'numpy') if n in sys.modules])").strip() == "[]"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="memorise"):
        hsa_ultralong.memorise  # noqa: B018
    with pytest.raises(ImportError):
        from hsa_ultralong import memorise  # noqa: F401


def test_checkers_see_every_lazy_name():
    """Type checkers and editors read the imports under TYPE_CHECKING, Python the table: they must agree."""
    tree = ast.parse(Path(hsa_ultralong.__file__).read_text(encoding="utf-8"))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in typed.body for alias in node.names}
    assert seen == {name: f"hsa_ultralong.{part}" for name, part in hsa_ultralong._LAZY.items()}
    assert set(seen) < set(hsa_ultralong.__all__)


def test_the_version_is_the_one_that_is_packaged():
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        tomllib = pytest.importorskip("tomli")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "hsa_ultralong.__version__"}
    assert hsa_ultralong.__version__.split(".") == [str(int(part)) for part in hsa_ultralong.__version__.split(".")]
    assert f"version: {hsa_ultralong.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
