"""`vlp serve` and `vlp index build`. Heavy imports wait until a command runs."""

import asyncio
import importlib.util
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_pipelines.console import CONTEXT, Group, command, emit, json_option, progress
from data_pipelines.errors import PipelineError
from server.settings import Settings, hash_key

if TYPE_CHECKING:
    import uvicorn

    from server.index import IndexInfo

FOLDER = click.Path(path_type=Path)
KEYS = "VLP_API_KEYS"
DRAIN_SECONDS = 20


@command(
    epilog=f"""Examples:

\b
  vlp serve runs/demo
  vlp serve runs/demo --index index --port 0
  vlp serve runs/demo --guard guard.safetensors
  {KEYS}=secret vlp serve runs/demo --host 0.0.0.0"""
)
@click.argument("bundle", type=FOLDER)
@click.option("--index", "index_folder", type=FOLDER, help="Index made by `vlp index build`; enables /v1/search.")
@click.option("--guard", "guard_file", type=FOLDER, help="File made by `vlp guard`; flags pictures with triggers.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free port.")
@click.option("--device", default="auto", show_default=True, help="torch device, for example cuda")
@click.option("--allow-open", is_flag=True, help=f"Listen beyond this machine without API keys ({KEYS}).")
@json_option
def serve(
    bundle: Path, index_folder: Path | None, guard_file: Path | None, host: str, port: int, device: str,
    allow_open: bool, as_json: bool,
) -> None:  # fmt: skip
    """Serve BUNDLE over HTTP: /v1/embeddings, /v1/classify, /v1/search, /docs."""
    keys = [key.strip() for key in os.environ.get(KEYS, "").split(",") if key.strip()]
    if not (keys or allow_open or is_loopback(host)):
        raise PipelineError(
            f"--host {host} would open the server to others without a key: set {KEYS}=key1,key2, or add --allow-open"
        )
    _require_extra()
    settings = Settings(host=host, port=port, key_hashes=tuple(hash_key(key) for key in keys))
    with listen(host, port) as listener:
        server, info = _prepare(settings, bundle, index_folder, guard_file, device, listener)

        def announce() -> None:
            emit(info, as_json, _welcome(info, bool(keys)))
            sys.stdout.flush()

        run_server(server, listener, announce)


def _prepare(
    settings: Settings, bundle: Path, index_folder: Path | None, guard_file: Path | None, device: str,
    listener: socket.socket,
) -> "tuple[uvicorn.Server, dict[str, Any]]":  # fmt: skip
    """Everything loaded and checked: (the server, what to tell about it)."""
    from server.index.edge import open_index

    index = open_index(index_folder) if index_folder else None  # first, because importing torch takes seconds

    import uvicorn

    from server.app import create_app
    from server.engine import BundleEngine
    from server.guarding import Guarding
    from vlp.backdoor.guard import Guard, load_guard
    from vlp.bundle import load_bundle
    from vlp.distributed import pick_device
    from vlp.embed import weights_digest

    model = load_bundle(bundle, pick_device(device))
    engine = BundleEngine(model, settings.limits)
    guarding = Guarding(Guard(*load_guard(guard_file, weights_digest(bundle)), model)) if guard_file else None
    if index is not None:
        check_same_model(index.info, engine.name, engine.dim, weights_digest(bundle))
    config = uvicorn.Config(
        create_app(settings, engine, index, guarding),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    bound = listener.getsockname()[1]
    shown = f"[{settings.host}]" if ":" in settings.host else settings.host
    info = {
        "url": f"http://{shown}:{bound}",
        "host": settings.host,
        "port": bound,
        "model": engine.name,
        "dim": engine.dim,
        "points": index.info.points if index else None,
        "guard": guarding.state() if guarding else None,
    }
    return uvicorn.Server(config), info


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises PipelineError when the port is taken or the address is not ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise PipelineError(f"--host {host}: {error.strerror or error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise PipelineError(
            f"cannot listen on {host}:{port} ({error.strerror or error}): choose another --port, or 0 for a free one"
        ) from error
    return listener


def check_same_model(info: "IndexInfo", model: str, dim: int, digest: str) -> None:
    """Raises PipelineError when another model made the vectors of an index: distances would mean nothing."""
    if info.dim != dim or (info.weights_sha256 and info.weights_sha256 != digest):
        raise PipelineError(
            f"--index: made with model {info.model or 'unknown'!r} (width {info.dim}), but {model!r} (width {dim}) is "
            "served and would not understand it: run `vlp embed` and `vlp index build` with this bundle"
        )


def run_server(server: "uvicorn.Server", listener: socket.socket, announce: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM, then finish what was begun. `announce` is called once it answers."""
    # uvicorn stops gracefully and then raises the signal once more, for handlers set before it: these end the process
    # by returning, with exit code 0.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: None)

    async def main() -> None:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not (server.started or serving.done()):
            await asyncio.sleep(0.02)
        if server.started:
            announce()
        await serving
        if not server.started:
            raise PipelineError("the server did not start; the log above says why")

    asyncio.run(main())


def _welcome(info: dict[str, Any], keyed: bool) -> list[str]:
    url = info["url"]
    key = " -H 'Authorization: Bearer KEY'" if keyed else ""
    post = f"curl -s{key} -H 'Content-Type: application/json' {url}"
    lines = [
        f"serving {info['model']!r} (width {info['dim']}) at {url}   docs: {url}/docs   stop: Ctrl-C",
        f"""  {post}/v1/embeddings -d '{{"input": ["a red circle"]}}'""",
        f"""  {post}/v1/classify -d '{{"image": "'$(base64 -w0 PICTURE)'", "labels": ["cat", "dog"]}}'""",
    ]
    if info["guard"] is not None:
        lines.append(f"  guard: pictures that score above {info['guard']['threshold']:.3f} are flagged")
    if info["points"] is not None:
        lines.append(f"""  {post}/v1/search -d '{{"text": "a red circle", "limit": 3}}'   # {info["points"]} entries""")
    return lines


def _require_extra() -> None:
    """Say what to install when the serve extra is missing."""
    missing = [name for name in ("fastapi", "uvicorn", "qdrant_edge") if importlib.util.find_spec(name) is None]
    if missing:
        raise PipelineError(f"{', '.join(missing)} not installed: pip install 'vlp[serve]'")


@click.group(cls=Group, context_settings=dict(CONTEXT))
def index() -> None:
    """Search indexes."""


@index.command(
    epilog="""Examples:

\b
  vlp index build embeddings --out index
  vlp index build embeddings --out index --field width"""
)
@click.argument("embeddings", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Index folder; an index that is there is replaced.")
@click.option("--modality", type=click.Choice(["image", "text"]), default="image", show_default=True)
@click.option("--field", "fields", multiple=True, help="Further metadata column to keep and filter by; repeatable.")
@json_option
def build(embeddings: Path, out: Path, modality: str, fields: tuple[str, ...], as_json: bool) -> None:
    """Build a Qdrant Edge index from EMBEDDINGS, a folder written by `vlp embed` or by clip-retrieval."""
    _require_extra()
    from server.index.build import Modality, build_index, count_rows

    which: Modality = "text" if modality == "text" else "image"
    with progress("indexing", count_rows(embeddings, which), unit="rows") as advance:
        info = build_index(embeddings, out, which, fields, advance)
    lines = [
        f"{info.points:,} {which} vectors of width {info.dim}, filtered by {', '.join(info.fields)}: {out}",
        f"serve it: vlp serve BUNDLE --index {out}",
    ]
    emit({"out": str(out), **info.model_dump()}, as_json, lines)
