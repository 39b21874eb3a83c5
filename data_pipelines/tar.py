"""Where the members of a tar lie: one walk over its headers, or its offset index after every header was checked.

Every header is checked either way, because Python's tarfile takes a damaged header for the end of the archive and loses
the rest silently. A table has one row per sample and two columns (offset, size) per kind of member.
"""

import mmap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import ShardError

BLOCK = 512
IMAGES = ("jpg", "png", "jpeg", "webp", "gif")
KINDS = ("image", "json", "txt", "cls", "npy")
"""What a table knows; the first three are those of the sidecar index. Members of other kinds are never read."""

Members = dict[str, tuple[int, int]]
"""Extension -> (offset, size) inside the tar."""
Table = NDArray[np.int64]
Data = mmap.mmap | bytes


def walk_tar(data: Data, name: str) -> list[tuple[str, Members]]:
    """(key, members) of every sample, in order. Raises ShardError where the archive is damaged."""
    samples: list[tuple[str, Members]] = []
    seen: set[str] = set()
    heads: list[int] = []
    try:
        end = _walk(data, name, heads, samples, seen)
    except ShardError:
        _check_sums(data, name, heads)  # a damaged header further up explains why the walk went astray
        raise
    _check_sums(data, name, heads)
    _check_end(data, name, end)
    return samples


def _walk(data: Data, name: str, heads: list[int], samples: list[tuple[str, Members]], seen: set[str]) -> int:
    """Follow the headers up to the end mark, whose offset is returned; `heads` receives where they lie."""
    offset, long_name = 0, ""
    while True:
        header = data[offset : offset + BLOCK]
        if len(header) < BLOCK:
            raise ShardError(f"{name}: ends at byte {len(data)} without an end-of-archive mark: the file is cut short")
        if not header.strip(b"\0"):
            return offset
        heads.append(offset)
        size, kind = _size(header, name, offset), header[156:157]
        start = offset + BLOCK
        if start + size > len(data):
            raise ShardError(f"{name}: member at byte {offset} needs {size} bytes, only {len(data) - start} are left")
        offset = start + -(-size // BLOCK) * BLOCK
        if kind in (b"x", b"L"):
            long_name = _long_name(data[start : start + size], kind, name, start) or long_name
        elif kind not in (b"g", b"K"):
            if kind in (b"0", b"\0", b"7"):
                _add(samples, seen, long_name or member_name(header), (start, size), name)
            long_name = ""


def _size(header: bytes, name: str, offset: int) -> int:
    if header[124] & 0x80:  # GNU writes sizes above 8 GiB in binary
        return int.from_bytes(header[125:136], "big")
    try:
        return int(header[124:136].split(b"\0")[0].strip() or b"0", 8)
    except ValueError as error:
        raise ShardError(f"{name}: damaged tar header at byte {offset}") from error


def member_name(header: bytes) -> str:
    """Name of a member by its own header."""
    name = header[:100].split(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0")[0] + b"/" + name
    return name.decode("utf-8", "replace")


def split_name(member: str) -> tuple[str, str]:
    """(key, extension): the extension begins at the first dot of the last path component, as in webdataset."""
    folder, _, base = member.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def _long_name(content: bytes, kind: bytes, name: str, offset: int) -> str:
    if kind == b"L":
        return content.split(b"\0")[0].decode("utf-8", "replace")
    found = ""
    while content.rstrip(b"\0"):  # records `length key=value\n`; a value may hold anything
        length = content.partition(b" ")[0]
        if not length.isdigit() or not len(length) < int(length) <= len(content):
            raise ShardError(f"{name}: damaged extended header at byte {offset}")
        key, _, value = content[: int(length) - 1][len(length) + 1 :].partition(b"=")
        found = value.decode("utf-8", "replace") if key == b"path" else found
        content = content[int(length) :]
    return found


def _add(samples: list[tuple[str, Members]], seen: set[str], member: str, where: tuple[int, int], shard: str) -> None:
    key, extension = split_name(member)
    if not samples or samples[-1][0] != key:
        if key in seen:
            raise ShardError(f"{shard}: members of {key!r} are apart; write the shard again with `vlp shard`")
        seen.add(key)
        samples.append((key, {}))
    if extension in samples[-1][1]:
        raise ShardError(f"{shard}: member {member!r} appears twice")
    samples[-1][1][extension] = where


def _good_headers(data: Data, heads: Table) -> tuple[NDArray[np.bool_], Table, NDArray[np.uint8]]:
    """(checksum holds, size, whole header) for the headers at these offsets, whole blocks inside the file."""
    blocks = np.frombuffer(data, np.uint8, len(data) // BLOCK * BLOCK).reshape(-1, BLOCK)[heads // BLOCK]
    stored, sizes = _octal(blocks[:, 148:156]), _octal(blocks[:, 124:136])
    total, own = (part.sum(axis=1, dtype=np.uint32).astype(np.int64) for part in (blocks, blocks[:, 148:156]))
    return stored == total - own + 8 * ord(" "), sizes, blocks


def _octal(field: NDArray[np.uint8]) -> Table:
    """Octal numbers of NUL- or space-terminated, space- or zero-led fields; -1 where there is another character."""
    digit = (field >= ord("0")) & (field <= ord("7"))
    value = np.zeros(len(field), dtype=np.int64)
    ended = np.zeros(len(field), dtype=bool)
    begun = np.zeros(len(field), dtype=bool)
    for column in range(field.shape[1]):
        use = digit[:, column] & ~ended
        value = np.where(use, value * 8 + field[:, column] - ord("0"), value)
        begun |= use
        ended |= ~digit[:, column] & (begun | (field[:, column] == 0))
    blank = digit | (field == 0) | (field == ord(" "))
    return np.where(blank.all(axis=1) & begun, value, -1)


def _check_sums(data: Data, name: str, heads: Sequence[int]) -> None:
    for start in range(0, len(heads), 1 << 14):  # 8 MB of headers at a time
        chunk = np.array(heads[start : start + (1 << 14)], dtype=np.int64)
        good = _good_headers(data, chunk)[0]
        if not good.all():
            raise ShardError(f"{name}: damaged tar header at byte {chunk[~good][0]} (checksum)")


def _check_end(data: Data, name: str, end: int) -> None:
    """Nothing may follow the end mark: readers would lose it without a word."""
    rest = data[end:]
    if rest.strip(b"\0"):
        place = end + len(rest) - len(rest.lstrip(b"\0"))
        raise ShardError(f"{name}: content at byte {place} behind the end-of-archive mark at byte {end}")


@dataclass(frozen=True, slots=True)
class Contents:
    """What a tar holds: samples in order."""

    table: Table
    """(samples, 2 x kinds): offset and size of each kind of member; offset -1 = there is none."""
    keys: list[str]
    good: NDArray[np.bool_]
    """False for samples with a damaged header."""
    ignored: Counter[str]
    """Extension -> members that no decoder is offered."""


def contents(samples: Sequence[tuple[str, Members]]) -> Contents:
    """The compact form of a walk."""
    table = np.tile(np.array([-1, 0], dtype=np.int64), (len(samples), len(KINDS)))
    ignored: Counter[str] = Counter()
    for row, (_, members) in zip(table, samples, strict=True):
        image = next((extension for extension in IMAGES if extension in members), None)
        for extension, where in members.items():
            kind = "image" if extension == image else extension
            if kind in KINDS:
                row[2 * KINDS.index(kind) : 2 * KINDS.index(kind) + 2] = where
            else:
                ignored[extension] += 1
    return Contents(table, [key for key, _ in samples], np.ones(len(samples), dtype=bool), ignored)


def indexed(data: Data, index: Table) -> Contents | None:
    """Contents by the sidecar index, every header checked; None where headers and index do not belong together.

    Members must follow each other without a gap from the first byte to the end mark. A sample with a damaged header is
    marked, as long as most of the others agree with the index.
    """
    present = index[:, 0::2] > 0  # an empty member has a place, an absent one does not
    rows, columns = np.nonzero(present)
    heads, claimed = index[rows, 2 * columns] - BLOCK, index[rows, 2 * columns + 1]
    order = np.argsort(heads, kind="stable")
    heads, claimed, rows = heads[order], claimed[order], rows[order]
    ends = heads + BLOCK + -(-claimed // BLOCK) * BLOCK
    gapless = len(heads) and heads[0] == 0 and claimed.min() >= 0 and np.array_equal(heads[1:], ends[:-1])
    if not gapless or not ends[-1] + 2 * BLOCK <= len(data) or data[int(ends[-1]) :].strip(b"\0"):
        return None
    right, found, blocks = _good_headers(data, heads)
    # as our writer pads its checksums: other padding is the same number, but not what was written
    right &= (blocks[:, 148] >= ord("0")) & (blocks[:, 154] == 0) & (blocks[:, 155] == ord(" "))
    right &= (found == claimed) & ((blocks[:, 156] == ord("0")) | (blocks[:, 156] == 0))
    good = np.ones(len(index), dtype=bool)
    good[rows[~right]] = False
    stems = _stems(blocks)
    first = np.zeros(len(index), dtype=np.int64)
    first[rows[::-1]] = np.arange(len(rows))[::-1]
    good[rows[stems != stems[first[rows]]]] = False
    if good.mean() < 0.5:
        return None
    table = np.tile(np.array([-1, 0], dtype=np.int64), (len(index), len(KINDS)))
    table[:, : index.shape[1]] = np.where(np.repeat(present, 2, axis=1), index, table[:, : index.shape[1]])
    return Contents(table, _keys(stems[first], blocks[first]), good, Counter())


def _stems(blocks: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """Name of each member before its first dot (names of at most 100 bytes)."""
    dots = blocks[:, :100] == ord(".")
    length = np.where(dots.any(axis=1), dots.argmax(axis=1), 100)
    names = blocks[:, :100] * (np.arange(100) < length[:, None])
    return np.ascontiguousarray(names).view("S100")[:, 0]


def _keys(stems: NDArray[np.bytes_], blocks: NDArray[np.uint8]) -> list[str]:
    """Keys by the first header of each sample; a name with folders takes the longer way."""
    keys = [stem.decode("utf-8", "replace") for stem in stems.tolist()]
    folders = (blocks[:, :100] == ord("/")).any(axis=1) | (blocks[:, 345] > 0)
    for row in np.flatnonzero(folders).tolist():
        keys[row] = split_name(member_name(blocks[row].tobytes()))[0]
    return keys
