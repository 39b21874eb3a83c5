"""What is wrong inside one tar: a walk that names every fault by key and offset and goes on behind it.

Python's tarfile takes a damaged header for the end of the archive; this walk looks for the next sound one instead.
"""

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import simplejpeg

from data_pipelines import arrays
from data_pipelines.errors import BadSample
from data_pipelines.images import MAX_PIXELS, open_header
from data_pipelines.shard_files import BLOCK

MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png", b"GIF8": "gif", arrays.MAGIC: "npy"}
KINDS = {"jpg": "jpg", "jpeg": "jpg", "png": "png", "webp": "webp", "gif": "gif", "npy": "npy"}
"""Image extension -> format."""
ADLER = 65521


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong. `offset` is in the shard's bytes: of the member's header, or of the damage itself."""

    kind: str
    shard: str
    detail: str
    key: str = ""
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class Member:
    """One file in the tar; offsets in bytes."""

    name: str
    header: int
    start: int
    size: int


@dataclass
class Found:
    """One sample as it lies in the tar."""

    key: str
    offset: int
    members: dict[str, Member] = field(default_factory=dict)
    columns: Mapping[str, Any] | None = None
    size: tuple[int, int] | None = None
    text: str | None = None


@dataclass
class TarCheck:
    """The walk over one shard's bytes; `faults` and `samples` fill up on the way."""

    shard: str
    data: memoryview
    max_pixels: int = MAX_PIXELS
    faults: list[Fault] = field(default_factory=list)
    samples: list[Found] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._seen: dict[str, Found] = {}

    def fault(self, kind: str, detail: str, key: str = "", offset: int | None = None) -> None:
        """Note something wrong."""
        self.faults.append(Fault(kind, self.shard, detail, key, offset))

    def run(self) -> "TarCheck":
        """Walk the whole archive."""
        for member in self._members():
            self._member(member)
        for sample in self.samples:
            if not KINDS.keys() & sample.members.keys():
                self.fault("missing_member", "no image", sample.key, sample.offset)
        return self

    def _members(self) -> Iterator[Member]:
        offset, end, long_name = 0, len(self.data), ""
        while True:
            header = bytes(self.data[offset : offset + BLOCK])
            if len(header) < BLOCK:
                what = "ends inside a header" if header else "ends without an end-of-archive mark"
                return self.fault("no_end_mark", f"{what}: the file is cut short", offset=offset)
            if not any(header):
                return self._end(offset)
            size = header_size(header)
            if size is None:
                following = self._next_header(offset + BLOCK)
                lost = f"; {following - offset} bytes are unreadable" if following < end else "; nothing follows"
                self.fault("bad_header", f"damaged tar header{lost}", offset=offset)
                offset = following
                continue
            start, kind = offset + BLOCK, header[156:157]
            name = long_name or header[:100].rstrip(b"\0").decode("utf-8", "replace")
            if start + size > end:
                detail = f"{name} needs {size} bytes, {max(0, end - start)} are left"
                return self.fault("cut_short", detail, split_name(name)[0], offset)
            long_name = ""
            if kind in (b"x", b"L"):
                long_name = _long_name(bytes(self.data[start : start + size]), kind)
                detail = f"{long_name[:60]}...: {len(long_name)} characters, plain tar headers hold 100"
                self.fault("long_name", detail, split_name(long_name)[0], offset)
            elif kind in (b"0", b"\0"):
                yield Member(name, offset, start, size)
            else:
                self.fault("extra_member", f"{name}: no file (type {kind!r})", split_name(name)[0], offset)
            offset = start + -(-size // BLOCK) * BLOCK

    def _end(self, offset: int) -> None:
        """Judge what follows the first zero block at `offset`."""
        rest = bytes(self.data[offset:])
        if len(rest) < 2 * BLOCK:
            self.fault("no_end_mark", "one zero block, a tar ends with two: the file is cut short", offset=offset)
        elif rest.count(0) < len(rest):
            first = offset + len(rest) - len(rest.lstrip(b"\0"))
            self.fault("trailing_bytes", "data behind the end of the archive", offset=first)

    def _next_header(self, offset: int) -> int:
        """Offset of the next sound header, or of the end mark; the file's end when there is none."""
        while offset + BLOCK <= len(self.data):
            header = bytes(self.data[offset : offset + BLOCK])
            if header[257:262] == b"ustar" and header_size(header) is not None:
                return offset
            offset += BLOCK
        return len(self.data)

    def _member(self, member: Member) -> None:
        key, extension = split_name(member.name)
        sample = self.samples[-1] if self.samples else None
        if sample is None or sample.key != key:
            if (before := self._seen.get(key)) is not None:
                kind = "duplicate_key" if extension in before.members else "scattered_key"
                self.fault(kind, f"{member.name}: this key was at byte {before.offset} already", key, member.header)
            sample = Found(key, member.header)
            self._seen.setdefault(key, sample)
            self.samples.append(sample)
        if extension in sample.members:
            self.fault("duplicate_key", f"{member.name} is there twice", key, member.header)
            return
        images = KINDS.keys() & sample.members.keys()
        if extension not in (*KINDS, "json", "txt") or (extension in KINDS and images):
            self.fault("extra_member", f"{member.name} is no part of a sample", key, member.header)
            return
        sample.members[extension] = member
        if not member.size and extension != "txt":
            self.fault("empty_member", f"{member.name} has no bytes", key, member.header)
        elif extension in KINDS:
            self._image(sample, member, extension)
        else:
            self._text(sample, member, extension)

    def _text(self, sample: Found, member: Member, extension: str) -> None:
        try:
            text = str(self.data[member.start : member.start + member.size], "utf-8")
        except UnicodeDecodeError as error:
            offset = member.start + error.start
            return self.fault("bad_utf8", f"{member.name} is not UTF-8", sample.key, offset)
        if extension == "txt":
            sample.text = text
            return None
        try:
            columns = json.loads(text)
            if not isinstance(columns, dict):
                raise ValueError(f"a {type(columns).__name__}, expected an object")
        except (ValueError, RecursionError) as error:
            return self.fault("bad_json", f"{member.name} is not JSON: {error}", sample.key, member.header)
        sample.columns = columns
        return None

    def _image(self, sample: Found, member: Member, extension: str) -> None:
        content = self.data[member.start : member.start + member.size]
        found = image_format(bytes(content[:16]))
        if found != KINDS[extension]:
            kind = "wrong_extension" if found else "not_an_image"
            self.fault(kind, f"{member.name} holds {found or 'no known format'}", sample.key, member.header)
        if not found:
            return
        try:
            sample.size = image_size(found, content)
        except (ValueError, struct.error, BadSample) as error:
            self.fault("not_an_image", f"{member.name}: {error}", sample.key, member.header)
            return
        if (pixels := sample.size[0] * sample.size[1]) > self.max_pixels:
            detail = f"{member.name}: {pixels:,} pixels, limit {self.max_pixels:,}"
            self.fault("too_many_pixels", detail, sample.key, member.header)


def header_size(header: bytes) -> int | None:
    """Size by a tar header whose checksum holds; None for a damaged one."""
    try:
        stored = int(header[148:156].split(b"\0")[0] or b"0", 8)
        size = int(header[124:136].split(b"\0")[0] or b"0", 8)
    except ValueError:
        return None
    # The low half of Adler-32 is one plus the sum of the bytes, modulo ADLER, and far quicker than Python's sum.
    total = (zlib.adler32(header) & 0xFFFF) - 1
    return size if (stored - total + sum(header[148:156]) - 8 * ord(" ")) % ADLER == 0 else None


def split_name(name: str) -> tuple[str, str]:
    """(key, extension): the key ends at the first dot of the last path component."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _long_name(content: bytes, kind: bytes) -> str:
    if kind == b"L":
        return content.split(b"\0")[0].decode("utf-8", "replace")
    paths = [line.partition(b"path=")[2] for line in content.split(b"\n") if b" path=" in line]
    return paths[0].decode("utf-8", "replace") if paths else ""


def image_format(head: bytes) -> str | None:
    """jpg, png, webp, gif or npy by the first bytes."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    return next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)


def image_size(kind: str, content: memoryview) -> tuple[int, int]:
    """(width, height) by the header alone. Raises ValueError, struct.error or BadSample."""
    if kind == "png":
        width, height = struct.unpack(">II", content[16:24])
    elif kind == "gif":
        width, height = struct.unpack("<HH", content[6:10])
    elif kind == "npy":
        width, height = arrays.array_size(arrays.read_header(content)[0])
    elif kind == "jpg":
        height, width, _, _ = simplejpeg.decode_jpeg_header(content)
    else:
        width, height = open_header(bytes(content), 2**62).size
    return width, height
