"""A memory shared out over processes answers like one: gloo, fp64, on the CPU."""

import pytest
import torch
import torch.distributed as dist

from hsa_ultralong.inference import append, ask, edit, join, memorize_together, open_shared, share_out
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
    """Every process reads documents of its own; the last one none where there are fewer."""
    model = tiny_model(**options)
    texts = [[document(n, seed=10 * number + i) for i, n in enumerate(own)] for number, own in enumerate(lengths)]
    names = [[f"{number}-{i}" for i in range(len(own))] for number, own in enumerate(lengths)]
    parts = [model.memorize(own, names=called) for own, called in zip(texts, names, strict=True) if own]
    whole = ChunkMemory.concat(parts)
    own = model.memorize(texts[rank], names=names[rank], store=store) if texts[rank] else whole.held(0, 0)
    own.documents = own.documents if texts[rank] else []
    joined = join(own)
    assert joined.num_chunks_of_all == whole.num_chunks and joined.num_tokens == whole.num_tokens
    told = [
        [(d.name, d.num_tokens, d.first_chunk, d.num_chunks) for d in memory.documents] for memory in (whole, joined)
    ]
    assert told[0] == told[1]
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
    here = sum(len(own) for own in texts[:rank])
    if texts[rank]:
        assert torch.equal(joined.documents[here].tokens, whole.documents[here].tokens)
    with pytest.raises(ValueError, match="alone, which has read it"):
        _ = joined.documents[0 if rank else len(texts[0])].tokens
    with pytest.raises(ValueError, match="joined"):
        join(joined)
    with pytest.raises(ValueError, match="shared out over processes"):
        append(model, joined, document(5))
    if rank == 0 and store == "device":
        append(model, joined.own, document(5))
        with pytest.raises(ValueError, match="another number of chunks"):
            model(ids, past_key_values=HSACache(model.config, memory=joined))


@pytest.mark.parametrize(
    ("options", "lengths", "store"),
    [
        ("default", [(90, 33), (41,)], "device"),
        ("hsa_only_layer", [(50,), (70, 9), ()], "tiered"),
    ],
)
def test_what_ranks_have_read_answers_like_one_memory(tmp_path, options, lengths, store):
    launch(len(lengths), tmp_path / "meet", read_apart, MODEL_OPTIONS[options], lengths, store)


def refuse_to_join(rank, world):
    model = tiny_model()
    is_open = model.memorize(document(50), close=rank == 0)
    with pytest.raises(ValueError, match="still open"):
        join(is_open)
    ordered = model.memorize(document(50))
    ordered.is_composable = False
    with pytest.raises(ValueError, match="order of chunks"):
        join(ordered)
    other = tiny_model(seed=rank)
    with pytest.raises(ValueError, match="different models"):
        join(other.memorize(document(50)))


def read_together(rank, world):
    model = tiny_model()
    texts = [document(70), document(41, seed=1)]
    shared, whole = memorize_together(model, texts[rank]), model.memorize(texts)
    assert shared.num_chunks_of_all == whole.num_chunks
    ids = random_tokens(1, 6, seed=3)
    found = [model.generate(ids, memory=memory, max_new_tokens=5, do_sample=False) for memory in (shared, whole)]
    assert torch.equal(*found)
    # the rank that cannot read says why, the others name it
    with pytest.raises(
        ValueError if rank else OSError, match="nothing to memorise" if rank else "process 1: ValueError"
    ):
        memorize_together(model, [] if rank else texts[0])


def test_ranks_read_together_or_none_does(tmp_path):
    launch(2, tmp_path / "meet", read_together)


def test_what_cannot_be_joined_is_refused_by_all(tmp_path):
    launch(2, tmp_path / "meet", refuse_to_join)


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
