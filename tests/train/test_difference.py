"""A converted model trained as low-rank changes: one small file, from which the model and the next run come back."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hsa_ultralong.cli.main import app
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.testing.factories import tiny_model
from hsa_ultralong.train.difference import read_difference, require_small, with_difference
from hsa_ultralong.train.lora import add_lora, is_lora, is_memory, merged

TINY = ["--device", "cpu", "--set", "probe_every=100000", "--set", "tensorboard=false", "--set", "compile=false",
        "--set", "log_every=1"]  # fmt: skip


def hsa(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


def sizes(stage, seq_len, steps, **options):
    table = {"seq_len": seq_len, "batch_tokens": 2 * seq_len, "tokens": 2 * seq_len * steps, "warmup_steps": 1,
             "sliding_window": 16, "hsa_sliding_window": 16, "mixture": {"chat_facts": 1.0}, **options}  # fmt: skip
    return [part for name, value in table.items() for part in ("--set", f"{stage}.{name}={value}")]


@pytest.fixture(scope="module")
def place(tmp_path_factory, shards_folder):
    """A source with the tokenizer of the shards, and what it is converted to."""
    folder, tokenizer = tmp_path_factory.mktemp("difference"), shards_folder[1]
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, **ids,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "source")
    tokenizer.save_pretrained(folder / "source")
    options = ["--set", "chunk_size=16", "--set", "retrieval_dim=16", "--set", "num_memory_heads=2", "--window", 32]
    made = hsa("convert", folder / "source", "-o", folder / "converted", "--read-at", "1,2", *options)
    assert made.exit_code == 0, made.output
    return folder


def align(place, shards_folder, run, *more, steps=3):
    return hsa(
        "train", "convert_align", "--data", shards_folder[0], "-o", run, "--init-from", place / "converted",
        "--teacher", place / "source", *TINY, *sizes("align", 256, steps), *more,
    )  # fmt: skip


def test_a_difference_and_its_source_are_the_trained_model(tmp_path, place, shards_folder):
    file = tmp_path / "change.safetensors"
    common = ["--set", "lora_rank=2", "--export-difference", file, "--export", tmp_path / "whole"]
    made = align(place, shards_folder, tmp_path / "run", *common)
    assert made.exit_code == 0, made.output
    applied = hsa("convert", place / "source", "--apply", file, "-o", tmp_path / "applied")
    assert applied.exit_code == 0, applied.output
    whole, again, before = (
        HSAForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (tmp_path / "whole", tmp_path / "applied", place / "converted")
    )
    ids = torch.randint(5, 300, (1, 100))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, whole(ids).logits, rtol=2e-2, atol=2e-2)
    changed = {name for name, part in whole.state_dict().items()
               if (part - before.state_dict()[name].bfloat16().float()).abs().max() > 1e-6}  # fmt: skip
    assert "model.embed_tokens.weight" not in changed
    assert {"model.chunk_encoder.landmark_proj.weight", "model.groups.1.hsa_layer.hsa.o_proj.weight"} <= changed
    # a later run may learn from the source too
    assert json.loads((tmp_path / "whole" / "conversion.json").read_text())["source_files"]
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    measured = [one for one in records if "loss" in one]
    names = {"divergence", "answer_loss", "retrieval_error", "output_error"}
    assert len(measured) == 3 and all(names <= set(one) for one in measured)


@pytest.mark.usefixtures("undrawn")
def test_a_part_of_the_change_lies_between_the_source_and_the_whole(tmp_path, place, shards_folder):
    file = tmp_path / "change.safetensors"
    made = align(place, shards_folder, tmp_path / "run", "--set", "lora_rank=2", "--export-difference", file)
    assert made.exit_code == 0, made.output
    weights = {}
    for strength in (0, 0.5, 1):
        small = tmp_path / f"{strength}.safetensors"
        more = [] if strength == 1 else ["--strength", str(strength), "--init-from", place / "converted"]
        packed = hsa("compact", file, "-o", small, "--bits", "8", *more)
        assert packed.exit_code == 0, packed.output
        tensors, _ = read_difference(small)
        start = HSAForCausalLM.from_pretrained(place / "converted", dtype=torch.float32).state_dict()
        weights[strength] = merged(with_difference(start, tensors))
    start = HSAForCausalLM.from_pretrained(place / "converted", dtype=torch.float32).state_dict()
    for name, part in start.items():
        none, half, whole = (weights[strength][name] for strength in (0, 0.5, 1))
        if is_memory(f".{name}"):
            torch.testing.assert_close(none, whole, rtol=0, atol=0)
        else:
            torch.testing.assert_close(none, part, rtol=0, atol=0)
            torch.testing.assert_close(half, (none + whole) / 2, rtol=1e-3, atol=1e-3)
    for more, said in (
        (["--strength", "0.5"], "go together"),
        (["--init-from", place / "converted"], "go together"),
        (["--strength", "0.5", "--init-from", place / "source"], "error"),
    ):
        refused = hsa("compact", file, "-o", tmp_path / "none.safetensors", *more)
        assert refused.exit_code == 2 and said in refused.output + refused.stderr
        assert not (tmp_path / "none.safetensors").exists()


@pytest.mark.usefixtures("undrawn")
def test_the_next_run_goes_on_from_the_file(tmp_path, place, shards_folder):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    lora = ["--set", "lora_rank=2"]
    assert align(place, shards_folder, tmp_path / "a", *lora, "--export-difference", first).exit_code == 0
    more = ["--from-difference", first, "--export-difference", second, "--set", "align.learning_rate=1e-9"]
    made = align(place, shards_folder, tmp_path / "b", *lora, *more, steps=1)
    assert made.exit_code == 0, made.output
    before, after = load_file(first), load_file(second)
    assert before.keys() == after.keys() and any(map(is_lora, before))
    for name, part in before.items():
        if "landmark_center" not in name:
            torch.testing.assert_close(after[name], part, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("then", [["freeze_source=true"], ["lora_rank=2", "lora_layers=upper"], ["lora_rank=0"]])
def test_a_run_keeps_what_it_does_not_train(tmp_path, place, shards_folder, then):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    rate = ["--set", "align.learning_rate=0.05"]
    made = align(place, shards_folder, tmp_path / "a", "--set", "lora_rank=2", *rate, "--export-difference", first)
    assert made.exit_code == 0, made.output
    more = [part for one in then for part in ("--set", one)]
    ends = ["--export-difference", second, "--export", tmp_path / "whole"]
    made = align(place, shards_folder, tmp_path / "b", *more, *rate, "--from-difference", first, *ends, steps=1)
    assert made.exit_code == 0, made.output
    made = hsa("convert", place / "source", "--apply", second, "-o", tmp_path / "applied")
    assert made.exit_code == 0, made.output
    whole, applied = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "applied"))
    for name, part in applied.items():
        torch.testing.assert_close(part.float(), whole[name].float(), rtol=0.02, atol=2e-3)
    before, after = load_file(first), load_file(second)
    lower = [name for name in before if "lower_layers" in name and is_lora(name)]
    assert any(before[name].abs().max() > 1e-3 for name in lower if name.endswith("lora_b"))
    if then != ["lora_rank=0"]:
        assert all(torch.equal(after[name].float(), before[name].float()) for name in lower)


@pytest.mark.usefixtures("undrawn")
def test_a_difference_counts_from_the_source_alone(tmp_path, place, shards_folder):
    first, lora = tmp_path / "first.safetensors", ["--set", "lora_rank=2"]
    ends = ["--export-difference", first, "--export", tmp_path / "whole"]
    assert align(place, shards_folder, tmp_path / "a", *lora, *ends, steps=1).exit_code == 0
    assert hsa("convert", place / "source", "--apply", first, "-o", tmp_path / "applied").exit_code == 0
    for name in ("whole", "applied"):
        for option in ("--export-difference", "--from-difference"):
            file = first if option == "--from-difference" else tmp_path / "none.safetensors"
            made = hsa(
                "train", "convert_align", "--data", shards_folder[0], "-o", tmp_path / "run", "--init-from",
                tmp_path / name, "--teacher", place / "source", *TINY, *sizes("align", 256, 1), *lora, option, file,
            )  # fmt: skip
            errors = [line for line in made.stderr.splitlines() if line.startswith("error")]
            assert made.exit_code == 2 and len(errors) == 1 and "holds trained weights" in errors[0], made.output
        weaker = ["--strength", 0.5, "--init-from", tmp_path / name]
        made = hsa("compact", first, "-o", tmp_path / "half.safetensors", *weaker)
        assert made.exit_code == 2 and "holds trained weights" in made.stderr
    planned = hsa(
        "train", "convert_align", *lora, "--init-from", tmp_path / "applied", "--from-difference", first, "--dry-run"
    )
    assert planned.exit_code == 2 and "holds trained weights" in planned.stderr
    assert not (tmp_path / "run").exists() and not (tmp_path / "half.safetensors").exists()


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_stopped_goes_on_exactly(tmp_path, place, shards_folder):
    lora = ["--set", "lora_rank=2", "--set", "old_rate=0.25"]
    assert align(place, shards_folder, tmp_path / "whole", *lora, "--export", tmp_path / "one").exit_code == 0
    assert align(place, shards_folder, tmp_path / "cut", *lora, "--max-minutes", 0).exit_code == 0
    assert align(place, shards_folder, tmp_path / "cut", *lora, "--export", tmp_path / "two").exit_code == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.usefixtures("undrawn")
def test_all_stages_of_the_memory_recipe_run_and_end_when_rows_are_recalled(tmp_path, place, shards_folder):
    stages = [
        *sizes("short", 256, 4, advance_below=100.0), *sizes("choose", 256, 1), *sizes("widen", 512, 1),
        *sizes("settle", 512, 1, sliding_window=32, hsa_sliding_window=32),
    ]  # fmt: skip
    made = hsa(
        "train", "convert_memory", "--data", shards_folder[0], "-o", tmp_path / "run", "--init-from",
        place / "converted", "--teacher", place / "source", *TINY, *stages, "--export", tmp_path / "model",
        "--set", "probe_lengths=(256,)", "--set", "probe_rows=2",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = {name: [one["step"] for one in records if one["stage"] == name and "loss" in one]
             for name in ("short", "choose", "widen", "settle")}  # fmt: skip
    assert steps == {"short": [1], "choose": [1], "widen": [1], "settle": [1]}
    assert any("probe" in one for one in records)
    config = HSAForCausalLM.from_pretrained(tmp_path / "model").config
    assert (config.sliding_window, config.hsa_sliding_window) == (32, 32)


REFUSED = {
    "no teacher": (["--init-from", "converted"], "--teacher SOURCE"),
    "another teacher": (["--init-from", "converted", "--teacher", "other"], "is not the source of this difference"),
    "no folder": (["--teacher", "source"], "old_rate needs --init-from"),
    "too large": (["--init-from", "converted", "--teacher", "source", "--export-difference", "x.safetensors"], "MiB"),
    "no conversion": (["--init-from", "plain", "--export-difference", "x.safetensors"], "needs --init-from"),
    "not a difference": (
        ["--init-from", "converted", "--teacher", "source", "--from-difference", "other/model.safetensors"],
        "is no difference",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_belong_together_is_one_line(tmp_path, place, shards_folder, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hsa_ultralong.train.difference.MAX_BYTES", 2**20)
    for name in ("source", "converted"):
        (tmp_path / name).symlink_to(place / name)
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaForCausalLM.config_class.from_pretrained(place / "source")).save_pretrained("other")
    tiny_model().save_pretrained("plain")
    arguments, words = REFUSED[case]
    made = hsa(
        "train", "convert_align", "--data", shards_folder[0], "-o", "run", *TINY, *sizes("align", 256, 1), *arguments
    )
    errors = [line for line in made.stderr.splitlines() if line.startswith("error")]
    assert made.exit_code == 2 and len(errors) == 1 and words in errors[0], made.output
    assert not (tmp_path / "run").exists()


def test_a_difference_is_applied_to_its_own_source_only(tmp_path, place):
    about = json.loads((place / "converted" / "conversion.json").read_text())
    kept = {**{name: about[name] for name in ("source", "source_files", "options")}, "windows": [16, 16]}
    meta = {"format": "hsa-difference-1", "conversion": json.dumps(kept)}
    file = tmp_path / "x.safetensors"
    save_file({"model.norm.weight": torch.full((32,), 2.0)}, file, meta)
    assert hsa("convert", place / "source", "--apply", file, "-o", tmp_path / "ours").exit_code == 0
    assert (load_file(tmp_path / "ours" / "model.safetensors")["model.norm.weight"] == 2).all()
    for tensors, metadata, words in (
        ({"model.norm.weight": torch.full((32,), float("nan"))}, meta, "not finite"),
        ({"model.new": torch.ones(2)}, meta, "does not fit the model"),
        ({"model.norm.weight": torch.ones(3)}, meta, "does not fit the model"),
        ({"model.norm.weight": torch.ones(32)}, {**meta, "format": "other"}, "is no difference"),
        ({"model.norm.weight": torch.ones(32)}, {**meta, "conversion": "{"}, "damaged"),
        ({"model.norm.weight": torch.ones(32)}, {**meta, "conversion": "{}"}, "does not say what it belongs to"),
        (
            {"model.norm.weight": torch.ones(32)},
            {**meta, "conversion": json.dumps({**kept, "source_files": {"a": {"bytes": 1, "sha256": "0"}}})},
            "its files differ",
        ),
    ):
        save_file(tensors, file, metadata)
        made = hsa("convert", place / "source", "--apply", file, "-o", tmp_path / "bad")
        assert made.exit_code == 2 and words in made.output, made.output
        assert len(made.output.strip().splitlines()) == 1 and not (tmp_path / "bad").exists()
    file.write_bytes(b"nothing")
    assert "damaged" in hsa("convert", place / "source", "--apply", file, "-o", tmp_path / "bad").output
    assert (
        "leave other options out"
        in hsa("convert", place / "source", "--apply", file, "-o", tmp_path / "bad", "--window", 8).output
    )


def test_a_frozen_source_stays_to_the_bit(tmp_path, place, shards_folder):
    file = tmp_path / "change.safetensors"
    frozen = ["--set", "freeze_source=true", "--export-difference", file, "--export", tmp_path / "whole"]
    made = align(place, shards_folder, tmp_path / "run", *frozen)
    assert made.exit_code == 0, made.output
    before = load_file(place / "converted" / "model.safetensors")
    after = load_file(tmp_path / "whole" / "model.safetensors")
    moved = {name for name, part in after.items() if not torch.equal(part, before[name].to(part.dtype))}
    assert moved and all(is_memory(f".{name}") for name in moved), moved
    written = load_file(file)
    assert all(is_memory(f".{name}") for name in written)
    made = hsa("convert", place / "source", "--apply", file, "-o", tmp_path / "applied")
    assert made.exit_code == 0, made.output
    applied = load_file(tmp_path / "applied" / "model.safetensors")
    for name, part in after.items():
        torch.testing.assert_close(applied[name].float(), part.float().to(torch.bfloat16).float(), atol=0, rtol=8e-3)


def test_a_low_rank_of_the_upper_half_leaves_the_lower_one():
    model = tiny_model()
    add_lora(model, 2, "upper")
    lower = [name for name, part in model.named_parameters() if "lower_layers" in name and part.requires_grad]
    assert not lower and not any("lower_layers" in name for name in model.state_dict() if is_lora(name))
    assert any(".groups." in name and is_lora(name) for name in model.state_dict())
    ids = torch.randint(model.config.vocab_size, (1, 40))
    model(ids, labels=ids).loss.backward()
    assert any(part.grad is not None for name, part in model.named_parameters() if "chunk_encoder" in name)


def test_low_rank_changes_are_silent_at_first_and_merge_exactly():
    model = tiny_model().eval()
    ids = torch.randint(model.config.vocab_size, (1, 40))
    with torch.no_grad():
        expected = model(ids).logits
        add_lora(model, 2)
        torch.testing.assert_close(model(ids).logits, expected)
        for name, part in model.named_parameters():
            if name.endswith("lora_b"):
                part.normal_(std=0.1)
        changed = model(ids).logits
        assert not torch.allclose(changed, expected, atol=1e-3)
        plain = tiny_model().eval()
        plain.load_state_dict(merged(model.state_dict()))
        torch.testing.assert_close(plain(ids).logits, changed, rtol=1e-4, atol=1e-4)
    for name, part in model.named_parameters():
        trains = is_memory(name) or is_lora(name) or part.dim() < 2
        assert part.requires_grad == trains, name
    assert not model.model.embed_tokens.weight.requires_grad
    require_small(model, {})
