"""A model that computes NaN memorises nothing, and says so with the document; what was there before stays."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.inference import Library, append, close_document, edit, memorize
from hsa_ultralong.memory import MemoryFile
from hsa_ultralong.memory.files.verification import verify_file
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
