"""The page at "/". Called by app.py."""

from __future__ import annotations

from importlib.resources import files

PAGE = (files("hsa_ultralong.serve") / "page.html").read_text(encoding="utf-8")
