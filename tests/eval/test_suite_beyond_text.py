"""Suites at lengths beyond the text: samples as ever, the text recombined, one comparison for every context."""

from __future__ import annotations

import json
from weakref import ref

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hsa_ultralong import default_checkpoint
from hsa_ultralong.cli.main import app
from hsa_ultralong.data import load_tokenizer
from hsa_ultralong.eval import memory_reader
from hsa_ultralong.eval.evidence import sample_digest
from hsa_ultralong.eval.haystack import line_starts, opticks
from hsa_ultralong.eval.likelihood_suite import check_lengths
from hsa_ultralong.eval.memory_reader import MemoryReader
from hsa_ultralong.eval.suite import SuiteRun, run_suite
from hsa_ultralong.eval.tasks import Material, make_samples
from hsa_ultralong.testing.factories import tiny_model

SHORT, LONG = 3_000, 12_000
# of samples 0 and 1 of two, with the text below, as the code before 2026-11-30 made them
DIGESTS = {
    ("s_niah_authors", SHORT): ("b39bbb8d", "e445cd4b"),
    ("s_niah_authors", LONG): ("b05ac756", "0b8eee27"),
    ("mq_authors", SHORT): ("183e64e6", "fbe7ae5c"),
    ("mq_authors", LONG): ("6b58ad23", "32f36afa"),
    ("recall_form_01", SHORT): ("6ecf63b8", "a7447bbf"),
    ("recall_form_01", LONG): ("cc8cd6b7", "e3ccd402"),
    ("recall_similar_4", SHORT): ("23292ac9", "0b7809b8"),
    ("recall_similar_4", LONG): ("7c4043ab", "b8654b1e"),
    ("niah_multikey_1", SHORT): ("716bc1d4", "74e0f603"),
    ("niah_multikey_1", LONG): ("f155cfe8", "f4ed1c30"),
}


@pytest.fixture(scope="module")
def material() -> Material:
    tokenizer = load_tokenizer(default_checkpoint())
    text = tokenizer(opticks()[:20_000])["input_ids"][:5_000]
    return Material(tokenizer, torch.tensor(text, dtype=torch.int32))


@pytest.mark.parametrize(("name", "length"), DIGESTS)
def test_samples_are_those_of_before_within_the_text_and_beyond_it(material, name, length):
    assert tuple(map(sample_digest, make_samples(name, material, length, 2))) == DIGESTS[name, length]


@pytest.mark.parametrize("name", ["s_niah_authors", "recall_form_01", "recall_form_10"])
def test_beyond_the_text_its_lines_come_again_and_the_fact_stands_at_its_depth(material, name):
    samples = list(make_samples(name, material, LONG, 4))
    own = material.text.numpy()
    lines = {tuple(line.tolist()) for line in _lines(material, own)}
    hidden = np.zeros(LONG, dtype=bool)
    for sample in samples:
        ((start, stop),) = sample.evidence
        hidden[start : stop + 1] = True
        stated = material.tokenizer.decode(sample.context[start:stop].tolist())
        assert sample.answers[0] in stated
        assert start / len(sample.context) == pytest.approx(sample.depth, abs=0.02)
        assert len(sample.prompt()) + sample.max_new_tokens == LONG
    shift = len(material.first)
    for sample in samples:
        text = sample.context[shift:]
        clean = ~hidden[shift : shift + len(text)]
        first = clean[: len(own)]
        assert np.array_equal(text[: len(own)][first], own[first])
        again = _lines(material, text[len(own) : 2 * len(own)])
        assert sum(tuple(line.tolist()) in lines for line in again) > 0.9 * len(again)
        assert not np.array_equal(text[len(own) : 2 * len(own)], own)


def _lines(material: Material, tokens: np.ndarray) -> list[np.ndarray]:
    starts = line_starts(torch.from_numpy(tokens), material.tokenizer).numpy()
    return np.split(tokens, starts[1:])


def test_a_context_is_compared_once_however_often_it_is_asked(material, monkeypatch):
    compared = []
    changed = memory_reader.changed_chunks
    monkeypatch.setattr(
        memory_reader, "changed_chunks", lambda old, new, *rest: compared.append(id(new)) or changed(old, new, *rest)
    )
    model = tiny_model(vocab_size=len(material.tokenizer), chunk_size=8).eval()
    reader, samples = MemoryReader(model, material), list(make_samples("s_niah_authors", material, SHORT, 3))
    verdicts, replies = reader.forced(samples), reader.answer(samples)
    # the first is the one that is read
    assert len(compared) == len(set(compared)) == 2
    assert verdicts == MemoryReader(model, material).forced(samples)
    fresh = MemoryReader(model, material, edits=False).answer(samples)
    assert [reply.tokens for reply in replies] == [reply.tokens for reply in fresh]
    context = ref(samples[1].context)
    del samples
    assert context() is None


def test_perplexities_of_lengths_beyond_the_text_alone_are_refused():
    check_lengths(["ppl_last_512", "s_niah_authors"], [4096, 8192], 5000)
    check_lengths(["s_niah_authors"], [8192], 5000)
    with pytest.raises(ValueError, match="ppl_position reads the text as it stands, and it has 5,000 tokens of 8,192"):
        check_lengths(["s_niah_authors", "ppl_position"], [8192, 16384], 5000)


@pytest.mark.usefixtures("undrawn")
def test_the_command_says_what_is_recombined_finds_the_fact_and_goes_on_with_the_same_text_alone(tmp_path):
    (tmp_path / "text.txt").write_text(opticks()[:4_000])
    (tmp_path / "other.txt").write_text(opticks()[4_000:8_000])

    def run(tasks: str, text: str, place: str = "run", lengths: str = "512,2K"):
        options = f"--tasks {tasks} --lengths {lengths} --samples 2 --device cpu --dtype fp32"
        return CliRunner().invoke(
            app, ["eval", *options.split(), "--text", str(tmp_path / text), "-o", str(tmp_path / place)]
        )

    result = run("recall_form_02", "text.txt")
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    source = settings["haystack_tokens"]
    assert 512 < source < 2048
    assert f"2,048 tokens from a text of {source:,}, its lines again in new orders" in result.stderr
    assert "512 tokens from" not in result.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    assert [(r["length"], r["found"]) for r in records] == [(512, True)] * 2 + [(2048, True)] * 2
    assert [r["distinct_chunks"] for r in records if r["index"] == 0] == [8, 32]
    assert run("passkey", "text.txt", "noise").exit_code == 0
    refused = run("recall_form_02", "other.txt")
    assert "holds another run: haystack was" in refused.output + str(refused.exception)
    refused = run("recall_form_02,ppl_last_512", "text.txt", "none", "2K")
    assert "ppl_last_512 reads the text as it stands" in refused.output + str(refused.exception)
    assert not (tmp_path / "none").exists()


def test_a_run_within_the_text_goes_on_beyond_it(tmp_path, material):
    class Oracle:
        batch, setting, limit, chunk_size = 4, "memory", None, 64

        def answer(self, samples):
            from hsa_ultralong.eval.answers import Reply

            return [Reply(sample.answers[0], [1]) for sample in samples]

    for lengths in ([SHORT], [SHORT, LONG]):
        with SuiteRun(tmp_path, {"seed": 0}) as run:
            run_suite(Oracle(), material, run, tasks=["recall_form_01"], lengths=lengths, samples=4)
            found = {length: len(run.done("recall_form_01", length)) for length in (SHORT, LONG)}
    assert found == {SHORT: 4, LONG: 4}
    assert all(record["score"] == 1 for record in run.records)
    assert [r["sample"] for r in run.records] == [
        sample_digest(s) for n in (SHORT, LONG) for s in make_samples("recall_form_01", material, n, 4)
    ]
