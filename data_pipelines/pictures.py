"""A record's picture made ready for a shard: read, hashed, checked, resized and encoded as the options ask."""

import hashlib
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import simplejpeg
from pydantic import Field, model_validator

from data_pipelines.arrays import array_size, is_array, open_array
from data_pipelines.config import StrictModel
from data_pipelines.errors import BadSample, ConfigError
from data_pipelines.fetch import FetchOptions, read_bytes
from data_pipelines.images import (
    MAX_PIXELS,
    check_size,
    halvings,
    has_exif,
    is_rotated,
    open_checked,
    open_header,
    upright,
)
from data_pipelines.records import Record
from data_pipelines.resize import (
    WHOLE,
    EncodeFormat,
    Frame,
    Pixels,
    ResizeMode,
    encode,
    encode_pixels,
    frame,
    needs_resize,
    resize_to,
    scaled_size,
    shrink,
)

KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats whose original bytes may stay, and their member extension."""
PLAIN = {"YCbCr": "RGBX", "RGB": "RGBX", "Gray": "GRAY"}
"""Colours of a JPEG -> the layout it is decoded to."""
THUMBNAIL_SIDE, THUMBNAIL_SIDES = 128, (16, 512)
"""Longer side of a thumbnail in pixels: usual, and what may be asked for."""
THUMBNAIL_QUALITY = 80
"""As JPEG: 3.7 kB and 1.4 ms for a photograph at 128 pixels; as WebP 2.6 kB and 2.6 ms, five times an icon's."""
KEPT_ROOM = 32 << 20
"""Bytes that a thread keeps for the next picture's pixels; asking the system anew costs half a decoding."""
_ROOM = threading.local()


class WriteOptions(StrictModel):
    """How pictures become shard members. Names are img2dataset's."""

    image_size: int | None = Field(default=None, ge=1)
    """Target side in pixels; None leaves every picture as it is."""
    resize_mode: ResizeMode = "no"
    resize_only_if_bigger: bool = True
    encode_format: EncodeFormat | None = None
    """None keeps a picture's own format (GIF becomes png). Original bytes are kept wherever nothing has to change."""
    encode_quality: int | None = Field(default=None, ge=0, le=100)
    """1..100 for jpg and webp (default 95), compression level 0..9 for png (default 6)."""
    samples_per_shard: int = Field(default=1000, ge=1)
    """Rows per shard; failed rows use up their index."""
    oom_shard_count: int = Field(default=5, ge=1, le=18)
    """Digits of a shard's name."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
    workers: int = Field(default=0, ge=0)
    """Threads for checking, resizing and encoding; 0 = one per core. Does not change a byte of the output."""
    fetch: FetchOptions = FetchOptions()
    fetch_concurrency: int = Field(default=32, ge=1)
    """URLs fetched at the same time."""
    on: str | None = Field(default=None, pattern=r"^ray(:.+)?$")
    """None: this process. `ray` or `ray:ADDRESS`: the same shards, written by tasks of a Ray cluster."""

    @model_validator(mode="after")
    def _consistent(self) -> "WriteOptions":
        if (self.image_size is None) != (self.resize_mode == "no"):
            raise ConfigError(
                f"image_size {self.image_size} with resize_mode {self.resize_mode!r}: give both or neither; modes are "
                "keep_ratio, keep_ratio_largest, center_crop, border"
            )
        if self.encode_quality is not None and self.encode_format is None:
            raise ConfigError(f"encode_quality {self.encode_quality} has no effect without encode_format")
        if self.encode_format == "png" and (self.encode_quality or 0) > 9:
            raise ConfigError(f"encode_quality {self.encode_quality}: png takes a compression level of 0 to 9")
        if self.encode_format == "jpg" and self.encode_quality == 0:
            raise ConfigError("encode_quality 0: jpg takes 1 to 100")
        return self

    def recorded(self) -> dict[str, str | int | float | bool | None]:
        """The options that shape the output, for the manifest."""
        return self.model_dump(exclude={"workers", "fetch", "fetch_concurrency", "on"})


@dataclass(frozen=True, slots=True)
class Prepared:
    """A record's picture, ready for the tar, or the reason why there is none."""

    sha256: str | None = None
    """Of the original bytes."""
    image: bytes = b""
    extension: str = ""
    original: tuple[int, int] | None = None
    size: tuple[int, int] | None = None
    frame: Frame = WHOLE
    """The part of the original that is shown."""
    reason: str = ""
    message: str | None = None
    unread: bool = False


def prepare(record: Record, options: WriteOptions, gate: AbstractContextManager[object] | None = None) -> Prepared:
    """Read, hash, check, resize and encode one picture; what is wrong with it comes back as a value.

    `gate` is held while pixels are in memory, so that many threads can wait for servers and few decode.
    """
    reason = record.problem.partition(":")[0]
    if reason and isinstance(record.image, str):
        return Prepared(reason=reason, message=record.problem, unread=True)  # no need to trouble a server for it
    try:
        data = read_bytes(record.image, options.fetch)
    except BadSample as error:
        return Prepared(reason=error.reason, message=str(error), unread=True)
    digest = hashlib.sha256(data).hexdigest()
    if reason:
        return Prepared(digest, reason=reason, message=record.problem, unread=True)
    try:
        with gate or nullcontext():
            return _convert(data, digest, options)
    except BadSample as error:
        return Prepared(digest, reason=error.reason, message=str(error))


def thumbnail(data: bytes, side: int, max_pixels: int = MAX_PIXELS) -> bytes:
    """JPEG of a picture, at most `side` pixels long: upright, on white where it is transparent, free of metadata.

    A smaller picture keeps its size. Raises BadSample, `array_kept_as_is` for an .npy picture.
    """
    options = WriteOptions(
        image_size=side, resize_mode="keep_ratio_largest", encode_format="jpg", encode_quality=THUMBNAIL_QUALITY,
        max_pixels=max_pixels,
    )  # fmt: skip
    small = _convert(data, "", options).image
    return encode(open_checked(data, max_pixels), "jpg", THUMBNAIL_QUALITY) if small is data else small


def _convert(data: bytes, digest: str, options: WriteOptions) -> Prepared:
    if is_array(data):
        return _keep_array(data, digest, options)
    if data[:2] == b"\xff\xd8" and (done := _convert_jpeg(data, digest, options)):
        return done
    image = open_checked(data, options.max_pixels)
    original = image.size
    kept = KEPT.get(image.format or "", "")
    size, mode = options.image_size or 0, options.resize_mode
    resize = needs_resize(*original, size, mode, options.resize_only_if_bigger)
    target: EncodeFormat = options.encode_format or ("webp" if kept == "webp" else "jpg" if kept == "jpg" else "png")
    # A turned picture is re-encoded upright: the fast decoders of the training path do not read EXIF.
    if kept == target and not resize and not is_rotated(image):
        return Prepared(digest, data, kept, original, original)
    image, shown = upright(image), WHOLE
    if resize:
        shown = frame(*image.size, size, mode)
        image = resize_to(image, size, mode, options.resize_only_if_bigger)
    return Prepared(digest, encode(image, target, options.encode_quality), target, original, image.size, shown)


def _keep_array(data: bytes, digest: str, options: WriteOptions) -> Prepared:
    """An .npy picture goes into the shard as it is; resizing it is left to training, which knows its bands."""
    if options.image_size is not None or options.encode_format is not None:
        raise BadSample("array_kept_as_is", "an .npy picture is neither resized nor encoded: leave these options out")
    size = array_size(open_array(data, options.max_pixels).shape)
    return Prepared(digest, data, "npy", size, size)


def _convert_jpeg(data: bytes, digest: str, options: WriteOptions) -> Prepared | None:
    """`_convert` for upright JPEGs, without Pillow and its hold on the GIL; None for any that needs Pillow.

    Damage is left to Pillow as well: it says what is wrong, and reads what is merely untidy.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    original, target = (width, height), options.encode_format or "jpg"
    check_size(*original, options.max_pixels)
    if colours not in PLAIN or (has_exif(data) and is_rotated(open_header(data, options.max_pixels))):
        return None
    size, mode = options.image_size or 0, options.resize_mode
    if not needs_resize(*original, size, mode, options.resize_only_if_bigger):
        # One eighth of the size is enough to prove a JPEG whole: every coefficient is still read.
        whole = target == "jpg" and _decode(data, original, colours, (1, 1)) is not None
        return Prepared(digest, data, "jpg", original, original) if whole else None
    scaled = scaled_size(*original, size, mode)
    if scaled >= original or (decoded := _decode(data, original, colours, scaled, coarse=target == "jpg")) is None:
        return None
    small = shrink(decoded, size, mode, original)
    content = encode_pixels(small, target, options.encode_quality)
    return Prepared(digest, content, target, original, small.shape[1::-1], frame(*original, size, mode))


def _decode(
    data: bytes, full: tuple[int, int], colours: str, size: tuple[int, int], coarse: bool = False
) -> Pixels | None:
    """The picture at a half, a quarter or an eighth if that covers `size` (width, height); None where it is damaged.

    It is good until the thread decodes the next one. `coarse` repeats subsampled colours instead of smoothing them:
    faster, and once they are subsampled again closer to the original.
    """
    by = halvings(full, size)
    width, height = -(-full[0] // by), -(-full[1] // by)
    room = _room(width * height * (1 if colours == "Gray" else 4))
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(
            data, PLAIN[colours], fastupsample=coarse, min_width=width, min_height=height, buffer=room
        )
    except ValueError:
        return None
    return pixels


def _room(size: int) -> bytearray:
    """Memory for a picture of so many bytes; within the limit it is the thread's own, used again and again."""
    if size > KEPT_ROOM:
        return bytearray(size)
    if len(getattr(_ROOM, "pixels", b"")) < size:
        _ROOM.pixels = bytearray(size)
    room: bytearray = _ROOM.pixels
    return room
