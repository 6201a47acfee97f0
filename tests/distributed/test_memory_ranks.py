"""A memory shared out over processes answers like one: gloo, fp64, on the CPU."""

import pytest
import torch
import torch.distributed as dist

from hsa_ultralong.inference import (
    DecodingEngine,
    append,
    ask,
    edit,
    join,
    memorize_together,
    open_shared,
    share_out,
)
from hsa_ultralong.inference.prefixes import contents_of
from hsa_ultralong.memory.chunk_memory import ChunkMemory
from hsa_ultralong.models import HSACache
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_model
from hsa_ultralong.testing.processes import launch


def document(length, seed=0):
    return random_tokens(1, length, seed=seed)[0]


class Words:
    """Stands for a tokenizer: one token a letter."""

    def __call__(self, text):
        return {"input_ids": [ord(letter) % 37 for letter in text]}

    def decode(self, tokens, **_):
        return " ".join(map(str, tokens))


def work(rank, world, address, options, lengths):
    model = tiny_model(**options)
    whole = model.memorize([document(n, seed) for seed, n in enumerate(lengths)])
    part = share_out(whole)
    assert part.num_chunks in (whole.num_chunks // world, -(-whole.num_chunks // world))
    assert part.num_chunks_of_all == whole.num_chunks
    for batch, tokens in ((1, 1), (3, 9), (1, 70)):
        ids = random_tokens(batch, tokens, seed=tokens)
        logits = []
        for memory in (whole, part):
            cache = HSACache(model.config, memory=memory)
            with torch.no_grad():
                first = model(ids, past_key_values=cache).logits
                logits.append((first, model(ids[:, :1], past_key_values=cache).logits))
        for one, other in zip(*logits, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-12)
    ids = random_tokens(2, 6, seed=3)
    more = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, memory=part, **more), model.generate(ids, memory=whole, **more))
    one, other = (ask(model, Words(), memory, "what is it", max_new_tokens=4) for memory in (whole, part))
    assert one.tokens == other.tokens and abs(one.weight - other.weight) < 1e-9
    assert [(s.document, s.start) for s in one.sources] == [(s.document, s.start) for s in other.sources]
    with pytest.raises(ValueError, match="shared out over processes"):
        append(model, part, document(5))
    if rank == 0:
        whole.save(f"{address}.hsa")
    dist.barrier()
    for store in ("device", "host", "file"):
        opened = open_shared(f"{address}.hsa", store=store, dtype=torch.float64)
        assert (opened.num_chunks, opened.num_chunks_of_all) == (part.num_chunks, whole.num_chunks)
        assert torch.equal(model.generate(ids, memory=opened, **more), model.generate(ids, memory=whole, **more))


@pytest.mark.parametrize(
    ("options", "world", "lengths"),
    [
        ("default", 2, (90, 33)),
        ("hsa_only_layer", 3, (50,)),
        pytest.param("default", 3, (50,), marks=pytest.mark.slow),
        pytest.param("hsa_only_layer", 2, (90, 33), marks=pytest.mark.slow),
        pytest.param("default", 3, (5,), marks=pytest.mark.slow),
        pytest.param("hsa_only_layer", 3, (5,), marks=pytest.mark.slow),
    ],
)
def test_ranks_together_answer_like_one(tmp_path, options, world, lengths):
    launch(world, tmp_path / "meet", work, tmp_path / "library", MODEL_OPTIONS[options], lengths)


def read_apart(rank, world, options, lengths, store):
    """Every process reads documents of its own, the last one none where there are fewer."""
    model = tiny_model(**options)
    texts = [[document(n, seed=10 * number + i) for i, n in enumerate(own)] for number, own in enumerate(lengths)]
    names = [[f"{number}-{i}" for i in range(len(own))] for number, own in enumerate(lengths)]
    parts = [model.memorize(own, names=called) for own, called in zip(texts, names, strict=True) if own]
    whole = ChunkMemory.concat(parts)
    joined = memorize_together(model, texts[rank], names=names[rank] or None, store=store)
    assert joined.num_chunks_of_all == whole.num_chunks and joined.num_tokens == whole.num_tokens
    assert joined.forms == joined.own.forms and "chunks" in repr(joined) and "Document" in repr(joined.documents)
    for one, other in zip(whole.documents, joined.documents, strict=True):
        for told in ("name", "num_tokens", "first_chunk", "num_chunks"):
            assert getattr(one, told) == getattr(other, told)
    ids = random_tokens(2, 6, seed=3)

    def compare():
        logits = []
        for memory in (whole, joined):
            with torch.no_grad():
                logits.append(model(ids, past_key_values=HSACache(model.config, memory=memory)).logits)
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-11, atol=1e-12)
        one, other = (ask(model, Words(), memory, "what is it", max_new_tokens=4) for memory in (whole, joined))
        assert one.tokens == other.tokens and abs(one.weight - other.weight) < 1e-9
        assert [(s.document, s.name, s.start) for s in one.sources] == [
            (s.document, s.name, s.start) for s in other.sources
        ]

    compare()
    # an edit where the text lies is an edit of the whole
    new = document(5, seed=77)
    edit(model, whole, 7, 12, new, document=0)
    if rank == 0:
        edit(model, joined.own, 7, 12, new, document=0)
    compare()
    assert contents_of(joined) is None
    here = sum(len(own) for own in texts[:rank])
    if texts[rank]:
        assert torch.equal(joined.documents[here].tokens, whole.documents[here].tokens)
    with pytest.raises(ValueError, match="which has read it"):
        _ = joined.documents[0 if rank else len(texts[0])].tokens
    with pytest.raises(ValueError, match="without reread"):
        ask(model, Words(), joined, "what is it", reread=1)
    with pytest.raises(ValueError, match="joined"):
        join(joined)
    with pytest.raises(ValueError, match="shared out over processes"):
        append(model, joined, document(5))


@pytest.mark.parametrize(
    ("options", "lengths", "store"),
    [
        ("default", [(90, 33), (41,)], "device"),
        ("hsa_only_layer", [(50,), (70, 9), ()], "tiered"),
    ],
)
def test_what_ranks_have_read_answers_like_one_memory(tmp_path, options, lengths, store):
    launch(len(lengths), tmp_path / "meet", read_apart, MODEL_OPTIONS[options], lengths, store)


def change_after_joining(rank, world):
    model = tiny_model()
    joined = memorize_together(model, [document(90, seed=rank), document(33, seed=9 + rank)])
    engine = DecodingEngine(model, joined, max_tokens=12)
    size, own, ids = model.config.chunk_size, joined.own, random_tokens(1, 6, seed=3)
    # both are refused before anything is exchanged, so on this process alone
    edit(model, own, 0, size, [], document=0)
    edit(model, own, 0, 0, document(size, seed=4), document=1)
    with pytest.raises(ValueError, match="as many"):
        model(ids, past_key_values=HSACache(model.config, memory=joined))
    edit(model, own, 0, 0, document(400, seed=5), document=0)
    edit(model, own, 0, 400 - size, [], document=0)
    edit(model, own, 0, size, [], document=1)
    with pytest.raises(ValueError, match="make a new engine"):
        engine.start(0, ids[0])
    fresh = ask(model, Words(), joined, "what is it", max_new_tokens=4)
    again = ask(model, Words(), join(own), "what is it", max_new_tokens=4)
    assert fresh.tokens == again.tokens and fresh.sources == again.sources
    append(model, own, document(5))
    with pytest.raises(ValueError, match="as many"):
        model(ids, past_key_values=HSACache(model.config, memory=joined))


def test_what_changes_lengths_after_joining_is_refused(tmp_path):
    launch(2, tmp_path / "meet", change_after_joining)


def ask_little(rank, world):
    """Fewer chunks than are asked for a token: a list of every rank is longer than all of them together."""
    model = tiny_model(chunk_topk=16)
    texts = [document(9, seed=rank) for rank in range(world)]
    whole = model.memorize(texts)
    for memory in (memorize_together(model, texts[rank]), share_out(whole)):
        one, other = (ask(model, Words(), each, "what is it", max_new_tokens=4) for each in (whole, memory))
        assert one.tokens == other.tokens and abs(one.weight - other.weight) < 1e-9
        assert [(s.document, s.start) for s in one.sources] == [(s.document, s.start) for s in other.sources]


def test_a_memory_of_fewer_chunks_than_a_token_reads_is_asked(tmp_path):
    launch(2, tmp_path / "meet", ask_little)


def read_differently(rank, world):
    model = tiny_model()
    joined = memorize_together(model, document(50, seed=rank))
    model.config.chunk_topk = 2 + rank
    with pytest.raises(ValueError, match="chunk_topk"):
        ask(model, Words(), joined, "what is it", max_new_tokens=2)


def test_processes_that_read_other_numbers_of_chunks_are_refused(tmp_path):
    launch(2, tmp_path / "meet", read_differently)


def refuse_to_join(rank, world):
    model = tiny_model()
    is_open = model.memorize(document(50), close=rank == 0)
    with pytest.raises(ValueError, match="still open"):
        join(is_open)
    with pytest.raises(ValueError, match="close=False"):
        memorize_together(model, document(50), close=False)
    ordered = model.memorize(document(50))
    ordered.is_composable = False
    with pytest.raises(ValueError, match="order of chunks"):
        join(ordered)
    other = tiny_model(seed=rank)
    with pytest.raises(ValueError, match="different models"):
        join(other.memorize(document(50)))
    of_dtype = tiny_model().to(torch.float32 if rank else torch.float64)
    with pytest.raises(ValueError, match="dtype"):
        join(of_dtype.memorize(document(50)))


def test_what_cannot_be_joined_is_refused_by_all(tmp_path):
    launch(2, tmp_path / "meet", refuse_to_join)


def read_together(rank, world):
    model = tiny_model()
    texts = [document(70), document(41, seed=1)]
    shared, whole = memorize_together(model, texts[rank]), model.memorize(texts)
    assert shared.num_chunks_of_all == whole.num_chunks
    ids = random_tokens(1, 6, seed=3)
    found = [model.generate(ids, memory=memory, max_new_tokens=5, do_sample=False) for memory in (shared, whole)]
    assert torch.equal(*found)
    # the rank that cannot read says why, the others name it
    with pytest.raises(ValueError if rank else OSError, match="empty" if rank else "process 1: ValueError"):
        memorize_together(model, document(0) if rank else texts[0])


def test_ranks_read_together_or_none_does(tmp_path):
    launch(2, tmp_path / "meet", read_together)


def ask_in_another_dtype(rank, world, address):
    """A memory in bf16 read by a model in fp32; one chunk a token, so that one process reads nothing."""
    model = tiny_model(chunk_topk=1).float()
    if rank == 0:
        model.memorize(document(90)).save(f"{address}.hsa", key_values="bf16")
    dist.barrier()
    ids, logits = random_tokens(1, 5, seed=3), []
    whole = ChunkMemory.load(f"{address}.hsa", store="file")
    part = share_out(ChunkMemory.load(f"{address}.hsa", store="device", dtype=torch.bfloat16))
    for memory in (whole, open_shared(f"{address}.hsa", store="file"), part):
        with torch.no_grad():
            logits.append(model(ids, past_key_values=HSACache(model.config, memory=memory)).logits)
    for found in logits[1:]:
        torch.testing.assert_close(found, logits[0], rtol=3e-2, atol=3e-2)


def test_ranks_read_a_memory_of_another_dtype(tmp_path):
    launch(2, tmp_path / "meet", ask_in_another_dtype, tmp_path / "library")


def test_sharing_out_needs_a_process_group():
    model = tiny_model()
    with pytest.raises(ValueError, match="torchrun"):
        share_out(model.memorize(document(9)))
    with pytest.raises(ValueError, match="torchrun"):
        join(model.memorize(document(9)))
