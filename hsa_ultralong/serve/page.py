"""The page at "/", and what a browser may do for it. Called by app.py; tests/serve/test_guard.py, test_page.py."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

PAGE = (files("hsa_ultralong.serve") / "page.html").read_text(encoding="utf-8")


def _sources(tag: str) -> str:
    """Hashes of what stands in the page between such tags."""
    texts = re.findall(f"<{tag}>(.*?)</{tag}>", PAGE, re.S)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in texts)


# its own script and style, its own server, and no frame around it
POLICY = (
    f"default-src 'none'; script-src {_sources('script')}; style-src {_sources('style')}; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
