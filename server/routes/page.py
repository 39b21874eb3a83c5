"""The web page at `/`: static files, the same for everyone, so that they need no key; what they ask the API for does.

Browsers ask each time whether a file has changed, which costs 304 and no body: a new server never meets an old page.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.answers import revalidated, tag_of
from server.errors import ApiError

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).resolve().parent.parent / "ui"
INDEX = "index.html"
KINDS: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = "; ".join((
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'",
    # pictures of results: those kept in payloads, and those that payloads have https addresses of
    "img-src 'self' data: blob: https:",
    "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
    "trusted-types 'none'",
))  # fmt: skip
"""Nothing but our own files runs, and no script can make markup out of text."""


@dataclass(frozen=True, slots=True)
class Asset:
    """One file of the page."""

    body: bytes
    kind: str
    """Content-Type."""
    tag: str


@cache
def assets() -> Mapping[str, Asset]:
    """File name -> file; read once, when the page is first asked for."""
    found = {}
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in KINDS:
            body = path.read_bytes()
            found[path.name] = Asset(body, KINDS[path.suffix], tag_of(body))
    return found


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    """The page."""
    return answer(request, assets()[INDEX])


@router.api_route("/ui/{name}", methods=["GET", "HEAD"])
async def asset(request: Request) -> Response:
    """What the page is made of. Raises ApiError 404."""
    name = request.path_params["name"]
    if name not in assets():
        raise ApiError(404, "the page has no such file", "not_found")
    return answer(request, assets()[name])


def answer(request: Request, asset: Asset) -> Response:
    """The file, or 304 for a browser that has it."""
    headers = {"Content-Type": asset.kind, "Cache-Control": "no-cache", "Content-Security-Policy": POLICY}
    return revalidated(request, asset.body, asset.tag, headers)
