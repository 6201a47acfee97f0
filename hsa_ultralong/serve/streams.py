"""Answers as one body, or as server-sent events, in OpenAI's form. Called by app.py; tests/serve/test_app.py."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from hsa_ultralong.serve.answers import Answers
from hsa_ultralong.serve.limits import ServeError
from hsa_ultralong.serve.memories import Opened
from hsa_ultralong.serve.protocol import ChatCompletion, Completion
from hsa_ultralong.serve.rows import Piece, TokenProbability

_REASONS = {"timeout": "length", "cancelled": "stop"}
Pieces = AsyncIterator[tuple[int, Piece]]


async def events(source: AsyncIterator[dict[str, Any]], give_up: Callable[[], None]) -> AsyncIterator[str]:
    """Server-sent events of JSON values, "[DONE]" last; `give_up` is called at the end, however it comes."""
    try:
        async for value in source:
            yield f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
    except ServeError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
    finally:
        give_up()
    yield "data: [DONE]\n\n"


async def whole_answer(
    answers: Answers, wanted: Completion | ChatCompletion, opened: Opened | None, pieces: Pieces
) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    texts: dict[int, list[str]] = {}
    chances: dict[int, list[TokenProbability]] = {}
    last: dict[int, Piece] = {}
    async for number, piece in pieces:
        texts.setdefault(number, []).append(piece.text)
        chances.setdefault(number, []).extend(piece.probabilities)
        if piece.finish is not None:
            last[number] = piece
    choices = []
    for number, piece in sorted(last.items()):
        choice: dict[str, Any] = {"index": number, "finish_reason": _REASONS.get(piece.finish or "", piece.finish)}
        text = "".join(texts[number])
        if isinstance(wanted, ChatCompletion):
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        choice["logprobs"] = answers.logprobs(wanted, chances[number], 0)
        retrieval = answers.retrieval(wanted, opened, piece)
        choices.append(choice if retrieval is None else {**choice, "retrieval": retrieval})
    usage = _usage(wanted, last, opened)
    return {**answers.head(wanted, is_chunk=False), "choices": choices, "usage": usage}


async def completion_events(
    answers: Answers, wanted: Completion | ChatCompletion, opened: Opened | None, pieces: Pieces
) -> AsyncIterator[dict[str, Any]]:
    """The events of a streamed answer."""
    head, is_chat = answers.head(wanted, is_chunk=True), isinstance(wanted, ChatCompletion)
    begun: set[int] = set()
    last: dict[int, Piece] = {}
    offsets: dict[int, int] = {}
    async for number, piece in pieces:
        if is_chat and number not in begun:
            begun.add(number)
            yield {**head, "choices": [_delta(number, {"role": "assistant", "content": ""})]}
        reason = None if piece.finish is None else _REASONS.get(piece.finish, piece.finish)
        found = answers.logprobs(wanted, piece.probabilities, offsets.get(number, 0))
        offsets[number] = offsets.get(number, 0) + len(piece.text)
        if is_chat:
            choice = _delta(number, {"content": piece.text} if piece.text else {}, found, reason)
        else:
            choice = {"index": number, "text": piece.text, "logprobs": found, "finish_reason": reason}
        if piece.finish is not None:
            last[number] = piece
            retrieval = answers.retrieval(wanted, opened, piece)
            choice = choice if retrieval is None else {**choice, "retrieval": retrieval}
        yield {**head, "choices": [choice]}
    if wanted.stream_options is not None and wanted.stream_options.include_usage:
        yield {**head, "choices": [], "usage": _usage(wanted, last, opened)}


def _delta(number: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
    return {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _usage(wanted: Completion | ChatCompletion, last: dict[int, Piece], opened: Opened | None) -> dict[str, Any]:
    """Tokens of all prompts, each once, and of all answers."""
    prompt = sum(piece.num_prompt for number, piece in last.items() if number % wanted.n == 0)
    answer = sum(piece.num_tokens for piece in last.values())
    found: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
    if opened is not None:
        found["memory_tokens"] = opened.memory.num_tokens
    return found
