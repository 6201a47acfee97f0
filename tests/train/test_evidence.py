"""Retrieval taught by what tells a token: the loss by hand, what it sees, whom it teaches, that it makes them come
first, with and without a source; and that it changes nothing where it is off."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hsa_ultralong.data import MixtureConfig, MixtureDataset, collate
from hsa_ultralong.models.convert import convert_model
from hsa_ultralong.testing.factories import tiny_model
from hsa_ultralong.train import StageConfig, TrainConfig
from hsa_ultralong.train.evidence import EvidenceLoss, count_told, evidence_loss, told_tokens
from hsa_ultralong.train.step_loss import StepLoss

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
SIZE = 4
CPU = torch.device("cpu")


def stage(**options):
    fields = {"seq_len": 64, "tokens": 128, "batch_tokens": 128, "learning_rate": 1e-3}
    return StageConfig("one", **{**fields, "mixture": {"text": 1.0}, "evidence_loss": 1.0, **options})


@pytest.fixture
def taught():
    """A converted model beside its source."""
    torch.manual_seed(0)
    source = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    sizes = {"sliding_window": 8, "chunk_size": 8, "retrieval_dim": 16, "chunk_topk": 8, "num_memory_heads": 2}
    student = convert_model(source, **sizes).model.train()
    config = TrainConfig("debug", [stage(divergence=1.0, align_retrieval=0.1)])
    return student, StepLoss(student, config, source, CPU, None)


@pytest.fixture
def batch():
    ids = torch.randint(3, 61, (2, 64), generator=torch.Generator().manual_seed(1))
    answers = torch.zeros(2, 64, dtype=torch.bool)
    answers[:, 50:54] = True
    evidence = torch.full((2, 64, 2), -1, dtype=torch.int32)
    evidence[0, 50:54], evidence[1, 50:54] = torch.tensor([9, 12]), torch.tensor([20, 31])
    # a copy that is no answer, which the source's divergence speaks for
    evidence[0, 40] = 3
    return {
        "input_ids": ids, "segment_ids": torch.zeros(2, 64, dtype=torch.int32), "answer_mask": answers, "labels": ids,
        "evidence": evidence, "isolated": torch.zeros(2, dtype=torch.bool),
    }  # fmt: skip


def step(losses, batch, **options):
    one = stage(**options)
    losses.backward(one, batch, losses.begin(one, [batch]))
    return {name: part.item() for name, part in losses.take().items()}


def batch_of(told, segments=None, isolated=False):
    """One row of 24 tokens; told: {place: place that it repeats}."""
    ids = torch.arange(24)[None] + 3
    evidence = torch.full((1, 24, 2), -1, dtype=torch.int32)
    for place, source in told.items():
        evidence[0, place] = source
    return {
        "input_ids": ids, "labels": ids, "evidence": evidence, "isolated": torch.tensor([isolated]),
        "segment_ids": torch.zeros(1, 24, dtype=torch.int32) if segments is None else segments,
        "answer_mask": torch.arange(24)[None] >= 20,
    }  # fmt: skip


def test_the_loss_is_the_share_of_the_right_chunks_among_those_seen():
    torch.manual_seed(0)
    query, landmarks = torch.randn(2, 1, 4, dtype=torch.float64), torch.randn(5, 1, 4, dtype=torch.float64)
    seen = torch.tensor([[True, True, True, False, True], [True] * 5])
    right = torch.tensor([[False, True, True, False, False], [False] * 5])
    scores = (query[0, 0] @ landmarks[:, 0].T / 2).exp()
    # the second token has no right chunk
    none = scores.new_zeros(())
    wanted = torch.stack([-torch.log((scores[1] + scores[2]) / (scores[0] + scores[1] + scores[2] + scores[4])), none])
    torch.testing.assert_close(evidence_loss(query, landmarks, None, seen, right)[0], wanted)
    share = (scores[1] + scores[2]) / (scores[1] + scores[2] + 50 * (scores[0] + scores[4]))
    many = torch.stack([-torch.log(share), none])
    torch.testing.assert_close(evidence_loss(query, landmarks, None, seen, right, 100)[0], many)
    # fewer than there are change nothing
    torch.testing.assert_close(evidence_loss(query, landmarks, None, seen, right, 1)[0], wanted)


def test_only_whole_chunks_of_the_past_are_told():
    found = told_tokens(batch_of({9: 3, 11: 4, 13: 8, 14: 10, 22: 1}), stage(), SIZE)
    # the token before the one that repeats looks for its chunk
    places = list(zip(found.places.tolist(), found.chunks[:, 0].tolist(), strict=True))
    assert places == [(8, 0), (10, 1), (12, 2), (13, 2), (21, 0)]
    assert found.is_answer.tolist()[-1] and not found.is_answer.tolist()[0]
    assert count_told([batch_of({9: 3, 22: 1})], stage(), SIZE) == [1, 1]
    # beside a source only answers count in the ordinary loss
    assert count_told([batch_of({9: 3, 22: 1})], stage(divergence=1.0), SIZE) == [1, 0]


def test_a_chunk_that_is_not_whole_yet_tells_nothing_and_one_of_an_earlier_document_does():
    segments = torch.zeros(1, 24, dtype=torch.int32)
    segments[:, 16:] = 1
    assert len(told_tokens(batch_of({6: 5}), stage(), SIZE).places) == 0
    assert told_tokens(batch_of({18: 14}, segments), stage(), SIZE).chunks.tolist() == [[3, 3]]
    assert len(told_tokens(batch_of({18: 14}, segments, isolated=True), stage(), SIZE).places) == 0
    assert len(told_tokens(batch_of({18: 14}, segments), stage(isolate_documents=True), SIZE).places) == 0


@pytest.mark.parametrize("topk", [1, 8])
def test_the_loss_is_that_of_a_softmax_over_all_chunks_however_many_are_kept(topk):
    torch.manual_seed(0)
    model = tiny_model(chunk_size=SIZE, chunk_topk=topk).train()
    batch = batch_of({22: 1, 23: 2})
    loss = EvidenceLoss(model)
    loss.expect(batch, stage(), count_told([batch], stage(), SIZE), CPU)
    seen = []
    for group in model.model.upper_groups():
        group.retriever.register_forward_hook(lambda m, a, k, out: seen.append((m, *a)), with_kwargs=True)
    model(batch["input_ids"], segment_ids=batch["segment_ids"], labels=batch["labels"])
    value, _ = loss.take()
    wanted = []
    for retriever, x, views in seen:
        query, landmarks = retriever.queries(x)[0].double(), views[-1].memory.landmarks[0].double()
        scores = torch.einsum("thr,chr->thc", query, landmarks) * retriever.factor()[:, None]
        for place in (21, 22):
            # five chunks are whole, the right one is number 0
            visible = scores[place, :, : place // SIZE]
            wanted += list(visible.logsumexp(-1) - visible[:, 0])
    torch.testing.assert_close(value.double(), torch.stack(wanted).mean(), rtol=1e-5, atol=0)
    assert loss.take() is None


def test_its_gradient_pulls_a_chunk_that_was_not_kept():
    torch.manual_seed(1)
    model = tiny_model(chunk_size=SIZE, chunk_topk=1).train()
    batch, loss = batch_of({21: 1, 22: 1, 23: 2}), EvidenceLoss(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    values = []
    for _ in range(12):
        loss.expect(batch, stage(), count_told([batch], stage(), SIZE), CPU)
        model(batch["input_ids"], segment_ids=batch["segment_ids"])
        value, _ = loss.take()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(value.item())
    assert values[-1] < 0.9 * values[0]


def test_answers_and_copies_count_half_each_however_many_are_drawn(monkeypatch):
    torch.manual_seed(0)
    model = tiny_model(chunk_size=SIZE).train()
    loss, copies = EvidenceLoss(model), {place: 1 for place in range(6, 20)}

    def value(told):
        batch = batch_of(told)
        loss.expect(batch, stage(), count_told([batch], stage(), SIZE), CPU)
        model(batch["input_ids"], segment_ids=batch["segment_ids"])
        return loss.take()[0]

    both = value({**copies, 22: 1})
    torch.testing.assert_close(both, (value(copies) + value({22: 1})) / 2)
    monkeypatch.setattr("hsa_ultralong.train.evidence._MOST_TOKENS", 1)
    drawn = torch.stack([value({**copies, 22: 1}) for _ in range(200)]).mean()
    assert abs(drawn - both) < 0.05 * both


def test_compiled_queries_see_whole_rows_only_and_are_never_compiled_for_the_number_of_told_tokens():
    model = tiny_model(chunk_size=SIZE).train()
    loss, shapes = EvidenceLoss(model), []
    for group in model.model.upper_groups():
        # as compilation does: a function of its own in the instance
        plain = group.retriever.queries
        group.retriever.queries = lambda x, plain=plain: (shapes.append(tuple(x.shape)), plain(x))[1]
    for told in ({22: 1}, {21: 1, 22: 1}):
        batch = batch_of(told)
        loss.expect(batch, stage(), count_told([batch], stage(), SIZE), CPU)
        model(batch["input_ids"], segment_ids=batch["segment_ids"])
        assert loss.take() is not None
    assert {shape[1] for shape in shapes} == {24}


def test_rows_of_a_pool_are_told_their_own_chunk(tiny_runs):
    """The row's own view comes last, and its chunks are numbered on the row's grid."""
    config = MixtureConfig({"self_copy": 1.0}, seq_len=128, chunk_size=16)
    dataset = MixtureDataset(tiny_runs.shards, tiny_runs.tokenizer, config)
    batch = collate([dataset[0], dataset[1], dataset[2]])
    model = tiny_model(chunk_size=16, chunk_topk=64, vocab_size=512).train()
    seen = []
    group = model.model.upper_groups()[0]
    group.retriever.register_forward_hook(lambda m, a, k, out: seen.append((a[1], out)), with_kwargs=True)
    model(batch["input_ids"], segment_ids=batch["segment_ids"], pool_memory="compete")
    views, found = seen[0]
    rows, places, chunks, _ = told_tokens(batch, stage(), 16)
    assert len(views) == 2 and len(rows) > 20
    kept = found.indices[rows, places, 0]
    assert (kept == (chunks[:, :1] + found.offsets[-1])).any(-1).all()


def test_a_chunk_of_another_row_or_still_open_is_seen_as_it_should_be(taught, batch):
    student, losses = taught
    first = step(losses, batch, divergence=1.0)
    # chunk 6 holds tokens 48 to 55, which the answer cannot read yet
    batch["evidence"][batch["evidence"] >= 0] = 48
    assert first["evidence_loss"] > 1 and "evidence_loss" not in step(losses, batch, divergence=1.0)
    # 2 rows of 8 chunks: all of the other row, 6 of one's own
    batch["evidence"][batch["evidence"] >= 0] = 0
    with torch.no_grad():
        for group in student.model.upper_groups():
            group.retriever.query_proj.weight.zero_()
    assert step(losses, batch, divergence=1.0)["evidence_loss"] == pytest.approx(torch.tensor(14.0).log().item())


def test_alignment_which_runs_retrieval_once_more_is_not_told_twice(taught, batch):
    _, losses = taught
    plain, aligned = (step(losses, batch, divergence=1.0, align_retrieval=weight) for weight in (0.0, 0.1))
    # the landmarks' centre moves from one step to the next, which changes scores in their last digit
    assert plain["evidence_loss"] == pytest.approx(aligned["evidence_loss"], rel=1e-6)
    assert aligned["retrieval_error"] > 0


@pytest.mark.parametrize("divergence", [0.0, 1.0])
def test_taught_retrieval_finds_the_right_chunks_first_with_and_without_a_source(taught, batch, divergence):
    student, losses = taught
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    batch["evidence"][:, :50] = -1
    for _ in range(25):
        optimizer.zero_grad()
        measured = step(losses, batch, divergence=divergence, evidence_chunks=1000)
        optimizer.step()
    assert measured["evidence_first"] > 0.9 and measured["evidence_loss"] < 5
    for name in ("retriever.query_proj", "chunk_encoder.landmark_proj"):
        assert any(name in key and part.grad.abs().max() > 0 for key, part in student.named_parameters())


def test_a_run_logs_it_beside_its_loss(tiny_runs, tmp_path):
    mixture = {"self_copy": 1.0}
    plain = tiny_runs.stage(mixture=mixture, tokens=512)
    told = tiny_runs.stage(mixture=mixture, tokens=512, evidence_loss=0.5, chunk_topk=2, micro_batch_rows=1)
    tiny_runs.trainer(tmp_path / "a", tiny_runs.config(plain)).train()
    tiny_runs.trainer(tmp_path / "b", tiny_runs.config(told)).train()
    logged = [one for one in tiny_runs.records(tmp_path / "b") if "loss" in one]
    assert all(one["evidence_loss"] > 0 for one in logged)
    assert all("evidence_loss" not in one for one in tiny_runs.records(tmp_path / "a"))


def test_where_it_cannot_be_had_it_is_refused(tiny_runs, tmp_path):
    with pytest.raises(ValueError, match="evidence_loss does not go with piece_tokens"):
        tiny_runs.stage(evidence_loss=0.1, piece_tokens=64)
    with pytest.raises(ValueError, match="softmax fusion"):
        EvidenceLoss(tiny_model(fusion="stick_breaking"))
    with pytest.raises(ValueError, match="twin"):
        config = tiny_runs.config(tiny_runs.stage(evidence_loss=0.1), twin="window")
        tiny_runs.trainer(tmp_path / "run", config)
