"""Nothing of the evaluation is in the training data that the library makes."""

from __future__ import annotations

import hashlib
import inspect
import re

import numpy as np

from hsa_ultralong.data import fact_clauses, fact_rows, fact_templates, fact_values, facts, list_rows, needles
from hsa_ultralong.eval.tasks import paper, ruler_needles, ruler_words
from hsa_ultralong.eval.tasks.recall import SHORT_WORDS
from hsa_ultralong.eval.tasks.recall_forms import CITIES, FAMILY_NAMES, FIRST_NAMES, RECALL_FORMS


def _strings(value):
    """All texts in nested tuples, lists and dictionaries."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for item in value.items() for text in _strings(item)]
    return [text for item in value for text in _strings(item)] if isinstance(value, list | tuple) else []


_TABLES = {
    needles: (
        "_STATEMENTS",
        "_COMPLETIONS",
        "_QUESTIONS",
        "_NUMBER_ATTRIBUTES",
        "_WORD_ATTRIBUTES",
        "_CODE_ATTRIBUTES",
    ),
    facts: ("_NUMBERS", "_WORDS", "_CITY_ATTRIBUTES", "_FRAMES", "_ASKED", "_DEEDS", "_OPENINGS"),
    fact_templates: tuple(name for name in vars(fact_templates) if name.isupper()),
    fact_values: ("_UNITS", "_CURRENCIES", "_TITLES", "_GROUPS", "_UNIT_NOUNS"),
    fact_clauses: ("PATTERNS", "VERBS", "NOUNS", "PREPOSITIONS", "AGENTS", "ADVERBS"),
    fact_rows: ("_PROMPTS", "_TAILS"),
    list_rows: ("_CHAINS", "_PAIRS", "_VALUES", "_ATTRIBUTES", "_FREQUENT", "_JOINT", "_STYLES"),
}
# everything that a fact of training can say, its words aside
_TEMPLATES = [text for module, names in _TABLES.items() for name in names for text in _strings(getattr(module, name))]
_TRAINING_TEMPLATES = " ".join(_TEMPLATES).lower()
_FROZEN = "a6d78b012e0470c6aefb98692742d9b0f432e460ce83887307fd59df45d96930"


def test_no_carrier_word_of_a_recall_form_stands_in_a_training_template():
    words = set(re.findall(r"[a-z]+", _TRAINING_TEMPLATES))
    for form in RECALL_FORMS:
        assert form.carriers, form
        assert not words & set(form.carriers), form
        for carrier in form.carriers:
            assert carrier in f"{form.statement} {form.question}".lower(), (form, carrier)


def test_no_word_of_the_shortest_prompts_stands_in_a_training_template():
    assert not {*re.findall(r"[a-z]+", _TRAINING_TEMPLATES)} & {*SHORT_WORDS}


def test_no_frame_of_a_recall_form_is_one_of_training():
    frames = {re.sub(r"\{\w+\}", "_", template).lower().rstrip(". ") for template in _TEMPLATES}
    for form in RECALL_FORMS:
        assert re.sub(r"\{\w+\}", "_", form.statement).lower().rstrip(". ") not in frames


def _skeleton(text):
    """Function words and marks in their order; whatever else a word says, a value or a subject is, is a blank."""
    text = re.sub(r"\{value\}|\{v\}", " 1 ", text)
    text = re.sub(r"(the )?\{\w+\}", " 2 ", text)
    found = [
        word if word in _FUNCTION_WORDS or not word.isalpha() else "_"
        for word in re.findall(r"\w+|[^\w\s.]", text.lower())
    ]
    return tuple(found)


_FUNCTION_WORDS = set(
    """
    the a an of on in at by to for with from off away that but and its it was were is are be been had has have did does
    do will who whom what which when where how many much before after until since while as if not no only few beside
    near they he she
    """.split()  # noqa: SIM905
)


def test_no_clause_of_training_has_the_function_words_of_a_recall_form_in_its_order():
    """An open vocabulary could say every sentence: the patterns are not those of the evaluation either."""
    wanted = {_skeleton(form.statement): form.statement for form in RECALL_FORMS}
    assert len(wanted) == len(RECALL_FORMS)
    draw = fact_values.Draw(np.random.default_rng(0))
    for _ in range(20_000):
        clause = fact_clauses.sample_clause(draw)
        skeleton = _skeleton(clause.statement)
        assert skeleton not in wanted, (clause.statement, wanted[skeleton])


def test_no_name_or_place_of_the_recall_suite_is_listed_for_training():
    listed = {*fact_values._FIRST, *fact_values._FAMILY, *fact_values._PLACES, *facts._NAMES, *facts._CITIES}
    assert not listed & {*FIRST_NAMES, *FAMILY_NAMES, *CITIES}


def test_no_phrase_of_ruler_or_of_the_authors_stands_in_a_training_template():
    """Five words in a row."""
    texts = [inspect.getsource(module) for module in (paper, ruler_needles, ruler_words)]
    said = {phrase for text in texts for quoted in re.findall(r'"([^"]{20,})"', text) for phrase in _phrases(quoted)}
    assert len(said) > 100
    for template in _TEMPLATES:
        assert not said & _phrases(template), template


def _phrases(text):
    words = re.findall(r"[a-z]+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def test_the_recall_forms_are_frozen():
    """A form that changes would make old numbers incomparable: add new ones under new numbers."""
    text = repr([*map(tuple, RECALL_FORMS), FIRST_NAMES, FAMILY_NAMES, CITIES])
    assert len(RECALL_FORMS) == 12
    assert hashlib.sha256(text.encode()).hexdigest() == _FROZEN
