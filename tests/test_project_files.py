"""Workflows, templates and citation say what the project says elsewhere."""

import re
import sys
from pathlib import Path

import pytest
import yaml

import hsa_ultralong

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def loaded(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_actions_matrix_has_every_python_and_the_oldest_transformers_of_pyproject():
    matrix = loaded(".github/workflows/tests.yml")["jobs"]["tests"]["strategy"]["matrix"]
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d", line)]
    assert matrix["python"] == named
    (oldest,) = (line for line in PROJECT["dependencies"] if line.startswith("transformers"))
    assert matrix["transformers"] == [re.search(r">=([\d.]+)", oldest)[1], "latest"]


def test_every_make_target_and_program_of_workflows_and_hooks_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    files = (".github/workflows/tests.yml", ".github/workflows/nightly.yml", ".ci/run")
    text = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
    assert set(re.findall(r"\bmake ([a-z]+)\b", text)) <= targets
    assert all((ROOT / file).is_file() for file in re.findall(r"(?:tests|examples)/[\w/.]*\w", text))
    assert set(re.findall(r"\.\[(\w+)\]", text)) <= set(PROJECT["optional-dependencies"])
    for hook in loaded(".pre-commit-config.yaml")["repos"][0]["hooks"]:
        assert hook["entry"].startswith(".venv/bin/")
        assert all((ROOT / file).is_file() for file in re.findall(r"tests/\S+\.py", hook["entry"]))


@pytest.mark.parametrize("name", [".github/ISSUE_TEMPLATE/bug.yml", ".github/ISSUE_TEMPLATE/wish.yml"])
def test_issue_forms_have_what_such_forms_need(name):
    form = loaded(name)
    assert form["name"] and form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids) and all(field["attributes"]["label"] for field in form["body"])


def test_the_citation_names_this_version_licence_and_paper():
    citation = loaded("CITATION.cff")
    assert (citation["version"], citation["license"]) == (hsa_ultralong.__version__, PROJECT["license"])
    paper = citation["preferred-citation"]
    assert paper["url"] == PROJECT["urls"]["Paper"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert paper["title"] in readme and all(author["family-names"] in readme for author in paper["authors"])


def test_the_changelog_has_this_version_below_what_is_not_released():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[(.+?)\]", text, re.M)
    assert sections[:2] == ["Unreleased", hsa_ultralong.__version__]
    assert set(re.findall(r"^### (.*)$", text, re.M)) <= {
        "Added",
        "Changed",
        "Deprecated",
        "Fixed",
        "Removed",
        "Security",
    }
