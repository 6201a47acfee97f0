"""Stories of bAbI in a book."""

from __future__ import annotations

import pytest

from hsa_ultralong.eval.tasks import Material, make_samples
from hsa_ultralong.eval.tasks.babilong import FILES, read_stories
from hsa_ultralong.eval.tasks.sample import TooShort

LENGTH = 6000


@pytest.mark.parametrize("kind", FILES)
def test_facts_keep_their_order_and_the_prompt_has_the_parts_of_babilong(material, kind):
    for sample in make_samples(f"babilong_{kind}", material, LENGTH, 4):
        text = material.tokenizer.decode(sample.prompt().tolist())
        places = [text.index(part) for part in (
            "<example>", "Answer: ", "</example>", "<context>", "Bill took the apple", "Bill went to the bathroom",
            "</context>", f"Question: {sample.query}",
        )]  # fmt: skip
        assert places == sorted(places)
        assert text.endswith("Answer:")
        assert text.count("<example>") == 2


def test_a_file_gives_each_question_with_all_facts_before_it(tmp_path):
    (tmp_path / "a.txt").write_text("1 A is b.\n2 C is d.\n3 What? \tb\t1\n4 E is f.\n5 And? \tf\t4 2\n1 G is h.\n")
    first, second = read_stories(tmp_path / "a.txt")
    assert first.facts == ("A is b.", "C is d.") and first.support == (0,)
    assert second.facts == ("A is b.", "C is d.", "E is f.") and second.support == (2, 1)
    assert (second.question, second.answer) == ("And?", "f")
    (tmp_path / "b.txt").write_text("no numbers")
    with pytest.raises(ValueError, match="no file of bAbI"):
        read_stories(tmp_path / "b.txt")


def test_many_facts_stand_in_order_in_little_text(material, files):
    facts = "\n".join(f"{n} Mary went to room number {n}." for n in range(1, 61))
    (files["babi"] / FILES["qa1"]).write_text(f"{facts}\n61 Where is Mary? \toffice\t60\n")
    (sample,) = make_samples("babilong_qa1", Material(material.tokenizer, material.text, files=files), LENGTH, 1)
    text = material.tokenizer.decode(sample.context.tolist())
    places = [text.index(f"room number {n}.") for n in range(1, 61)]
    assert places == sorted(places)


def test_stories_with_too_many_facts_are_left_out_and_what_is_missing_is_named(material, files):
    with pytest.raises(ValueError, match="9 samples of 8 questions"):
        list(make_samples("babilong_qa1", material, LENGTH, 9))
    (files["babi"] / FILES["qa2"]).unlink()
    with pytest.raises(ValueError, match=r"babilong_qa2 reads qa2_two-supporting-facts_test\.txt"):
        list(make_samples("babilong_qa2", material, LENGTH, 1))
    with pytest.raises(ValueError, match="give --data babi=FOLDER"):
        list(make_samples("babilong_qa1", Material(material.tokenizer, material.text), LENGTH, 1))


@pytest.mark.parametrize("kind", FILES)
def test_of_length_zero_the_context_is_the_facts_alone_of_the_same_stories(material, kind):
    long = list(make_samples(f"babilong_{kind}", material, LENGTH, 4))
    for sample, other in zip(make_samples(f"babilong_{kind}", material, 0, 4), long, strict=True):
        text = material.tokenizer.decode(sample.context.tolist()).split("<context>\n")[1]
        assert text.count("Bill") == 2 and "snores" not in text
        assert (sample.query, sample.answers, sample.length) == (other.query, other.answers, 0)
        start, stop = sample.evidence[0]
        fact = material.tokenizer.decode(sample.context[start:stop].tolist())
        assert sample.answers[0] in fact and fact in text
    with pytest.raises(TooShort, match="vt has no form of facts alone; length 0 is of the suite babilong"):
        list(make_samples("vt", material, 0, 1))
