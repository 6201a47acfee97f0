"""A needle study that is cut off anywhere goes on: every sentence asked once, the same numbers as in one go."""

from __future__ import annotations

import contextlib
import shutil

import pytest

from hsa_ultralong.eval import needles as study_module
from hsa_ultralong.eval.needle_run import NeedleRun
from hsa_ultralong.eval.needles import run_forms
from hsa_ultralong.testing.factories import random_tokens, tiny_model
from tests.eval.test_scoring import Letters

FORMS = ["", "int8"]


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=128)


def text_of(length, seed=1):
    return random_tokens(1, length, vocab_size=128, seed=seed)[0].int()


def go(model, folder, text, *, samples=3, stop_after=10**9):
    asked = []
    with NeedleRun(folder, model, "tiny", forms=FORMS, store="device", task="s_niah", samples=samples, seed=5) as run:

        def keep(result):
            asked.append((result.length, result.form, result.samples[-1].index))
            run.keep(result)
            if len(asked) == stop_after:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            run_forms(model, Letters(), text, samples=samples, forms=FORMS, seed=5, known=run.known(text), keep=keep)
        return asked, run.study()


def numbers(study):
    return [
        (result.length, result.form, result.logits_error, result.distinct_chunks, result.memory_bytes, result.samples)
        for result in study.results
    ]


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The folder of a study in one go, its sentences, and the study."""
    folder = tmp_path_factory.mktemp("whole") / "study"
    return folder, *go(model, folder, text_of(240))


@pytest.mark.parametrize("stop_after", [1, 3, 4, 5])
def test_a_study_cut_off_after_any_sentence_ends_as_if_it_had_not_been(model, whole, tmp_path, stop_after):
    text = text_of(240)
    _, sentences, study = whole
    assert len(sentences) == 6
    first, _ = go(model, tmp_path / "cut", text, stop_after=stop_after)
    second, resumed = go(model, tmp_path / "cut", text)
    assert first + second == sentences
    assert numbers(resumed) == numbers(study)
    third, again = go(model, tmp_path / "cut", text)
    assert third == [] and numbers(again) == numbers(study)


def test_a_study_that_is_whole_reads_nothing_again_and_takes_another_length(model, whole, tmp_path, monkeypatch):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    read, memorize = [], study_module.memorize
    monkeypatch.setattr(study_module, "memorize", lambda *a, **o: read.append(len(a[1][0])) or memorize(*a, **o))
    go(model, tmp_path, text_of(240))
    assert read == []
    _, study = go(model, tmp_path, text_of(320))
    assert read == [320, 320]
    assert [(result.length, result.form) for result in study.results] == [
        (240, ""),
        (240, "int8"),
        (320, ""),
        (320, "int8"),
    ]


def test_another_text_of_the_same_length_is_refused(model, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="holds 240 tokens of another text; give another folder"):
        go(model, tmp_path, text_of(240, seed=2))


def test_other_weights_forms_or_numbers_are_refused(model, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="samples was 3, now 4"):
        go(model, tmp_path, text_of(240), samples=4)
    with pytest.raises(ValueError, match="weights was"):
        go(tiny_model(vocab_size=128, seed=3), tmp_path, text_of(240))
