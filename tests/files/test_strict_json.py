"""JSON of files: nothing passes for another value, sealed JSON shows every change."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsa_ultralong.files import strict_json

VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists)


@given(st.dictionaries(st.text().filter(lambda name: name != "sha256"), VALUES), st.data())
def test_sealed_json_comes_back_and_shows_any_changed_bit(tmp_path_factory, content, data):
    path = tmp_path_factory.getbasetemp() / "x.json"
    whole = strict_json.sealed(content)
    assert strict_json.unsealed(whole, path) == (content, True)
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8
    try:
        found, is_sealed = strict_json.unsealed(bytes(changed), path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        # the name of the seal itself: a field that no reader knows
        assert not is_sealed and len(found) == len(content) + 1


@given(st.recursive(VALUES, lambda one: st.lists(one) | st.dictionaries(st.text(), one)))
def test_json_by_lines_comes_back(value):
    assert json.loads(strict_json.as_lines(value)) == value


def test_json_by_lines_has_a_record_a_line():
    value = {
        "meta": {"seed": 0, "runs": [{"a": 1}, {}]},
        "records": [{"task": "é", "at": (1, 2)}, {"task": "b"}],
        "no": [],
    }
    assert strict_json.as_lines(value) == (
        '{\n "meta": {\n  "seed": 0,\n  "runs": [{"a":1},{}]\n },\n'
        ' "records": [\n  {"task":"\\u00e9","at":[1,2]},\n  {"task":"b"}\n ],\n "no": []\n}\n'
    )


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        "3",
        "",
        "{",
        "[" * 100_000,
        "\xff",
        '{"a": 1' + "0" * 5000 + "}",
        '{"a": 1, "a": 2}',
        '{"a": NaN}',
        '{"a": 1e999}',
    ],
)
def test_what_is_no_json_object_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"x\.json") as caught:
        strict_json.read_json(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


def test_what_a_seal_covers_may_be_no_finite_number(tmp_path):
    content, is_sealed = strict_json.unsealed(strict_json.sealed({"loss": [math.nan, math.inf]}), tmp_path / "x.json")
    assert is_sealed and math.isnan(content["loss"][0]) and content["loss"][1] == math.inf
