"""Reading equals one forward, in segments, streams and documents (facts 4, 5, 7)."""

import pytest
import torch

from hsa_ultralong.inference import append, close_document, last_logits, memory_fingerprint
from hsa_ultralong.memory.chunk_memory import ChunkMemory
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_model

EXACT = {"rtol": 1e-10, "atol": 1e-11}
SIZE = 4


def document(length, seed=0):
    return random_tokens(1, length, seed=seed)[0]


def assert_same_memory(one, other):
    """Same chunks; slots of k and v beyond a short chunk's length mean nothing."""
    assert one.num_chunks == other.num_chunks
    torch.testing.assert_close(one.landmarks, other.landmarks, **EXACT)
    for name in ("lengths", "segments", "ends"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    present = torch.arange(one.chunk_size) < one.lengths[..., None]  # (1, C, S)
    for a, b in ((one.k, other.k), (one.v, other.v)):
        torch.testing.assert_close(a[present.flatten(1)], b[present.flatten(1)], **EXACT)


@pytest.mark.parametrize("options", MODEL_OPTIONS)
@torch.no_grad()
def test_last_logits_after_reading_in_segments_equal_one_full_forward(options):
    model, tokens = tiny_model(**MODEL_OPTIONS[options]), document(61)
    full = model(tokens[None], use_cache=False).logits[0]
    for segment in (1, 7, 16, 1000):
        memory = model.memorize(tokens, close=False, piece_tokens=segment)
        for count in (1, 3, SIZE):
            torch.testing.assert_close(last_logits(model, memory, count), full[-count:], **EXACT)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 64, 67])
@torch.no_grad()
def test_any_length_is_read_exactly(length):
    model, tokens = tiny_model(), document(length)
    memory = model.memorize(tokens, close=False, piece_tokens=6)
    full = model(tokens[None], use_cache=False).logits[0]
    torch.testing.assert_close(last_logits(model, memory, min(SIZE, length)), full[-min(SIZE, length) :], **EXACT)
    assert memory.num_chunks == length // SIZE and memory.num_tokens == length


def test_reading_never_runs_the_upper_decoder():
    model = tiny_model()
    ran = []
    for group in model.model.groups:
        group.register_forward_hook(lambda *_: ran.append(True))
    model.memorize(document(50))
    assert not ran


def test_memory_and_fingerprint_do_not_depend_on_the_upper_decoder():
    model, tokens = tiny_model(), document(50)
    memory, print_before = model.memorize(tokens), memory_fingerprint(model)
    with torch.no_grad():
        for part in (*model.model.groups.parameters(), model.model.norm.weight):
            part.add_(0.1)
    assert memory_fingerprint(model) == print_before
    assert_same_memory(memory, model.memorize(tokens))


@pytest.mark.parametrize("part", ["embed_tokens", "lower_layers", "chunk_encoder"])
def test_a_memory_of_another_lower_half_is_refused(part):
    model = tiny_model()
    memory = model.memorize(document(30))
    with torch.no_grad():
        next(getattr(model.model, part).parameters()).add_(0.1)
    with pytest.raises(ValueError, match="another model"):
        model.generate(document(3)[None], memory=memory, max_new_tokens=1)
    with pytest.raises(ValueError, match="another model"):
        append(model, memory, document(3))


def test_experts_per_token_are_part_of_the_fingerprint():
    options = {"num_experts": 4, "moe_intermediate_size": 8}
    one, two = (tiny_model(num_experts_per_token=k, **options) for k in (1, 2))
    assert memory_fingerprint(one) != memory_fingerprint(two)


def test_documents_read_together_are_the_concatenation_of_each_alone():
    model = tiny_model()
    parts = [document(length, seed) for seed, length in enumerate((30, 4, 7, 1))]
    together = model.memorize(parts, names=list("abcd"))
    assert_same_memory(together, ChunkMemory.concat([model.memorize(part) for part in parts]))
    assert [d.num_chunks for d in together.documents] == [8, 1, 2, 1]
    assert together.lengths[0].tolist() == [4] * 7 + [2, 4, 4, 3, 1]
    assert [d.name for d in together.documents] == list("abcd")


@torch.no_grad()
def test_order_of_documents_does_not_change_answers():
    model, prompt = tiny_model(), document(9, seed=9)[None]
    parts = [model.memorize(document(length, seed)) for seed, length in enumerate((30, 7, 21))]
    from hsa_ultralong.models import HSACache

    logits = [
        model(prompt, past_key_values=HSACache(model.config, memory=ChunkMemory.concat(order))).logits
        for order in (parts, parts[::-1], [parts[1], parts[2], parts[0]])
    ]
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], **EXACT)
    selected = ChunkMemory.concat(parts).select([1])
    assert_same_memory(selected, parts[1])


@pytest.mark.parametrize("options", [{"fusion": "stick_breaking"}, {"position_decay": True}])
def test_order_dependent_models_refuse_merging(options):
    model = tiny_model(**options)
    memories = [model.memorize(document(9, seed)) for seed in (0, 1)]
    with pytest.raises(ValueError, match="order of chunks"):
        ChunkMemory.concat(memories)
    with pytest.raises(ValueError, match="order of chunks"):
        memories[0].select([0])


def test_a_stream_of_pieces_equals_the_whole():
    model, tokens = tiny_model(), document(53)
    stream = (piece for piece in tokens.split(9))
    assert_same_memory(model.memorize(stream), model.memorize(tokens))


def test_appending_equals_reading_at_once():
    model, tokens, second = tiny_model(), document(53), document(10, seed=4)
    memory = model.memorize(tokens[:22], close=False)
    append(model, memory, tokens[22:], document=0, close=False)
    torch.testing.assert_close(
        last_logits(model, memory, 2), last_logits(model, model.memorize(tokens, close=False), 2), **EXACT
    )
    append(model, memory, second)
    assert_same_memory(memory, model.memorize([tokens, second]))
    assert memory.open_document is None
    with pytest.raises(ValueError, match="not open"):
        append(model, memory, second, document=0)


def test_closing_turns_the_tail_into_a_short_chunk():
    model = tiny_model()
    memory = model.memorize(document(10), close=False)
    assert memory.num_chunks == 2
    close_document(model, memory)
    assert memory.num_chunks == 3 and memory.lengths[0].tolist() == [4, 4, 2]
    with pytest.raises(ValueError, match="no open document"):
        last_logits(model, memory)


def test_open_documents_are_not_merged():
    model = tiny_model()
    with pytest.raises(ValueError, match="open document"):
        ChunkMemory.concat([model.memorize(document(10), close=False)])


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([], {}, "nothing to memorise"),
        (torch.empty(0, dtype=torch.long), {}, "empty"),
        (torch.ones(3), {}, "token ids"),
        (torch.ones(2, 3, dtype=torch.long), {}, "1-D"),
        (torch.tensor([37]), {}, "0..36"),
        (torch.tensor([-1]), {}, "0..36"),
        (torch.tensor([1]), {"store": "disk"}, "store must be"),
        (torch.tensor([1]), {"names": ["a", "b"]}, "names"),
        (3, {}, "token ids"),
    ],
)
def test_bad_input_is_refused(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().memorize(tokens, **options)


def test_progress_counts_every_token():
    seen = []
    tiny_model().memorize(document(50), piece_tokens=16, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(16, 50), (32, 50), (48, 50), (50, 50)]


def test_bytes_per_token_do_not_depend_on_the_number_of_hsa_layers():
    sizes = {groups: tiny_model(num_upper_groups=groups).memorize(document(40)).num_bytes for groups in (1, 2, 3)}
    assert len(set(sizes.values())) == 1


def test_memorizing_leaves_training_mode_and_landmark_centre_alone():
    model = tiny_model().train()
    before = model.model.chunk_encoder.landmark_center.clone()
    model.memorize(document(30))
    assert model.training and torch.equal(before, model.model.chunk_encoder.landmark_center)
