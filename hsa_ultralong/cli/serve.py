"""`hsa serve`: memories and a model behind an HTTP API in OpenAI's form, with a page."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from hsa_ultralong.cli.numbers import MAX_COUNT, finite, parse_size
from hsa_ultralong.cli.terminal import echo

_STORES = ("host", "device", "file")


def register(app: typer.Typer) -> None:
    app.command("serve")(_ends_well_by_term()(serve))


def serve(
    model: Annotated[Path | None, typer.Argument(help="Model folder.", show_default="checkpoints/nano")] = None,
    memories: Annotated[Path, typer.Option(help="Folder of all memories; made if it does not exist.")] = Path(
        "memories"
    ),
    host: Annotated[str, typer.Option(help="Address; others than this machine's own need --keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name in the API.", show_default="its folder's")] = None,
    keys: Annotated[
        Path | None, typer.Option(help="File of API keys, a line each: NAMESPACE KEY. Each sees its own memories.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A name or address that clients and a proxy may call it by, port or not; repeatable."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, max=1024, help="Answers decoded at once.")] = 8,
    context: Annotated[str, typer.Option(help="Tokens of a prompt and its answer, such as 8K.")] = "8K",
    waiting: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Requests that may wait.")] = 256,
    max_body: Annotated[str, typer.Option(help="Bytes of a request, such as 64M.")] = "64M",
    max_seconds: Annotated[
        float, typer.Option(min=0.1, max=86400, callback=finite, help="Longest time of an answer.")
    ] = 300.0,
    max_disk: Annotated[
        str | None, typer.Option(help="Bytes of all memories, such as 50G.", show_default="no bound")
    ] = None,
    max_disk_per_namespace: Annotated[
        str | None, typer.Option(help="Bytes of the memories of one namespace of --keys.", show_default="no bound")
    ] = None,
    evict: Annotated[
        bool, typer.Option("--evict", help="Past these, delete what was not asked for longest in the same namespace.")
    ] = False,
    store: Annotated[
        str, typer.Option(help="Best place for keys and values while asked: device, host, file.")
    ] = "host",
    device_memory: Annotated[
        str | None, typer.Option(help="Bytes of open memories on the device.", show_default="half of what is free")
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="Bytes of open memories in host memory.", show_default="half of what is free")
    ] = None,
    all_tokens: Annotated[
        str | None,
        typer.Option(help="Tokens of all prompts and answers under way.", show_default="--rows times --context"),
    ] = None,
    piece: Annotated[str, typer.Option(help="Tokens of prompts read between two steps of other answers.")] = "512",
    prefixes: Annotated[str, typer.Option(help="Bytes for beginnings of prompts that are known; 0: none.")] = "256M",
    key_values: Annotated[
        str, typer.Option(help="Form of new memories' keys and values: bf16, int8, fp8, fp16, fp32.")
    ] = "bf16",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bf16, fp32 or auto.")] = "auto",
    supervise: Annotated[
        bool, typer.Option("--supervise", help="Start the server again at once when it dies (Linux).")
    ] = False,
) -> None:
    """Serve a model and its memories: /v1/completions, /v1/chat/completions and /v1/memories, and a page at /.

    Clients of OpenAI's API work with base_url http://HOST:PORT/v1 and name memories in the request. Stop it with
    Ctrl-C: answers under way are finished first.

    Examples:

      hsa serve --memories library --port 8000

      hsa serve models/mine --memories library --keys keys.txt --host 0.0.0.0 --rows 32 --max-disk 200G
    """
    _check_choices(store, key_values, memories)
    namespaces = None if keys is None else read_keys(keys)
    hosts = _hosts(host, allow_host or [], namespaces is not None)
    _require_packages()
    sizes = {
        "body_bytes": ("--max-body", max_body), "context_tokens": ("--context", context),
        "disk_bytes": ("--max-disk", max_disk), "row_tokens": ("--all-tokens", all_tokens),
        "namespace_bytes": ("--max-disk-per-namespace", max_disk_per_namespace),
        "piece_tokens": ("--piece", piece), "prefix_bytes": ("--prefixes", prefixes),
        "device_bytes": ("--device-memory", device_memory), "host_bytes": ("--host-memory", host_memory),
    }  # fmt: skip
    limits = _limits(sizes, rows=rows, waiting=waiting, request_seconds=max_seconds, evict=evict)
    owners = 1 if namespaces is None else len(set(namespaces.values()))
    sockets, serves = _forked(host, port) if supervise else (None, None)  # returns in every server
    from hsa_ultralong.serve.app import build_app
    from hsa_ultralong.serve.connections import server_config

    answers = make_answers(model, memories, limits, name, store, key_values, device, dtype, owners)
    config = server_config(
        build_app(answers, namespaces, hosts), limits, host=host, port=port, log_level="warning",
        timeout_graceful_shutdown=int(max_seconds) + 1, timeout_keep_alive=30,
    )  # fmt: skip
    _Server(config, answers, serves).run(sockets)


@contextmanager
def _ends_well_by_term() -> Iterator[None]:
    """SIGTERM ends the process with 0 from now on: at once until uvicorn listens to it, then after its answers."""

    def stop(*_: object) -> None:
        with suppress(RuntimeError):  # in the middle of another line
            echo("Stopped.")
            sys.stdout.flush()
        # nothing to put in order, and an exception could be lost where modules are imported
        os._exit(0)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _forked(host: str, port: int) -> tuple[list[Any], Callable[[], object]]:
    """The open port, and what to call once it is served; in a fork, and again whenever that dies."""
    from hsa_ultralong.serve.supervisor import fork_servers, open_port

    sockets = [open_port(host, port)]
    _import_all()
    return sockets, fork_servers(lambda line: echo(f"note: {line}", err=True))


def _import_all() -> None:
    """What every server would import; nothing of it touches a GPU or starts threads."""
    from importlib import import_module

    for name in ("transformers", "uvicorn", "pydantic.v1"):
        import_module(name)
    served = ("app", "answers", "connections", "memories", "worker")
    for name in ("models", "cli.common", *(f"serve.{one}" for one in served)):
        import_module(f"hsa_ultralong.{name}")


def _check_choices(store: str, key_values: str, memories: Path) -> None:
    from hsa_ultralong.cli.memorize import FORMATS

    if store not in _STORES:
        raise ValueError(f"--store must be one of {', '.join(_STORES)}, got {store!r}")
    if key_values not in FORMATS:
        raise ValueError(f"--key-values must be one of {', '.join(FORMATS)}, got {key_values!r}")
    if memories.exists() and not memories.is_dir():
        raise ValueError(f"--memories {memories} is no folder")


def _limits(sizes: dict[str, tuple[str, str | None]], **others: Any) -> Any:
    """Limits, sizes of which are (option, text), None for no bound."""
    from hsa_ultralong.serve.limits import Limits

    may_be_nothing = ("prefix_bytes", "device_bytes", "host_bytes")
    parsed = {
        name: None if text is None else parse_size(text, option, 0 if name in may_be_nothing else 1)
        for name, (option, text) in sizes.items()
    }
    limits = Limits(**parsed, **others)  # type: ignore[arg-type]
    if limits.evict and limits.disk_bytes is None and limits.namespace_bytes is None:
        raise ValueError("--evict needs --max-disk or --max-disk-per-namespace")
    if limits.row_tokens is not None and limits.row_tokens < limits.context_tokens:
        raise ValueError(
            f"--all-tokens {sizes['row_tokens'][1]} cannot hold one answer of --context {sizes['context_tokens'][1]}"
        )
    return limits


def make_answers(
    model: Path | None,
    memories: Path,
    limits: Any,
    name: str | None,
    store: str,
    key_values: str,
    device: str,
    dtype: str,
    num_owners: int = 1,
) -> Any:
    """Model, worker and memories, on a GPU warm: the first answer waits for no compiler."""
    from dataclasses import replace

    from hsa_ultralong import default_checkpoint
    from hsa_ultralong.cli.common import load_model
    from hsa_ultralong.serve.answers import Answers
    from hsa_ultralong.serve.memories import Memories
    from hsa_ultralong.serve.worker import Worker

    network, tokenizer = load_model(model, device, dtype)
    if limits.device_bytes is None or limits.host_bytes is None:
        on_device, on_host = (count // 2 for count in free_bytes(network))
        limits = replace(
            limits,
            device_bytes=on_device if limits.device_bytes is None else limits.device_bytes,
            host_bytes=on_host if limits.host_bytes is None else limits.host_bytes,
        )
    rooms = Memories(memories, network, tokenizer, limits, store=store, key_values=key_values)
    small = _small_memories(network, store, key_values)
    worker = Worker(network, tokenizer, limits, num_owners, small, lambda line: echo(f"note: {line}", err=True))
    label = name or (model or default_checkpoint()).resolve().name
    return Answers(network, tokenizer, label, worker, rooms, limits)


def free_bytes(network: Any) -> tuple[int, int]:
    """Memory that is free on the model's device and on the host."""
    from hsa_ultralong.inference.placement import available_device_bytes, available_host_bytes

    return max(0, available_device_bytes(network.device)), available_host_bytes()


def _small_memories(network: Any, store: str, key_values: str) -> list[Any]:
    """What a GPU is warmed up with: memories of the kind that will be asked."""
    from hsa_ultralong.inference.warming import small_memories

    if network.device.type != "cuda":
        return []
    place: dict[str, Any] = {"store": "host", "key_values": key_values} if store == "host" else {}
    return small_memories(network, **place)


def read_keys(path: Path) -> dict[str, str]:
    """Namespace of the SHA-256 of every key in a file.

    Raises:
        ValueError: a file that is no text, a line that is none, a namespace that is no name, or a key twice.
    """
    import hashlib

    from hsa_ultralong.files.regular import read_regular
    from hsa_ultralong.serve.limits import ServeError, require_id

    found: dict[str, str] = {}
    try:
        text = read_regular(path, 2**20).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text, from byte {error.start} on") from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = line.split()
        if len(parts) != 2:
            raise ValueError(f"{path}, line {number}: needs NAMESPACE KEY")
        try:
            require_id(parts[0], "namespace")
        except ServeError as error:
            raise ValueError(f"{path}, line {number}: {error.message}") from None
        digest = hashlib.sha256(parts[1].encode()).hexdigest()
        if digest in found:
            raise ValueError(f"{path}, line {number}: this key stands there twice")
        found[digest] = parts[0]
    if not found:
        raise ValueError(f"{path} holds no keys; a line is: NAMESPACE KEY")
    return found


def _hosts(host: str, allowed: list[str], has_keys: bool) -> list[str]:
    """The names that --allow-host gives, beside an address that may be listened on."""
    from hsa_ultralong.serve.guard import is_loopback, require_host

    if not has_keys and not is_loopback(host):
        raise ValueError(
            f"--host {host} can be reached from other machines: give --keys FILE, or leave it at 127.0.0.1"
        )
    try:
        return [require_host(one) for one in allowed]
    except ValueError as error:
        raise ValueError(f"--allow-host: {error}") from None


def _require_packages() -> None:
    from importlib.util import find_spec

    missing = [one for one in ("fastapi", "uvicorn", "python_multipart", "prometheus_client") if find_spec(one) is None]
    if missing:
        raise ValueError(f"hsa serve needs {', '.join(missing)}: pip install 'hsa-ultralong[serve]'")


class _Server:
    """uvicorn, which says where it listens once it does."""

    def __init__(self, config: Any, answers: Any, serves: Callable[[], object] | None = None) -> None:
        import uvicorn

        class Told(uvicorn.Server):
            async def startup(self, sockets: Any = None) -> None:
                await super().startup(sockets)
                for server in self.servers:
                    for socket in server.sockets:
                        host, port = socket.getsockname()[:2]
                        place = f"[{host}]" if ":" in host else host
                        echo(f"Serving {answers.name} and {answers.memories.folder} on http://{place}:{port}")
                if serves is not None:
                    serves()

        self.server = Told(config)

    def run(self, sockets: Any = None) -> None:
        try:
            self.server.run(sockets)
        except KeyboardInterrupt:  # passed on after all answers were finished
            echo("Stopped.")
        except SystemExit:  # after its own line of why; a server that ran ends as it says
            if self.server.started:
                raise
        if not self.server.started:
            raise ValueError("the address is taken or cannot be used; give another --port or --host")
