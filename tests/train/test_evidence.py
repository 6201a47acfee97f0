"""Retrieval taught by the chunks that tell an answer: the loss by hand, what it sees, that it makes them come first."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hsa_ultralong.models.convert import convert_model
from hsa_ultralong.train import StageConfig, TrainConfig
from hsa_ultralong.train.evidence import evidence_loss
from hsa_ultralong.train.teaching import Counts, Teacher, answer_tokens, text_tokens

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip


def stage(**options):
    fields = {"seq_len": 64, "tokens": 128, "batch_tokens": 128, "learning_rate": 1e-3, "divergence": 1.0}
    return StageConfig("one", **{**fields, "mixture": {"text": 1.0}, "evidence_loss": 1.0, **options})


@pytest.fixture
def taught():
    torch.manual_seed(0)
    source = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    sizes = {"sliding_window": 8, "chunk_size": 8, "retrieval_dim": 16, "chunk_topk": 8, "num_memory_heads": 2}
    student = convert_model(source, **sizes).model.train()
    return student, Teacher(source, student, TrainConfig("debug", [stage()]), torch.device("cpu"))


@pytest.fixture
def batch():
    ids = torch.randint(3, 61, (2, 64), generator=torch.Generator().manual_seed(1))
    answers = torch.zeros(2, 64, dtype=torch.bool)
    answers[:, 50:54] = True
    evidence = torch.full((2, 64, 2), -1, dtype=torch.int32)
    evidence[0, 50:54], evidence[1, 50:54] = torch.tensor([1, 1]), torch.tensor([2, 3])
    segments = torch.zeros(2, 64, dtype=torch.int32)
    return {"input_ids": ids, "segment_ids": segments, "answer_mask": answers, "labels": ids, "evidence": evidence}


def counts(batch):
    return Counts(int(answer_tokens(batch).sum()), int(text_tokens(batch).sum()))


def test_the_loss_is_the_share_of_the_right_chunks_among_those_seen():
    torch.manual_seed(0)
    query, landmarks = torch.randn(2, 1, 4, dtype=torch.float64), torch.randn(5, 1, 4, dtype=torch.float64)
    seen = torch.tensor([[True, True, True, False, True], [True] * 5])
    right = torch.tensor([[False, True, True, False, False], [False] * 5])
    scores = (query[0, 0] @ landmarks[:, 0].T / 2).exp()
    wanted = -torch.log((scores[1] + scores[2]) / (scores[0] + scores[1] + scores[2] + scores[4]))
    # the second token has no right chunk
    torch.testing.assert_close(evidence_loss(query, landmarks, None, seen, right)[0], wanted)
    many = -torch.log((scores[1] + scores[2]) / (scores[1] + scores[2] + 50 * (scores[0] + scores[4])))
    torch.testing.assert_close(evidence_loss(query, landmarks, None, seen, right, 100)[0], many)
    # fewer than there are change nothing
    torch.testing.assert_close(evidence_loss(query, landmarks, None, seen, right, 1)[0], wanted)


def test_a_chunk_of_another_row_or_still_open_is_seen_as_it_should_be(taught, batch):
    student, teacher = taught
    teacher.losses(student, batch, batch, stage(), counts(batch))
    first = {name: part.item() for name, part in teacher.take().items()}
    # chunk 6 holds tokens 48 to 55, which the answer cannot read yet
    batch["evidence"][batch["evidence"] >= 0] = 6
    teacher.losses(student, batch, batch, stage(), counts(batch))
    assert first["evidence_loss"] > 1 and teacher.take()["evidence_loss"] == 0
    # 2 rows of 8 chunks: all of the other row, 6 of one's own
    batch["evidence"][batch["evidence"] >= 0] = 0
    with torch.no_grad():
        for group in student.model.upper_groups():
            group.retriever.query_proj.weight.zero_()
        teacher.losses(student, batch, batch, stage(), counts(batch))
    torch.testing.assert_close(teacher.take()["evidence_loss"], torch.tensor(14.0).log())


def test_taught_retrieval_finds_the_right_chunks_first(taught, batch):
    student, teacher = taught
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        teacher.losses(student, batch, batch, stage(evidence_chunks=1000), counts(batch)).backward()
        optimizer.step()
        measured = teacher.take()
    assert measured["evidence_first"] > 0.9 and measured["evidence_loss"] < 5
    for name in ("retriever.query_proj", "chunk_encoder.landmark_proj"):
        assert any(name in key and part.grad.abs().max() > 0 for key, part in student.named_parameters())


def test_a_stage_that_teaches_evidence_needs_a_source():
    with pytest.raises(ValueError, match="evidence_loss"):
        stage(divergence=0.0)
