"""Values on their way out: JSON without NaN and infinity, which become null, and vectors in the dialects' encodings."""

import base64
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import orjson
from starlette.requests import Request
from starlette.responses import Response

from server.batcher import Row

OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS


def json_answer(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """`content` as JSON; numpy arrays are lists, written without a detour over Python numbers."""
    try:
        body = orjson.dumps(content, option=OPTIONS)
    except orjson.JSONEncodeError:  # an integer beyond 64 bits, an object that JSON has no word for
        body = orjson.dumps(safe(content), option=OPTIONS)
    return Response(body, status, media_type="application/json", headers=headers)


def revalidated(request: Request, body: bytes, tag: str, headers: Mapping[str, str]) -> Response:
    """`body`, or 304 for a client that has what `tag` stands for; `headers` are those of both."""
    headers = {**headers, "ETag": tag}
    known = [known.strip().removeprefix("W/") for known in request.headers.get("if-none-match", "").split(",")]
    if tag in known or "*" in known:
        headers.pop("Content-Type", None)
        return Response(status_code=304, headers=headers)
    headers["Content-Length"] = str(len(body))  # a HEAD answer has the length, too
    return Response(b"" if request.method == "HEAD" else body, headers=headers)


def tag_of(body: bytes) -> str:
    """ETag made of the content: equal on every worker and replica."""
    return f'"{hashlib.sha256(body).hexdigest()[:24]}"'


def safe(value: Any) -> Any:
    """The same value with only what JSON can hold."""
    if isinstance(value, np.generic | np.ndarray):
        return safe(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [safe(item) for item in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return float(value) if abs(value) < 1e308 else None
    if isinstance(value, bool | int | None):
        return value
    return str(value).encode(errors="replace").decode()  # half a character has no place in UTF-8


def as_floats(row: Row) -> Any:
    """A vector as JSON numbers: the shortest that give the same float32 again."""
    return np.ascontiguousarray(row, dtype=np.float32)


def as_base64(row: Row) -> str:
    """A vector as base64 of little-endian float32."""
    return base64.b64encode(np.ascontiguousarray(row, dtype="<f4").tobytes()).decode("ascii")


def as_int8(row: Row) -> Any:
    """-127..127, linear: 127 is 1.0. Components of a vector of length 1 lie between."""
    return np.rint(np.clip(_finite(row), -1, 1) * 127).astype(np.int64)


def as_uint8(row: Row) -> Any:
    """0..255, linear: 0 is -1.0 and 255 is 1.0."""
    return np.rint((np.clip(_finite(row), -1, 1) + 1) * 127.5).astype(np.int64)


def as_ubinary(row: Row) -> Any:
    """One bit per component, 1 where it is above 0, eight to a number 0..255, the first one highest."""
    return np.packbits(_finite(row) > 0).astype(np.int64)


def as_binary(row: Row) -> Any:
    """The same less 128, as Cohere, Jina and sentence-transformers write it: -128..127."""
    return as_ubinary(row) - 128


ENCODINGS: dict[str, Callable[[Row], Any]] = {
    "float": as_floats, "base64": as_base64, "int8": as_int8, "uint8": as_uint8,
    "binary": as_binary, "ubinary": as_ubinary,
}  # fmt: skip
"""How a vector may be asked for."""


def _finite(row: Row) -> Row:
    return np.nan_to_num(row, nan=0.0, posinf=1.0, neginf=-1.0)
