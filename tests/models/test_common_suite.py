"""transformers' own common tests on two debug models: what fails is listed with a reason, and the list is not stale."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hsa_ultralong.testing.common_suite import MODELS, fetch_source, functions, outcome, prepare, run

# by mixin, as only a checkout has the tests of generation
KNOWN = json.loads(Path(__file__).with_name("common_suite.json").read_text(encoding="utf-8"))
LISTED: dict[str, str] = {**KNOWN["models"], **KNOWN["generation"]}
MOST_FAILING_FUNCTIONS = 12


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", MODELS)
def test_transformers_common_tests_fail_only_where_a_reason_is_listed(tmp_path, model):
    pytest.importorskip("parameterized")
    try:
        source = fetch_source(tmp_path)
    except RuntimeError as error:
        pytest.skip(str(error))
    root = tmp_path / "suite"
    missing = prepare(root, source, fill=None)
    results = run(root, model)
    failing = functions(results, "failed")
    assert failing <= set(LISTED), f"fail without a reason: {sorted(failing - set(LISTED))}"
    assert len(failing) <= MOST_FAILING_FUNCTIONS
    stale = functions(results, "passed") & set(LISTED) - failing
    assert not stale, f"pass and are listed all the same: {sorted(stale)}"
    assert "tests/test_modeling_common.py" not in missing
    assert sum(record["outcome"] == "passed" for record in results.values()) > 50


def test_the_list_of_failing_common_tests_gives_reasons():
    assert all(name.startswith("test_") and len(reason) > 20 for name, reason in LISTED.items())


@pytest.mark.parametrize(
    "case, function", [("test_sdpa_03_fp16_pad", "test_sdpa"), ("test_sdpa_2_keys", "test_sdpa_2_keys")]
)
def test_cases_of_one_function_count_once(case, function):
    element = ElementTree.fromstring(f'<testcase name="{case}"><failure message="a&#10;b"/></testcase>')
    assert outcome(element, {"test_sdpa", "test_sdpa_2_keys"}) == {
        "function": function, "outcome": "failed", "message": "a",
    }  # fmt: skip
