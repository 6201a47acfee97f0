"""From a request of the API to rows of the worker, and from their pieces to answers in OpenAI's form.

Called by app.py; tests/serve/test_app.py.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from hsa_ultralong.inference.ask import unsure_weight
from hsa_ultralong.inference.passages import Reread, reread_prompt
from hsa_ultralong.inference.prompts import Prompt, as_question, has_chat_template, prompt_ids
from hsa_ultralong.memory import Memory
from hsa_ultralong.serve.limits import Limits, ServeError, require_few_and_short
from hsa_ultralong.serve.memories import Memories, Opened
from hsa_ultralong.serve.protocol import ChatCompletion, Completion
from hsa_ultralong.serve.rows import Piece, Request, Sampling, TokenProbability
from hsa_ultralong.serve.worker import Worker


class AskedPrompt(NamedTuple):
    """A prompt as text or messages, None where token ids were given, and its token ids."""

    form: Prompt | None
    ids: list[int]


class Answers:
    """Answers requests of one model."""

    def __init__(
        self, model: Any, tokenizer: Any, name: str, worker: Worker, memories: Memories, limits: Limits
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.worker, self.memories, self.limits = worker, memories, limits
        self.created = int(time.time())
        memories.opened.is_held, memories.opened.let_go = worker.holds, worker.retire
        worker.is_open = memories.opened.has

    def require_model(self, name: str) -> None:
        """Raises: ServeError for a model that is not served here."""
        if name != self.name:
            raise ServeError(404, f"this server has the model {self.name!r}, not {name[:80]!r}", "model_not_found")

    # prompts ----------------------------------------------------------------------------------------------------------

    def prompts(self, wanted: Completion | ChatCompletion) -> list[AskedPrompt]:
        """Every prompt of a request.

        Raises:
            ServeError: too many choices, empty, too long, tokens that are none, or turns that the model's template
                refuses.
        """
        require_few_and_short(self.tokenizer, wanted.texts(), wanted.n, self.limits)
        if isinstance(wanted, ChatCompletion):
            found = [self._asked(self._chat(wanted))]
        elif isinstance(wanted.prompt, str):
            found = [self._asked(wanted.prompt)]
        elif wanted.prompt and isinstance(wanted.prompt[0], str):
            found = [self._asked(str(text)) for text in wanted.prompt]
        else:
            found = [AskedPrompt(None, [int(token) for token in wanted.prompt])]
        for asked in found:
            if not asked.ids:
                raise ServeError(400, "the prompt is empty", "invalid_prompt")
            if wanted.reread and asked.form is None:
                raise ServeError(400, "reread needs a prompt in text, not token ids", "invalid_request")
            if any(not 0 <= token < self.model.config.vocab_size for token in asked.ids):
                raise ServeError(400, f"token ids are 0 to {self.model.config.vocab_size - 1}", "invalid_tokens")
            if self._room(wanted, asked) < 0:
                raise ServeError(
                    400,
                    f"{len(asked.ids):,} tokens of prompt and {wanted.wanted_tokens():,} of answer pass the "
                    f"{self.limits.context_tokens:,} of a row; put long text into a memory",
                    "context_length_exceeded",
                )
        return found

    def _asked(self, form: Prompt) -> AskedPrompt:
        try:
            return AskedPrompt(form, prompt_ids(self.tokenizer, form))
        except ValueError as error:
            raise ServeError(400, str(error), "invalid_prompt") from None

    def _room(self, wanted: Completion | ChatCompletion, asked: AskedPrompt) -> int:
        """Tokens that a row has left beside the prompt and its answer."""
        return self.limits.context_tokens - len(asked.ids) - wanted.wanted_tokens()

    def _chat(self, wanted: ChatCompletion) -> Prompt:
        if has_chat_template(self.tokenizer):
            return [
                {"role": "system" if one.role == "developer" else one.role, "content": one.text()}
                for one in wanted.messages
            ]
        if len(wanted.messages) > 1 or wanted.messages[0].role != "user":
            raise ServeError(
                400,
                f"{self.name} is no chat model and answers one message of the user; put what it should know into a "
                "memory",
                "no_chat_template",
            )
        return as_question(wanted.messages[0].text())

    def stops(self, wanted: Completion | ChatCompletion) -> list[str]:
        """Stop strings; a model without a chat template answers in one line."""
        one_line = isinstance(wanted, ChatCompletion) and not has_chat_template(self.tokenizer)
        return [*wanted.stops(), *(["\n"] if one_line else [])]

    # rows -------------------------------------------------------------------------------------------------------------

    def start(
        self, wanted: Completion | ChatCompletion, prompts: list[AskedPrompt], opened: Opened | None, owner: str = ""
    ) -> tuple[list[Request], AsyncIterator[tuple[int, Piece]]]:
        """Hand all rows of a request over; pieces come as (number of the choice, piece). owner: whose prompts count as
        known.

        Raises:
            ServeError: the worker takes no more.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece]]()
        deadline = time.monotonic() + self.limits.request_seconds
        requests: list[Request] = []
        memory = None if opened is None else opened.memory
        for number in range(len(prompts) * wanted.n):
            seed = None if wanted.seed is None else wanted.seed + number % wanted.n
            sampling = Sampling(wanted.temperature, wanted.top_k, wanted.top_p, seed, wanted.wanted_logprobs())

            def put(piece: Piece, number: int = number) -> None:
                loop.call_soon_threadsafe(queue.put_nowait, (number, piece))

            asked = prompts[number // wanted.n]
            requests.append(
                Request(
                    torch.tensor(asked.ids), memory, wanted.wanted_tokens(), put, sampling, self.stops(wanted),
                    deadline, owner, not wanted.stream, reread=self._reread(wanted, asked, memory),
                )
            )  # fmt: skip
        try:
            for request in requests:
                self.worker.submit(request)
        except ServeError:
            cancel(requests)
            raise
        return requests, _pieces(queue, len(requests))

    def _reread(
        self, wanted: Completion | ChatCompletion, asked: AskedPrompt, memory: Memory | None
    ) -> Callable[[], Reread] | None:
        """What puts passages into the prompt, where they are wanted, as many as the row has room for."""
        if not wanted.reread or memory is None or asked.form is None:
            return None
        room = self._room(wanted, asked)
        room = room if wanted.reread_tokens is None else min(room, wanted.reread_tokens)
        return partial(reread_prompt, self.model, self.tokenizer, memory, asked.form, wanted.reread, most_tokens=room)

    # answers ----------------------------------------------------------------------------------------------------------

    def head(self, wanted: Completion | ChatCompletion, *, is_chunk: bool) -> dict[str, Any]:
        """The fields that every answer and every event of it begins with."""
        is_chat = isinstance(wanted, ChatCompletion)
        kind = ("chat.completion.chunk" if is_chunk else "chat.completion") if is_chat else "text_completion"
        prefix = "chatcmpl-" if is_chat else "cmpl-"
        return {"id": prefix + uuid.uuid4().hex, "object": kind, "created": int(time.time()), "model": self.name}

    def logprobs(self, wanted: Completion | ChatCompletion, found: list[TokenProbability], offset: int) -> Any:
        """Log probabilities in the form of either API; offset: characters before the first token."""
        if wanted.wanted_logprobs() is None:
            return None
        texts = [self.tokenizer.decode([one.token]) for one in found]
        if isinstance(wanted, ChatCompletion):
            return {"content": [self._one_logprob(one) for one in found], "refusal": None}
        places = [offset]
        for text in texts:
            places.append(places[-1] + len(text))
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in found],
            "top_logprobs": [{self.tokenizer.decode([token]): value for token, value in one.best} for one in found],
            "text_offset": places[:-1],
        }

    def _one_logprob(self, one: TokenProbability) -> dict[str, Any]:
        pairs = [(one.token, one.logprob), *one.best]
        entries = [
            {"token": text, "logprob": value, "bytes": list(text.encode())}
            for text, value in ((self.tokenizer.decode([token]), value) for token, value in pairs)
        ]
        return {**entries[0], "top_logprobs": entries[1:]}

    def retrieval(
        self, wanted: Completion | ChatCompletion, opened: Opened | None, piece: Piece
    ) -> dict[str, Any] | None:
        """What an answer was read from: best weight, whether that is little, passages, and those that stood in the
        prompt; None without a memory."""
        if opened is None:
            return None
        line = unsure_weight(self.model.config, opened.memory.num_chunks_of_all)
        line = line if wanted.unsure_below is None else wanted.unsure_below
        weight = piece.weight or 0.0
        return {
            "weight": weight,
            "unsure_below": line,
            "is_uncertain": None if line is None else weight < line,
            "chunks": opened.memory.num_chunks_of_all,
            "sources": [self._source(opened, *pair) for pair in piece.chunks[: wanted.sources]],
            "reread": [self._source(opened, *pair) for pair in piece.reread],
        }

    def _source(self, opened: Opened, chunk: int, weight: float) -> dict[str, Any]:
        memory = opened.memory
        number = bisect_right([document.first_chunk for document in memory.documents], chunk) - 1
        document, (id, document_id) = memory.documents[number], opened.documents[number]
        start = (chunk - document.first_chunk) * memory.chunk_size
        stop = min(start + memory.chunk_size, document.num_tokens)
        text = self.tokenizer.decode(document.tokens[start:stop].tolist(), skip_special_tokens=True)
        return {
            "memory": id, "document": document_id, "name": document.name, "start": start, "stop": stop,
            "weight": weight, "chunk": chunk, "text": text,
        }  # fmt: skip


async def _pieces(queue: asyncio.Queue[tuple[int, Piece]], count: int) -> AsyncIterator[tuple[int, Piece]]:
    open_rows = count
    while open_rows:
        number, piece = await queue.get()
        if piece.error is not None:
            raise piece.error
        open_rows -= piece.finish is not None
        yield number, piece


def cancel(requests: list[Request]) -> None:
    """Give the rows of a request back."""
    for request in requests:
        request.is_cancelled = True
