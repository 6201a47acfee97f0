"""Random sequences of edits, appends and deletions equal a rebuild; an edit costs what was said."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsa_ultralong.inference import append, close_document, edit, last_logits
from hsa_ultralong.inference.editor import plan_edit, recompute_chunks
from hsa_ultralong.models.evaluation import evaluating
from hsa_ultralong.models.reading import DocumentReader
from hsa_ultralong.nn.views import ChunkTensors
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_model
from tests.inference.test_memory_states import assert_same_chunks

EXACT = {"rtol": 1e-10, "atol": 1e-11}
SIZE = 4

# where (share of the document), tokens removed, tokens put in
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 13), st.integers(0, 13), st.integers(0, 2)), min_size=1, max_size=4
)


def document(length, seed=0):
    return random_tokens(1, length, seed=seed)[0].to(torch.int32)


def assert_same_memory(memory, rebuilt):
    assert_same_chunks(memory, rebuilt)
    for one, other in zip(memory.documents, rebuilt.documents, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert (one.first_chunk, one.num_chunks, one.is_open) == (other.first_chunk, other.num_chunks, other.is_open)
        assert (one.continuation is None) == (other.continuation is None)


def apply(model, memory, texts, edits):
    for number, (place, remove, put, which) in enumerate(edits):
        which %= len(texts)
        text = texts[which]
        start = round(place * len(text))
        stop = min(len(text), start + remove)
        if len(text) - (stop - start) + put == 0:
            continue
        new = document(put, seed=100 + number) if put else document(1)[:0]
        texts[which] = torch.cat((text[:start], new, text[stop:]))
        edit(model, memory, start, stop, new, document=which)


@pytest.mark.parametrize("options", ["default", "window_of_one"])
@given(EDITS)
def test_any_sequence_of_edits_equals_a_rebuild(options, edits):
    model = tiny_model(**MODEL_OPTIONS[options])
    texts = [document(n, seed) for seed, n in enumerate((30, 7, 21))]
    memory = model.memorize(texts)
    apply(model, memory, texts, edits)
    assert_same_memory(memory, model.memorize(texts))


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["edit", "whole chunks", "append", "continue", "close", "delete"]), EDITS.map(lambda e: e[0])
    ),
    min_size=2,
    max_size=6,
)


@pytest.mark.parametrize(
    "options", ["default", "window_of_one", pytest.param("mixture_of_experts", marks=pytest.mark.slow)]
)
@given(CHANGES)
@torch.no_grad()
def test_any_sequence_of_edits_appends_and_deletions_equals_a_rebuild(options, changes):
    model = tiny_model(**MODEL_OPTIONS[options])
    texts, is_open = [document(30), document(7, seed=1), document(21, seed=2)], True
    memory = model.memorize(texts, close=False)
    for number, (kind, (place, remove, put, which)) in enumerate(changes):
        if kind == "edit":
            apply(model, memory, texts, [(place, remove, put, which)])
        elif kind == "whole chunks":
            # the grid stays: chunks after the edit move by whole chunks, or not at all
            apply(model, memory, texts, [(place, SIZE * (remove // 5), SIZE * (put // 5), which)])
        elif kind in ("append", "continue") and put and (is_open or kind == "append"):
            more, is_open = document(put, seed=50 + number), which > 0
            if kind == "append":
                append(model, memory, more, close=not is_open, piece_tokens=3)
                texts.append(more)
            else:
                append(model, memory, more, document=len(texts) - 1, close=not is_open)
                texts[-1] = torch.cat((texts[-1], more))
        elif kind == "close":
            close_document(model, memory)
            is_open = False
        elif kind == "delete" and len(texts) > 1 and not is_open:
            del texts[which % len(texts)]
            memory = memory.select([n for n in range(len(texts) + 1) if n != which % (len(texts) + 1)])
    rebuilt = model.memorize(texts, close=not is_open)
    assert_same_memory(memory, rebuilt)
    if is_open:
        count = min(SIZE, len(texts[-1]))
        torch.testing.assert_close(last_logits(model, memory, count), last_logits(model, rebuilt, count), **EXACT)


@given(EDITS)
@torch.no_grad()
def test_an_edited_open_document_goes_on_like_a_rebuilt_one(edits):
    model = tiny_model()
    texts = [document(9), document(26, seed=1)]
    memory = model.memorize(texts, close=False)
    apply(model, memory, texts, edits)
    for more in (None, document(5, seed=9)):
        if more is not None:
            append(model, memory, more, document=1, close=False)
            texts[1] = torch.cat((texts[1], more))
        rebuilt = model.memorize(texts, close=False)
        assert_same_chunks(memory, rebuilt)
        torch.testing.assert_close(last_logits(model, memory, 1), last_logits(model, rebuilt, 1), **EXACT)


@given(st.integers(1, 60), st.floats(0, 1), st.integers(0, 20), st.integers(0, 20), st.booleans())
def test_chunks_outside_the_plan_keep_every_bit(length, place, remove, put, is_open):
    model, text = tiny_model(), document(length)
    start = round(place * length)
    stop = min(length, start + remove)
    if length - (stop - start) + put == 0:
        return
    memory = model.memorize(text, close=not is_open)
    old = [part.clone() for part in memory.tensors]
    plan = plan_edit(model.config, length, start, stop, put, is_open=is_open)
    total = (length - (stop - start) + put) // SIZE if is_open else -(-(length - (stop - start) + put) // SIZE)
    assert 0 <= plan.first <= plan.new_stop <= total and plan.num_chunks <= total
    rewritten = edit(model, memory, start, stop, document(put, seed=3) if put else [])
    assert rewritten == range(plan.first, plan.new_stop)
    for name, before in zip(ChunkTensors._fields, old, strict=True):
        after = getattr(memory, name)
        if name in ("k", "v"):
            before, after = (part.unflatten(1, (-1, SIZE)) for part in (before, after))
        assert torch.equal(before[:, : plan.first], after[:, : plan.first])
        moved = SIZE * (plan.new_stop - plan.old_stop) if name == "ends" else 0
        assert torch.equal(before[:, plan.old_stop :] + moved, after[:, plan.new_stop :])


@pytest.mark.parametrize("options", ["default", "window_of_one", "one_group_of_one"])
@given(edits=EDITS)
def test_a_plan_counts_the_chunks_that_are_encoded_again(options, edits):
    model = tiny_model(**MODEL_OPTIONS[options])
    texts, encoded = [document(n, seed) for seed, n in enumerate((30, 7, 21))], []
    memory, encode = model.memorize(texts), DocumentReader.encode

    def counting(self, hidden, *arguments):
        encoded.append(hidden.shape[1] // SIZE)
        return encode(self, hidden, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DocumentReader, "encode", counting)
        for place, remove, put, which in edits:
            encoded.clear()
            text = texts[which]
            start = round(place * len(text))
            stop = min(len(text), start + remove)
            if len(text) - (stop - start) + put == 0:
                continue
            plan = plan_edit(model.config, len(text), start, stop, put)
            edit(model, memory, start, stop, document(put, seed=3) if put else [], document=which)
            texts[which] = memory.documents[which].tokens
            assert sum(encoded) == plan.num_chunks <= memory.documents[which].num_chunks


def test_with_windows_of_one_an_edit_reads_only_the_chunks_it_overlaps():
    config = tiny_model(**MODEL_OPTIONS["window_of_one"]).config
    assert config.lower_reach == 0
    assert plan_edit(config, 100, 41, 43, 2) == (10, 11, 11)
    assert plan_edit(config, 100, 40, 48, 0) == (10, 12, 10)
    assert plan_edit(config, 100, 41, 45, 0) == (10, 12, 11)
    assert plan_edit(config, 100, 40, 40, 4) == (10, 10, 11)


@pytest.mark.parametrize("step", [1, 3, 4, 10, 47])
def test_chunks_read_again_in_pieces_are_those_of_one_reading(step):
    model, text = tiny_model(), document(47)
    whole = model.memorize(text)
    for first, stop in ((0, 12), (0, 1), (5, 9), (11, 12)):
        with evaluating(model):
            parts = list(recompute_chunks(model, text, first, stop, 0, step))
        again = ChunkTensors(*(torch.cat(columns, 1) for columns in zip(*parts, strict=True)))
        assert again.ends[0].tolist() == [SIZE * (number + 1) for number in range(first, stop)]
        used = (torch.arange(SIZE) < again.lengths[..., None]).flatten(1)
        torch.testing.assert_close(again.landmarks, whole.landmarks[:, first:stop], **EXACT)
        torch.testing.assert_close(again.k[used], whole.k[:, SIZE * first : SIZE * stop][used], **EXACT)
        torch.testing.assert_close(again.v[used], whole.v[:, SIZE * first : SIZE * stop][used], **EXACT)


def test_length_changes_by_whole_chunks_read_a_few_chunks_again_others_the_rest():
    config = tiny_model().config
    reach = config.lower_reach // SIZE + 2
    assert plan_edit(config, 4000, 400, 400, 8).num_chunks <= 2 + reach
    assert plan_edit(config, 4000, 400, 408, 0).num_chunks <= reach
    assert plan_edit(config, 4000, 400, 403, 3).num_chunks <= 1 + reach
    assert plan_edit(config, 4000, 400, 400, 3) == (100, 1000, 1001)
    assert plan_edit(config, 4000, 400, 400, 0).num_chunks == 0


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (5, 4), (0, 11)])
def test_a_range_outside_the_document_or_an_empty_result_is_refused(start, stop):
    model = tiny_model()
    memory = model.memorize(document(10))
    with pytest.raises(ValueError, match=r"not a range of the document \(0\.\.10\)"):
        edit(model, memory, start, stop, [1])
    with pytest.raises(ValueError, match="delete the document instead"):
        edit(model, memory, 0, 10, [])
    assert memory.documents[0].num_tokens == 10
