"""ChunkMemory: growth, writing, merging, selecting, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsa_ultralong.memory.chunk_memory import ChunkMemory, Document
from hsa_ultralong.nn.views import ChunkTensors
from hsa_ultralong.ops.chunk_topk.visibility import UNUSED
from hsa_ultralong.testing.factories import random_chunks, random_tokens, tiny_model


def empty(batch=1, capacity=0, **options):
    return ChunkMemory.empty(
        batch=batch, chunk_size=4, num_memory_heads=1, head_dim=4, num_retrieval_heads=1, retrieval_dim=8,
        dtype=torch.float64, device="cpu", capacity=capacity, **options,
    )  # fmt: skip


def document_memory(*lengths, seed=0, **options):
    """A memory of closed documents with these numbers of tokens."""
    memory = empty(**options)
    for number, length in enumerate(lengths):
        chunks = random_chunks(1, -(-length // 4), seed=seed + 10 * number)
        chunks.segments.fill_(number)
        first = memory.num_chunks
        memory.write(first, chunks)
        tokens = random_tokens(1, length, seed=seed + number)[0].to(torch.int32)
        memory.documents.append(Document(tokens, first, -(-length // 4), name=f"document {seed + number}"))
    return memory


def assert_same(actual, expected):
    for name, left, right in zip(ChunkTensors._fields, actual, expected, strict=True):
        assert torch.equal(left, right), name


def joined(*chunks):
    return ChunkTensors(*(torch.cat(parts, 1) for parts in zip(*chunks)))


def test_an_empty_memory_has_no_chunks_and_no_bytes():
    memory = empty(capacity=8)
    assert memory.num_chunks == 0 and memory.num_tokens == 0 and memory.num_bytes == 0
    assert memory.k.shape == (1, 0, 1, 4) and memory.landmarks.shape == (1, 0, 1, 8)
    assert memory.open_document is None


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.integers(0, 6))
def test_writing_piece_by_piece_equals_writing_at_once(counts, capacity):
    whole = random_chunks(2, sum(counts))
    memory, first = empty(batch=2, capacity=capacity), 0
    for count in counts:
        part = ChunkTensors(
            whole.k[:, first * 4 : (first + count) * 4],
            whole.v[:, first * 4 : (first + count) * 4],
            *(x[:, first : first + count] for x in whole[2:]),
        )
        memory.write(first, part)
        first += count
    assert memory.num_chunks == first
    assert_same(memory.tensors, whole)


def test_growth_doubles_so_that_copies_are_few():
    memory, sizes = empty(), set()
    for chunk in range(100):
        memory.write(chunk, random_chunks(1, 1))
        sizes.add(memory.storage.landmarks.shape[1])
    assert len(sizes) <= 8 and max(sizes) <= 200


def test_room_that_is_not_written_belongs_to_nobody():
    memory = empty()
    memory.write(3, random_chunks(1, 1))
    assert memory.num_chunks == 4
    assert memory.segments[0].tolist() == [UNUSED, UNUSED, UNUSED, 0]
    memory.reserve(9)
    assert bool((memory.storage.segments[0, 4:] == UNUSED).all())


def test_writing_over_chunks_replaces_them_and_nothing_else():
    memory = empty()
    old, new = random_chunks(1, 5), random_chunks(1, 2, seed=9)
    memory.write(0, old)
    memory.write(2, new)
    assert memory.num_chunks == 5
    assert torch.equal(memory.k[:, 8:16], new.k) and torch.equal(memory.landmarks[:, 2:4], new.landmarks)
    assert torch.equal(memory.k[:, :8], old.k[:, :8]) and torch.equal(memory.v[:, 16:], old.v[:, 16:])


def test_rows_can_be_written_at_different_places():
    memory = empty(batch=2)
    memory.reserve(4)
    chunks = random_chunks(2, 2)
    memory.write_rows(torch.tensor([[0, 1], [2, 3]]), chunks)
    memory.num_chunks = 4
    assert torch.equal(memory.k[0, :8], chunks.k[0]) and torch.equal(memory.k[1, 8:], chunks.k[1])
    assert torch.equal(memory.lengths[1, 2:], chunks.lengths[1])
    assert memory.segments.tolist() == [[0, 0, UNUSED, UNUSED], [UNUSED, UNUSED, 0, 0]]


def test_writing_keeps_no_graph():
    memory = empty()
    chunks = random_chunks(1, 1)
    memory.write(0, chunks._replace(k=chunks.k.requires_grad_()))
    assert not memory.k.requires_grad


def test_concat_holds_all_documents_in_the_given_order():
    first, second = document_memory(7, 4), document_memory(10, seed=50)
    merged = ChunkMemory.concat([second, first])
    assert_same(merged.tensors._replace(segments=merged.segments * 0), joined(second.tensors, first.tensors)._replace(
        segments=merged.segments * 0
    ))  # fmt: skip
    assert merged.segments[0].tolist() == [0, 0, 0, 1, 1, 2]
    assert [doc.first_chunk for doc in merged.documents] == [0, 3, 5]
    assert [doc.name for doc in merged.documents] == ["document 50", "document 0", "document 1"]
    assert merged.num_tokens == 21
    assert [doc.first_chunk for doc in first.documents] == [0, 2]


def test_concat_does_not_share_storage_with_its_parts():
    first, second = document_memory(7), document_memory(4, seed=5)
    before = first.k.clone()
    merged = ChunkMemory.concat([first, second])
    merged.storage.k.zero_()
    assert torch.equal(first.k, before)


def test_select_keeps_only_the_named_documents_in_the_given_order():
    memory = document_memory(7, 4, 9)
    chosen = memory.select([2, 0])
    assert [doc.name for doc in chosen.documents] == ["document 2", "document 0"]
    assert [(doc.first_chunk, doc.num_chunks) for doc in chosen.documents] == [(0, 3), (3, 2)]
    assert chosen.segments[0].tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(chosen.k, torch.cat((memory.k[:, 12:24], memory.k[:, :8]), 1))
    assert torch.equal(chosen.lengths, torch.cat((memory.lengths[:, 3:6], memory.lengths[:, :2]), 1))


def test_selecting_everything_equals_the_memory():
    memory = document_memory(7, 4, 9)
    assert_same(memory.select([0, 1, 2]).tensors, memory.tensors)


@pytest.mark.parametrize("number", [-1, 2])
def test_select_refuses_an_unknown_document(number):
    with pytest.raises(ValueError, match=f"document {number} does not exist; the memory holds 2"):
        document_memory(7, 4).select([number])


def test_merging_refuses_open_documents_other_models_and_order_dependent_fusion():
    closed = document_memory(7)
    is_open = document_memory(8)
    is_open.documents[-1] = replace(is_open.documents[-1], is_open=True)
    assert is_open.open_document is is_open.documents[-1]
    for refused, message in (
        ([closed, is_open], "memory 1 holds an open document"),
        ([closed, document_memory(4, fingerprint="other")], "memory 1 was built by another model: 'other'"),
        ([document_memory(4, is_composable=False)] * 2, "depends on the order of chunks"),
        ([], "at least one memory"),
    ):
        with pytest.raises(ValueError, match=message):
            ChunkMemory.concat(refused)
    with pytest.raises(ValueError, match="open document"):
        is_open.select([0])
    with pytest.raises(ValueError, match="depends on the order of chunks"):
        document_memory(4, 4, is_composable=False).select([1])


def test_a_copy_shares_nothing_with_its_memory():
    memory = document_memory(9, 5)
    before = [part.clone() for part in memory.tensors]
    copy = memory.to("cpu")
    copy.write(0, random_chunks(1, 2, seed=99))
    assert all(torch.equal(a, b) for a, b in zip(memory.tensors, before, strict=True))


def test_to_changes_float_tensors_only():
    memory = document_memory(7)
    low = memory.to(dtype=torch.bfloat16)
    assert low.k.dtype == low.v.dtype == low.landmarks.dtype == torch.bfloat16
    assert low.lengths.dtype == low.segments.dtype == low.ends.dtype == torch.int32
    assert memory.k.dtype == torch.float64 and low.num_tokens == 7


def test_map_batch_moves_rows_of_every_tensor():
    memory = empty(batch=2)
    chunks = random_chunks(2, 2)
    memory.write(0, chunks)
    memory.map_batch(lambda x: x[[1, 0, 1]])
    assert_same(memory.tensors, ChunkTensors(*(x[[1, 0, 1]] for x in chunks)))


def test_bytes_per_token_follow_the_formula():
    memory = document_memory(64)
    per_token = 8 * (2 * 1 * 4 + 8 / 4) + 3 * 4 / 4
    assert memory.num_bytes == 64 * per_token


def test_a_moved_copy_has_document_records_of_its_own():
    memory = tiny_model().memorize(random_tokens(1, 9)[0])
    copy = memory.to(dtype=torch.float32)
    copy.documents[0].tokens = copy.documents[0].tokens + 1
    assert not torch.equal(copy.documents[0].tokens, memory.documents[0].tokens)
    assert copy.k.dtype == torch.float32 and memory.k.dtype == torch.float64
