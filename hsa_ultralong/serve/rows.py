"""One answer on its way: what is wanted, the row that decodes it, and the pieces that are passed on.

Called by worker.py and answers.py; tests/serve/test_worker.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hsa_ultralong.inference.answer_text import AnswerText
from hsa_ultralong.inference.passages import Reread
from hsa_ultralong.memory import Memory
from hsa_ultralong.serve.evidence import Evidence
from hsa_ultralong.serve.limits import ServeError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the best token. seed: of this answer's own draws. top_logprobs: alternatives per token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    top_logprobs: int | None = None


@dataclass(frozen=True)
class TokenProbability:
    """A token's text and log probability in nats, with the best tokens of its place."""

    token: int
    logprob: float
    best: list[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """One step of one answer: text to pass on, often empty; at the end the reason (stop, length, cancelled, timeout),
    the tokens of the prompt, and chunks with their weights: retrieved ones, and those that stood in the prompt."""

    text: str = ""
    probabilities: list[TokenProbability] = field(default_factory=list)
    finish: str | None = None
    num_tokens: int = 0
    weight: float | None = None
    chunks: list[tuple[int, float]] = field(default_factory=list)
    reread: list[tuple[int, float]] = field(default_factory=list)
    num_prompt: int = 0
    error: ServeError | None = None


@dataclass
class Request:
    """One answer that is wanted.

    Attributes:
        prompt: (n,) token ids, a new document. put: takes every Piece, on the worker's thread. owner: whose prompts
            count as known. is_whole: text is wanted at the end only, so there is a first Piece and a last one.
        is_cancelled: set it from anywhere to give the row back.
        reread: makes the prompt from what the memory holds, on a thread beside the one that decodes; `passages` is what
            it made.
    """

    prompt: torch.Tensor
    memory: Memory | None
    max_new_tokens: int
    put: Callable[[Piece], None]
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    deadline: float = float("inf")
    owner: str = ""
    is_whole: bool = False
    is_cancelled: bool = False
    reread: Callable[[], Reread] | None = None
    passages: Reread | None = None

    def prepare(self) -> None:
        """Put the passages that are to be read again into the prompt, once."""
        if self.reread is not None and self.passages is None:
            self.passages = self.reread()
            self.prompt = torch.tensor(self.passages.ids)


class RunningRow:
    """A request under way."""

    def __init__(self, request: Request, tokenizer: Any, device: torch.device) -> None:
        self.request, self.text = request, AnswerText(tokenizer, request.stop)
        self.evidence = Evidence(request.memory)
        if request.passages is not None:
            self.evidence.begin_with(request.passages.weights)
        self.held = Piece()
        self.has_begun = False
        self.generator: torch.Generator | None = None
        if request.sampling.temperature:
            self.generator = torch.Generator(device)
            if request.sampling.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(request.sampling.seed)

    def put(self, piece: Piece) -> None:
        """Pass a piece on, or hold it back where only the whole answer is wanted."""
        if not self.request.is_whole:
            self.request.put(piece)
            return
        text, found = self.held.text + piece.text, [*self.held.probabilities, *piece.probabilities]
        if self.has_begun and piece.finish is None:
            self.held = Piece(text, found)
            return
        self.held, self.has_begun = Piece(), True
        self.request.put(replace(piece, text=text, probabilities=found))
