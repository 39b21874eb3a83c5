"""The starter set: emoji of two vendors and clip-art to train on, a third vendor's emoji to test on.

The split is a function of a fixed hash of the concept's family, so that gender, skin and direction variants never
straddle it:

- `train`            two vendors, one of them with its drawings of 2017 too, and clip-art, without the withheld families
- `val`              the two vendors' pictures of the validation families: every choice is made here
- `unseen_vendor`    the third vendor's base pictures of the training families (another drawing style)
- `unseen_concepts`  the third vendor's base pictures of the withheld test families (another style and new concepts)

Training records keep their alternative captions; the others carry the name alone, so that a split's captions are its
candidates. A withheld name is removed from the clip-art as well, wherever title or keywords carry it.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data_pipelines.config import StrictModel
from data_pipelines.packages import Package
from data_pipelines.records import Record
from data_pipelines.sources import clipart, emoji

SPLITS = ("train", "val", "unseen_vendor", "unseen_concepts")
PACKAGES: tuple[Package, ...] = (*emoji.PACKAGES.values(), *clipart.PACKAGES.values())
WRITE = {"image_size": 144, "resize_mode": "keep_ratio_largest", "encode_format": "png"}
"""Write options unless others are asked for: drawings stay lossless and keep their alpha."""
TRAINING_VENDORS = ("google", "google-2017", "twitter")
VALIDATION_VENDORS = ("google", "twitter")
TEST_VENDOR = "fluent"
WITHHELD = 0.17
"""Share of the families withheld for the test, and again for validation: about 200 of 1,200 each."""


class Config(StrictModel):
    """Where the packages lie, and whether the clip-art (two Debian packages) is part of the training split."""

    clipart: bool = True
    languages: tuple[str, ...] = ("en",)
    dir: Path | None = None


def split_of(family: str) -> str:
    """train | val | test, from a fixed hash of the family alone."""
    digest = hashlib.sha256(f"vlp-starter-1:{family}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    return "test" if position < WITHHELD else "val" if position < 2 * WITHHELD else "train"


def iter_records(config: Config) -> Iterator[Record]:
    """All records of all splits; Record.split names the folder."""
    settings = emoji.Config(languages=config.languages, dir=config.dir)
    concepts = emoji.load_concepts(settings)
    base = {concept.family: concept.code for concept in reversed(concepts)}
    base |= {concept.family: concept.code for concept in concepts if concept.code == concept.family}
    for record in emoji.iter_records(settings):
        family, part = str(record.extra["family"]), split_of(str(record.extra["family"]))
        if record.source in TRAINING_VENDORS:
            if part == "train":
                yield replace(record, split="train")
            elif part == "val" and record.source in VALIDATION_VENDORS:
                yield replace(record, split="val", captions=record.captions[:1])
        elif base[family] == record.extra["concept"] and part != "val":
            split = "unseen_vendor" if part == "train" else "unseen_concepts"
            yield replace(record, split=split, captions=record.captions[:1])
    if config.clipart:
        withheld = _phrases(concept.name for concept in concepts if split_of(concept.family) != "train")
        for record in clipart.iter_records(clipart.Config(dir=config.dir)):
            if not withheld.search(" | ".join((*record.captions[:1], *record.labels))):
                yield replace(record, split="train")


def _phrases(names: Iterator[str]) -> re.Pattern[str]:
    """Matches any of the names as whole words, singular or plural."""
    alternatives = "|".join(sorted((re.escape(name.lower()) for name in set(names)), key=len, reverse=True))
    return re.compile(rf"\b(?:{alternatives})s?\b")
