"""`vlp health`: asks a running server whether it can answer.

The check of a container, where there is neither a shell nor curl; imports little, because it runs every few seconds.
"""

from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import urlsplit

import click

from data_pipelines.console import command, emit, json_option
from data_pipelines.errors import PipelineError


@command(epilog="Example: vlp health --url http://127.0.0.1:8000/readyz")
@click.option("--url", default="http://127.0.0.1:8000/readyz", show_default=True, help="/healthz: only that it runs.")
@click.option("--timeout", default=3.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Seconds.")
@json_option
def health(url: str, timeout: float, as_json: bool) -> None:
    """Ask a server whether it is ready; exit code 1 and its reason when it is not."""
    status, body = ask(url, timeout)
    if status != 200:
        raise PipelineError(f"{url}: {status} {body}")
    emit({"url": url, "status": status}, as_json, [f"{url}: ready"])


def ask(url: str, timeout: float) -> tuple[int, str]:
    """(status, body) of a GET. Raises PipelineError when nobody answers."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise PipelineError(f"--url {url}: expected http://HOST:PORT/readyz")
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    try:
        connection = kind(parts.hostname, parts.port, timeout=timeout)
        try:
            connection.request("GET", parts.path or "/")
            answer = connection.getresponse()
            return answer.status, answer.read(4096).decode(errors="replace").strip()
        finally:
            connection.close()
    except (OSError, ValueError, HTTPException) as error:
        raise PipelineError(f"{url}: no answer ({error})") from error
