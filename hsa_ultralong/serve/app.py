"""The HTTP side: routes, keys, limits, errors, metrics. docs/serve.md; tests/serve/test_app.py."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Request, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from hsa_ultralong.inference.prompts import has_chat_template
from hsa_ultralong.serve.answers import Answers, cancel
from hsa_ultralong.serve.bodies import BodyLimit
from hsa_ultralong.serve.guard import HeaderCheck, require_host
from hsa_ultralong.serve.limits import ServeError, require_id
from hsa_ultralong.serve.memories import Memories, Opened
from hsa_ultralong.serve.metrics import Metrics
from hsa_ultralong.serve.page import PAGE, POLICY
from hsa_ultralong.serve.protocol import (
    Change,
    ChatCompletion,
    Completion,
    Merge,
    MoreDocuments,
    NewMemory,
)
from hsa_ultralong.serve.streams import completion_events, events, whole_answer
from hsa_ultralong.serve.uploads import documents_of

# names a request, so that it is done once however often it is sent
RequestKeyHeader = Annotated[str | None, Header(alias="Idempotency-Key")]


def build_app(answers: Answers, keys: Mapping[str, str] | None = None, hosts: Sequence[str] = ()) -> FastAPI:
    """The application.

    Args:
        keys: namespace of every API key's SHA-256 in hex; None: no key is needed and all share one namespace.
        hosts: names or addresses, with or without a port, that the server has beside this machine's own.

    Raises:
        ValueError: a host that is none.
    """
    memories, worker, limits = answers.memories, answers.worker, answers.limits
    metrics = Metrics(answers)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(worker.close)

    app = FastAPI(title="hsa_ultralong", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(BodyLimit, limits=limits)
    app.add_middleware(HeaderCheck, keys=keys, hosts=tuple(require_host(one) for one in hosts))

    def namespace(request: Request) -> str:
        return str(request.state.namespace)

    space = Depends(namespace)
    _register_errors(app)
    _register_health(app, answers, metrics)
    _register_answers(app, answers, metrics, space)
    _register_memories(app, memories, space)
    _register_documents(app, memories, space)
    return app


def _error(error: ServeError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers())


def _register_errors(app: FastAPI) -> None:
    @app.exception_handler(ServeError)
    async def refused(_: Request, error: ServeError) -> JSONResponse:
        return _error(error)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        message = str(first["msg"]).removeprefix("Value error, ")
        if first["type"] == "json_invalid":
            place, message = "", f"the body is no JSON: {first['ctx']['error']} at character {place}"
        elif not place and first["type"] != "value_error":
            message = "send a JSON object, with the header Content-Type: application/json"
        return _error(ServeError(400, f"{place}: {message}"[:500] if place else message[:500], "invalid_request"))

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> JSONResponse:
        return _error(
            ServeError(error.status_code, str(error.detail), "not_found" if error.status_code == 404 else "http")
        )

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        return _error(ServeError(500, f"the server failed: {type(error).__name__}", "internal"))


def _register_health(app: FastAPI, answers: Answers, metrics: Metrics) -> None:
    @app.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY})

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        if not answers.worker.is_alive or answers.worker.is_closing:
            raise ServeError(503, "the server is stopping", "stopping")
        return {"status": "ready"}

    @app.get("/metrics", response_class=PlainTextResponse)
    def numbers() -> Response:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")


def _register_answers(app: FastAPI, answers: Answers, metrics: Metrics, space: Any) -> None:
    @app.get("/v1/models")
    async def models(_: str = space) -> dict[str, Any]:
        return {"object": "list", "data": [_model(answers)]}

    @app.get("/v1/models/{name}")
    async def model(name: str, _: str = space) -> dict[str, Any]:
        answers.require_model(name)
        return _model(answers)

    async def answer(wanted: Completion | ChatCompletion, place: str, request: Request) -> Response:
        answers.require_model(wanted.model)
        # a body of text takes seconds to tokenise
        prompts = await run_in_threadpool(answers.prompts, wanted)
        opened: Opened | None = None
        if wanted.memories():
            opened = await run_in_threadpool(answers.memories.open, place, wanted.memories())
        elif wanted.sources or wanted.reread or wanted.unsure_below is not None:
            raise ServeError(
                400, "sources, reread and unsure_below are of a memory; name one: memory: [id]", "no_memory"
            )
        rows, pieces = answers.start(wanted, prompts, opened, place)
        pieces = metrics.watch(pieces)
        if wanted.stream:
            stream = completion_events(answers, wanted, opened, pieces)
            return StreamingResponse(events(stream, lambda: cancel(rows)), media_type="text/event-stream")
        return await _unless_gone(request, whole_answer(answers, wanted, opened, pieces), lambda: cancel(rows))

    @app.post("/v1/completions")
    async def completions(wanted: Completion, request: Request, place: str = space) -> Response:
        return await answer(wanted, place, request)

    @app.post("/v1/chat/completions")
    async def chat(wanted: ChatCompletion, request: Request, place: str = space) -> Response:
        return await answer(wanted, place, request)


async def _unless_gone(request: Request, answer: Awaitable[dict[str, Any]], give_up: Callable[[], None]) -> Response:
    """The answer, or nothing when the client has left: its rows are given back then."""

    async def gone() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.25)

    task, watch = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return Response(status_code=499)
        return JSONResponse(task.result())
    finally:
        give_up()
        watch.cancel()
        task.cancel()


def _model(answers: Answers) -> dict[str, Any]:
    return {
        "id": answers.name, "object": "model", "created": answers.created, "owned_by": "hsa_ultralong",
        "context_tokens": answers.limits.context_tokens, "has_chat_template": has_chat_template(answers.tokenizer),
    }  # fmt: skip


def _register_memories(app: FastAPI, memories: Memories, space: Any) -> None:
    @app.get("/v1/memories")
    def listed(place: str = space) -> dict[str, Any]:
        return {"object": "list", "data": memories.infos(place)}

    @app.post("/v1/memories")
    async def created(wanted: NewMemory, place: str = space, key: RequestKeyHeader = None) -> Response:
        require_id(wanted.id)
        return await _changed(
            lambda report: memories.create(place, wanted.id, wanted.pairs(), report, key), wanted.stream, status=201
        )

    @app.post("/v1/memories/{id}/files")
    async def uploaded(
        id: str, files: list[UploadFile], place: str = space, stream: bool = False, key: RequestKeyHeader = None
    ) -> Response:
        """Files as documents: a new memory, or more documents of an old one."""
        require_id(id)
        pairs = await documents_of(files, memories.uploads)
        known = id in await run_in_threadpool(memories.ids, place)
        change = memories.append if known else memories.create
        return await _changed(lambda report: change(place, id, pairs, report, key), stream, status=201)

    @app.get("/v1/memories/{id}")
    def info(id: str, place: str = space) -> dict[str, Any]:
        return memories.info(place, id)

    @app.delete("/v1/memories/{id}")
    def deleted(id: str, place: str = space) -> dict[str, Any]:
        memories.delete(place, id)
        return {"id": id, "object": "memory", "deleted": True}

    @app.post("/v1/memories/{id}/merge")
    def merged(id: str, wanted: Merge, place: str = space, key: RequestKeyHeader = None) -> dict[str, Any]:
        return memories.merge(place, id, wanted.memories, key)


def _register_documents(app: FastAPI, memories: Memories, space: Any) -> None:
    @app.get("/v1/memories/{id}/documents")
    def documents(id: str, place: str = space) -> dict[str, Any]:
        return {"object": "list", "data": memories.documents(place, id)}

    @app.post("/v1/memories/{id}/documents")
    async def appended(id: str, wanted: MoreDocuments, place: str = space, key: RequestKeyHeader = None) -> Response:
        return await _changed(lambda report: memories.append(place, id, wanted.pairs(), report, key), wanted.stream)

    @app.get("/v1/memories/{id}/documents/{document}")
    def passage(id: str, document: int, place: str = space, start: int = 0, stop: int = 1024) -> dict[str, Any]:
        return memories.passage(place, id, document, start, min(stop, start + 65_536))

    @app.put("/v1/memories/{id}/documents/{document}")
    def replaced(
        id: str, document: int, wanted: Change, place: str = space, key: RequestKeyHeader = None
    ) -> dict[str, Any]:
        return memories.replace(place, id, document, wanted.text, wanted.span(), key)

    @app.delete("/v1/memories/{id}/documents/{document}")
    def removed(id: str, document: int, place: str = space) -> dict[str, Any]:
        return memories.remove(place, id, document)


async def _changed(
    change: Callable[[Callable[[int, int], None]], dict[str, Any]], stream: bool, status: int = 200
) -> Response:
    """Run a change that reads text on a thread of its own; streamed, its progress comes as events.

    The stream begins with the first progress: what is refused before has its own status.
    """
    if not stream:
        return JSONResponse(await run_in_threadpool(change, lambda *_: None), status)
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | ServeError | None]()
    last = 0.0

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.1 or done == total:
            last = time.monotonic()
            event = {"object": "memory.progress", "tokens": done, "total": total}
            loop.call_soon_threadsafe(queue.put_nowait, event)

    def work() -> None:
        result: dict[str, Any] | ServeError
        try:
            result = change(report)
        except ServeError as error:
            result = error
        except Exception as error:  # an event of its own, if the stream has begun
            result = ServeError(500, f"failed: {type(error).__name__}", "internal")
        loop.call_soon_threadsafe(queue.put_nowait, result)
        loop.call_soon_threadsafe(queue.put_nowait, None)

    running = loop.run_in_executor(None, work)
    first = await queue.get()
    if isinstance(first, ServeError):
        raise first

    async def told() -> AsyncIterator[dict[str, Any]]:
        event: dict[str, Any] | ServeError | None = first
        while event is not None:
            if isinstance(event, ServeError):
                raise event
            yield event
            event = await queue.get()
        await running

    return StreamingResponse(events(told(), lambda: None), status, media_type="text/event-stream")
