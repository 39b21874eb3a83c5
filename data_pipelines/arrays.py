"""Pictures stored as NumPy arrays (.npy): multispectral, radar and other data that no picture format holds.

Torch-free. The header is read and checked before the content; nothing is ever unpickled.
"""

import io
import math
import threading
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import BadSample
from data_pipelines.images import MAX_PIXELS, check_size

MAGIC = b"\x93NUMPY"
KINDS = ("u1", "u2", "f4")
"""Values that are read: uint8, uint16, float32, of either byte order."""
DAMAGE = (ValueError, EOFError, OSError, SyntaxError, TypeError, TokenError, RecursionError, MemoryError)
"""What NumPy's header parser raises on damaged input, which it hands to Python's own."""

_PARSING = threading.Lock()
"""NumPy reads a header as Python code, whose depth CPython below 3.12 counts in one place for all threads; two of them
at a time may end in a SystemError (python/cpython#106905)."""


def load_array(file: io.BytesIO | Path) -> NDArray[Any]:
    """`np.load` of one array, for threads. Raises ValueError, EOFError, OSError."""
    with _PARSING:
        array: NDArray[Any] = np.load(file, allow_pickle=False)
    return array


def is_array(data: bytes | memoryview) -> bool:
    """Whether these bytes are an .npy file."""
    return bytes(data[: len(MAGIC)]) == MAGIC


def array_size(shape: tuple[int, ...]) -> tuple[int, int]:
    """(width, height) of HW, CHW or HWC; bands are the outer axis that is shorter, the first where both are equal."""
    if len(shape) == 2:
        return shape[1], shape[0]
    return (shape[2], shape[1]) if shape[0] <= shape[2] else (shape[1], shape[0])


def read_header(data: bytes | memoryview) -> tuple[tuple[int, ...], bool, "np.dtype[np.generic]", int]:
    """(shape, whether in Fortran order, dtype, offset of the content). Raises BadSample `not_an_array`."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        with _PARSING:
            shape, fortran, dtype = read(stream)
    except DAMAGE as error:
        raise BadSample("not_an_array", f"{len(data)} bytes are no .npy file: {error}") from error
    if dtype.str[1:] not in KINDS or len(shape) not in (2, 3) or min(shape) < 0:
        detail = f"shape {shape} of {dtype}; allowed are two or three axes of uint8, uint16 or float32"
        raise BadSample("not_an_array", detail)
    return shape, fortran, dtype, stream.tell()


def open_array(data: bytes, max_pixels: int = MAX_PIXELS) -> NDArray[np.generic]:
    """The array as stored, read-only, without a copy.

    Raises BadSample: `not_an_array`, `too_many_pixels`, `empty_image`, `truncated_image` when bytes are missing or too
    many, and `not_finite` for infinities and NaN.
    """
    shape, fortran, dtype, offset = read_header(data)
    check_size(*array_size(shape), max_pixels)
    if len(data) - offset != math.prod(shape) * dtype.itemsize:
        raise BadSample("truncated_image", f"{len(data) - offset} bytes for shape {shape} of {dtype}")
    array = np.frombuffer(data, dtype, offset=offset).reshape(shape, order="F" if fortran else "C")
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise BadSample("not_finite", f"shape {shape}: holds NaN or infinity; replace missing values before sharding")
    return array
