"""hsa convert: a folder that loads, a report, refusals in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging
from typer.testing import CliRunner

from hsa_ultralong.cli.common import load_model
from hsa_ultralong.cli.main import app
from hsa_ultralong.data.tokenizer import train_tokenizer
from hsa_ultralong.files.checksum import file_record
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.authors import _names, authors_config
from hsa_ultralong.models.auto_map import REMOTE_MODULE
from hsa_ultralong.testing.gguf_files import write_gguf


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
    stated = {"model_max_length": 2048, "eos_token": "é"}
    (tmp_path / "llama" / "tokenizer_config.json").write_text(json.dumps(stated))
    result = run(tmp_path / "llama", "-o", tmp_path / "ours", "--window", 16, "--set", "retrieval_dim=16", "--json")
    assert result.exit_code == 0 and result.stderr == "", result.output
    report = json.loads(result.stdout)
    assert report["source"] == "llama" and report["window"] == 16 and 0.5 < report["reused_share"] < 1
    assert json.loads((tmp_path / "ours" / "conversion.json").read_text()) == report
    # the source's length would cut what the new model can read
    assert json.loads((tmp_path / "ours" / "tokenizer_config.json").read_text()) == {"eos_token": "é"}
    assert (tmp_path / "ours" / f"{REMOTE_MODULE}.py").is_file()
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


SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


def write_older_rope(folder, theta, scaling):
    """config.json as transformers 4 wrote it."""
    path = folder / "config.json"
    keys = json.loads(path.read_text())
    del keys["rope_parameters"]
    path.write_text(json.dumps({**keys, "rope_theta": theta, "rope_scaling": scaling}))


@pytest.mark.parametrize("is_older", [False, True])
def test_qwen2_and_scaled_rope_are_converted_whoever_wrote_the_folder(tmp_path, is_older):
    torch.manual_seed(0)
    rope = {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}
    for name, model in {
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SIZES, initializer_range=0.1)),
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.1, rope_parameters=rope)),
    }.items():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(tmp_path / name)
        if is_older:
            old = {"rope_type": "llama3", **LLAMA3} if name == "llama" else None
            write_older_rope(tmp_path / name, 500.0 if old else 10_000.0, old)
        result = run(tmp_path / name, "-o", tmp_path / f"ours-{name}", "--window", 16, "--set", "retrieval_dim=16")
        assert result.exit_code == 0, result.output
        student, ids = HSAForCausalLM.from_pretrained(tmp_path / f"ours-{name}"), torch.randint(61, (1, 16))
        assert student.config.use_qkv_bias == (name == "qwen2")
        assert student.config.rope_scaling == ({"rope_type": "llama3", **LLAMA3} if name == "llama" else None)
        with torch.no_grad():
            torch.testing.assert_close(student(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_converted_is_one_line(tmp_path):
    result = run(tmp_path, "-o", tmp_path / "x")
    assert result.exit_code == 2 and "no config.json" in result.output
    kept = {**SIZES, "hidden_act": "silu"}
    for keys, problem in (
        ({**kept, "model_type": "llama", "attention_bias": True}, None),
        ({**kept, "model_type": "llama", "mlp_bias": True}, "feed-forward blocks have biases"),
        ({**kept, "model_type": "mixtral", "num_local_experts": 8}, "mixtures of experts"),
        ({**kept, "model_type": "gemma2", "final_logit_softcapping": 30.0}, "soft-capped"),
        ({**kept, "model_type": "not-known-to-anyone"}, "its type is none of llama, mistral, qwen2, qwen3"),
        (kept, "this unnamed model cannot be converted"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(keys))
        result = run(tmp_path, "-o", tmp_path / "x")
        # the configuration alone decides: there are no weights in the folder
        assert result.exit_code == 2 and len(result.output.strip().splitlines()) == 1, result.output
        assert problem is None or problem in result.output
        assert not (tmp_path / "x").exists()
    (tmp_path / "config.json").write_text("{")
    result = run(tmp_path, "-o", tmp_path / "x")
    assert result.exit_code == 2 and "not readable JSON" in result.output
    (tmp_path / "config.json").write_text(json.dumps({**kept, "model_type": "llama"}))
    result = run(tmp_path, "-o", tmp_path / "x", "--set", "sliding_window=64")
    assert result.exit_code == 2 and "sliding_window: use --window" in result.output


def gguf_source(folder, **options):
    """A Llama in a GGUF file, and its tokenizer's fields."""
    pytest.importorskip("gguf")
    tokenizer = train_tokenizer(["the mill of the miller is old 1234567890"], 300)
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    torch.manual_seed(0)
    ids = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": None}
    sizes = {**SIZES, "vocab_size": len(tokens), "hidden_size": 64, "intermediate_size": 64, **ids}
    teacher = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.1)).eval()
    fields = {
        "ggml.model": "gpt2", "ggml.pre": "smollm", "ggml.tokens": tokens, "chat_template": "{{ messages }}",
        "ggml.merges": [" ".join(pair) if isinstance(pair, list) else pair for pair in merges],
        "ggml.token_type": [3, 3, 3, *[1] * (len(tokens) - 3)],
    }  # fmt: skip
    return teacher, tokenizer, write_gguf(teacher, folder / "source.gguf", tokenizer=fields, **options)


def test_a_gguf_file_becomes_a_folder_with_its_tokenizer(tmp_path):
    teacher, tokenizer, path = gguf_source(tmp_path)
    made = run(path, "-o", tmp_path / "ours", "--window", 16, "--set", "retrieval_dim=16")
    assert made.exit_code == 0, made.output
    # the file names no token that begins a document, none for padding
    assert "bos_token, which the tokenizer lacks, is <|eos|> from now on" in made.output
    assert "pad_token, which the tokenizer lacks, is <|eos|> from now on" in made.output
    student, found = load_model(tmp_path / "ours", "cpu", "fp32")
    assert (found.bos_token, found.eos_token, found.pad_token) == ("<|eos|>",) * 3
    assert found.chat_template == "{{ messages }}"
    ids = found("the miller is old 17", add_special_tokens=False, return_tensors="pt")["input_ids"][:, :16]
    assert ids[0].tolist() == tokenizer("the miller is old 17", add_special_tokens=False)["input_ids"][:16]
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, teacher(ids).logits, rtol=1e-4, atol=1e-5)
    report = json.loads((tmp_path / "ours" / "conversion.json").read_text())
    assert report["source_files"] == {"source.gguf": file_record(path)}


def test_a_gguf_file_is_measured_as_the_model_that_it_holds(tmp_path):
    _, _, path = gguf_source(tmp_path)
    words = ["--tasks", "recall_form_02", "--lengths", "512", "--samples", "1", "--device", "cpu"]
    result = CliRunner().invoke(app, ["eval", str(path), *words, "-o", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    (record,) = map(json.loads, (tmp_path / "run" / "records.jsonl").read_text().splitlines())
    assert (record["model"], record["setting"]) == ("source.gguf", "prompt")


def test_a_damaged_gguf_file_is_one_line(tmp_path):
    _, _, path = gguf_source(tmp_path)
    content = path.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[:-200])
    (tmp_path / "other.gguf").write_bytes(b"not what its name says")
    for name, problem in (("cut.gguf", "ends before"), ("other.gguf", "does not begin with GGUF")):
        result = run(tmp_path / name, "-o", tmp_path / "x")
        assert result.exit_code == 2 and problem in result.output, result.output
        assert len(result.output.strip().splitlines()) == 1 and not (tmp_path / "x").exists()


def test_numbers_that_are_not_finite_are_no_source(tmp_path):
    _, _, path = gguf_source(tmp_path, tensors={"output_norm.weight": torch.full((64,), float("nan"))})
    result = run(path, "-o", tmp_path / "x", "--set", "retrieval_dim=16")
    assert result.exit_code == 2 and "not finite" in result.output and not (tmp_path / "x").exists()


def test_another_tokenizer_takes_the_place_of_the_sources(tmp_path):
    teacher, tokenizer, path = gguf_source(tmp_path, fields={"tokenizer.ggml.pre": "unheard-of"})
    options = ["-o", tmp_path / "ours", "--set", "retrieval_dim=16"]
    refused = run(path, *options)
    assert refused.exit_code == 2 and "--tokenizer FOLDER" in refused.output
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    made = run(path, *options, "--tokenizer", tmp_path / "tokenizer")
    assert made.exit_code == 0 and "lacks" not in made.output, made.output
    assert load_model(tmp_path / "ours", "cpu", "fp32")[1].bos_token == tokenizer.bos_token


def test_a_checkpoint_of_the_authors_becomes_a_folder_as_it_is(tmp_path):
    keys = {
        "model_type": "hsa_swa", "vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_lower_layers": 1,
        "num_upper_layers": 1, "num_upper_groups": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
        "chunk_topk": 3, "retrieval_dim": 64, "chunk_size": 64, "encoder_layers": 1, "sliding_window": 24,
        "enable_softmax": True, "enable_qk_norm": True, "eos_token_id": 3,
    }  # fmt: skip
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(keys))
    config = authors_config(keys)
    weights = {theirs: part for ours, theirs in _names(config)
               for name, part in HSAForCausalLM(config).state_dict().items() if name == ours}  # fmt: skip
    weights["lm_head.weight"] = weights["backbone.embeddings.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    refused = run(folder, "-o", tmp_path / "ours", "--window", 12)
    assert refused.exit_code == 2 and "leave out options" in refused.output and not (tmp_path / "ours").exists()
    made = run(folder, "-o", tmp_path / "ours")
    assert made.exit_code == 0, made.output
    found = HSAForCausalLM.from_pretrained(tmp_path / "ours")
    assert found.config.to_dict()["encoder_qkv_bias"] and found.config.hsa_residual == "bypass"
    assert torch.equal(found.model.chunk_encoder.landmark_proj.weight, weights["backbone.layers.1.lmk_ln.weight"])
    (folder / "config.json").write_text(json.dumps({**keys, "enable_lmk_norm": True}))
    refused = run(folder, "-o", tmp_path / "again")
    assert refused.exit_code == 2 and "enable_lmk_norm=True is not supported" in refused.output


def test_a_folder_whose_weights_are_no_source_is_one_line_without_bars(tmp_path, monkeypatch):
    monkeypatch.setattr(logging, "_tqdm_active", True)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "llama")
    weights = load_file(tmp_path / "llama" / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    for tensor, problem in (
        (None, f"lacks weights, e.g. {name}"),
        (weights[name][:3].clone(), "weights of other shapes"),
        (weights[name] * torch.nan, "not finite"),
    ):
        other = {key: value for key, value in weights.items() if key != name}
        other |= {} if tensor is None else {name: tensor}
        save_file(other, tmp_path / "llama" / "model.safetensors", {"format": "pt"})
        result = run(tmp_path / "llama", "-o", tmp_path / "x")
        assert result.exit_code == 2 and len(result.output.strip().splitlines()) == 1, result.output
        assert problem in result.output and "Loading" not in result.output
