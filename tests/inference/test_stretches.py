"""Stretches of documents read together equal the documents read as a whole."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.inference import stretches
from hsa_ultralong.inference.stretches import Stretch, StretchReader
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_model

EXACT = {"rtol": 1e-9, "atol": 1e-10}


def cut(text: torch.Tensor, first: int, stop: int, size: int, reach: int) -> Stretch:
    """Chunks first..stop of a document."""
    text = text.to(torch.int32)
    return Stretch(text[max(0, first * size - reach) : first * size], text[first * size : stop * size])


@pytest.mark.parametrize("options", sorted(MODEL_OPTIONS))
def test_chunks_of_stretches_equal_those_of_the_whole_documents(options, monkeypatch):
    monkeypatch.setitem(stretches._TOKENS_AT_ONCE, "cpu", 90)
    model = tiny_model(**MODEL_OPTIONS[options])
    size, reach = model.config.chunk_size, model.config.lower_reach
    texts = [random_tokens(1, length, seed=seed)[0] for seed, length in enumerate((7, 61, 150, 2))]
    memory = model.memorize(texts)
    wanted = [(1, 3, 5), (2, 0, 2), (1, 14, 16), (0, 0, 2), (2, 20, 38), (3, 0, 1), (2, 0, 38), (1, 3, 4), (2, 1, 2)]
    reader = StretchReader(model, kept_leads=2)
    for _ in range(2):  # the second time some leads are known
        found = reader.read([cut(texts[number], first, stop, size, reach) for number, first, stop in wanted])
        for (number, first, stop), chunks in zip(wanted, found, strict=True):
            start = memory.documents[number].first_chunk
            expected = memory.part(start + first, start + stop)
            assert [chunk.length for chunk in chunks] == expected.lengths[0].tolist()
            for name in ("k", "v"):
                whole = getattr(expected, name)[0].unflatten(0, (-1, size))
                for chunk, other in zip(chunks, whole, strict=True):
                    torch.testing.assert_close(getattr(chunk, name)[: chunk.length], other[: chunk.length], **EXACT)
            torch.testing.assert_close(torch.stack([c.landmark for c in chunks]), expected.landmarks[0], **EXACT)


@pytest.mark.parametrize("options", sorted(MODEL_OPTIONS))
def test_a_memory_of_documents_read_together_equals_one_of_documents_read_one_by_one(options, monkeypatch):
    monkeypatch.setitem(stretches._TOKENS_AT_ONCE, "cpu", 90)
    model = tiny_model(**MODEL_OPTIONS[options])
    texts = [random_tokens(1, n, seed=n)[0].to(torch.int32) for n in (7, 61, model.config.chunk_size, 30, 1)]
    one, other = model.memorize(texts), StretchReader(model).memory(texts)
    assert (other.num_chunks, other.fingerprint, other.is_composable) == (
        one.num_chunks,
        one.fingerprint,
        one.is_composable,
    )
    for name in ("lengths", "segments", "ends"):
        assert torch.equal(getattr(one, name), getattr(other, name)) and getattr(other, name).dtype == torch.int32
    used = torch.arange(one.chunk_size) < one.lengths[0, :, None]  # what lies behind a short chunk is read by none
    for name in ("k", "v"):
        mine, own = (getattr(each, name)[0].unflatten(0, (-1, one.chunk_size))[used] for each in (one, other))
        torch.testing.assert_close(own, mine, **EXACT)
    torch.testing.assert_close(other.landmarks, one.landmarks, **EXACT)
    for mine, own in zip(one.documents, other.documents, strict=True):
        assert torch.equal(mine.tokens, own.tokens)
        assert (mine.first_chunk, mine.num_chunks, mine.is_open) == (own.first_chunk, own.num_chunks, own.is_open)


def test_a_lead_that_was_read_is_not_read_again(monkeypatch):
    model = tiny_model()
    size, reach = model.config.chunk_size, model.config.lower_reach
    text = random_tokens(1, 100)[0]
    reader = StretchReader(model)
    rows: list[int] = []
    real = reader._lower
    monkeypatch.setattr(
        reader, "_lower", lambda tokens, cache: rows.append(sum(map(len, tokens))) or real(tokens, cache)
    )
    reader.read([cut(text, 10, 12, size, reach)])
    assert rows == [reach, 2 * size]
    changed = text.clone()
    changed[11 * size :] += 1
    changed %= model.config.vocab_size
    reader.read([cut(changed, 10, 12, size, reach)])
    assert rows == [reach, 2 * size, 2 * size]
