"""What a stage leaves out is full coverage; a recipe says so."""

import ast
from pathlib import Path

import pytest

from hsa_ultralong import recipes

FILES = sorted(Path(recipes.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_stage_says_how_many_chunks_a_token_keeps(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "StageConfig":
            named = {keyword.arg for keyword in node.keywords}
            assert "name" not in named or "chunk_topk" in named, f"{file.name}:{node.lineno}"
