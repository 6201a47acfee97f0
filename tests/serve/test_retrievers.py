"""The example of retrievers: passages of a served memory in the form of LangChain and of LlamaIndex.

A stand-in takes the place of one that is not installed.
"""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest

from tests.serve.conftest import FILLER, LANTERN
from tests.test_examples import example

QUESTION = "What is the secret code of the silver lantern?"


class Kept:
    """A class that keeps what it is made of, and is asked as a retriever is."""

    def __init__(self, **parts):
        self.__dict__.update(parts)

    def invoke(self, question):
        return self._get_relevant_documents(question, run_manager=None)

    def retrieve(self, question):
        return self._retrieve(SimpleNamespace(query_str=question))


@pytest.fixture
def packages(monkeypatch):
    """langchain_core and llama_index, or stand-ins with the names that the example imports."""
    wanted = {
        "langchain_core.documents": ["Document"],
        "langchain_core.retrievers": ["BaseRetriever"],
        "llama_index.core.retrievers": ["BaseRetriever"],
        "llama_index.core.schema": ["NodeWithScore", "TextNode"],
    }
    missing = {name for name in ("langchain_core", "llama_index") if importlib.util.find_spec(name) is None}
    for place, names in wanted.items():
        parts = place.split(".")
        if parts[0] not in missing:
            continue
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[:count])
            monkeypatch.setitem(sys.modules, name, sys.modules.get(name) or ModuleType(name))
        for name in names:
            monkeypatch.setattr(sys.modules[place], name, Kept, raising=False)


def test_a_retriever_returns_the_passages_that_the_model_looked_up(server, packages, capsys):
    server[1].memories.create("default", "looked", [("note", f"{LANTERN} {FILLER}")])
    retrievers = example("retrievers")
    found = retrievers.main(["looked", QUESTION, "--url", server[0]])
    assert "lantern" in found[0]["text"] and "note, tokens" in capsys.readouterr().out
    passages = retrievers.MemoryPassages(["looked"], url=server[0])
    texts = [one["text"] for one in found[:2]]
    documents = retrievers.langchain_retriever(passages, 2).invoke(QUESTION)
    assert [one.page_content for one in documents] == texts
    assert documents[0].metadata["memory"] == "looked" and documents[0].metadata["weight"] == found[0]["weight"]
    nodes = retrievers.llama_index_retriever(passages, 2).retrieve(QUESTION)
    assert [one.node.text for one in nodes] == texts and nodes[0].score == found[0]["weight"]
