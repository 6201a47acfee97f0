"""Checks of JSON name the place, what is needed and what was got."""

from __future__ import annotations

import json

import pytest

from hsa_ultralong.files.fields import require, table, text, whole


def test_fields_are_checked_by_name_and_kind():
    fields = {"n": whole(1, 9), "name": text()}
    require(table(fields), {"n": 3, "name": "a"}, "it:")
    require(table(fields, may_lack=("name",)), {"n": 3}, "it:")
    require(table(fields, is_open=True), {"n": 3, "name": "a", "m": 1}, "it:")
    for content, words in (
        ([], "it: must be a JSON object"),
        ({"n": 3}, "it: lacks 'name'"),
        ({"n": 3, "name": "a", "m": 1}, "it: has an unknown field 'm'"),
        ({"n": True, "name": "a"}, "it: n must be a whole number within 1..9, got True"),
        ({"n": 3, "name": ["\x1b[2J" * 99]}, "it: name must be a string"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            require(table(fields), json.loads(json.dumps(content)), "it:")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 200
