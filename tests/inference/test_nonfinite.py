"""A model that computes NaN memorises nothing, and says so with the document; what was there before stays."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.inference import Library, append, close_document, edit, memorize
from hsa_ultralong.memory import MemoryFile
from hsa_ultralong.memory.files.verification import verify_file
from hsa_ultralong.models.reading import DocumentReader
from hsa_ultralong.testing.factories import random_tokens, tiny_model

SICK = 36  # the one token whose embedding is not finite


@pytest.fixture(params=[float("nan"), float("inf")])
def model(request):
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[SICK] = request.param
    return model


def tokens(length, *, seed=0, sick=None):
    ids = random_tokens(1, length, vocab_size=36, seed=seed)[0]
    if sick is not None:
        ids[sick] = SICK
    return ids


@pytest.mark.parametrize("options", [{}, {"store": "host"}, {"key_values": "int8", "landmarks": "int8"}])
@pytest.mark.parametrize(("length", "sick"), [(23, 3), (23, 22), (3, 1)])
def test_memorize_refuses_and_names_the_document(model, options, length, sick):
    documents = [tokens(9), tokens(length, sick=sick)]
    with pytest.raises(ValueError, match="'b' cannot be memorised: the model computes numbers that are not finite"):
        memorize(model, documents, names=["a", "b"], piece_tokens=8, **options)


def test_append_and_edit_refuse_and_leave_the_memory_as_it_was(model):
    memory = memorize(model, tokens(23))
    before = [part.clone() for part in memory.tensors]
    with pytest.raises(ValueError, match="not finite"):
        append(model, memory, tokens(14, sick=5), name="second")
    with pytest.raises(ValueError, match="not finite"):
        edit(model, memory, 2, 3, [SICK])
    assert len(memory.documents) == 1 and memory.num_chunks == 6
    assert all(torch.equal(left, right) for left, right in zip(before, memory.tensors, strict=True))
    append(model, memory, tokens(14), name="second")
    close_document(model, memory)
    assert len(memory.documents) == 2


def test_a_file_takes_nothing_of_it(model, tmp_path):
    with Library.create(model, tmp_path / "a.hsa", key_values="fp32", landmarks="fp32") as library:
        library.add(tokens(23), name="good")
        for length, sick in ((23, 3), (3, 1)):
            with pytest.raises(ValueError, match=r"'bad'.*not finite"):
                library.add(tokens(length, sick=sick), name="bad")
        with pytest.raises(ValueError, match="not finite"):
            library.edit("good", 2, 3, [SICK])
    with MemoryFile.open(tmp_path / "a.hsa") as file:
        assert [document.name for document in file.documents] == ["good"] and verify_file(file) == []


@pytest.fixture
def sick_short(monkeypatch):
    """A model whose numbers overflow in short chunks only, as those of fp16 may."""
    encode_short = DocumentReader.encode_short

    def overflow(self, hidden, chunk, segment):
        found = encode_short(self, hidden.to(hidden.dtype).clone(), chunk, segment)
        found.k[:, : hidden.shape[1]] = float("inf")
        self.check.note(found.k)
        return found

    def switch(is_sick):
        monkeypatch.setattr(DocumentReader, "encode_short", overflow if is_sick else encode_short)

    return switch


@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize(("before", "close", "document"), [(True, True, None), (False, True, None), (False, True, 0)])
def test_a_lone_short_chunk_that_is_not_finite_leaves_the_memory_as_it_was(sick_short, store, before, close, document):
    model = tiny_model()
    memory = memorize(model, tokens(10), close=before, store=store)
    was_open, num_chunks = memory.open_document is not None, memory.num_chunks
    state = memory.open_document.continuation if was_open else None
    sick_short(True)
    with pytest.raises(ValueError, match="cannot be memorised: the model computes numbers that are not finite"):
        append(model, memory, tokens(1), document=document, name="" if document == 0 else "short")
    assert len(memory.documents) == 1 and memory.num_chunks == num_chunks
    assert memory.documents[0].num_tokens == 10 and memory.documents[0].continuation is state
    assert (memory.open_document is not None) == was_open
    sick_short(False)
    append(model, memory, tokens(5), document=document)
    expected = memorize(model, torch.cat((tokens(10), tokens(5))) if document == 0 else [tokens(10), tokens(5)])
    assert memory.num_chunks == expected.num_chunks
    torch.testing.assert_close(memory.loaded().landmarks, expected.landmarks)


def test_a_short_text_that_is_not_finite_is_refused_though_it_stays_open(model):
    memory = memorize(model, tokens(23))
    with pytest.raises(ValueError, match="'short' cannot be memorised"):
        append(model, memory, tokens(2, sick=1), name="short", close=False)
    append(model, memory, tokens(2), name="short", close=False)
    with pytest.raises(ValueError, match="not finite"):
        append(model, memory, [SICK], document=1, close=False)
    assert memory.open_document.num_tokens == 2 and memory.open_document.continuation.lower.isfinite().all()


def test_a_file_takes_no_lone_short_chunk_that_is_not_finite(sick_short, tmp_path):
    model = tiny_model()
    with Library.create(model, tmp_path / "a.hsa", key_values="fp32", landmarks="fp32") as library:
        library.add(tokens(10), name="good", close=False)
        sick_short(True)
        for change in (lambda: library.add(tokens(1), name="bad"), lambda: library.extend([3], close=True)):
            with pytest.raises(ValueError, match="not finite"):
                change()
            assert [(d.name, d.num_tokens, d.is_open) for d in library.documents] == [("good", 10, True)]
        sick_short(False)
        library.add(tokens(1), name="short")
    with MemoryFile.open(tmp_path / "a.hsa") as file:
        assert [d.is_open for d in file.documents] == [False, False] and verify_file(file) == []
