"""Public-domain clip-art (openclipart 0.18) with titles, keywords and folders, from two pinned Debian packages.

The keywords are honest label noise: authors' names, other languages, some plain mistakes.
"""

import hashlib
import html
import re
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.config import StrictModel
from data_pipelines.files import cache_dir
from data_pipelines.packages import Package, fetch_package, read_members
from data_pipelines.records import Record

PACKAGES = {
    "pictures": Package(
        "deb",
        "openclipart-png",
        "1:0.18+dfsg-19",
        "openclipart-png_0.18.deb",
        "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
        "public domain",
        "openclipart.org authors",
    ),
    "metadata": Package(
        "deb",
        "openclipart-svg",
        "1:0.18+dfsg-19",
        "openclipart-svg_0.18.deb",
        "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
        "public domain",
        "openclipart.org authors",
    ),
}

PICTURES = "usr/share/openclipart/png/"
DRAWINGS = "usr/share/openclipart/svg/"
SKIPPED_GROUPS = (
    "shapes/", "computer/icons/", "computer/buttons/", "special/", "signs_and_symbols/flags/", "signs_and_symbols/led/",
    "recreation/games/cards/", "geography/", "unsorted/",
)  # fmt: skip
DROPPED_KEYWORDS = {"", "hash", "unsorted"}
TITLE_TAIL = re.compile(r"\b(bw|colou?r|b and w|mini)\b|\b\d+\b|[()\[\]#]")


class Config(StrictModel):
    """Nothing to choose but where the packages lie."""

    dir: Path | None = None


def iter_records(config: Config) -> Iterator[Record]:
    """One record per distinct picture that has a title or keywords; the same bytes are yielded once."""
    folder = config.dir or cache_dir() / "packages"
    drawings = fetch_package(PACKAGES["metadata"], folder)
    texts = {
        name.removeprefix(DRAWINGS).removesuffix(".svg"): _metadata(content)
        for name, content in read_members(drawings, lambda name: name.startswith(DRAWINGS) and name.endswith(".svg"))
    }
    seen: set[bytes] = set()
    for name, content in read_members(fetch_package(PACKAGES["pictures"], folder), _usable):
        stem = name.removeprefix(PICTURES).removesuffix(".png")
        title, description, keywords = texts.get(stem, ("", "", ()))
        digest = hashlib.sha256(content).digest()
        if not title or not keywords or digest in seen:
            continue
        seen.add(digest)
        folders = tuple(part.replace("_", " ") for part in stem.split("/")[:-1])
        captions = dict.fromkeys(text for text in (title, description) if text)
        yield Record(
            image=content,
            captions=tuple(captions),
            labels=tuple(dict.fromkeys((*folders, *keywords))),
            source="openclipart",
            origin=f"{PACKAGES['pictures'].spec}/{stem}",
        )


def _usable(name: str) -> bool:
    return name.startswith(PICTURES) and name.endswith(".png") and not name[len(PICTURES) :].startswith(SKIPPED_GROUPS)


def _metadata(svg: bytes) -> tuple[str, str, tuple[str, ...]]:
    """(title, description, keywords) of a drawing's RDF block; empty where it has none."""
    block = re.search(rb"<metadata.*?</metadata>", svg, re.DOTALL)
    text = block.group().decode("utf-8", "replace") if block else ""
    title = normalise_title(_first(r"<dc:title[^>]*>([^<]*)", text))
    description = _first(r"<dc:description[^>]*>([^<]*)", text).lower()
    keywords = (
        html.unescape(word).strip().lower().replace("_", " ") for word in re.findall(r"<rdf:li[^>]*>([^<]*)", text)
    )
    return title, description[:200], tuple(word for word in keywords if word not in DROPPED_KEYWORDS)


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return " ".join(html.unescape(html.unescape(found.group(1))).split()) if found else ""


def normalise_title(title: str) -> str:
    """Lower case, separators to spaces, colour and number variants folded together.

    >>> normalise_title("Ice_Cream-Cone (3 Scoop) (B and W)")
    'ice cream cone scoop'
    """
    spaced = re.sub(r"[_\-/]+", " ", title.lower())
    return " ".join(TITLE_TAIL.sub(" ", spaced).split())
