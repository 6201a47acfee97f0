"""A served memory as a retriever of LangChain or LlamaIndex, through the API alone.

    hsa serve --memories library --port 8000
    pip install langchain-core        # or llama-index-core
    python examples/retrievers.py lib "What is the secret code of the silver lantern?"

A retriever returns passages instead of an answer: those that the model looked up for the first token of one. Use it to
give them to another model, or to see what was found.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from typing import Any


class MemoryPassages:
    """Passages of memories of a running `hsa serve`."""

    def __init__(self, memory: str | list[str], *, url: str = "http://localhost:8000", key: str = "none") -> None:
        self.memory, self.url, self.key = memory, url.rstrip("/"), key
        self.model = self._call("/v1/models")["data"][0]["id"]

    def find(self, question: str, count: int = 4) -> list[dict[str, Any]]:
        """The `count` passages with the largest weights: text, weight, memory, name, document, start and stop."""
        asked = {"role": "user", "content": question}
        body = {"model": self.model, "messages": [asked], "memory": self.memory, "sources": count, "max_tokens": 1}
        found: list[dict[str, Any]] = self._call("/v1/chat/completions", body)["choices"][0]["retrieval"]["sources"]
        return found

    def _call(self, path: str, body: Any = None) -> Any:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers)) as response:
            return json.load(response)


def langchain_retriever(passages: MemoryPassages, count: int = 4) -> Any:
    """A `langchain_core` retriever; use it as any other: `.invoke(question)`, or in a chain."""
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever

    class MemoryRetriever(BaseRetriever):
        def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
            return [
                Document(page_content=found["text"], metadata={key: found[key] for key in found if key != "text"})
                for found in passages.find(query, count)
            ]

    return MemoryRetriever()


def llama_index_retriever(passages: MemoryPassages, count: int = 4) -> Any:
    """A `llama_index` retriever; use it as any other: `.retrieve(question)`, or in a query engine."""
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.core.schema import NodeWithScore, TextNode

    class MemoryRetriever(BaseRetriever):
        def _retrieve(self, query_bundle: Any) -> list[NodeWithScore]:
            return [
                NodeWithScore(
                    node=TextNode(text=found["text"], metadata={key: found[key] for key in found if key != "text"}),
                    score=found["weight"],
                )
                for found in passages.find(query_bundle.query_str, count)
            ]

    return MemoryRetriever()


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("memory")
    parser.add_argument("question")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--key", default="none")
    options = parser.parse_args(arguments)
    found = MemoryPassages(options.memory, url=options.url, key=options.key).find(options.question)
    for passage in found:
        print(f"{passage['weight']:.2f} {passage['name']}, tokens {passage['start']}-{passage['stop']}")
        print(" ".join(passage["text"].split()))
    return found


if __name__ == "__main__":
    main()
