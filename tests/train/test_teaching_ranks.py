"""A converted model beside its source on two processes is that on one: alignment, distillation, low rank, pools."""

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from hsa_ultralong.models.convert import convert_model
from hsa_ultralong.testing.processes import launch
from hsa_ultralong.train import ParallelConfig
from hsa_ultralong.train.lora import is_lora, is_memory

TAUGHT = {"divergence": 1.0, "evidence_loss": 0.1, "evidence_chunks": 64, "chunk_topk": 8,
          "sliding_window": 16, "hsa_sliding_window": 16}  # fmt: skip


def talk(number):
    said = {"user": f"Say {number}.", "assistant": f"Well, {number} and more."}
    return {"messages": [{"role": role, "content": text} for _ in range(2) for role, text in said.items()]}


@pytest.fixture(scope="module")
def converted(tiny_runs, tmp_path_factory):
    """A source, and the configuration of a run on what it is converted to."""
    folder, tokenizer = tmp_path_factory.mktemp("taught"), tiny_runs.tokenizer
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    source = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes)).eval()
    options = {"sliding_window": 32, "chunk_size": 16, "retrieval_dim": 16, "num_memory_heads": 2}
    student = convert_model(source, **options).model
    (folder / "chat.jsonl").write_text("\n".join(json.dumps(talk(number)) for number in range(30)), encoding="utf-8")
    mixture = {"chat": 0.3, "text": 0.2, "chat_facts": 0.3, "span_copy": 0.2}
    common = {"seq_len": 256, "batch_tokens": 1024, "micro_batch_rows": 2, "mixture": mixture, **TAUGHT}
    config = tiny_runs.config(
        tiny_runs.stage("align", tokens=1024, align_retrieval=0.3, align_output=1.0, **common),
        tiny_runs.stage("long", tokens=2048, pool_memory="attended", **common),
        lora_rank=2, old_rate=0.25, chats=[str(folder / "chat.jsonl")],
    )  # fmt: skip
    config.start_from(student.config)
    config.fresh = [name for name, _ in student.named_parameters() if is_memory(name)]
    return source, config


def trained(runs, folder, source, config):
    run = runs.trainer(folder, config, teacher=source)
    before = {name: part.detach().clone() for name, part in run.model.named_parameters() if is_lora(name)}
    assert run.train()
    assert before and all(part.requires_grad for part in run.model.parameters() if part.dim() < 2)
    return run


def check_two(rank, world, runs, folder, source, config):
    for name, parallel in {
        "copies": ParallelConfig(replicate=2, reshard_after_forward=False),
        "shards": ParallelConfig(shard=2, reshard_after_forward=False),
    }.items():
        run = trained(runs, folder / name, source, replace(config, parallel=parallel))
        whole = {key: getattr(part, "full_tensor", lambda part=part: part)() for key, part in
                 run.model.named_parameters()}  # fmt: skip
        if rank == 0:
            torch.save({key: part.detach().clone() for key, part in whole.items()}, folder / f"{name}.pt")
    dist.barrier()


def test_two_processes_learn_from_a_source_what_one_learns(tiny_runs, converted, tmp_path):
    source, config = converted
    one = trained(tiny_runs, tmp_path / "one", source, config)
    launch(2, tmp_path / "meet", check_two, tiny_runs, tmp_path, source, config)
    expected = [record for record in tiny_runs.records(tmp_path / "one") if "loss" in record]
    names = {"loss", "grad_norm", "divergence", "answer_loss", "evidence_loss"}
    assert len(expected) == 3 and all(names <= set(record) for record in expected)
    assert expected[0]["retrieval_error"] > 0 and "retrieval_error" not in expected[-1]
    for name in ("copies", "shards"):
        found = [record for record in tiny_runs.records(tmp_path / name) if "loss" in record]
        for mine, theirs in zip(found, expected, strict=True):
            told = names | {"retrieval_error", "output_error"} & set(theirs)
            assert {key: mine[key] for key in told} == pytest.approx({key: theirs[key] for key in told}, rel=1e-3)
        weights = torch.load(tmp_path / f"{name}.pt")
        for key, part in one.model.named_parameters():
            torch.testing.assert_close(weights[key], part.detach(), rtol=1e-3, atol=2e-5, msg=f"{name}: {key}")
