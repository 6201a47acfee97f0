"""A memory shared out over processes answers like one: gloo, fp64, on the CPU."""

import pytest
import torch
import torch.distributed as dist

from hsa_ultralong.inference import append, ask, open_shared, share_out
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
