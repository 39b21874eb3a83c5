"""IDX files (MNIST and its kin): pictures in NAME-images-idx3-ubyte[.gz], classes in NAME-labels-idx1-ubyte[.gz].

Pictures become png. Split names come from the files: train, and test for t10k; a single file has none.
"""

import gzip
import hashlib
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipelines import rows
from data_pipelines.config import StrictModel
from data_pipelines.errors import PipelineError
from data_pipelines.places import place
from data_pipelines.records import Record
from data_pipelines.resize import encode

SPLITS = {"train": "train", "t10k": "test", "test": "test"}
Array = NDArray[np.uint8]


class Config(StrictModel):
    """An images file or the folder of several, and what the classes are called."""

    path: Path
    names: tuple[str, ...] = ()
    """Class names by number; empty: the numbers themselves."""
    template: rows.Template | None = None
    """Caption made of the class name, such as "a photo of a {label}"; None: pictures carry labels only."""


def iter_records(config: Config) -> Iterator[Record]:
    """One record per picture, in order."""

    def captions(label: str) -> tuple[str, ...]:
        return rows.templated(config.template, (label,))

    for path in _pairs(config):
        pictures, classes = (parse(unpack(file.read_bytes(), file.name), file.name) for file in (path, _labels(path)))
        split = SPLITS.get(path.name.partition("-")[0], "") if config.path.is_dir() else ""
        yield from records(pictures, classes, config.names, captions, path.name, place(config.path).stem, split)


def records(
    pictures: Array,
    classes: Array,
    names: Sequence[str],
    captions: Callable[[str], tuple[str, ...]],
    file: str,
    source: str,
    split: str,
) -> Iterator[Record]:
    """Records of pictures (N, height, width) and their classes (N,); `captions` makes captions of a class name."""
    if len(pictures) != len(classes) or pictures.ndim != 3 or classes.ndim != 1:
        raise PipelineError(f"{file}: pictures {pictures.shape} and classes {classes.shape} do not belong together")
    if names and len(classes) and int(classes.max()) >= len(names):
        raise PipelineError(f"{file}: class {classes.max()} has no name, only {len(names)} are given")
    for number, (picture, index) in enumerate(zip(pictures, classes.tolist(), strict=True)):
        label = names[index] if names else str(index)
        yield Record(
            image=encode(Image.fromarray(picture), "png"),
            captions=captions(label),
            labels=(label,),
            source=source,
            origin=f"{file}#{number}",
            split=split,
            extra={"class_index": index},
        )


def unpack(content: bytes, name: str) -> bytes:
    """Content of a file that may be gzipped. Raises PipelineError."""
    try:
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise PipelineError(f"{name}: damaged gzip file: {error}") from error


def parse(content: bytes, name: str) -> Array:
    """Array of an IDX file of bytes: two zeros, 8 for uint8, dimensions; their sizes as big-endian int32; the data."""
    count = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    start = 4 + 4 * count
    shape = np.frombuffer(content, ">i4", count, 4).tolist() if start <= len(content) else []
    if not shape or min(shape) < 0 or math.prod(shape) != len(content) - start:
        raise PipelineError(f"{name}: no IDX file of bytes, or one of another length than its header says")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def count(config: Config) -> int:
    """Number of records, from the headers."""
    total = 0
    for path in _pairs(config):
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            total += int.from_bytes(stream.read(8)[4:], "big")
    return total


def fingerprint(config: Config) -> str:
    """Changes when a file is written."""
    files = [file for path in _pairs(config) for file in (path, _labels(path))]
    return hashlib.sha256("\n".join(f"{file.name} {place(file).state()}" for file in files).encode()).hexdigest()


def is_idx(name: str) -> bool:
    """Whether a file name is that of IDX pictures."""
    return name.endswith(("-images-idx3-ubyte", "-images-idx3-ubyte.gz"))


def _pairs(config: Config) -> list[Path]:
    """The pictures' files; each has its classes beside it."""
    paths = [config.path] if not config.path.is_dir() else sorted(config.path.iterdir(), reverse=True)
    found = [path for path in paths if is_idx(path.name)]
    if not found:
        raise PipelineError(f"{config.path}: no NAME-images-idx3-ubyte or NAME-images-idx3-ubyte.gz there")
    for path in found:
        for file in (path, _labels(path)):
            if not file.is_file():
                raise PipelineError(f"{file}: no such file; pictures and classes come in pairs")
    return found


def _labels(path: Path) -> Path:
    return path.with_name(path.name.replace("-images-idx3-", "-labels-idx1-"))
