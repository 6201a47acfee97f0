"""Compiled kernels on disk, checked before they are used: Triton's files with versions and checksums.

Triton finds a kernel by a hash of its own files, of the kernel's source with all that it calls, of the options, of the
card's capability and of the assembler's version, and loads unchecked what lies there. Here every kernel, and every
library of Triton's launcher, has a stamp beside it, `__checked__NAME`: the versions of torch, Triton and this library,
and the SHA-256 of its files. What a stamp does not fit is compiled again, so are kernels without one; damage is told by
a warning. Kernels of torch's compiler come out of bundles, which may hold no stamps. Imports triton: for backends.
Tests: tests/ops/test_compiled.py.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.runtime.cache import FileCacheManager

_MARK = "__checked__"
# what torch's compiler calls its kernels
_FOREIGN = "triton_"
_LIBRARY = ".so"


def versions() -> dict[str, str]:
    """What a stamp must say besides checksums."""
    # not imported: the package stands above this part
    package = sys.modules[__name__.partition(".")[0]]
    return {package.__name__: package.__version__, "torch": torch.__version__, "triton": triton.__version__}


def _checksums(group: dict[str, str]) -> dict[str, str]:
    return {name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for name, path in group.items()}


class CheckedFiles(FileCacheManager):  # type: ignore[misc]
    """Triton's folder of one compiled kernel, or of one library of its launcher, whose files must be those written."""

    def put(self, data: bytes | str, filename: str, binary: bool = True) -> str:
        path = str(super().put(data, filename, binary=binary))
        if filename.endswith(_LIBRARY):
            self._stamp(filename, {filename: path})
        return path

    def put_group(self, filename: str, group: dict[str, str]) -> str:
        self._stamp(filename, group)
        return str(super().put_group(filename, group))

    def get_file(self, filename: str) -> str | None:
        path: str | None = super().get_file(filename)
        is_checked = path is not None and filename.endswith(_LIBRARY)
        return None if path and is_checked and not self._is_whole(filename, {filename: path}, True) else path

    def get_group(self, filename: str) -> dict[str, str] | None:
        group: dict[str, str] | None = super().get_group(filename)
        is_foreign = filename.startswith(_FOREIGN)
        return None if group is None or not self._is_whole(filename, group, is_foreign) else group

    def _stamp(self, filename: str, group: dict[str, str]) -> None:
        super().put(json.dumps({"versions": versions(), "sha256": _checksums(group)}), _MARK + filename, binary=False)

    def _is_whole(self, filename: str, group: dict[str, str], without_stamp: bool) -> bool:
        """Whether versions and files are the stamp's; `without_stamp` where there is none."""
        wrong = [_MARK + filename]
        try:
            stamp = json.loads(Path(self._make_path(wrong[0])).read_bytes())
            if stamp["versions"] != versions():
                return False
            found, written = _checksums(group), dict(stamp["sha256"])
            wrong = sorted(name for name in {*found, *written} if found.get(name) != written.get(name))
        except FileNotFoundError:
            return without_stamp
        except (OSError, ValueError, TypeError, KeyError):
            pass
        if wrong:
            text = f"{self.cache_dir}: {', '.join(wrong)} is damaged; it is compiled again"
            warnings.warn(text, RuntimeWarning, stacklevel=3)
        return not wrong


def check_compiled() -> None:
    """Let Triton use CheckedFiles here, unless another class was chosen."""
    if knobs.cache.manager_class is None:
        # by assignment it would become a variable of the environment, of other programs too
        vars(knobs.cache)["manager_class"] = CheckedFiles
