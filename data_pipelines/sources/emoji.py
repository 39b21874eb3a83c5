"""Emoji drawings of three vendors with names, tags and categories, from pinned npm packages.

Two vendors' packages carry an `emoji.json` with categories; names and tags come from emojibase (Unicode CLDR), joined
by code point. The third vendor, drawn in 3-D, is matched by file name.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import field_validator

from data_pipelines.config import StrictModel
from data_pipelines.files import cache_dir
from data_pipelines.packages import Package, fetch_package, read_members
from data_pipelines.records import Record

VENDORS = ("google", "google-2017", "twitter", "fluent")
"""Google's carries the concept table; `google-2017` holds its former drawings, nearly all of which were drawn anew
since. `fluent` is drawn in another style altogether."""

PACKAGES = {
    "google": Package(
        "npm",
        "emoji-datasource-google",
        "16.0.0",
        "emoji-datasource-google-16.0.0.tgz",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        "Apache-2.0",
        "Noto Emoji by Google",
    ),
    "twitter": Package(
        "npm",
        "emoji-datasource-twitter",
        "16.0.0",
        "emoji-datasource-twitter-16.0.0.tgz",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        "CC-BY-4.0",
        "Twemoji by Twitter and contributors",
    ),
    "google-2017": Package(
        "npm",
        "emoji-datasource-google",
        "3.0.0",
        "emoji-datasource-google-3.0.0.tgz",
        "3247dd55dee7954d6d1d3d84b05759e49daf71cab5cccb4566940209679af66f",
        "Apache-2.0",
        "Noto Emoji by the Android Open Source Project, April 2017",
    ),
    "fluent": Package(
        "npm",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "MIT",
        "Fluent Emoji by Microsoft, packaged by LobeHub",
    ),
    "names": Package(
        "npm",
        "emojibase-data",
        "17.0.0",
        "emojibase-data-17.0.0.tgz",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        "MIT",
        "emojibase by Miles Johnson, texts from Unicode CLDR",
    ),
}

SKIPPED_CATEGORIES = {"Flags", "Symbols", "Component"}
SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
JOINER = "200D"
VARIANT_SUFFIXES = {"2640", "2642", "27A1"}
"""Female, male, facing right: the last part of a joined sequence that only varies its base."""
BASE_OF = {
    "1F468": "1F9D1", "1F469": "1F9D1",  # man, woman -> person
    "1F466": "1F9D2", "1F467": "1F9D2",  # boy, girl -> child
    "1F474": "1F9D3", "1F475": "1F9D3",  # old man, old woman -> older person
    "1F934": "1FAC5", "1F478": "1FAC5",  # prince, princess -> person with crown
    "1F57A": "1F483",                    # man dancing -> woman dancing
    "1F936": "1F385",                    # Mrs. Claus -> Santa Claus
    "1F46B": "1F9D1-200D-1F91D-200D-1F9D1", "1F46C": "1F9D1-200D-1F91D-200D-1F9D1",
    "1F46D": "1F9D1-200D-1F91D-200D-1F9D1",  # couples holding hands
    "1F930": "1FAC4", "1FAC3": "1FAC4",  # pregnant woman, man -> person
    "1F470": "1F935",                    # veil, tuxedo: the wedding pair
}  # fmt: skip
WHOLE = {
    "1F9D1-200D-1F384": "1F385",             # mx claus -> Santa Claus
    "1F46A": "1F9D1-200D-1F9D1-200D-1F9D2",  # family: the vendors draw it with the very bytes of adult, adult, child
}  # fmt: skip


class Config(StrictModel):
    """Which vendors, and the languages of names and tags (the first one is the caption, others go to `names`)."""

    vendors: tuple[str, ...] = VENDORS
    languages: tuple[str, ...] = ("en",)
    dir: Path | None = None
    """Folder of the downloaded packages; default the user cache."""

    @field_validator("vendors")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if odd := [name for name in value if name not in VENDORS]:
            raise ValueError(f"{odd[0]!r} is unknown; known: {', '.join(VENDORS)}")
        return value


@dataclass(frozen=True, slots=True)
class Concept:
    """One emoji, shared by all vendors."""

    code: str
    """Code points without the presentation selector FE0F."""
    family: str
    """Code of the base that gender, skin and direction variants belong to."""
    image: str
    """File stem in the vendors' packages."""
    name: str
    tags: tuple[str, ...]
    category: str
    subcategory: str
    short_names: tuple[str, ...]
    names: dict[str, str]
    """Language -> name, for the languages asked for beyond the first."""


def family_of(code: str) -> str:
    """Base of a code: without skin tone, gender sign and direction; man and woman become person.

    >>> family_of("1F3C3-200D-2640-200D-27A1")
    '1F3C3'
    """
    parts = [part for part in code.split("-") if part not in SKIN_TONES and part != "FE0F"]
    while len(parts) > 2 and parts[-2] == JOINER and parts[-1] in VARIANT_SUFFIXES:
        parts = parts[:-2]
    base = "-".join(BASE_OF.get(part, part) for part in parts)
    return WHOLE.get(base, base)


def load_concepts(config: Config) -> list[Concept]:
    """All usable concepts in the order of the first vendor's table."""
    folder = config.dir or cache_dir() / "packages"
    names = _names(fetch_package(PACKAGES["names"], folder), config.languages)
    archive = fetch_package(PACKAGES["google"], folder)
    ((_, table),) = read_members(archive, "package/emoji.json".__eq__)
    concepts = []
    for row in json.loads(table):
        code = row["unified"].replace("-FE0F", "")
        entry = names[config.languages[0]].get(code)
        if row["category"] in SKIPPED_CATEGORIES or entry is None:
            continue
        concepts.append(
            Concept(
                code=code,
                family=family_of(code),
                image=row["image"].removesuffix(".png"),
                name=entry["label"],
                tags=tuple(entry.get("tags", ())),
                category=row["category"],
                subcategory=row["subcategory"],
                short_names=tuple(name.replace("_", " ").replace("-", " ") for name in row["short_names"]),
                names={lang: names[lang][code]["label"] for lang in config.languages[1:] if code in names[lang]},
            )
        )
    return concepts


def _names(archive: Path, languages: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    wanted = {f"package/{language}/data.json": language for language in languages}
    found = {wanted[name]: json.loads(text) for name, text in read_members(archive, wanted.__contains__)}
    if missing := set(languages) - set(found):
        raise ValueError(f"languages: emojibase has no {sorted(missing)}; use locale folders such as en, de, zh-hant")
    return {lang: {row["hexcode"].replace("-FE0F", ""): row for row in rows} for lang, rows in found.items()}


def load_images(vendor: str, config: Config) -> dict[str, bytes]:
    """File stem (without FE0F, lower case) -> encoded picture of one vendor."""
    archive = fetch_package(PACKAGES[vendor], config.dir or cache_dir() / "packages")
    prefix = "package/assets/" if vendor == "fluent" else f"package/img/{vendor.partition('-')[0]}/64/"
    inside = partial(_is_picture, prefix)
    return {_stem(name.removeprefix(prefix)): content for name, content in read_members(archive, inside)}


def _is_picture(prefix: str, name: str) -> bool:
    return name.startswith(prefix) and name.endswith((".png", ".webp"))


def _stem(file: str) -> str:
    return file.lower().rpartition(".")[0].replace("-fe0f", "")


def iter_records(config: Config) -> Iterator[Record]:
    """One record per concept and vendor that has a picture of it."""
    concepts = load_concepts(config)
    for vendor in config.vendors:
        images = load_images(vendor, config)
        for concept in concepts:
            image = images.get(_stem(concept.image + "."))
            if image is not None:
                yield make_record(concept, vendor, image)


def make_record(concept: Concept, vendor: str, image: bytes) -> Record:
    """Caption = the name, then the short names that differ; labels = category, subcategory and tags."""
    alternatives = dict.fromkeys((concept.name, *concept.short_names))
    return Record(
        image=image,
        captions=tuple(alternatives),
        labels=tuple(dict.fromkeys((concept.category, concept.subcategory, *concept.tags))),
        source=vendor,
        origin=f"{PACKAGES[vendor].spec}/{concept.image}",
        extra={
            "concept": concept.code,
            "family": concept.family,
            "names": json.dumps(concept.names, ensure_ascii=False) if concept.names else None,
        },
    )
