"""Tux Paint's stamps from a pinned Debian package: photographs cut out with alpha, and cartoons, with captions in many
languages. GPL-2: fetched by the user, never part of a release of this project.

A caption is the first line of the text beside a stamp; further lines are its translations. Labels are the folders.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.config import StrictModel
from data_pipelines.files import cache_dir
from data_pipelines.packages import Package, fetch_package, read_members
from data_pipelines.records import Record

PACKAGES = {
    "stamps": Package(
        "deb",
        "tuxpaint-stamps-default",
        "2022.06.04-1",
        "tuxpaint-stamps-default_2022.06.04.deb",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        "GPL-2",
        "the Tux Paint developers and contributors",
    ),
}
STAMPS = "usr/share/tuxpaint/stamps/"
MIRRORED = ("_mirror", "_flip")


class Config(StrictModel):
    """Which captions, and where the package lies."""

    languages: tuple[str, ...] = ("en",)
    """`en` and codes of translations, such as `de`; one without any of them is left out."""
    dir: Path | None = None


def iter_records(config: Config) -> Iterator[Record]:
    """One record per distinct stamp, without the symbols and the mirrored copies."""
    archive = fetch_package(PACKAGES["stamps"], config.dir or cache_dir() / "packages")
    files = dict(read_members(archive, _wanted))
    seen: set[bytes] = set()
    for name in sorted(name for name in files if name.endswith(".png")):
        stem = name.removesuffix(".png")
        captions = _captions(files.get(f"{stem}.txt", b"").decode(), config.languages)
        digest = hashlib.sha256(files[name]).digest()
        if captions and digest not in seen:
            seen.add(digest)
            folders = stem.removeprefix(STAMPS).split("/")[:-1]
            yield Record(
                image=files[name],
                captions=captions,
                labels=tuple(folder for folder in folders if folder != "cartoon"),
                source="tuxpaint",
                origin=f"{PACKAGES['stamps'].spec}/{stem.removeprefix(STAMPS)}",
                extra={"drawing": int("cartoon" in folders)},
            )


def _wanted(name: str) -> bool:
    stem, _, kind = name.removeprefix(STAMPS).rpartition(".")
    return name.startswith(STAMPS) and kind in ("png", "txt") and not stem.startswith("symbols/") and not (
        stem.endswith(MIRRORED)
    )  # fmt: skip


def _captions(text: str, languages: tuple[str, ...]) -> tuple[str, ...]:
    """Captions in the languages asked for, in their order: `A crow.`, then lines such as `de.utf8=Eine Krähe.`"""
    first, *others = text.splitlines() or [""]
    found = {"en": first.strip()} | {
        code: caption.strip() for code, mark, caption in (line.partition(".utf8=") for line in others) if mark
    }
    return tuple(dict.fromkeys(found[code] for code in languages if found.get(code)))
