"""`vlp serve` and `vlp keys`. Heavy imports wait until a command runs."""

import importlib.util
import socket
import sys
from pathlib import Path
from typing import Any

import click

from data_pipelines.console import CONTEXT, Group, command, emit, json_option
from data_pipelines.errors import PipelineError
from data_pipelines.fetch import FetchOptions
from data_pipelines.urls import WEB
from server.browsers import is_loopback
from server.keys import ENVIRONMENT as KEYS
from server.keys import add_key, read_file, read_keys, remove_key
from server.logs import configure
from server.serving import Launch, start
from server.settings import BACKENDS, SCOPES, Batching, Limits, Rate, Scope, Settings

FOLDER = click.Path(path_type=Path)


@command(
    epilog=f"""Examples:

\b
  vlp serve runs/demo
  vlp serve runs/demo --index index --port 0
  vlp serve runs/demo --collections collections
  vlp serve small=runs/small large=runs/large --backend auto --workers 2
  vlp serve runs/demo --guard guard.safetensors
  vlp keys new web --file keys.json; vlp serve runs/demo --host 0.0.0.0 --keys keys.json
  {KEYS}=secret vlp serve runs/demo --host 0.0.0.0"""
)
@click.argument("bundles", nargs=-1, required=True, metavar="[NAME=]BUNDLE...")
@click.option("--index", "index_folder", type=FOLDER, help="Index made by `vlp index build`; enables /v1/search.")
@click.option("--collections", type=FOLDER, help="Folder that keeps the collections of /v1/collections.")
@click.option("--qdrant", metavar="URL", help="Qdrant server that keeps them instead; key in VLP_QDRANT_API_KEY.")
@click.option("--guard", "guard_file", type=FOLDER, help="File made by `vlp guard`; flags pictures with triggers.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free port.")
@click.option("--device", default="auto", show_default=True, help="torch device, for example cuda")
@click.option(
    "--backend", default="torch", show_default=True, type=click.Choice(BACKENDS),
    help="What runs the models; auto measures what is installed and takes the fastest that is right.",
)  # fmt: skip
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 256), help="Processes on the port.")
@click.option("--keys", "key_file", type=FOLDER, help=f"File made by `vlp keys new`; also {KEYS}=key1,key2.")
@click.option("--allow-open", is_flag=True, help="Listen beyond this machine without API keys.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Requests per second and key, or address.")
@click.option(
    "--patience", default=2.0, show_default=True, type=click.FloatRange(0, min_open=True),
    help="Seconds of work that may wait; beyond it requests get 429.",
)  # fmt: skip
@click.option("--allow-host", "hosts", multiple=True, help="Host header to answer to; repeatable, * for any.")
@click.option("--cors", "origins", multiple=True, help="Origin whose pages may ask, as https://a.example; repeatable.")
@click.option("--fetch", is_flag=True, help="Fetch pictures given as URLs, from public addresses only.")
@click.option("--audit", type=FOLDER, help="File that gets a hash-chained line per change; `vlp keys audit` checks it.")
@click.option("--label-sets", type=FOLDER, help="Folder that keeps named label sets; else they end with the server.")
@click.option("--docs/--no-docs", default=None, help="/docs and /openapi.json; by default on a loopback address only.")
@click.option("--log-format", default="text", show_default=True, type=click.Choice(["text", "json"]))
@click.option("--log-level", default="info", show_default=True, type=click.Choice(["debug", "info", "warning"]))
@click.option("--drain-wait", default=0.5, show_default=True, help="Seconds from SIGTERM to closing the port.")
@json_option
def serve(
    bundles: tuple[str, ...], index_folder: Path | None, collections: Path | None, qdrant: str | None,
    guard_file: Path | None, host: str, port: int, device: str, backend: str, workers: int, key_file: Path | None,
    allow_open: bool, rate: float | None, patience: float, hosts: tuple[str, ...], origins: tuple[str, ...],
    fetch: bool, audit: Path | None, label_sets: Path | None, docs: bool | None, log_format: str, log_level: str,
    drain_wait: float, as_json: bool,
) -> None:  # fmt: skip
    """Serve one or several BUNDLEs over HTTP: /v1/embeddings, /v1/classify, /v1/search, /metrics, /docs.

    SIGTERM drains and stops; SIGHUP reads keys and bundles again.
    """
    keys = read_keys(key_file)
    if not (keys or allow_open or is_loopback(host)):
        raise PipelineError(
            f"--host {host} would open the server to others without a key: make one with `vlp keys new NAME --file F` "
            f"and add --keys F, set {KEYS}=key1,key2, or add --allow-open"
        )
    if workers > 1 and (index_folder or collections):
        raise PipelineError("an embedded index is open in one process only: leave out --workers, or use --qdrant URL")
    _require_extra()
    settings = Settings(
        host=host, port=port, keys=keys, rate=Rate(per_second=rate, burst=max(1, round(2 * rate))) if rate else None,
        hosts=hosts, cors_origins=origins, docs=is_loopback(host) if docs is None else docs, audit=audit,
        fetch=fetch_options() if fetch else None, workers=workers, label_sets=label_sets,
        batching=Batching(patience=patience),
    )  # fmt: skip
    launch = Launch(settings, bundles, index_folder, guard_file, device, backend, drain_wait, key_file,
                    collections, qdrant)  # fmt: skip
    configure("json" if log_format == "json" else "text", log_level)
    with listen(host, port) as listener:
        where = _where(host, listener)

        def announce(info: dict[str, Any]) -> None:
            told = {**where, **info}
            emit(told, as_json, _welcome(told, bool(keys)))
            sys.stdout.flush()

        start(launch, listener, announce)


def fetch_options() -> FetchOptions:
    """Shorter and stricter than for shards: somebody waits, and may have written the URL to see what happens."""
    limit = Limits().body_bytes
    return FetchOptions(timeout=5, total_timeout=10, max_bytes=limit, retries=0, schemes=WEB, user_agent="vlp-server")


def _where(host: str, listener: socket.socket) -> dict[str, Any]:
    bound = listener.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    return {"url": f"http://{shown}:{bound}", "host": host, "port": bound}


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


def _welcome(info: dict[str, Any], keyed: bool) -> list[str]:
    url = info["url"]
    key = " -H 'Authorization: Bearer KEY'" if keyed else ""
    post = f"curl -s{key} -H 'Content-Type: application/json' {url}"
    names = ", ".join(f"{name!r} ({info['backends'][name]})" for name in info["models"])
    lines = [
        f"serving {names}, width {info['dim']}, at {url}   docs: {url}/docs   stop: Ctrl-C",
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
    missing = [
        name for name in ("fastapi", "uvicorn", "httptools", "qdrant_edge") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise PipelineError(f"{', '.join(missing)} not installed: pip install 'vlp[serve]'")


@click.group(cls=Group, context_settings=dict(CONTEXT))
def keys() -> None:
    """API keys of the server, and its audit log."""


@keys.command(
    epilog="""Example:

\b
  vlp keys new web --file keys.json --scope read --rate 10"""
)
@click.argument("name")
@click.option("--file", "path", type=FOLDER, required=True, help="Made when it is not there.")
@click.option("--scope", default="read", show_default=True, type=click.Choice(SCOPES), help="Includes those before it.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Requests per second of this key.")
@json_option
def new(name: str, path: Path, scope: Scope, rate: float | None, as_json: bool) -> None:
    """Make a key and print it, this once; the file keeps its hash. A running server takes it up on SIGHUP."""
    value = add_key(path, name, scope, Rate(per_second=rate, burst=max(1, round(2 * rate))) if rate else None)
    emit({"name": name, "scope": scope, "key": value}, as_json, [value])


@keys.command(epilog="Example: vlp keys drop web --file keys.json")
@click.argument("name")
@click.option("--file", "path", type=FOLDER, required=True)
def drop(name: str, path: Path) -> None:
    """Take a key out of the file. A running server forgets it on SIGHUP."""
    remove_key(path, name)


@keys.command(name="list", epilog="Example: vlp keys list --file keys.json")
@click.option("--file", "path", type=FOLDER, required=True)
@json_option
def list_keys(path: Path, as_json: bool) -> None:
    """Names and scopes of the keys in a file."""
    found = read_file(path)
    emit(
        {"keys": [{"name": key.name, "scope": key.scope} for key in found]},
        as_json,
        [f"{k.name}  {k.scope}" for k in found],
    )


@keys.command(epilog="Example: vlp keys audit audit.jsonl")
@click.argument("log", type=FOLDER)
@json_option
def audit(log: Path, as_json: bool) -> None:
    """Check that every line of an audit log follows from the one before; exit code 1 names the first that does not."""
    from server.audit import verify

    if not log.is_file():
        raise PipelineError(f"no such file: {log}")
    count = verify(log)
    emit({"lines": count}, as_json, [f"{count} lines, none changed"])
