"""Nothing of the evaluation is in the training data that the library makes."""

from __future__ import annotations

import hashlib
import re

from hsa_ultralong.data import needles
from hsa_ultralong.eval.tasks.recall_forms import CITIES, FAMILY_NAMES, FIRST_NAMES, RECALL_FORMS

# everything that a needle of training can say, its words aside
_TRAINING_TEMPLATES = " ".join(
    (
        *needles._STATEMENTS,
        *needles._COMPLETIONS,
        *needles._QUESTIONS,
        *needles._NUMBER_ATTRIBUTES,
        *needles._WORD_ATTRIBUTES,
        *needles._CODE_ATTRIBUTES,
    )
).lower()
_FROZEN = "a6d78b012e0470c6aefb98692742d9b0f432e460ce83887307fd59df45d96930"


def test_no_carrier_word_of_a_recall_form_stands_in_a_training_template():
    words = set(re.findall(r"[a-z]+", _TRAINING_TEMPLATES))
    for form in RECALL_FORMS:
        assert form.carriers, form
        assert not words & set(form.carriers), form
        for carrier in form.carriers:
            assert carrier in f"{form.statement} {form.question}".lower(), (form, carrier)


def test_no_frame_of_a_recall_form_is_one_of_training():
    frames = {re.sub(r"\{\w+\}", "_", template).lower() for template in [*needles._STATEMENTS, *needles._QUESTIONS]}
    for form in RECALL_FORMS:
        assert re.sub(r"\{\w+\}", "_", form.statement).lower().rstrip(". ") not in frames


def test_the_recall_forms_are_frozen():
    """A form that changes would make old numbers incomparable: add new ones under new numbers."""
    text = repr([*map(tuple, RECALL_FORMS), FIRST_NAMES, FAMILY_NAMES, CITIES])
    assert len(RECALL_FORMS) == 12
    assert hashlib.sha256(text.encode()).hexdigest() == _FROZEN
