"""The needle study: scoring, intervals, and that it leaves the memory as it found it."""

import json

import pytest
import torch

from hsa_ultralong.cli.common import load_model
from hsa_ultralong.eval import needles as study_module
from hsa_ultralong.eval.haystack import opticks
from hsa_ultralong.eval.intervals import wilson_interval
from hsa_ultralong.eval.metadata import run_metadata, write_json
from hsa_ultralong.eval.needles import is_right, run_needles, score_margin
from hsa_ultralong.eval.plots import human_tokens, plot_needles, plot_training, read_jsonl
from hsa_ultralong.eval.report import study_records, write_study
from hsa_ultralong.eval.tasks import Material
from hsa_ultralong.eval.tasks.paper import AuthorsNeedle


def test_wilson_interval_has_its_known_values():
    # R. G. Newcombe 1998, table I: 81 of 263 gives .2553 to .3662
    low, high = wilson_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(30, 30)[1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" 4821937", True),
        (" 4821937.", True),
        ("4821937 ", True),
        (" 48219377", False),
        (" 482193", False),
        ("", False),
    ],
)
def test_only_the_whole_value_is_right(answer, right):
    assert is_right(answer, "4821937") is right


@pytest.fixture(scope="module")
def nano():
    return load_model(None, "cpu", "fp32")


def test_the_shipped_checkpoint_recalls_hidden_sentences(nano):
    model, tokenizer = nano
    text = torch.tensor(tokenizer(opticks()[:30_000])["input_ids"], dtype=torch.int32)
    study = run_needles(model, tokenizer, text, lengths=[4096], samples=8, controls=2)
    (result,) = study.results
    assert result.accuracy >= 0.75
    assert [sample.depth for sample in result.samples] == [(i + 0.5) / 8 for i in range(8)]
    assert len(result.control_weights) == 2
    records = study_records(study, "nano")
    assert records[0]["value"] == result.accuracy and records[0]["samples"] == 8


def test_the_shipped_book_is_long_enough_and_real_text(nano):
    _, tokenizer = nano
    assert len(tokenizer(opticks())["input_ids"]) >= 262_144


def test_every_needle_is_taken_out_again(nano, monkeypatch):
    model, tokenizer = nano
    seen = {}
    original = study_module.memorize

    def remember(*arguments, **options):
        seen["memory"] = original(*arguments, **options)
        seen["before"] = seen["memory"].landmarks.clone()
        return seen["memory"]

    monkeypatch.setattr(study_module, "memorize", remember)
    text = torch.tensor(tokenizer(opticks()[:6000])["input_ids"], dtype=torch.int32)[:1024]
    run_needles(model, tokenizer, text, lengths=[1024], samples=3)
    torch.testing.assert_close(seen["memory"].landmarks, seen["before"], rtol=0, atol=1e-4)
    assert torch.equal(seen["memory"].documents[0].tokens, text)


def test_the_authors_sentence_is_hidden_and_asked_for_as_in_their_suite(nano):
    model, tokenizer = nano
    text = torch.tensor(tokenizer(opticks()[:6000])["input_ids"], dtype=torch.int32)[:1024]
    (result,) = study_module.run_forms(model, tokenizer, text.clone(), samples=2, wording="authors").results
    assert result.task == "s_niah_authors" and [sample.index for sample in result.samples] == [0, 1]
    (sample,) = AuthorsNeedle().samples(Material(tokenizer, text), 1024, 1, 0)
    needles = study_module.worded("authors", 0, 2)
    assert needles == study_module.worded("authors", 0, 3)[:2] and needles[0].value != needles[1].value
    for needle, found in zip(needles, result.samples, strict=True):
        assert found.prompt == needle.question and found.expected.isdigit() and len(found.expected) == 8
        assert tokenizer.decode(sample.question) == needle.question
        assert needle.statement.replace(needle.value, sample.answers[0]) in tokenizer.decode(sample.context.tolist())
    for options in ({"together": True}, {"notes": True}):
        with pytest.raises(ValueError, match="hide them one at a time"):
            study_module.run_forms(model, tokenizer, text, samples=2, wording="authors", **options)
    with pytest.raises(ValueError, match="wording must be one of own, authors, got 'mine'"):
        study_module.run_forms(model, tokenizer, text, samples=2, wording="mine")


def test_too_short_a_haystack_is_refused(nano):
    model, tokenizer = nano
    with pytest.raises(ValueError, match="add more text"):
        run_needles(model, tokenizer, torch.ones(100, dtype=torch.int32), lengths=[200], samples=1)


def test_plots_are_drawn_from_records_alone(tmp_path):
    samples = [{"length": 4096 * n, "depth": d / 10, "correct": d % 2 == 0} for n in (1, 8) for d in range(10)]
    plot_needles(samples, tmp_path / "a.png", "needles")
    log = [
        {"stage": "warmup", "tokens": 10, "loss": 2.0},
        {"stage": "warmup", "tokens": 20, "probe": {"needle_accuracy": 1}},
    ]
    plot_training(log, tmp_path / "b.png", "loss")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("a.png", "b.png"))
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_training(log[1:], tmp_path / "c.png", "loss")
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\nnot json\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:2"):
        read_jsonl(tmp_path / "bad.jsonl")
    assert [human_tokens(n) for n in (512, 4096, 1 << 20, 3 << 30)] == ["512", "4K", "1M", "3G"]


def test_results_files_have_the_documented_form(tmp_path):
    meta = run_metadata("hsa test", 3)
    assert {"command", "commit", "date", "hardware", "versions", "seed"} <= set(meta)
    write_study(tmp_path, study_module.NeedleStudy([], 32, 0, 7), "nano", meta)
    assert json.loads((tmp_path / "report.json").read_text())["meta"]["seed"] == 3
    write_json(tmp_path / "x.json", {"a": 1})
    assert not list(tmp_path.glob(".partial*"))


def test_the_score_margin_is_that_of_the_wanted_chunk_above_the_best_other():
    indices, scores = torch.tensor([[9, 7, 4, -1]]), torch.tensor([[1.0, 3.0, 2.5, -torch.inf]])
    assert score_margin(indices, scores, range(7, 8)) == 0.5
    assert score_margin(indices, scores, range(4, 5)) == -0.5
    assert score_margin(indices, scores, range(7, 10)) == 0.5
    # not retrieved: the last of the kept bounds it
    assert score_margin(indices, scores, range(5, 6)) == -2.0
    # the head that sees it best counts
    assert score_margin(indices.repeat(2, 1), torch.stack((scores[0], -scores[0])), range(9, 10)) == 1.5
    assert score_margin(torch.tensor([[3, -1]]), torch.tensor([[1.0, -torch.inf]]), range(3, 4)) == 0.0
