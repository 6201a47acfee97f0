"""Random sequences of edits, insertions and deletions equal a rebuild; an edit costs what was said."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsa_ultralong.inference import append, edit, last_logits
from hsa_ultralong.inference.editor import plan_edit
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
    rebuilt = model.memorize(texts)
    assert_same_chunks(memory, rebuilt)
    assert [d.tokens.tolist() for d in memory.documents] == [t.tolist() for t in texts]
    assert [(d.first_chunk, d.num_chunks) for d in memory.documents] == [
        (d.first_chunk, d.num_chunks) for d in rebuilt.documents
    ]


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
    for name in ("landmarks", "lengths"):
        before, after = old[2 if name == "landmarks" else 3], getattr(memory, name)
        assert torch.equal(before[:, : plan.first], after[:, : plan.first])
        assert torch.equal(before[:, plan.old_stop :], after[:, plan.new_stop :])


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
