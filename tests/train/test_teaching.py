"""What a converted model learns from its source: divergence by document, recall, alignment beyond the window."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hsa_ultralong.models.convert import convert_model
from hsa_ultralong.testing.factories import tiny_model
from hsa_ultralong.train import StageConfig, TrainConfig
from hsa_ultralong.train.teaching import Counts, Teacher, answer_tokens, is_learnt, taught_by, text_tokens

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip


def stage(**options):
    fields = {"seq_len": 64, "tokens": 128, "batch_tokens": 128, "learning_rate": 1e-3, "divergence": 1.0}
    return StageConfig("one", **{**fields, "mixture": {"text": 1.0}, **options})


def made(window=64, **options):
    torch.manual_seed(0)
    source = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    sizes = {"sliding_window": window, "chunk_size": 8, "retrieval_dim": 16, "chunk_topk": 8, "num_memory_heads": 2}
    student = convert_model(source, **sizes, **options).model.train()
    config = TrainConfig("debug", [stage()])
    return source, student, Teacher(source, student, config, torch.device("cpu"))


def batch_of(segments=None):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (2, 64), generator=generator)
    segments = torch.zeros(2, 64, dtype=torch.int32) if segments is None else segments
    answers = torch.zeros(2, 64, dtype=torch.bool)
    answers[:, 50:54] = True
    labels = ids.masked_fill(segments < 0, -100)
    return {"input_ids": ids, "segment_ids": segments, "answer_mask": answers, "labels": labels}


def packed():
    segments = torch.zeros(2, 64, dtype=torch.int32)
    segments[:, 24:56], segments[:, 56:] = 1, -1
    return batch_of(segments)


def counts(batch):
    return Counts(int(answer_tokens(batch).sum()), int(text_tokens(batch).sum()))


def test_within_the_window_a_fresh_conversion_does_not_diverge():
    _, student, teacher = made(window=64)
    batch = batch_of()
    teacher.losses(student, batch, batch, stage(), counts(batch))
    parts = teacher.take()
    assert parts["divergence"].abs() < 1e-6 and parts["answer_loss"] > 1
    assert set(teacher.take()) == set()


@torch.no_grad()
def test_the_source_reads_every_document_by_itself():
    source, _, teacher = made()
    batch = packed()
    logits = source.lm_head(teacher._read(batch, keep_attention=False, is_packed=True))
    for kept in (slice(0, 24), slice(24, 56)):
        torch.testing.assert_close(logits[:, kept], source(batch["input_ids"][:, kept]).logits, rtol=1e-4, atol=1e-4)
    eager = source.lm_head(teacher._read(batch, keep_attention=True, is_packed=True))
    torch.testing.assert_close(eager[:, :56], logits[:, :56], rtol=1e-4, atol=1e-4)


def test_every_token_counts_once_as_answer_or_as_text_inside_a_document():
    batch = packed()
    answers, texts = answer_tokens(batch), text_tokens(batch)
    assert not (answers & texts).any() and int(answers.sum()) == 8
    # not the first of a document, nor padding
    assert int((answers | texts).sum()) == 2 * (23 + 31) and not texts[:, 23].any() and not texts[:, 55:].any()


def test_micro_batches_share_out_the_loss_of_a_step():
    _, student, teacher = made(window=8)
    batch = packed()
    whole = teacher.losses(student, batch, batch, stage(), counts(batch))
    parts = [{name: part[i : i + 1] for name, part in batch.items()} for i in range(2)]
    shares = [teacher.losses(student, part, part, stage(), counts(batch)) for part in parts]
    torch.testing.assert_close(sum(shares), whole, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_step_without_answers_says_nothing_of_recall():
    _, student, teacher = made(window=8)
    batch = batch_of()
    batch["answer_mask"][:] = False
    teacher.losses(student, batch, batch, stage(), counts(batch))
    assert set(teacher.take()) == {"divergence"}


def test_the_target_of_retrieval_is_the_sources_attention_on_chunks_beyond_the_window():
    source, student, teacher = made(window=10)
    batch = batch_of()
    teacher._read(batch, keep_attention=True, is_packed=False)
    number = student.config.reading_layers[0]
    found = teacher._chunk_mass(student.model.groups[0], number, batch, student)
    source.set_attn_implementation("eager")
    outputs = source(batch["input_ids"], output_attentions=True, output_hidden_states=True)
    layer = source.model.layers[number]
    values = layer.self_attn.v_proj(layer.input_layernorm(outputs.hidden_states[number])).unflatten(-1, (2, 8))
    size = 8
    for row, t in ((0, 63), (1, 40), (0, 17)):
        wanted, everything = torch.zeros(64 // size), 0.0
        for head in range(4):
            for j in range(t + 1):
                mass = outputs.attentions[number][row, head, t, j] * values[row, j, head // 2].norm()
                everything += mass
                if t - j >= 10 and j > 0 and (j // size + 1) * size <= t:
                    wanted[j // size] += mass
        torch.testing.assert_close(found[row, t, 0, :-1], wanted / everything, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 64, 1))


def test_alignment_falls_when_it_is_trained_and_reaches_the_memory():
    _, student, teacher = made(window=8, hsa_residual="standard")
    batch, wanted = batch_of(), stage(align_retrieval=1.0, align_output=1.0)
    names = ("retriever.query_proj", "chunk_encoder.landmark_proj", "hsa.o_proj", "chunk_encoder.v_proj")
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    records = []
    for _ in range(25):
        optimizer.zero_grad()
        teacher.losses(student, batch, batch, wanted, counts(batch)).backward()
        if len(records) == 1:
            for name in names:
                assert any(name in key and part.grad.abs().max() > 0 for key, part in student.named_parameters()), name
        optimizer.step()
        records.append({name: part.item() for name, part in teacher.take().items()})
    assert records[-1]["output_error"] < 0.8 * records[0]["output_error"]
    assert records[-1]["retrieval_error"] < records[0]["retrieval_error"]


def test_what_a_teacher_does_not_go_with_is_refused():
    source, student, _ = made()
    config = TrainConfig("debug", [stage()])
    with pytest.raises(ValueError, match="--teacher SOURCE"):
        taught_by(None, student, config, torch.device("cpu"))
    assert taught_by(None, student, TrainConfig("debug", [stage(divergence=0.0)]), torch.device("cpu")) is None
    for options, words in (
        ({"piece_tokens": 64}, "piece_tokens does not go with a teacher"),
        ({"align_output": 1.0, "pool_memory": "attended"}, "pool_memory beside alignment"),
    ):
        with pytest.raises(ValueError, match=words):
            taught_by(source, student, TrainConfig("debug", [stage(**options)]), torch.device("cpu"))
    with pytest.raises(ValueError, match="the teacher's vocab_size is 61"):
        taught_by(source, tiny_model(), config, torch.device("cpu"))
    with pytest.raises(ValueError, match="go with divergence"):
        stage(divergence=0.0, align_output=1.0)


def test_a_stage_ends_once_its_answers_are_recalled():
    assert is_learnt(stage(advance_below=0.5), {"answer_loss": 0.4, "step": 3})
    assert not is_learnt(stage(advance_below=0.5), {"answer_loss": 0.6, "step": 3})
    assert not is_learnt(stage(), {"answer_loss": 0.0, "step": 3}) and not is_learnt(stage(advance_below=0.5), {})
