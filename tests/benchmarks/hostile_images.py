"""Pictures that mean harm, or are damaged, with the statuses that are right for each."""

import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice

from PIL import Image

OK, REFUSED = frozenset({200}), frozenset({400})
EITHER = OK | REFUSED
"""Where damage may or may not hit a byte that matters."""


@dataclass(frozen=True)
class Hostile:
    """One file. `mime`: what its data URI claims; empty for plain base64."""

    kind: str
    data: bytes
    right: frozenset[int]
    mime: str = ""


def _photo(form: str, size: tuple[int, int] = (96, 80), mode: str = "RGB", seed: int = 0, **options: bool) -> bytes:
    noise = random.Random(seed).randbytes(12 * 10 * 3)
    image = Image.frombytes("RGB", (12, 10), noise).resize(size, Image.Resampling.BICUBIC).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@cache
def _zeros(count: int) -> bytes:
    """So many, packed."""
    return zlib.compress(bytes(count), 9)


def _png(width: int, height: int, *extra: bytes, pixels: bytes = b"", packed: bytes = b"") -> bytes:
    """A grey PNG of any size on paper; `extra` chunks come before the pixels."""
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + b"".join(extra)
        + _chunk(b"IDAT", packed or zlib.compress(pixels))
        + _chunk(b"IEND", b"")
    )


def _bombs(rng: random.Random) -> Iterator[Hostile]:
    """Little files that claim or hold very much."""
    for width, height in ((100_000, 100_000), (2**31 - 1, 2**31 - 1), (25_001, 1000), (16_385, 1), (1, 16_385)):
        yield Hostile(f"PNG of {width} x {height}", _png(width, height), REFUSED)
    zeros = _zeros(64_000_000)  # 62 kB
    yield Hostile("PNG with more pixels than it says", _png(8, 8, packed=_zeros(50_000_000)), EITHER)
    yield Hostile("zTXt bomb", _png(8, 8, _chunk(b"zTXt", b"a\0\0" + zeros), pixels=bytes(72)), EITHER)
    yield Hostile("iTXt bomb", _png(8, 8, _chunk(b"iTXt", b"a\0\1\0\0\0" + zeros), pixels=bytes(72)), EITHER)
    yield Hostile("ICC bomb", _png(8, 8, _chunk(b"iCCP", b"a\0\0" + zeros), pixels=bytes(72)), EITHER)
    yield Hostile("PNG of 100,000 chunks", _png(8, 8, *[_chunk(b"tEXt", b"a\0b")] * 100_000, pixels=bytes(72)), REFUSED)
    gif = _photo("GIF")
    yield Hostile("GIF of 65,535 x 65,535", gif[:6] + b"\xff\xff\xff\xff" + gif[10:], REFUSED)
    buffer = io.BytesIO()
    frames = [Image.new("P", (16, 16), n % 250) for n in range(300)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    yield Hostile("GIF of 300 frames", buffer.getvalue(), OK)
    jpeg = _photo("JPEG")
    at = jpeg.index(b"\xff\xc0")
    yield Hostile("JPEG of 65,500 x 65,500", jpeg[: at + 5] + b"\xff\xdc\xff\xdc" + jpeg[at + 9 :], REFUSED)
    yield Hostile("JPEG of 300,000 segments", jpeg[:2] + b"\xff\xfe\0\2" * 300_000 + jpeg[2:], REFUSED)
    scans = _photo("JPEG", progressive=True)
    last = scans.rindex(b"\xff\xda")
    yield Hostile("JPEG of a hundred scans", scans[:last] + scans[last:-2] * 100 + scans[-2:], REFUSED)
    frame = 13 + (3 << ((gif[10] & 7) + 1))
    yield Hostile("GIF of 300,000 blocks", gif[:frame] + b"!\xfe\1a\0" * 300_000 + gif[frame:], REFUSED)
    yield Hostile("GIF with a million bytes of nothing", gif[:frame] + bytes(1_000_000) + gif[frame:], REFUSED)
    yield Hostile("JPEG with a million fill bytes", jpeg[:2] + b"\xff" * 1_000_000 + jpeg[2:], REFUSED)
    yield Hostile("JPEG with half a million restarts", jpeg[:2] + b"\xff\xd0" * 500_000 + jpeg[2:], REFUSED)
    webp = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + b"\xfe\x3f\0" * 2
    yield Hostile("WebP of 16,383 x 16,383", webp, REFUSED)


def _foreign(rng: random.Random) -> Iterator[Hostile]:
    """Formats that are not offered, though Pillow knows most of them."""
    for form in (
        "TIFF",
        "BMP",
        "ICO",
        "PPM",
        "TGA",
        "PCX",
        "SGI",
        "DDS",
        "JPEG2000",
        "PDF",
        "EPS",
        "ICNS",
        "SPIDER",
    ):
        try:
            data = _photo(form, (64, 64), seed=rng.getrandbits(20))
        except (KeyError, OSError):  # not in this build
            continue
        yield Hostile(form, data, REFUSED)
        yield Hostile(f"{form} called a PNG", data, REFUSED, "image/png")
    heads = {
        "FITS": b"SIMPLE  =                    T" + b" " * 50 + b"NAXIS   =                    2" + bytes(3000),
        "GD": b"\xff\xff" + struct.pack(">HH", 60_000, 60_000) + bytes(2000),
        "BDF font": b"STARTFONT 2.1\nFONTBOUNDINGBOX 99999999 99999999 0 0\n",
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
        "SVG with an entity bomb": b"<!DOCTYPE a [<!ENTITY b 'b'><!ENTITY c '&b;&b;'>]><svg>&c;</svg>",
        "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200),
        "AVIF": b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(200),
        "PSD": b"8BPS\0\1" + bytes(6) + b"\0\3" + struct.pack(">II", 30_000, 30_000) + bytes(100),
        "ELF": b"\x7fELF\2\1\1" + rng.randbytes(200),
        "pickle": b"\x80\x04cos\nsystem\n(S'id'\ntR.",
        "noise": rng.randbytes(2000),
        "zeros": bytes(5000),
    }
    for name, data in heads.items():
        yield Hostile(name, data, REFUSED)


def _polyglots(rng: random.Random) -> Iterator[Hostile]:
    """Two things at once: a picture with something behind it is a picture, a magic number alone is none."""
    script = b"<script>alert(document.domain)</script>"
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr(zipfile.ZipInfo("../../evil"), rng.randbytes(500))
    for form in ("JPEG", "PNG", "WEBP", "GIF"):
        data = _photo(form, seed=rng.getrandbits(20))
        yield Hostile(f"{form} and a zip", data + archive.getvalue(), OK)
        yield Hostile(f"{form} and a script", data + script, OK)
        yield Hostile(f"a script, then {form}", script + data, REFUSED)
        yield Hostile(f"{form} called text/html", data, REFUSED, "text/html")
        yield Hostile(f"{form} called a PNG", data, OK, "image/png")
    for magic in (b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\x10\0\0\0WEBPVP8 "):
        yield Hostile("a magic number and a script", magic + script, REFUSED)
    yield Hostile("empty", b"", REFUSED)


def _odd(rng: random.Random) -> Iterator[Hostile]:
    """Rare, and pictures all the same."""
    for form, mode in (
        ("JPEG", "CMYK"), ("JPEG", "L"), ("PNG", "1"), ("PNG", "I;16"), ("PNG", "LA"), ("PNG", "P"), ("PNG", "RGBA"),
        ("WEBP", "RGBA"), ("GIF", "L"),
    ):  # fmt: skip
        image = "I;16" if mode == "I;16" else mode
        data = _photo(form, mode=image, seed=rng.getrandbits(20)) if image != "I;16" else _deep()
        yield Hostile(f"{form} of mode {mode}", data, OK)
    yield Hostile("one pixel", _photo("PNG", (1, 1)), OK)
    yield Hostile("a stripe", _photo("PNG", (2000, 10)), OK)
    yield Hostile("a line", _photo("PNG", (16_384, 1)), EITHER)  # as the model's size is: at 224 it is refused


def _deep() -> bytes:
    buffer = io.BytesIO()
    Image.new("I;16", (40, 30), 30_000).save(buffer, "PNG")
    return buffer.getvalue()


def _damaged(rng: random.Random) -> Iterator[Hostile]:
    """Cut at a random place of its pixels, or some bytes changed."""
    for form in ("JPEG", "PNG", "WEBP", "GIF"):
        data = _photo(form, (160, 120), seed=rng.getrandbits(20))
        for _ in range(6):
            cut = data[: rng.randrange(0, len(data) - 16)]
            yield Hostile(f"{form} cut", cut, REFUSED)
            changed = bytearray(data)
            for _ in range(rng.randint(1, 20)):
                changed[rng.randrange(len(data))] = rng.getrandbits(8)
            yield Hostile(f"{form} with bytes changed", bytes(changed), EITHER)


FAMILIES: tuple[Callable[[random.Random], Iterator[Hostile]], ...] = (_damaged, _foreign, _polyglots, _odd, _bombs)


def hostile_images(number: int, seed: int = 0) -> Iterator[Hostile]:
    """So many, of all families in turn; fresh damage every time round."""
    rng = random.Random(seed)

    def endless(family: Callable[[random.Random], Iterator[Hostile]]) -> Iterator[Hostile]:
        while True:
            yield from family(rng)

    turns = [endless(family) for family in FAMILIES]
    return islice((next(turn) for turn in cycle(turns)), number)
