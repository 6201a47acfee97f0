"""What reading leaves behind: chunks equal one forward's, refusals and interruptions change nothing (facts 4, 5)."""

import numpy as np
import pytest
import torch

from hsa_ultralong.inference import append, close_document, edit, last_logits, memory_fingerprint
from hsa_ultralong.memory.chunk_memory import ChunkMemory
from hsa_ultralong.models import HSACache
from hsa_ultralong.testing.factories import MODEL_OPTIONS, encode_documents, random_tokens, tiny_model
from hsa_ultralong.train.stages import set_window

EXACT = {"rtol": 1e-10, "atol": 1e-11}
SIZE = 4


def document(length, seed=0):
    return random_tokens(1, length, seed=seed)[0]


def assert_same_chunks(one, other):
    """Same chunks; slots of k and v beyond a short chunk's length mean nothing."""
    assert one.num_chunks == other.num_chunks
    for name in ("lengths", "segments", "ends"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    present = (torch.arange(one.chunk_size) < one.lengths[..., None]).flatten(1)
    torch.testing.assert_close(one.landmarks, other.landmarks, **EXACT)
    torch.testing.assert_close(one.k[present], other.k[present], **EXACT)
    torch.testing.assert_close(one.v[present], other.v[present], **EXACT)


def snapshot(memory):
    return [part.clone() for part in memory.tensors], memory.num_tokens, memory.open_document is not None


def assert_unchanged(memory, before):
    tensors, num_tokens, is_open = before
    assert memory.num_tokens == num_tokens and (memory.open_document is not None) == is_open
    assert all(torch.equal(a, b) for a, b in zip(tensors, memory.tensors, strict=True))
    assert memory.num_chunks == sum(part.num_chunks for part in memory.documents)


@pytest.mark.parametrize("options", MODEL_OPTIONS)
@torch.no_grad()
def test_chunks_read_in_segments_equal_those_of_one_forward(options):
    model, tokens = tiny_model(**MODEL_OPTIONS[options]), document(47)
    whole, full = model.memorize(tokens, close=False), model(tokens[None]).past_key_values.own_memory
    assert_same_chunks(whole, full)
    for segment in (1, 3, 11, 46):
        assert_same_chunks(model.memorize(tokens, close=False, piece_tokens=segment), whole)


@pytest.mark.parametrize("lengths", [(1,), (3,), (4,), (5,), (47,), (9, 1, 8, 3)])
def test_closed_documents_equal_reading_each_with_empty_windows(lengths):
    model = tiny_model()
    parts = [document(length, seed) for seed, length in enumerate(lengths)]
    assert_same_chunks(model.memorize(parts, piece_tokens=5), encode_documents(model, parts))


@pytest.mark.parametrize("options", ["default", "hsa_only_layer", "window_of_one", "all_at_once"])
@pytest.mark.parametrize("length", [2, 4, 50])
@torch.no_grad()
def test_every_number_of_last_logits_equals_the_full_forward(options, length):
    model, tokens = tiny_model(**MODEL_OPTIONS[options]), document(length)
    memory, full = model.memorize(tokens, close=False), model(tokens[None], use_cache=False).logits[0]
    for count in range(1, min(SIZE, length) + 1):
        torch.testing.assert_close(last_logits(model, memory, count), full[-count:], **EXACT)
    for count in (0, SIZE + 1):
        with pytest.raises(ValueError, match=r"1\.\.4"):
            last_logits(model, memory, count)


@torch.no_grad()
def test_last_logits_of_a_later_document_read_the_earlier_ones():
    model, first, second = tiny_model(), document(22), document(13, seed=1)
    memory = model.memorize([first, second], close=False)
    cache = HSACache(model.config, memory=model.memorize(first))
    full = model(second[None], past_key_values=cache).logits[0]
    torch.testing.assert_close(last_logits(model, memory, SIZE), full[-SIZE:], **EXACT)


@pytest.mark.parametrize("part", ["embed_tokens", "lower_layers", "chunk_encoder"])
def test_fingerprint_changes_with_every_parameter_below_the_upper_decoder(part):
    model = tiny_model()
    seen = {memory_fingerprint(model)}
    for parameter in getattr(model.model, part).parameters():
        with torch.no_grad():
            parameter.flatten()[-1:].add_(1e-9)
        seen.add(memory_fingerprint(model))
    assert len(seen) == 1 + len(list(getattr(model.model, part).parameters()))


def test_a_changed_window_or_dtype_is_noticed_and_the_memory_refused():
    model = tiny_model()
    memory = model.memorize(document(30))
    before = memory_fingerprint(model)
    set_window(model, 3)
    with pytest.raises(ValueError, match="another model"):
        edit(model, memory, 0, 1, [1])
    set_window(model, 5)
    assert memory_fingerprint(model) == before
    model.float()
    with pytest.raises(ValueError, match="another model"):
        append(model, memory, [1, 2])


def test_two_models_of_the_same_weights_share_a_memory():
    first, second = tiny_model(), tiny_model()
    memory = first.memorize(document(30))
    append(second, memory, document(7, seed=1))
    assert_same_chunks(memory, first.memorize([document(30), document(7, seed=1)]))


@pytest.mark.parametrize("kind", [list, np.asarray, lambda x: np.asarray(x, dtype=np.uint16), lambda x: x[None]])
def test_token_ids_may_come_in_any_integer_form(kind):
    model, tokens = tiny_model(), document(21)
    given = kind(tokens) if kind is not list else tokens.tolist()
    assert_same_chunks(model.memorize(given), model.memorize(tokens))
    assert model.memorize(given).documents[0].tokens.dtype == torch.int32


@pytest.mark.parametrize("size", [1, 4, 7, 30])
def test_streams_of_any_piece_size_equal_the_whole(size):
    model, tokens = tiny_model(), document(26)
    pieces = [tokens[:0], *tokens.split(size), tokens[:0]]
    assert_same_chunks(model.memorize(iter(pieces), piece_tokens=6), model.memorize(tokens))
    assert torch.equal(model.memorize(iter(pieces)).documents[0].tokens, tokens.int())


@pytest.mark.parametrize("pieces", [[1] * 27, [3, 1, 8, 15], [26, 1], [4, 4, 4, 15]])
@torch.no_grad()
def test_a_document_grown_by_appends_equals_one_read_at_once(pieces):
    model, tokens = tiny_model(), document(27)
    first, *rest = tokens.split(pieces)
    memory = model.memorize(first, close=False)
    for piece in rest:
        append(model, memory, piece, document=0, close=False)
    full = model(tokens[None], use_cache=False).logits[0]
    torch.testing.assert_close(last_logits(model, memory, SIZE), full[-SIZE:], **EXACT)
    close_document(model, memory)
    assert_same_chunks(memory, model.memorize(tokens))
    close_document(model, memory)
    assert memory.num_chunks == 7


def test_appended_documents_equal_a_list_and_close_the_open_one():
    model, parts = tiny_model(), [document(length, seed) for seed, length in enumerate((10, 4, 7))]
    memory = model.memorize(parts[0], names=["a"], close=False)
    append(model, memory, parts[1], name="b", close=False)
    append(model, memory, parts[2], name="c")
    assert_same_chunks(memory, model.memorize(parts))
    assert [(part.name, part.is_open) for part in memory.documents] == [("a", False), ("b", False), ("c", False)]


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([99], {}, r"0\.\.36"),
        ([-1], {"document": 0}, r"0\.\.36"),
        ([], {}, "nothing to append"),
        ([], {"document": 0}, "nothing to append"),
        ([1.5], {}, "token ids"),
        ([1], {"piece_tokens": 0}, "piece_tokens"),
        ([1], {"document": 1}, "not open"),
        ([1], {"document": -1}, "not open"),
    ],
)
def test_a_refused_append_changes_nothing(tokens, options, message):
    model = tiny_model()
    memory = model.memorize(document(30), close=False)
    before = snapshot(memory)
    with pytest.raises(ValueError, match=message):
        append(model, memory, tokens, **options)
    assert_unchanged(memory, before)


@pytest.mark.parametrize("options", [{"document": 0}, {}])
def test_an_interrupted_append_leaves_no_chunk_without_an_owner(options):
    model, more = tiny_model(), document(40, seed=1)
    memory = model.memorize(document(30), close=not options)
    before = snapshot(memory)

    def interrupt(done, _):
        if done >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        append(model, memory, more, piece_tokens=8, progress=interrupt, **options)
    assert_unchanged(memory, before)
    append(model, memory, more, **options)
    both = torch.cat((document(30), more)) if options else [document(30), more]
    assert_same_chunks(memory, model.memorize(both))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2], []], "document 1 is empty"),
        ([[]], "empty"),
        (iter([]), "empty"),
        (torch.tensor([True, False]), "token ids"),
        ([True], "token ids"),
        ("a text", "token ids"),
        ({"input_ids": [1]}, "token ids"),
        (None, "token ids"),
        ([2**40], r"0\.\.36"),
        (torch.tensor([2**32 + 1]), r"0\.\.36"),
        ([[1], [37]], r"0\.\.36"),
        (iter([torch.tensor([1]), torch.tensor([37])]), r"0\.\.36"),
    ],
)
def test_what_is_no_document_is_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().memorize(tokens)


@pytest.mark.parametrize("options", [{"fusion": "stick_breaking"}, {"position_decay": True}, {"fusion": "softmax"}])
def test_only_order_free_models_merge_and_select(options):
    model = tiny_model(**options)
    memory, other = model.memorize(document(9)), model.memorize(document(6, seed=1))
    if model.config.is_composable:
        merged = ChunkMemory.concat([memory, other, memory])
        assert_same_chunks(merged, model.memorize([document(9), document(6, seed=1), document(9)]))
        assert_same_chunks(merged.select([1, 0]), ChunkMemory.concat([other, memory]))
        return
    for merge in (lambda: ChunkMemory.concat([memory, other]), lambda: memory.select([0])):
        with pytest.raises(ValueError, match=r"order of chunks .* softmax-fusion model"):
            merge()
    with pytest.raises(ValueError, match="another kind of fusion"):
        HSACache(tiny_model().config, memory=memory)


def test_a_model_cut_over_processes_is_refused_before_it_is_read(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(torch.nn.Parameter, "full_tensor", lambda self: self, raising=False)
    with pytest.raises(ValueError, match="cut over processes"):
        memory_fingerprint(model)
