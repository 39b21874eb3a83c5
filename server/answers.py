"""Values on their way out: NaN and infinity become null, because JSON has no words for them."""

import base64
import math
from typing import Any

import numpy as np
from starlette.responses import JSONResponse

from server.batcher import Row


def json_answer(content: dict[str, Any]) -> JSONResponse:
    """200 with `content`, made safe."""
    return JSONResponse(safe(content))


def safe(value: Any) -> Any:
    """The same value with only what JSON can hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [safe(item) for item in value]
    return value


def as_floats(row: Row) -> list[float]:
    """A vector as JSON numbers, exact to the last bit of float32."""
    return [float(value) for value in row.tolist()]


def as_base64(row: Row) -> str:
    """A vector as base64 of little-endian float32."""
    return base64.b64encode(np.ascontiguousarray(row, dtype="<f4").tobytes()).decode("ascii")
