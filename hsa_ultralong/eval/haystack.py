"""The text that ships with the library: Newton's Opticks (public domain), compressed, 282,777 tokens for nano."""

from __future__ import annotations

import lzma
from importlib import resources


def opticks() -> str:
    """Isaac Newton, Opticks (4th edition, 1730), as plain text."""
    packed = resources.files("hsa_ultralong.eval").joinpath("assets/opticks.txt.xz").read_bytes()
    return lzma.decompress(packed).decode("utf-8")
