"""The prototype for vLLM reads pages as a model reads its own chunks: mixed batches, shuffled and shared pages."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from hsa_ultralong.ops import ChunkVisibility, chunk_topk, hsa_attention
from hsa_ultralong.ops.chunk_topk.lists import softmax_fusion
from hsa_ultralong.testing.factories import random_tensor

SIZE, HEADS, KV_HEADS, DIM, TOPK = 4, 4, 2, 8, 3


@pytest.fixture(scope="module")
def prototype():
    path = Path(__file__).parents[1] / "examples" / "vllm" / "memory_operator.py"
    spec = importlib.util.spec_from_file_location("memory_operator", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["memory_operator"] = module
    spec.loader.exec_module(module)
    return module


def test_pages_of_a_mixed_batch_are_read_as_rows_of_their_own(prototype):
    # (tokens in all, tokens of this step): decoding, a prompt's middle, a start without chunks, another reader of pages
    requests = [(23, 1), (18, 7), (3, 3), (12, 1)]
    tables = [[9, 2, 7, 0, 5], [1, 8, 3, 6], [], [9, 2, 7]]  # the last one shares the first one's beginning
    kv_cache, landmarks = torch.full((10, 2, SIZE, KV_HEADS, DIM), torch.nan).double(), torch.zeros(10, 1, 6).double()
    operator = prototype.MemoryOperator(HEADS, DIM, KV_HEADS, SIZE, TOPK)
    pages = torch.arange(10)
    k, v = (random_tensor(10, SIZE, KV_HEADS, DIM, seed=seed) for seed in (1, 2))
    operator.update(kv_cache, landmarks, pages, (k, v, random_tensor(10, 1, 6, seed=3)))
    counts = [new for _, new in requests]
    table = torch.full((4, 5), -1, dtype=torch.int32)
    for row, own in enumerate(tables):
        table[row, : len(own)] = torch.tensor(own, dtype=torch.int32)
    metadata = prototype.BatchMetadata(
        torch.tensor([0, *counts]).cumsum(0), torch.tensor([length for length, _ in requests]), table,
        torch.zeros(sum(counts), dtype=torch.int64),
    )  # fmt: skip
    asked, query = random_tensor(sum(counts), 1, 6, seed=4), random_tensor(sum(counts), HEADS, DIM, seed=5)
    chosen, weights = operator.retrieve(asked, landmarks, None, metadata)
    found = operator.forward(query, kv_cache, chosen, weights, torch.empty_like(query))
    start = 0
    for (length, new), own in zip(requests, tables, strict=True):
        part = slice(start, start + new)
        start += new
        if not own:
            assert not found[part].any()
            continue
        places = torch.arange(length - new, length, dtype=torch.int32)[None]
        ends = torch.arange(1, len(own) + 1, dtype=torch.int32)[None] * SIZE
        visible = ChunkVisibility(torch.zeros_like(places), places, torch.zeros_like(ends), ends)
        indices, scores = chunk_topk(asked[None, part], landmarks[own][None], visible, topk=TOPK)
        expected = hsa_attention(
            query[None, part], k[own].flatten(0, 1)[None], v[own].flatten(0, 1)[None], indices, softmax_fusion(scores),
            chunk_size=SIZE,
        )  # fmt: skip
        torch.testing.assert_close(found[part], expected[0], rtol=1e-12, atol=1e-12)
