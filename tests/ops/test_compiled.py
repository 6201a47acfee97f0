"""Kernels on disk: what another version left is not used, and what is damaged is not used without a word."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from hsa_ultralong.testing.processes import HANG_SECONDS

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs the triton package")

# conftest.py makes this process interpret kernels, so another one compiles them, for cards that need not be there
PROGRAM = """
import importlib.util, sys, warnings
from pathlib import Path
import torch, triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import cache
import hsa_ultralong
from hsa_ultralong.ops import _compiled, _triton

_triton.check_compiled()
assert knobs.cache.manager_class is _compiled.CheckedFiles
here, hits = Path(sys.argv[1]), []
knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
SOURCE = '''
import triton
import triton.language as tl
@triton.jit
def _helper(x):
    return x * 3.0
@triton.jit
def _kernel(x_ptr):
    place = tl.arange(0, 64)
    tl.store(x_ptr + place, _helper(tl.load(x_ptr + place)))
'''

def load(name, text):
    (here / name).write_text(text)
    spec = importlib.util.spec_from_file_location(name[:-3], here / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module._kernel

kernel = load("first.py", SOURCE)

def compiled(function=kernel, capability=90):
    'Whether it was found on disk, its machine code and what was said.'
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        source = ASTSource(function, {"x_ptr": "*fp32"}, {}, {})
        found = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    return hits[-1], found.asm["cubin"], [str(one.message) for one in said if "damaged" in str(one.message)]

def folders():
    return {path.parent for path in here.rglob("_kernel.cubin")}

code = compiled()[1]
assert hits == [False] and compiled() == (True, code, [])
(folder,) = folders()
"""

VERSIONS = """
# the stamp's own versions
for owner, name in ((torch, "__version__"), (hsa_ultralong, "__version__"), (triton, "__version__")):
    before = getattr(owner, name)
    setattr(owner, name, "0.0.1")
    assert compiled() == (False, code, []), name
    assert compiled() == (True, code, []), name
    setattr(owner, name, before)
    assert compiled() == (False, code, []), name
# Triton's hash of its own files, the card, the source and what it calls: other folders
seen = folders()
assert seen == {folder}
key = cache.triton_key
cache.triton_key = lambda: key() + "-another"
assert compiled()[0] is False and len(folders()) == 2
cache.triton_key = key
other = compiled(capability=89)
assert other[0] is False and other[1] != code and len(folders()) == 3
changed = compiled(load("second.py", SOURCE.replace("x * 3.0", "x * 5.0")))
assert changed[0] is False and changed[1] != code and len(folders()) == 4
assert compiled() == (True, code, [])
# files of a time without stamps
(folder / "__checked___kernel.json").unlink()
assert compiled() == (False, code, []) and compiled()[0]
"""

DAMAGE = """
def broken(name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))
    return name

def flip(data):
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]

# why: Triton itself takes it
broken("_kernel.cubin", flip)
vars(knobs.cache)["manager_class"] = None
found = compiled()
assert found[0] and found[1] != code
vars(knobs.cache)["manager_class"] = _compiled.CheckedFiles
found = compiled()
assert found[:2] == (False, code) and "_kernel.cubin is damaged" in found[2][0], found[2]
for name in ("_kernel.cubin", "_kernel.json", "_kernel.ptx", "__checked___kernel.json"):
    for change in (flip, lambda data: data[:40], lambda data: b""):
        broken(name, change)
        found = compiled()
        # a stamp that still reads says that a file is
        said = "is damaged" if name.startswith("__checked__") else f"{name} is damaged"
        assert found[:2] == (False, code) and said in found[2][0], (name, found[0], found[2])
        assert compiled() == (True, code, [])
# libraries of the launcher
files = _compiled.CheckedFiles("KEY")
path = files.put(b"library", "launcher.so")
assert files.get_file("launcher.so") == path
Path(path).write_bytes(b"librarx")
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert files.get_file("launcher.so") is None and "launcher.so is damaged" in str(said[0].message)
# kernels of torch's compiler come out of bundles without stamps
group = {"triton_poi.json": files.put("{}", "triton_poi.json")}
cache.FileCacheManager.put_group(files, "triton_poi.json", group)
assert files.get_group("triton_poi.json") == group
"""


@pytest.mark.parametrize("program", [VERSIONS, DAMAGE], ids=["versions", "damage"])
def test_what_another_version_left_or_is_damaged_is_compiled_again(tmp_path, program):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_CACHE_MANAGER", None)
    command = [sys.executable, "-c", PROGRAM + program, str(tmp_path)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert found.returncode == 0, found.stderr[-2000:]


def test_operators_have_kernels_checked_before_their_first_launch(monkeypatch):
    import torch
    from triton import knobs

    from hsa_ultralong.ops import _compiled, _triton

    monkeypatch.setitem(vars(knobs.cache), "manager_class", None)
    monkeypatch.setattr(_triton, "is_interpreted", lambda: True)
    _triton.check_compiled.cache_clear()
    _triton.require_triton("hsa_attention", torch.ones(1))
    assert knobs.cache.manager_class is _compiled.CheckedFiles
    # a choice of the user's stays
    monkeypatch.setitem(vars(knobs.cache), "manager_class", _compiled.FileCacheManager)
    _compiled.check_compiled()
    assert knobs.cache.manager_class is _compiled.FileCacheManager
