from __future__ import annotations

import numpy as np
import pytest

from hsa_ultralong.data import (
    DocumentSampler,
    NeedleOptions,
    PieceTokenizer,
    RowLayout,
    needles_row,
    self_copy_row,
    text_row,
)

S = 32
T = 32 * 33
LAYOUT = RowLayout(T, S, bos=0, eos=1, pad=2)
NUM_ROWS = 60


@pytest.fixture(scope="module")
def sampler(shards):
    return DocumentSampler(shards)


@pytest.fixture(scope="module")
def make_needles(shards, sampler, tokenizer):
    pieces = PieceTokenizer(tokenizer, shards.words)

    def make(seed: int, **options):
        options = {"max_needles": 6, "max_questions": 4, **options}
        return needles_row(np.random.default_rng(seed), LAYOUT, sampler, pieces, shards.words, NeedleOptions(**options))

    return make


@pytest.fixture(scope="module")
def rows(sampler, make_needles):
    rngs = [np.random.default_rng(seed) for seed in range(NUM_ROWS)]
    return (
        [text_row(rng, LAYOUT, sampler) for rng in rngs]
        + [self_copy_row(rng, LAYOUT, sampler) for rng in rngs]
        + [make_needles(seed) for seed in range(NUM_ROWS)]
    )


def spans(row):
    """Return [start, stop) of each document of a row."""
    return [
        (int(np.flatnonzero(row.segment_ids == i)[0]), int(np.flatnonzero(row.segment_ids == i)[-1]) + 1)
        for i in range(int(row.segment_ids.max()) + 1)
    ]


def text_of(row, tokenizer, document):
    start, stop = spans(row)[document]
    return tokenizer.decode(row.input_ids[start:stop], skip_special_tokens=True)


def test_rows_have_their_shapes_and_types(rows):
    for row in rows:
        assert row.input_ids.shape == row.labels.shape == row.segment_ids.shape == row.answer_mask.shape == (T,)
        assert row.input_ids.dtype == row.labels.dtype == row.segment_ids.dtype == np.int32
        assert row.answer_mask.dtype == np.bool_


def test_every_document_starts_a_chunk_with_bos_and_is_contiguous(rows):
    for row in rows:
        assert row.segment_ids.min() >= -1
        for i, (start, stop) in enumerate(spans(row)):
            assert start % S == 0 and row.input_ids[start] == LAYOUT.bos
            assert (row.segment_ids[start:stop] == i).all()
            assert (row.input_ids[start + 1 : stop] != LAYOUT.bos).all()
        starts = [start for start, _ in spans(row)]
        assert starts[0] == 0 and starts == sorted(starts)


def test_padding_only_fills_the_last_chunk_of_a_document(rows):
    for row in rows:
        padding = row.segment_ids == -1
        assert (row.input_ids[padding] == LAYOUT.pad).all()
        ends = [*[start for start, _ in spans(row)][1:], T]
        for (_, stop), end in zip(spans(row), ends):
            # Questions may leave whole chunks at the end of a row unused.
            assert end - stop < S or end == T


def test_text_and_self_copy_rows_waste_less_than_two_chunks_at_the_end(rows):
    for row in rows[: 2 * NUM_ROWS]:
        assert T - spans(row)[-1][1] < 2 * S


def test_labels_are_the_tokens_but_for_padding_and_first_tokens(rows):
    for row in rows:
        ignored = row.segment_ids == -1
        ignored[[start for start, _ in spans(row)]] = True
        assert (row.labels[ignored] == -100).all()
        assert (row.labels[~ignored] == row.input_ids[~ignored]).all()
        assert not (row.answer_mask & ignored).any()


def test_text_rows_are_slices_of_training_documents(rows, tokenizer, documents, shards):
    allowed = [tokenizer.encode(documents[i], add_special_tokens=False) for i in shards.documents("train")]
    for row in rows[:10]:
        for start, stop in spans(row):
            tokens = [int(token) for token in row.input_ids[start + 1 : stop] if token != LAYOUT.eos]
            needle = " ".join(map(str, tokens))
            assert any(f" {needle} " in f" {' '.join(map(str, source))} " for source in allowed)


def test_slices_start_uniformly_over_tokens(shards):
    sampler = DocumentSampler(shards)
    rng = np.random.default_rng(0)
    # every token is its own place
    sampler._data = np.arange(shards.num_tokens)
    starts = [sampler.slice(rng, 8, min_tokens=1)[0] for _ in range(4000)]
    counts = np.array([sum(shards.offsets[i] <= s < shards.offsets[i + 1] for s in starts) for i in range(8)])
    lengths = np.diff(shards.offsets).astype(float)
    lengths[shards.documents("validation")] = 0
    assert np.abs(counts / 4000 - lengths / lengths.sum()).max() < 0.03


def test_long_documents_give_rows_of_one_document(shards):
    sampler = DocumentSampler(shards, long_tokens=T)
    for seed in range(20):
        row = text_row(np.random.default_rng(seed), LAYOUT, sampler)
        assert (row.segment_ids == 0).all()


def test_self_copy_repeats_the_text_in_one_or_two_documents(rows):
    num_documents = []
    for row in rows[NUM_ROWS : 2 * NUM_ROWS]:
        found = spans(row)
        num_documents.append(len(found))
        body = [row.input_ids[start + 1 : stop] for start, stop in found]
        body = [part[:-1] if part[-1] == LAYOUT.eos else part for part in body]
        if len(found) == 1:
            assert len(body[0]) % 2 == 0 and len(body[0]) > T - S - 4
            first, second = np.split(body[0], 2)
            assert (first == second).all()
        else:
            first, second = body
            assert len(second) > T // 2 - 2 * S
            assert any((first[i : i + len(second)] == second).all() for i in range(S) if i + len(second) <= len(first))
    assert 0.25 < np.mean(np.array(num_documents) == 1) < 0.75


def test_question_documents_ask_for_statements_of_the_haystack(make_needles, tokenizer):
    for seed in range(30):
        row = make_needles(seed, inline_fraction=0.0)
        texts = [text_of(row, tokenizer, i) for i in range(int(row.segment_ids.max()) + 1)]
        is_question = [bool(row.answer_mask[start:stop].any()) for start, stop in spans(row)]
        num_questions = sum(is_question)
        assert 1 <= num_questions <= 4 and is_question == sorted(is_question)
        haystack = "".join(texts[:-num_questions])
        for (start, stop), text in list(zip(spans(row), texts))[-num_questions:]:
            answer = tokenizer.decode(row.input_ids[start:stop][row.answer_mask[start:stop]])
            assert answer.startswith(" ") and text.rstrip(".").endswith(answer)
            assert haystack.count(answer + ".") == 1
            assert row.input_ids[stop - 1] == LAYOUT.eos
            assert text.startswith("Question:") == text.endswith(answer)


def test_inline_questions_end_the_haystacks_last_document(make_needles, tokenizer):
    for seed in range(30):
        row = make_needles(seed, inline_fraction=1.0)
        last = int(row.segment_ids.max())
        assert set(row.segment_ids[row.answer_mask]) == {last}
        assert (row.segment_ids >= 0).all() and row.input_ids[-1] == LAYOUT.eos
        whole = "".join(text_of(row, tokenizer, i) for i in range(last + 1))
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.answer_mask.astype(int), [0]])))
        for start, stop in edges.reshape(-1, 2):
            assert whole.count(tokenizer.decode(row.input_ids[start:stop])) >= 2


def test_needle_places_are_uniform_over_the_haystack(make_needles, tokenizer):
    places = []
    for seed in range(300):
        row = make_needles(seed, inline_fraction=0.0, max_needles=1, max_haystack_documents=1)
        haystack = text_of(row, tokenizer, 0)
        start, stop = spans(row)[1]
        answer = tokenizer.decode(row.input_ids[start:stop][row.answer_mask[start:stop]])
        places.append(haystack.index(answer + ".") / len(haystack))
    assert 0.44 < np.mean(places) < 0.56
    assert np.histogram(places, bins=4, range=(0, 1))[0].min() > 45


def test_both_question_styles_and_both_placements_occur(rows, tokenizer):
    needle_rows = rows[2 * NUM_ROWS :]
    text = "".join(tokenizer.decode(row.input_ids) for row in needle_rows)
    assert text.count("Question:") > 20 and text.count("<|bos|>The ") > 20
    inline = np.mean([row.segment_ids[row.answer_mask].min() == row.segment_ids.max() for row in needle_rows])
    assert 0.1 < inline < 0.7
    assert {row.segment_ids[row.answer_mask].min() > 1 for row in needle_rows} == {True, False}


def test_too_short_rows_are_refused(shards, sampler, tokenizer):
    pieces = PieceTokenizer(tokenizer, shards.words)
    with pytest.raises(ValueError, match="use a larger seq_len"):
        needles_row(
            np.random.default_rng(0), RowLayout(32, 8, 0, 1, 2), sampler, pieces, shards.words, NeedleOptions(4, 4)
        )


def test_no_document_long_enough_is_refused(shards):
    with pytest.raises(ValueError, match="no train document has 10,000,000 tokens"):
        DocumentSampler(shards, long_tokens=10_000_000)
