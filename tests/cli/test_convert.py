"""hsa convert: a folder that loads, a report, refusals in one line."""

import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hsa_ultralong.cli.main import app
from hsa_ultralong.models import HSAForCausalLM


def run(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_a_converted_folder_loads_and_says_where_it_comes_from(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    teacher = LlamaForCausalLM(config)
    teacher.save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer_config.json").write_text("{}")
    result = run(tmp_path / "llama", "-o", tmp_path / "ours", "--window", 16, "--set", "retrieval_dim=16", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["source"] == "llama" and report["window"] == 16 and 0.5 < report["reused_share"] < 1
    assert json.loads((tmp_path / "ours" / "conversion.json").read_text()) == report
    assert (tmp_path / "ours" / "tokenizer_config.json").is_file()
    student = HSAForCausalLM.from_pretrained(tmp_path / "ours")
    ids = torch.randint(61, (1, 16))
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, teacher(ids).logits, rtol=1e-4, atol=1e-5)
    table = run(tmp_path / "llama", "-o", tmp_path / "table", "--window", 16, "--set", "retrieval_dim=16").output
    count = sum(parameter.numel() for parameter in student.parameters())
    lines = {line[:24].strip(): line[24:].split() for line in table.splitlines()}
    assert lines["all"] == [f"{count:,}", f"{report['reused_share']:.1%}"]
    assert lines["layers below the memory"][1] == "100.0%" and lines["attention to the memory"][2] == "o_proj"
    again = run(tmp_path / "llama", "-o", tmp_path / "ours")
    assert again.exit_code == 2 and "exists already" in again.output
    assert not list(tmp_path.glob(".partial*"))


def test_what_cannot_be_converted_is_one_line(tmp_path):
    result = run(tmp_path, "-o", tmp_path / "x")
    assert result.exit_code == 2 and "no config.json" in result.output
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        attention_bias=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "biased")
    result = run(tmp_path / "biased", "-o", tmp_path / "x")
    assert result.exit_code == 2 and "biases" in result.output and not (tmp_path / "x").exists()
