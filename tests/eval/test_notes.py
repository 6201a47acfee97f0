"""Notes: sentences that are documents of their own behind a text, through the study and through the command."""

import json

import pytest
import torch
from typer.testing import CliRunner

from hsa_ultralong.cli.common import load_model
from hsa_ultralong.cli.main import app
from hsa_ultralong.data import evaluation_needles
from hsa_ultralong.eval import needles as study_module
from hsa_ultralong.eval.haystack import opticks
from hsa_ultralong.eval.needles import Place, run_forms
from hsa_ultralong.inference.ask import RetrievedChunk
from hsa_ultralong.testing.factories import tiny_model


@pytest.fixture(scope="module")
def nano():
    return load_model(None, "cpu", "fp32")


@pytest.fixture(scope="module")
def text(nano):
    return torch.tensor(nano[1](opticks()[:10_000])["input_ids"], dtype=torch.int32)[:1000]


def test_a_place_names_its_chunks_and_the_sources_that_it_overlaps(nano, text):
    model, _ = nano
    memory = study_module.memorize(model, [text, text[:20], text[:130]])
    assert memory.num_chunks == 16 + 1 + 3
    assert [Place(*place).chunks(memory) for place in ((0, 60, 70), (0, 64, 128), (1, 0, 20), (2, 0, 130))] == [
        range(0, 2), range(1, 2), range(16, 17), range(17, 20)
    ]  # fmt: skip
    source = RetrievedChunk(1, "", 0, 20, 0.5)
    assert Place(1, 0, 20).overlaps(source) and Place(1, 19, 25).overlaps(source)
    assert not Place(1, 20, 25).overlaps(source) and not Place(0, 0, 20).overlaps(source)


def test_a_random_model_is_asked_about_every_note(nano, text, monkeypatch):
    tokenizer = nano[1]
    model = tiny_model(dtype=torch.float32, vocab_size=len(tokenizer))
    memories, original = [], study_module.memorize
    monkeypatch.setattr(
        study_module, "memorize", lambda *args, **options: memories.append(original(*args, **options)) or memories[-1]
    )
    before = text.clone()
    study = run_forms(model, tokenizer, text, samples=3, forms=("", "int8"), notes=True, seed=5)
    assert torch.equal(text, before)
    needles = evaluation_needles(5 + len(text), 3)
    for result, memory in zip(study.results, memories, strict=True):
        assert (result.task, result.length, len(result.samples)) == ("notes", 1000, 3)
        assert [sample.prompt for sample in result.samples] == [needle.completion for needle in needles]
        assert [sample.expected for sample in result.samples] == [needle.value for needle in needles]
        assert [sample.depth for sample in result.samples] == [1 / 6, 3 / 6, 5 / 6]
        assert all(sample.margin is not None and not sample.correct for sample in result.samples)
        documents = [tokenizer.decode(document.tokens, skip_special_tokens=True) for document in memory.documents[1:]]
        assert documents == [needle.statement.strip() for needle in needles]
        assert torch.equal(memory.documents[0].tokens, text)
    assert study.results[0].logits_error == 0 < study.results[1].logits_error


def test_the_shipped_checkpoint_finds_notes_in_their_own_documents(nano, text):
    study = run_forms(*nano, text, samples=4, notes=True)
    (result,) = study.results
    assert result.accuracy >= 0.5
    # not every right answer: the largest weight over all steps may lie on another note
    assert any(sample.found and sample.margin > 0 for sample in result.samples)


def test_notes_are_not_together_in_the_text(nano, text, tmp_path):
    with pytest.raises(ValueError, match="notes or together, not both"):
        run_forms(*nano, text, samples=2, notes=True, together=True)
    result = CliRunner().invoke(app, f"eval needles --notes --together -o {tmp_path / 's'}".split())
    assert result.exit_code != 0 and "--notes or --together, not both" in " ".join(result.output.split())
    assert not (tmp_path / "s").exists()


def test_the_command_writes_a_study_of_notes(tmp_path):
    command = f"eval needles --lengths 1K --needles 2 --notes --device cpu -o {tmp_path / 's'}"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "s" / "summary.json").read_text())
    (accuracy,) = [record for record in summary["records"] if "task" in record]
    assert (accuracy["task"], accuracy["length"], accuracy["samples"]) == ("notes", 1024, 2)
    lines = [json.loads(line) for line in (tmp_path / "s" / "records.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines] == ["notes", "notes"]
    assert all(line["prompt"].endswith(" is") for line in lines)
    assert (tmp_path / "s" / "needles.png").stat().st_size > 5000


def test_the_help_says_what_notes_are():
    result = CliRunner().invoke(app, ["eval", "needles", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert "--notes" in result.output and "a document of its own" in " ".join(result.output.split())
