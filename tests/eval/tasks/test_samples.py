"""What holds of the samples of every task."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from hsa_ultralong.data.tokenizer import load_tokenizer
from hsa_ultralong.eval.evidence import sample_digest
from hsa_ultralong.eval.tasks import SUITES, TASKS, Material, Sample, make_samples, reads_text, ruler_words
from hsa_ultralong.eval.tasks.sample import TooShort
from tests.eval.tasks.conftest import MAKES, make_material, write_files

pytest.importorskip("wonderwords")

LENGTH = 24_000
# tasks whose question is answered by its evidence, word for word
QUESTIONS = [task.name for task in SUITES["qa"]]
STATED = [name for name in TASKS if name not in ("cwe", "fwe", "recall_documents", *QUESTIONS)]


@pytest.fixture(scope="module", params=sorted(MAKES))
def material(request, tmp_path_factory) -> Material:
    """One for all tests, which only read it."""
    return make_material(MAKES[request.param](), write_files(tmp_path_factory.mktemp("files")))


def made(material: Material, name: str) -> tuple[Sample, ...]:
    """Two samples of LENGTH tokens and seed 0, made once for the tests that only read them."""
    return material.kept(("made", name), lambda: tuple(make_samples(name, material, LENGTH, 2)))


def decoded(material: Material, sample: Sample, span: tuple[int, int]) -> str:
    return material.tokenizer.decode(sample.context[span[0] : span[1]].tolist())


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_has_exactly_the_length_asked_for(material, name):
    (other,) = make_samples(name, material, LENGTH + 13, 1)
    for length, samples in ((LENGTH, made(material, name)), (LENGTH + 13, (other,))):
        for sample in samples:
            assert len(sample.prompt()) + sample.max_new_tokens == length == sample.length
            assert sample.task == name
            assert sample.context.dtype == np.int32


@pytest.mark.parametrize("name", TASKS)
def test_the_tasks_that_read_the_text_are_known(material, monkeypatch, name):
    asked, haystack = [], Material.haystack
    monkeypatch.setattr(
        Material, "haystack", lambda self, length, room: asked.append(length) or haystack(self, length, room)
    )
    next(make_samples(name, material, LENGTH, 1))
    assert bool(asked) is reads_text(name)


@pytest.mark.parametrize("name", ["recall_form_01", "passkey", "niah_multiquery", "fwe", "qa_1", "qa_xquad"])
def test_an_answer_has_the_room_that_is_asked_for_within_the_same_length(material, name):
    (own,) = made(material, name)[:1]
    roomy = Material(material.tokenizer, material.text, answer_tokens=100, files=material.files)
    (sample,) = make_samples(name, roomy, LENGTH, 1)
    assert sample.max_new_tokens == max(100, own.max_new_tokens)
    assert len(sample.prompt()) + sample.max_new_tokens == LENGTH


@pytest.mark.slow
def test_a_list_too_long_for_single_words_and_too_short_for_as_many_pairs_has_fewer_pairs(material, monkeypatch):
    few, lists = ruler_words._single_words()[:80], []
    monkeypatch.setattr(ruler_words, "_single_words", lambda: few)
    made_list = ruler_words.CommonWords._list
    monkeypatch.setattr(
        ruler_words.CommonWords, "_list", lambda *given: lists.append(given[3]) or made_list(*given)
    )  # fmt: skip
    fresh = Material(material.tokenizer, material.text)
    for length in range(9_000, 21_000, 1_500):
        lists.clear()
        first, second = make_samples("cwe", fresh, length, 2)
        assert len(lists) < 2 * 60
        for sample in (first, second):
            listed = fresh.tokenizer.decode(sample.context.tolist())
            # the newlines that fill the rest are fewer than two words of the list would be
            assert len(sample.context) - len(fresh.encode(listed.rstrip("\n"))) < 200
            assert len(sample.prompt()) + sample.max_new_tokens == length


@pytest.mark.parametrize("name", STATED)
def test_the_evidence_holds_the_answers_and_lies_where_it_says(material, name):
    for sample in made(material, name):
        text = " ".join(decoded(material, sample, span) for span in sample.evidence)
        assert all(answer in text for answer in sample.answers), (text, sample.answers)
        assert all(0 <= start < stop <= len(sample.context) for start, stop in sample.evidence)


@pytest.mark.parametrize("name", TASKS)
def test_samples_depend_on_seed_length_and_index_alone_and_are_those_of_every_version(material, name):
    found = [sample_digest(sample) for sample in made(material, name)]
    if not name.startswith("qa"):  # few questions, the same ones first, as RULER has it
        assert found[0] != sample_digest(next(iter(make_samples(name, material, LENGTH, 2, 1))))
    kind = "chat" if material.tokenizer.chat_template else "plain"
    golden = json.loads(Path(__file__).with_name("golden_samples.json").read_text(encoding="utf-8"))
    assert golden[kind][name] == found, "samples changed: what was measured with the old ones does not compare"


def test_depths_are_uniform_and_facts_stand_at_them(material):
    needles = ("niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_2")
    for name in (*needles, "passkey", "kv", "recall_form_01"):
        samples = list(make_samples(name, material, LENGTH, 8))
        assert [sample.depth for sample in samples] == [(i + 0.5) / 8 for i in range(8)]
        for sample in samples:
            start, stop = sample.evidence[0]
            assert abs(start / (len(sample.context) - (stop - start)) - sample.depth) < 0.04, name


def test_a_task_that_is_editable_changes_few_tokens_of_its_context(material):
    for name, task in TASKS.items():
        first, second = made(material, name)
        common = min(len(first.context), len(second.context))
        share = (first.context[:common] != second.context[:common]).mean()
        if task.is_editable and name != "recall_similar_256":
            assert share < 0.25, name


@pytest.mark.parametrize("name", TASKS)
def test_a_length_that_is_too_short_is_refused_and_says_how_much_is_needed(material, name):
    with pytest.raises(ValueError, match=r"needs at least|no room|use a"):
        list(make_samples(name, material, 30, 2))


def test_the_chat_template_stands_around_the_task_and_the_answer_begins_the_models_turn(material):
    if material.tokenizer.chat_template is None:
        with pytest.raises(ValueError, match="no chat template"):
            list(make_samples("vt", Material(material.tokenizer, material.text, chat=True), LENGTH, 1))
        return
    chat = Material(material.tokenizer, material.text, chat=True, files=material.files)
    for name in TASKS:
        (sample,) = make_samples(name, chat, LENGTH, 1)
        text = material.tokenizer.decode(sample.prompt().tolist())
        assert text.startswith("<|user|>")
        assert text.count("<|assistant|>") == 1
        assert len(sample.prompt()) + sample.max_new_tokens == LENGTH


def test_suites_and_names_are_those_of_ruler():
    assert [task.name for task in SUITES["ruler"]] == [
        "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
        "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
    ]  # fmt: skip
    tokens = {task.name: task.max_new_tokens for task in SUITES["ruler"]}
    assert set(tokens.values()) == {128, 30, 120, 50, 32}
    assert all(tokens[name] == 128 for name in tokens if name.startswith("niah"))
    assert (tokens["vt"], tokens["cwe"], tokens["fwe"], tokens["qa_1"], tokens["qa_2"]) == (30, 120, 50, 32, 32)


def test_unknown_tasks_and_missing_files_are_refused_by_name(material):
    with pytest.raises(ValueError, match="unknown task 'niah'; there are niah_single_1"):
        list(make_samples("niah", material, LENGTH, 1))
    with pytest.raises(ValueError, match="qa_1 needs a file of questions: give --data squad=FILE"):
        list(make_samples("qa_1", Material(material.tokenizer, material.text), LENGTH, 1))
    with pytest.raises(ValueError, match="21 samples of 20 questions"):
        list(make_samples("qa_1", material, LENGTH, 21))


def test_a_question_whose_documents_do_not_fit_is_passed_over(material, files):
    rows = [json.loads(line) for line in files["hotpot"].read_text().splitlines()]
    before = list(make_samples("qa_2", material, LENGTH, 5))
    rows[1]["context"][0][1] = [rows[1]["context"][0][1][0] + " It rows." * 3000]
    files["hotpot"].with_name("long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    long = Material(material.tokenizer, material.text, files={"hotpot": files["hotpot"].with_name("long.jsonl")})
    found = list(make_samples("qa_2", long, LENGTH, 5))
    assert [sample.index for sample in found] == [0, 1, 2, 3, 4]
    assert [sample.query for sample in found] == [f"Who owns boat {i}?" for i in (0, 2, 3, 4, 5)]
    assert [sample.query for sample in before] == [f"Who owns boat {i}?" for i in range(5)]
    with pytest.raises(TooShort, match="qa_2 needs at least"):
        list(make_samples("qa_2", long, LENGTH, 6))


def test_the_latest_of_changed_facts_counts_and_half_of_the_absent_ones_are_absent(material):
    for sample in make_samples("recall_changed", material, LENGTH, 6):
        text = material.tokenizer.decode(sample.context.tolist())
        head = sample.query.removeprefix("What is the secret code of the ").removesuffix("?")
        places = [text.index(f"{head} is"), text.rindex(f"{head} is")]
        assert places[0] != places[1]
        assert text[places[1] :].startswith(f"{head} is {sample.answers[0]}")
    absent = list(make_samples("recall_absent", material, LENGTH, 6))
    assert [len(sample.answers) for sample in absent] == [1, 0, 1, 0, 1, 0]
    for sample in absent:
        head = sample.query.removeprefix("What is the secret code of the ").removesuffix("?")
        assert (head in material.tokenizer.decode(sample.context.tolist())) == bool(sample.answers)


def test_samples_that_ask_for_similar_facts_share_contexts_and_ask_for_each_fact_once(material):
    samples = list(make_samples("recall_similar_16", material, LENGTH, 34))
    facts = {}
    for sample in samples:
        text = material.tokenizer.decode(sample.context.tolist())
        stated = frozenset(part.split(".")[0] for part in text.split("The secret code of the")[1:])
        facts.setdefault(stated, []).append(sample.query)
    assert [len(queries) for queries in facts.values()] == [17, 17]
    assert all(len(set(queries)) == 17 for queries in facts.values())


def test_similar_facts_differ_in_keys_and_values_and_documents_stand_behind_the_text(material):
    for sample in make_samples("recall_similar_64", material, LENGTH, 2):
        text = material.tokenizer.decode(sample.context.tolist())
        assert text.count("The secret code of the") == 65
        assert text.count(sample.answers[0]) == 1
    (sample,) = make_samples("recall_documents", material, LENGTH, 1)
    notes = [material.tokenizer.decode(list(note), skip_special_tokens=True) for note in sample.notes]
    assert len(notes) == 16 == len(set(notes))
    assert sample.answers[0] in notes[0]
    assert "secret code" not in material.tokenizer.decode(sample.context.tolist())


def test_a_short_prompt_is_fact_filler_and_the_fact_begun_again(material):
    for length in (240, 300):
        for sample in make_samples("recall_prompt", material, length, 3):
            text = material.tokenizer.decode(sample.prompt().tolist(), skip_special_tokens=True)
            stem = sample.query.removesuffix(" ...")
            assert text.startswith(f"{stem} {sample.answers[0]}.")
            assert text.endswith(f" {stem}")
            assert len(sample.prompt()) + sample.max_new_tokens == length


@pytest.mark.parametrize("length", [16, 32, 48])
def test_the_shortest_prompts_hold_a_fact_of_a_word_and_two_digits_twice(length):
    tokenizer = load_tokenizer(Path(__file__).parents[3] / "checkpoints/nano")
    made = list(make_samples("recall_prompt_short", Material(tokenizer, torch.arange(100, 4000)), length, 40))
    for sample in made:
        text = tokenizer.decode(sample.prompt().tolist(), skip_special_tokens=True)
        stem = sample.query.removesuffix(" ...")
        assert re.fullmatch(r"The [a-z]+ is", stem) and re.fullmatch(r"[1-9]\d", sample.answers[0])
        assert text.startswith(f"{stem} {sample.answers[0]}.") and text.endswith(f" {stem}")
        assert len(sample.prompt()) + sample.max_new_tokens == length
    assert len({sample.query for sample in made}) > 8 and len({sample.answers[0] for sample in made}) > 20


def test_common_words_stand_more_often_than_all_others(material):
    (sample,) = make_samples("cwe", material, 40_000, 1)
    text = material.tokenizer.decode(sample.context.tolist()).split("Answer:")[-1].split("Memorize")[-1]
    words = [part.split()[0] for part in text.split(". ")[1:] if part.split()]
    counts = {word: words.count(word) for word in set(words)}
    top = sorted(counts, key=lambda word: -counts[word])[:10]
    assert set(top) == set(sample.answers)
    assert {counts[word] for word in sample.answers} <= {29, 30}  # the last of the list may be cut


@pytest.mark.parametrize("length", [4096, 4500, 5120, 6656, 8192])
def test_a_list_of_common_words_fills_lengths_from_rulers_first_on(length):
    tokenizer = load_tokenizer(Path(__file__).parents[3] / "checkpoints/nano")
    line_break = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    for sample in make_samples("cwe", Material(tokenizer, torch.arange(100, 200)), length, 2):
        listed = tokenizer.decode(sample.context.tolist()).split("often.\n")[-1]
        counts = Counter(re.findall(r"\d+\. ([^\d]+?)(?= +\d|\s*$)", listed))
        assert {counts[word] for word in sample.answers} == {30} and {*counts.values()} == {30, 3}
        assert len(sample.context) - np.flatnonzero(sample.context != line_break)[-1] - 1 < 64


def test_common_words_say_how_much_they_need(material):
    with pytest.raises(TooShort, match=r"cwe needs at least [0-9]+ tokens, got 4100") as refused:
        list(make_samples("cwe", material, 4100, 1))
    needed = int(re.search(r"least (\d+)", str(refused.value))[1])
    assert len(list(make_samples("cwe", material, needed + needed // 10, 1))) == 1


def test_frequent_words_are_the_ranks_two_to_four(material):
    (sample,) = make_samples("fwe", material, LENGTH, 1)
    text = material.tokenizer.decode(sample.context.tolist()).split("coded words. ")[-1]
    counts: dict[str, int] = {}
    for word in text.split():
        counts[word] = counts.get(word, 0) + 1
    counts.pop("...")
    ranked = sorted(counts, key=lambda word: -counts[word])
    assert set(ranked[:3]) == set(sample.answers)
