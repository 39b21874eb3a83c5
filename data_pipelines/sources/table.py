"""A table of pictures: csv, tsv, txt (one address a line), json, jsonl, parquet, each also .gz, or a folder of them.

The picture is a URL, a path (relative to the table's folder), or the bytes themselves as Hugging Face's parquet files
hold them. Captions and labels may fill several columns or lists. Rows keep their order; a row without picture or text
is a counted failure. Cells of csv and tsv stay text. Tables may lie in object stores.
"""

import csv
import gzip
import hashlib
import io
import itertools
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines import rows
from data_pipelines.config import StrictModel
from data_pipelines.errors import BadSample, PipelineError
from data_pipelines.parquet import read_batches
from data_pipelines.places import Place, place
from data_pipelines.records import Record

MAX_LINE = 64 * 2**20
"""A longer line or cell is no table of captions."""
BATCH = 512
"""Rows of a parquet file in memory at a time."""
HEAD = 100
"""Rows looked at to learn which columns there are; json rows need not all have the same."""

Found = rows.Row | BadSample
"""A row, or what is wrong with it."""


class Config(StrictModel):
    """Where the table lies and which column means what."""

    path: Path | str
    image_col: str | None = None
    """None: url, image, image_path, filepath, path or file_name, in any case."""
    caption_col: tuple[str, ...] = ()
    """Empty: caption, captions, text."""
    label_col: tuple[str, ...] = ()
    """Empty: label, labels."""
    box_col: str | None = None
    """None: boxes. [[x0, y0, x1, y1, label], ...] as fractions of the picture."""
    columns: tuple[str, ...] | None = None
    """Columns to pass through; None = all others."""
    template: rows.Template | None = None
    """Caption of a row that has a label only, such as "a photo of a {label}"."""
    split_by: str | None = None
    """Column that names the split, and so the sub-folder, of a row."""


@dataclass(frozen=True, slots=True)
class _Table:
    """One file of rows."""

    place: Place
    suffix: str
    packed: bool


def format_of(name: str) -> tuple[str, bool]:
    """(suffix, packed) of a file name: captions.CSV.gz -> (".csv", True); the suffix is empty for other files."""
    lower = name.lower()
    packed = lower.endswith(".gz")
    suffix = "." + lower.removesuffix(".gz").rpartition(".")[2]
    return (suffix if suffix in READERS else "", packed)


def iter_records(config: Config) -> Iterator[Record]:
    """One record per row, in the order of the files' names and of their rows."""
    source = place(config.path).stem
    for table in _tables(config):
        found = _read(table)
        head = list(itertools.islice(found, HEAD))
        columns = list(dict.fromkeys(name for row in head if isinstance(row, Mapping) for name in row))
        if not head:
            continue
        if not columns:
            raise PipelineError(f"{table.place}: none of the first {len(head)} rows can be read; {head[0]}")
        image = rows.image_column(config.image_col, columns, str(table.place))
        reading = rows.choose(config, columns, str(table.place), (image,))
        for number, row in enumerate(itertools.chain(head, found)):
            yield _record(row, image, reading, table.place, source, number)


def _record(row: Found, column: str, reading: rows.Reading, table: Place, source: str, number: int) -> Record:
    origin = f"{table.name}#{number}"
    try:
        if isinstance(row, BadSample):
            raise row
        image, origin = _image(row.get(column), table.parent, origin)
    except BadSample as error:
        return Record(image=b"", captions=(), source=source, origin=origin, problem=str(error))
    return rows.record(row, reading, image, origin, source)


def _image(cell: Any, folder: Place, origin: str) -> tuple[bytes | Path | str, str]:
    """The picture, or where it is read from, and its address. Raises BadSample: no_image, bad_url."""
    if isinstance(cell, Mapping):  # Hugging Face's {"bytes": ..., "path": ...}
        origin = cell.get("path") or origin
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes) and cell:
        return cell, origin
    if not isinstance(cell, str) or not cell.strip():
        raise BadSample("no_image", "the row names no picture")
    cell = cell.strip()
    if cell.startswith("file://") and folder.local:
        return Path(unquote(urlsplit(cell).path)), cell
    return (cell if "://" in cell else folder.beside(cell)), cell


def count(config: Config) -> int | None:
    """Number of records, where the files know it without being read (parquet); else None."""
    tables = _tables(config)
    if any(table.suffix != ".parquet" or table.packed for table in tables):
        return None
    total = 0
    for table in tables:
        with table.place.open() as stream:
            try:
                total += pq.read_metadata(stream).num_rows
            except (OSError, pa.ArrowException) as error:
                raise PipelineError(f"{table.place}: no parquet file, or a damaged one: {error}") from error
    return total


def fingerprint(config: Config) -> str:
    """Changes when a table is written; the pictures that it names are not looked at."""
    lines = (f"{table.place.name}\0{table.place.state()}\n" for table in _tables(config))
    return hashlib.sha256("".join(lines).encode("utf-8", "replace")).hexdigest()


def _tables(config: Config) -> list[_Table]:
    where = place(config.path)
    if not where.exists():
        raise PipelineError(f"{where}: no such table")
    if not where.is_dir():
        return [_table(where)]
    files = [child for child in where.children() if format_of(child.name)[0]]
    # Beside real tables a .txt is a read-me and a .json a description; alone they are the tables.
    real = [child for child in files if format_of(child.name)[0] not in (".txt", ".json")]
    if not files:
        raise PipelineError(f"{where}: no table in this folder; looked for {', '.join(READERS)}, each also .gz")
    return [_table(child) for child in real or files]


def _table(where: Place) -> _Table:
    suffix, packed = format_of(where.name)
    if not suffix:
        raise PipelineError(f"{where}: no table by its name; tables end in {', '.join(READERS)}, each also .gz")
    return _Table(where, suffix, packed)


def _read(table: _Table) -> Iterator[Found]:
    """The rows of one file; what goes wrong with the file itself names the row it was found behind."""
    number = 0
    try:
        with _open(table) as stream:
            for row in READERS[table.suffix](stream):
                yield row
                number += 1
    except (OSError, EOFError, zlib.error, csv.Error, pa.ArrowException, ValueError, RecursionError) as error:
        raise PipelineError(
            f"{table.place}: damaged behind row {number}, or no such table as its name says: {error}"
        ) from error


@contextmanager
def _open(table: _Table) -> Iterator[IO[bytes]]:
    with ExitStack() as stack:
        stream = stack.enter_context(table.place.open())
        if table.packed:
            unpacked = stack.enter_context(gzip.GzipFile(fileobj=stream))
            stream = cast(IO[bytes], unpacked)
            if table.suffix == ".parquet":  # it is read from its end, which gzip reaches last
                stream = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(unpacked, stream)
        yield stream


def _csv(stream: IO[bytes], delimiter: str = ",") -> Iterator[Found]:
    """Strict, so that a quote that is never closed is an error and does not swallow the rest of the file."""
    csv.field_size_limit(MAX_LINE)
    # Bytes that are no UTF-8 become surrogates, which make their own row a failure further on.
    with io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ValueError(f"two columns have the same name: {', '.join(map(repr, header))}")
        for cells in reader:
            if len(cells) == len(header):
                yield dict(zip(header, cells, strict=True))
            elif cells:
                yield BadSample("bad_row", f"line {reader.line_num} has {len(cells)} cells, the first {len(header)}")


def _tsv(stream: IO[bytes]) -> Iterator[Found]:
    return _csv(stream, "\t")


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, str | BadSample]]:
    """(number, text) of the lines that are not blank."""
    for number in itertools.count(1):
        line = stream.readline(MAX_LINE + 1)
        if not line:
            return
        if len(line) > MAX_LINE:
            raise ValueError(f"line {number} is longer than {MAX_LINE} bytes")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            yield number, BadSample("bad_row", f"line {number} is not UTF-8: {error.reason} at byte {error.start}")
            continue
        if text:
            yield number, text


def _txt(stream: IO[bytes]) -> Iterator[Found]:
    for _, line in _lines(stream):
        yield {"url": line} if isinstance(line, str) else line


def _jsonl(stream: IO[bytes]) -> Iterator[Found]:
    for number, line in _lines(stream):
        try:
            yield _object(json.loads(line), f"line {number}") if isinstance(line, str) else line
        except (ValueError, RecursionError) as error:
            yield BadSample("bad_row", f"line {number} is not JSON: {error}")


def _json(stream: IO[bytes]) -> Iterator[Found]:
    found = json.load(stream)
    if not isinstance(found, list):
        raise ValueError("it holds no list of rows; COCO annotations are --kind coco, JSON lines end in .jsonl")
    for number, row in enumerate(found):
        yield _object(row, f"row {number}")


def _object(row: Any, where: str) -> Found:
    return row if isinstance(row, dict) else BadSample("bad_row", f"{where} holds a {type(row).__name__}, no object")


def _parquet(stream: IO[bytes]) -> Iterator[Found]:
    for batch in read_batches(stream, BATCH):
        yield from batch.to_pylist()


READERS: Mapping[str, Callable[[IO[bytes]], Iterator[Found]]] = {
    ".csv": _csv, ".tsv": _tsv, ".txt": _txt, ".json": _json, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet
}  # fmt: skip
