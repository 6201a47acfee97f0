"""Scores of adversarial answers."""

from __future__ import annotations

import pytest

from hsa_ultralong.eval.tasks import score


@pytest.mark.parametrize(
    ("metric", "answer", "references", "wanted"),
    [
        # RULER's substring scores: case ignored, control characters are line breaks
        ("all", "A is 123 and b 456", ["123", "456"], 1.0),
        ("all", "only 123", ["123", "456"], 0.5),
        ("all", "1234567", ["123"], 1.0),  # RULER counts a prefix; `exact` does not
        ("all", "HELLO there", ["hello"], 1.0),
        ("all", "12\x003", ["123"], 0.0),
        ("part", "it was Rush, I think", ["rush", "queen"], 1.0),
        ("part", "", ["rush"], 0.0),
        # the whole answer
        ("exact", " 8237401.", ["8237401"], 1.0),
        ("exact", "8237401\nQuestion: and more", ["8237401"], 1.0),
        ("exact", "82374011", ["8237401"], 0.0),
        ("exact", "823740", ["8237401"], 0.0),
        ("exact", "8237401 8237401", ["8237401"], 0.0),
        ("exact", "", ["8237401"], 0.0),
        # the answer goes on with other text
        ("begins", " 8237401. It snores", ["8237401"], 1.0),
        ("begins", " 82374012", ["8237401"], 0.0),
        ("begins", " it is 8237401", ["8237401"], 0.0),
        ("begins", "45585697|One of", ["45585697"], 1.0),
        ("begins", "8237401.5", ["8237401"], 0.0),
        ("begins", "8237401,000", ["8237401"], 0.0),
        ("begins", "12:30:15", ["12:30"], 0.0),
        ("begins", "12:30. Then", ["12:30"], 1.0),
        # the answer stands anywhere, as it is
        ("mentions", "45585697|One of the special magic numbers", ["45585697"], 1.0),
        ("mentions", " 12345. Remember it.", ["12345"], 1.0),
        ("mentions", "The secret code of the amber kettle is **8237401**.", ["8237401"], 1.0),
        ("mentions", "the number is:8237401", ["8237401"], 1.0),
        ("mentions", "82374011", ["8237401"], 0.0),
        ("mentions", "18237401", ["8237401"], 0.0),
        ("mentions", "82374 01", ["8237401"], 0.0),
        ("mentions", "x8237401", ["8237401"], 0.0),
        ("mentions", "12.8237401", ["8237401"], 0.0),
        ("mentions", "1,234", ["234"], 0.0),
        ("mentions", "1230", ["12:30"], 0.0),
        ("mentions", "at 12:30:15", ["12:30"], 0.0),
        ("mentions", "It was 12 March 1850.", ["2 March 1850"], 0.0),
        ("mentions", "Anna Bell and Tom Reed", ["Tom Reed"], 1.0),
        ("mentions", "Anna Bellows", ["Anna Bell"], 0.0),
        ("mentions", "1111111 or 8237401", ["8237401"], 1.0),  # `begins` does not forgive it
        ("begins", "1111111 or 8237401", ["8237401"], 0.0),
        ("mentions", "", ["8237401"], 0.0),
        ("mentions_all", "926535, 141508", ["141508", "926535"], 1.0),
        ("mentions_all", "141508 and 9265351", ["141508", "926535"], 0.5),
        ("mentions_all", "ABCDEF", ["ABCDE"], 0.0),
        # lists in order, nothing else among them
        ("in_order", "141508 926535", ["141508", "926535"], 1.0),
        ("in_order", "926535 141508", ["141508", "926535"], 0.0),
        ("in_order", "141508 926535 897932", ["141508", "926535"], 0.0),
        ("in_order", "ABCDE, FGHIJ and KLMNO.", ["ABCDE", "FGHIJ", "KLMNO"], 1.0),
        ("in_order", "141508, 926535.", ["141508", "926535"], 1.0),
        ("in_order", "141508 9265351", ["141508", "926535"], 0.0),
        ("in_order", "141508 926535.5", ["141508", "926535"], 0.0),
        ("in_order", "ABCDEF GHIJK", ["ABCDE", "GHIJK"], 0.0),
        ("in_order", "141508 926535. | One of the numbers for EEUVM", ["141508", "926535"], 0.0),
        # the answer goes on
        ("begins_in_order", "141508 926535. | One of the numbers for EEUVM", ["141508", "926535"], 1.0),
        ("begins_in_order", "926535 141508", ["141508", "926535"], 0.0),
        ("begins_in_order", "897932 141508 926535", ["141508", "926535"], 0.0),
        ("begins_in_order", "141508 926535.5", ["141508", "926535"], 0.0),
        ("begins_in_order", "141508", ["141508", "926535"], 0.0),
        ("begins_in_order", "", ["141508", "926535"], 0.0),
        # SQuAD
        ("em", "The Eiffel Tower!", ["eiffel tower"], 1.0),
        ("em", "Eiffel", ["eiffel tower"], 0.0),
        ("f1", "the Eiffel Tower in Paris", ["Eiffel Tower"], 2 * 0.5 * 1 / 1.5),
        ("f1", "a", ["the"], 1.0),  # both empty in normal form
        ("f1", "nothing", ["Eiffel"], 0.0),
        ("f1", "Eiffel Eiffel Eiffel", ["Eiffel"], 0.5),
        ("contains", "I would say hill 12.", ["hill 1"], 0.0),
        ("contains", "I would say hill 1.", ["hill 1"], 1.0),
    ],
)
def test_an_answer_gets_the_score_it_deserves(metric, answer, references, wanted):
    assert score(metric, answer, references) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("metric", "answer", "target", "query", "wanted"),
    [
        ("places", "The most recent location of Mary is office.", "office", "Where is Mary?", 1.0),
        ("places", "OFFICE", "office", "Where is Mary?", 1.0),
        ("places", "kitchen", "office", "Where is Mary?", 0.0),
        # all labels named
        ("places", "bathroom bedroom garden hallway kitchen office", "office", "Where is Mary?", 0.0),
        ("places", "office or kitchen", "office", "Where is Mary?", 0.0),
        ("places", "office\nkitchen", "office", "Where is Mary?", 0.0),  # a line break ends no sentence
        # the first sentence counts, what follows it does not
        ("places", "office. kitchen", "office", "Where is Mary?", 1.0),
        ("places", "I think. office", "office", "Where is Mary?", 0.0),
        ("places", "office<context>kitchen", "office", "Where is Mary?", 1.0),
        # labels of the question do not count
        ("places", "Before the kitchen it was in the garden", "garden", "Where was the milk before the kitchen?", 1.0),
        ("givers", "Mary gave it", "Mary", "Who gave the milk to Fred?", 1.0),
        ("givers", "Mary gave the apple", "Mary", "Who gave the milk to Fred?", 0.0),
        ("givers", "", "Mary", "Who gave the milk to Fred?", 0.0),
    ],
)
def test_labels_must_be_exactly_the_right_ones(metric, answer, target, query, wanted):
    assert score(metric, answer, [target], query) == wanted


def test_metrics_that_are_none_and_samples_without_references_are_refused():
    with pytest.raises(ValueError, match="unknown metric 'bleu'; there are all"):
        score("bleu", "a", ["a"])
    with pytest.raises(ValueError, match="at least one reference"):
        score("all", "a", [])
