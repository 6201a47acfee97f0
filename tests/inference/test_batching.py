"""Rows that join and leave decode what they decode alone."""

import pytest
import torch

from hsa_ultralong.inference import DecodingEngine
from hsa_ultralong.inference import engine as engine_module
from hsa_ultralong.inference.batching import BatchEngine
from hsa_ultralong.inference.warming import warm
from hsa_ultralong.memory import open_memory
from hsa_ultralong.nn.views import GraphView
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_model
from hsa_ultralong.testing.graphs import EagerGraphs

# (step at which it joins, number of its memory, tokens of the prompt, tokens wanted)
PLAN = [(0, 0, 9, 12), (0, 1, 30, 3), (1, 2, 1, 9), (4, 0, 13, 6), (5, 1, 24, 14), (8, 0, 5, 5)]


def document(length, seed=0):
    return random_tokens(1, length, seed=seed)[0]


def memories_of(model):
    return [model.memorize(document(50)), model.memorize([document(30, 1), document(13, 2)]), None]


def alone(model, memory, prompt, count):
    """Tokens, as one sequence decodes them."""
    engine = DecodingEngine(model, memory, max_tokens=400)
    return [step.tokens[0] for step in engine.stream([prompt], count)]


def requests_of(memories):
    return [(at, memories[m], document(n, 10 + i), count) for i, (at, m, n, count) in enumerate(PLAN)]


def together(engine, requests, piece=1000):
    """The tokens of every request; prompts are read in pieces between steps, and rows move down."""
    waiting, reading, running, found = list(enumerate(requests)), [], {}, {}

    def take(row, number):
        found[number].append(int(engine.tokens[row]))
        if len(found[number]) == requests[number][3]:
            engine.leave(row)
            return
        running[row] = number

    for now in range(200):
        while waiting and waiting[0][1][0] <= now and engine.has_room(len(waiting[0][1][2]) + waiting[0][1][3]):
            number, (_, memory, prompt, count) = waiting.pop(0)
            reading.append((number, engine.begin(prompt, memory, max_new_tokens=count)))
            found[number] = []
        for one in list(reading):
            row = engine.read_on(one[1], piece)
            if row is not None:
                reading.remove(one)
                take(row, one[0])
        for old, new in engine.compact().items():
            running[new] = running.pop(old)
        if not (running or waiting or reading):
            return [found[number] for number in range(len(requests))]
        engine.step()
        for row, number in list(running.items()):
            del running[row]
            take(row, number)
    raise AssertionError("it does not end")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def requests(model):
    return requests_of(memories_of(model))


@pytest.fixture(scope="module")
def expected(model, requests):
    return [alone(model, *request[1:]) for request in requests]


@pytest.fixture
def eager_graphs(monkeypatch):
    monkeypatch.setattr(engine_module, "StepGraphs", EagerGraphs)


@pytest.mark.parametrize("piece", [1000, 7])
def test_rows_that_join_and_leave_decode_what_they_decode_alone(model, requests, expected, piece):
    assert together(BatchEngine(model, batch=3, max_tokens=60), requests, piece) == expected


@pytest.mark.parametrize("options", ["two_retrieval_heads", "all_at_once"])
def test_so_do_rows_of_other_models(options):
    model = tiny_model(**MODEL_OPTIONS[options])
    requests = requests_of(memories_of(model))[1:4]
    expected = [alone(model, *request[1:]) for request in requests]
    assert together(BatchEngine(model, batch=2, max_tokens=60), requests, 9) == expected


def test_with_graphs_rows_decode_what_they_decode_alone(model, requests, expected, eager_graphs):
    EagerGraphs.made = 0
    engine = BatchEngine(model, batch=3, max_tokens=60, use_graph=True)
    assert engine.sizes == [1, 2, 3] and together(engine, requests, 9) == expected
    # small memories that are known come along: at most one graph for every size and every new memory
    assert EagerGraphs.made <= 3 * 3
    made = EagerGraphs.made
    assert together(engine, requests, 9) == expected and EagerGraphs.made == made


def test_pages_are_shared_out_by_what_rows_need(model, requests, expected):
    engine = BatchEngine(model, batch=6, max_tokens=40, num_tokens=64)
    assert together(engine, requests) == expected
    assert engine.own.free == list(range(16)) and not engine.own.taken
    first = engine.begin(document(20), max_new_tokens=20)
    assert not engine.has_room(40) and engine.has_room(24)
    with pytest.raises(ValueError, match="do not fit beside those under way"):
        engine.begin(document(30), max_new_tokens=10)
    engine.drop(first)
    assert engine.has_room(40)
    with pytest.raises(ValueError, match="cannot hold one of"):
        BatchEngine(model, batch=2, max_tokens=40, num_tokens=39)


def test_a_row_moves_down_when_fewer_need_to_be_computed_then(model):
    engine = BatchEngine(model, batch=4, max_tokens=40)
    rows = [engine.join(document(5 + n, n)) for n in range(4)]
    for row in rows[:3]:
        engine.leave(row)
    assert engine.compact() == {3: 0} and engine.is_taken == [True, False, False, False]
    tokens = [int(engine.tokens[0]), *(int(engine.step()[0]) for _ in range(9))]
    assert tokens == alone(model, None, document(8, 3), 10)


@pytest.mark.parametrize(("form", "store"), [("bf16", "host"), ("int8", "host"), ("int8", "file")])
def test_rows_read_a_file_as_one_sequence_does(tmp_path, form, store):
    model = tiny_model(dtype=torch.float32)
    model.memorize([document(50), document(30, 1)]).save(tmp_path / "m.hsa", key_values=form)
    memory = open_memory(tmp_path / "m.hsa", store=store, dtype=torch.float32)
    requests = requests_of([memory, None, memory])
    expected = [alone(model, *request[1:]) for request in requests]
    assert together(BatchEngine(model, batch=3, max_tokens=60), requests, 9) == expected


def test_a_free_row_never_grows_full_and_a_taken_one_is_refused(model):
    engine = BatchEngine(model, batch=2, max_tokens=12)
    row = engine.join(document(4))
    for _ in range(8):
        engine.step()
    with pytest.raises(ValueError, match="max_tokens"):
        engine.step()
    engine.leave(row)
    for _ in range(13):
        engine.step()
    engine.join(document(4))
    engine.join(document(5))
    with pytest.raises(ValueError, match="all 2 rows are taken"):
        engine.join(document(6))


def test_a_step_ranks_a_memory_once_for_all_rows_that_read_it(model, monkeypatch):
    shared, other = model.memorize(document(80)), model.memorize(document(28, 1))
    engine = BatchEngine(model, batch=4, max_tokens=40)
    for number, memory in enumerate((shared, other, shared, shared)):
        engine.join(document(5 + number), memory)
    ranked, real = [], GraphView.topk

    def noted(view, query, search):
        ranked.append((view.num_chunks(), len(query)))
        return real(view, query, search)

    monkeypatch.setattr(GraphView, "topk", noted)
    engine.step()
    # beside them the own chunks of all rows, in one pool
    found = {(chunks, rows): ranked.count((chunks, rows)) for chunks, rows in ranked}
    groups = len(model.model.upper_groups())
    own = (engine.own.num_pages + 1, 4)
    assert found == {(shared.num_chunks, 3): groups, (other.num_chunks, 1): groups, own: groups}


def test_a_memory_is_let_go_only_when_no_row_reads_it(model):
    first, second = model.memorize(document(80)), model.memorize(document(90, 1))
    engine = BatchEngine(model, batch=2, max_tokens=80)
    row, other = engine.join(document(5), first), engine.join(document(6), second)
    tokens = [int(engine.tokens[other]), int(engine.step()[other])]
    assert engine.chunk_offset(other) == first.num_chunks
    with pytest.raises(ValueError, match="reads this memory"):
        engine.forget(first)
    engine.leave(row)
    engine.forget(first)
    assert engine.chunk_offset(other) == 0 and engine.known == [second]
    for _ in range(8):
        tokens.append(int(engine.step()[other]))
    assert tokens == alone(model, second, document(6), 10)


def test_a_prompt_that_is_refused_leaves_the_row_free(model):
    engine = BatchEngine(model, batch=1, max_tokens=10)
    with pytest.raises(ValueError, match="needs 1 to 10 tokens"):
        engine.join(document(11))
    assert engine.is_taken == [False]
    assert engine.join(document(3)) == 0


def test_warming_up_leaves_no_trace(model, requests, expected, eager_graphs):
    engine = BatchEngine(model, batch=3, max_tokens=60, use_graph=True)
    warm(engine, [model.memorize(document(9)), model.memorize(document(40))], piece=20)
    assert not any(engine.is_taken) and engine.known == [] and len(engine.own.free) == engine.own.num_pages
    assert sorted(size for size, memories in engine._captured if not memories) == engine.sizes
    assert together(engine, requests) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_on_a_gpu_rows_decode_what_they_decode_alone(tmp_path, form, store):
    model = tiny_model().float().cuda()
    places = []
    for number, memory in enumerate(memories_of(model)[:2]):
        memory.save(tmp_path / f"{number}.hsa", key_values=form)
        places.append(open_memory(tmp_path / f"{number}.hsa", store=store, device="cuda", dtype=torch.float32))
    requests = requests_of([*places, None])
    engine = BatchEngine(model, batch=5, max_tokens=60, prefix_bytes=2**20)
    warm(engine)
    assert engine.is_captured and engine.sizes == [1, 2, 4, 5]
    expected = [alone(model, *request[1:]) for request in requests]
    assert together(engine, requests, 9) == expected
    assert together(engine, requests, 9) == expected and engine.prefixes.num_hits >= len(requests)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_many_rows_read_host_memory_in_a_graph(tmp_path):
    model = tiny_model(chunk_topk=16).float().cuda()
    model.memorize(document(250)).save(tmp_path / "m.hsa", key_values="int8")
    memory = open_memory(tmp_path / "m.hsa", store="host", device="cuda", dtype=torch.float32)
    engine = BatchEngine(model, batch=40, max_tokens=24)
    prompts = [document(6, seed) for seed in range(40)]
    rows = [engine.join(prompt, memory) for prompt in prompts]
    tokens = [engine.tokens.tolist(), *(engine.step().tolist() for _ in range(5))]
    assert all(plan.graphs is not None for plan in engine._captured.values())
    for row, prompt in zip(rows[::13], prompts[::13], strict=True):
        assert [step[row] for step in tokens] == alone(model, memory, prompt, 6)
