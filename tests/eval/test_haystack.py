"""Haystacks of any length: the same lines, new chunks; planted needles; forms of memory compared."""

import json

import pytest
import torch
from typer.testing import CliRunner

from hsa_ultralong.cli.common import load_model
from hsa_ultralong.cli.main import app
from hsa_ultralong.eval import needles as study_module
from hsa_ultralong.eval.haystack import count_distinct, line_starts, opticks, recombined
from hsa_ultralong.eval.needles import MERGED, NUM_PARTS, part_borders, plant, run_forms


@pytest.fixture(scope="module")
def nano():
    return load_model(None, "cpu", "fp32")


@pytest.fixture(scope="module")
def text(nano):
    return torch.tensor(nano[1](opticks()[:20_000])["input_ids"], dtype=torch.int32)


def test_recombined_text_keeps_its_lines_and_makes_new_chunks(nano, text):
    tokenizer = nano[1]
    starts = line_starts(text, tokenizer).tolist()
    lines = sorted(text[a:b].tolist() for a, b in zip(starts, [*starts[1:], len(text)], strict=True))
    long = recombined(text, 2 * len(text) + 100, tokenizer, seed=3)
    assert torch.equal(long[: len(text)], text)
    second = long[len(text) : 2 * len(text)]
    assert not torch.equal(second, text)
    # the last line of the text may lack its break, which glues it to the next one
    again = line_starts(second, tokenizer).tolist()
    found = sorted(second[a:b].tolist() for a, b in zip(again, [*again[1:], len(second)], strict=True))
    assert sum(line in lines for line in found) >= len(found) - 2
    assert torch.equal(text.sort().values, second.sort().values)
    assert torch.equal(long, recombined(text, 2 * len(text) + 100, tokenizer, seed=3))
    assert not torch.equal(long, recombined(text, 2 * len(text) + 100, tokenizer, seed=4))
    repeated = torch.cat([text[: len(text) // 64 * 64]] * 2)
    assert count_distinct(repeated, 64) < 0.55 * len(repeated) / 64
    assert count_distinct(long, 64) > 0.95 * len(long) / 64


def test_distinct_chunks_are_counted():
    tokens = torch.arange(6 * 64, dtype=torch.int32)
    assert count_distinct(tokens, 64) == 6
    assert count_distinct(torch.cat((tokens, tokens[:64], tokens[:5])), 64) == 7
    assert count_distinct(tokens[:0], 64) == 0


def test_needles_are_planted_at_their_depths():
    tokens = torch.zeros(1000, dtype=torch.int32)
    places = plant(tokens, [[1, 2, 3], [4, 5], [6]])
    assert [tokens[a:b].tolist() for a, b in places] == [[1, 2, 3], [4, 5], [6]]
    assert [round(a / 1000, 1) for a, _ in places] == [0.2, 0.5, 0.8]
    with pytest.raises(ValueError, match="too few"):
        plant(tokens[:9], [[1, 2, 3]] * 4)


@pytest.mark.parametrize("together", [False, True])
def test_forms_of_one_memory_are_compared(nano, text, together):
    model, tokenizer = nano
    haystack = text[:2048].clone()
    study = run_forms(model, tokenizer, haystack, samples=2, forms=("", "int8"), store="host", together=together)
    assert torch.equal(haystack, text[:2048]) is not together
    own, small = study.results
    assert (own.form, small.form, own.store, own.task) == ("", "int8", "host", "mk_niah" if together else "s_niah")
    assert own.logits_error == 0 < small.logits_error < 0.05
    assert small.memory_bytes < own.memory_bytes / 3
    assert own.accuracy >= 0.5 and small.accuracy >= 0.5


@pytest.mark.parametrize("together", [False, True])
def test_one_stream_is_compared_with_memories_of_its_parts_merged(nano, text, together, monkeypatch):
    model, tokenizer = nano
    memories, concat = [], study_module.ChunkMemory.concat
    monkeypatch.setattr(study_module.ChunkMemory, "concat", lambda parts: memories.append(concat(parts)) or memories[0])
    haystack = text[:4096].clone()
    study = run_forms(model, tokenizer, haystack, samples=6, forms=("", MERGED), together=together)
    own, merged = study.results
    (memory,) = memories
    assert len(memory.documents) == NUM_PARTS and merged.form == MERGED
    # every edit was taken back, in the part where the sentence lay
    assert torch.equal(torch.cat([document.tokens for document in memory.documents]), haystack)
    assert [(a.prompt, a.depth) for a in own.samples] == [(b.prompt, b.depth) for b in merged.samples]
    # windows begin anew in each part, so that little but something differs
    assert own.logits_error == 0 < merged.logits_error < 0.1
    assert [sample.found for sample in own.samples] == [sample.found for sample in merged.samples]
    assert sum(sample.correct for sample in merged.samples) >= sum(sample.correct for sample in own.samples) - 1


def test_no_border_of_a_part_cuts_a_sentence():
    assert part_borders(800, [(95, 105), (200, 210), (395, 400)]) == [0, 95, 200, 300, 400, 500, 600, 700, 800]
    with pytest.raises(ValueError, match="too few for 8 parts"):
        part_borders(6, [])


def test_a_merged_memory_is_measured_on_the_device_and_without_notes(nano, text):
    for options in ({"notes": True}, {"store": "host"}):
        with pytest.raises(ValueError, match="on the device and without notes"):
            run_forms(*nano, text[:2048], samples=2, forms=(MERGED,), **options)


@pytest.mark.usefixtures("undrawn")
def test_the_command_writes_a_study(tmp_path, nano):
    result = CliRunner().invoke(
        app, f"eval needles --lengths 1K,2K --needles 2 --forms own,fp8 --device cpu -o {tmp_path / 's'}".split()
    )
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "s" / "summary.json").read_text())
    accuracies = [record for record in summary["records"] if record.get("task") == "s_niah"]
    assert [(r["length"], r.get("form", "")) for r in accuracies] == [
        (1024, ""), (1024, "fp8"), (2048, ""), (2048, "fp8")
    ]  # fmt: skip
    assert summary["meta"]["source_tokens"] >= 2048 and (tmp_path / "s" / "needles.png").is_file()
    errors = [record["value"] for record in summary["records"] if record.get("metric") == "logits_error"]
    assert len(errors) == 2 and all(0 < error < 0.1 for error in errors)
