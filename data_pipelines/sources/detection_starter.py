"""The composed detection set: photographs of objects, cut out with alpha, pasted on photographs of places.

No package with real boxed pictures was found, so pictures are composed; a box is the bounding box of the alpha channel
where it exceeds 24. Twenty classes, each a folder of the stamps; captions name every object by its own name and by its
class. A distractor (a planet, a road sign, a gravestone) stands in every fourth picture, without name or box.

- `pretrain`  captions alone, no boxes; objects of all classes, base and novel
- `train`     boxes, for fine-tuning; objects of the base classes only: no novel object is in its pictures
- `val`       boxes of all classes; every choice is made here
- `test`      boxes of all classes; read once

`pretrain` and `train` share cut-outs and photographs; those of `val` and `test` appear in no other split, in no crop or
mirror image: 12, 3 and 5 photographs, and all files of a name stay together. Novel are `bird` and `fruit`
(compose/objects.py says why): the names of their training files occur in the captions of `pretrain`, nowhere else.
A specific name of a test file (`toucan`) therefore occurs in no training caption, unless as a part of another name.

A picture depends on the seed, its split, its number and the packages alone. Scores on composed pictures say nothing
about COCO or LVIS. The stamps and photographs are GPL: fetched by the user, never part of a release of this project.
"""

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import BeforeValidator, Field

from data_pipelines.compose import paste
from data_pipelines.compose.dice import Dice
from data_pipelines.compose.objects import NOVEL, Thing, distractors, split_things, things
from data_pipelines.compose.scenes import PACKAGES as PHOTOGRAPHS
from data_pipelines.compose.scenes import SCENES, Scene
from data_pipelines.compose.wording import captions
from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError, PipelineError
from data_pipelines.files import cache_dir
from data_pipelines.packages import fetch_package, read_members
from data_pipelines.records import Box, Record
from data_pipelines.shards import in_order
from data_pipelines.sources import tuxpaint

PACKAGES = (tuxpaint.PACKAGES["stamps"], *PHOTOGRAPHS.values())
PICTURES = {"pretrain": 4000, "train": 3000, "val": 500, "test": 1000}
"""Pictures of each split."""
MATERIAL = {"pretrain": "train", "train": "train", "val": "val", "test": "test"}
"""Split -> whose cut-outs and photographs it uses."""
OBJECTS = (0.3, 0.4, 0.3)
"""Shares of pictures with one, two and three objects."""
DISTRACTED = 0.25
"""Share of pictures with a distractor."""
GRID = 32
"""Cells of `segments` a side."""


def _sizes(given: Any) -> Any:
    """Split -> pictures, from a mapping or `split=number` texts; splits not named keep their default."""
    if isinstance(given, list | tuple):
        parts = [str(item).partition("=") for item in given]
        if wrong := [name for name, _, number in parts if not number.isdecimal()]:
            raise ConfigError(f"pictures: {wrong[0]!r} has no number: write for example train=1000,test=200")
        given = {name: int(number) for name, _, number in parts}
    if not isinstance(given, Mapping):
        raise ConfigError(f"pictures {given!r}: give split=number for some of {', '.join(PICTURES)}")
    if unknown := sorted(set(given) - set(PICTURES)):
        raise ConfigError(f"pictures: there is no split {', '.join(unknown)}; splits are {', '.join(PICTURES)}")
    return PICTURES | dict(given)


class Config(StrictModel):
    """How many pictures, how large, from which seed."""

    pictures: Annotated[dict[str, Annotated[int, Field(ge=0)]], BeforeValidator(_sizes)] = PICTURES
    """Pictures of each split; those not named keep their default."""
    side: int = Field(320, ge=64, le=2048)
    """Width and height, pixels."""
    seed: int = 0
    dir: Path | None = None


@dataclass(frozen=True, slots=True)
class Material:
    """Everything decoded that pictures are made of."""

    cutouts: Mapping[Thing, Image.Image]
    scenes: Mapping[Scene, Image.Image]
    shown: Mapping[str, list[Thing]]
    """Split -> cut-outs that are named and boxed."""
    others: Mapping[str, list[Thing]]
    """Split -> distractors."""


def count(config: Config) -> int:
    """Number of records that `iter_records` yields."""
    return sum(config.pictures.values())


def iter_records(config: Config) -> Iterator[Record]:
    """All records of all splits; Record.split names the folder."""
    material = load(config)
    tasks = ((split, index) for split, number in config.pictures.items() for index in range(number))
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:  # Pillow lets go of the GIL
        yield from in_order(lambda task: pool.submit(compose, config, material, *task), tasks, 2 * threads)


def load(config: Config) -> Material:
    """Fetch and decode. Raises PipelineError for a package without the files of the table."""
    folder = config.dir or cache_dir() / "packages"
    wanted = {f"{tuxpaint.STAMPS}{thing.path}.png": thing for thing in (*things(), *distractors())}
    stamps = dict(read_members(fetch_package(tuxpaint.PACKAGES["stamps"], folder), wanted.__contains__))
    _complete(set(wanted) - set(stamps))
    cutouts = {thing: paste.open_cutout(stamps[path], config.side) for path, thing in wanted.items()}
    scenes: dict[Scene, Image.Image] = {}
    for name, package in PHOTOGRAPHS.items():
        paths = {scene.path: scene for scene in SCENES if scene.package == name}
        for path, data in read_members(fetch_package(package, folder), paths.__contains__):
            scenes[paths[path]] = paste.open_scene(data, paths[path].part, config.side)
    _complete({scene.path for scene in SCENES if scene not in scenes})
    objects, others = split_things(things()), split_things(distractors())
    shown = {split: objects[part] for split, part in MATERIAL.items()}
    shown["train"] = [thing for thing in shown["train"] if thing.kind not in NOVEL]
    return Material(cutouts, scenes, shown, {split: others[part] for split, part in MATERIAL.items()})


def _complete(missing: set[str]) -> None:
    if missing:
        raise PipelineError(f"{', '.join(sorted(missing))}: not in the packages, which are of another version")


def compose(config: Config, material: Material, split: str, index: int) -> Record:
    """One picture of a split: number `index` of the seed."""
    origin = f"{config.seed}/{split}/{index:06d}"
    dice = Dice(f"vlp-detection-1/{origin}")
    scene = dice.pick([scene for scene in SCENES if scene.split == MATERIAL[split]])
    picture = paste.ground(material.scenes[scene], config.side, dice)
    found: list[tuple[Thing, paste.Placed]] = []
    for thing in _drawn(material.shown[split], 1 + dice.weighted(OBJECTS), dice):
        _put(thing, material, config.side, found, dice)
    if dice.chance(DISTRACTED):
        _put(dice.pick(material.others[split]), material, config.side, found, dice)
    for _, placed in found:
        paste.paste(picture, placed, dice)
    named = [(thing, placed) for thing, placed in found if thing.kind]
    names = [thing.name for thing, _ in named]
    kinds = list(dict.fromkeys(thing.kind for thing, _ in named))
    extra: dict[str, Any] = {"background": scene.name, "names": json.dumps(names)}
    if split != "pretrain":
        extra["segments"] = json.dumps(segments(named, kinds, config.side))
    return Record(
        image=paste.camera(picture, dice),
        captions=captions([thing for thing, _ in named], scene.phrase, dice),
        source="composed",
        origin=origin,
        labels=tuple(dict.fromkeys((*kinds, *names))),
        boxes=() if split == "pretrain" else tuple(_box(thing, placed, config.side) for thing, placed in named),
        split=split,
        extra=extra,
    )


def _drawn(shown: list[Thing], number: int, dice: Dice) -> list[Thing]:
    """Different files; a class comes up in proportion to the root of its number of files, so that none is rare."""
    kinds: dict[str, list[Thing]] = {}
    for thing in shown:
        kinds.setdefault(thing.kind, []).append(thing)
    weights = [sqrt(len(items)) for items in kinds.values()]
    listed, found = list(kinds.values()), list[Thing]()
    while len(found) < number:
        thing = dice.pick(listed[dice.weighted(weights)])
        if thing not in found:
            found.append(thing)
    return found


def _put(thing: Thing, material: Material, side: int, found: list[tuple[Thing, paste.Placed]], dice: Dice) -> None:
    placed = paste.place(material.cutouts[thing], side, [item.box for _, item in found], dice)
    if placed is not None:
        found.append((thing, placed))


def _box(thing: Thing, placed: paste.Placed, side: int) -> Box:
    x0, y0, x1, y1 = (pixels / side for pixels in placed.box)
    return x0, y0, x1, y1, thing.kind


def segments(named: list[tuple[Thing, paste.Placed]], kinds: list[str], side: int) -> dict[str, Any]:
    """Which cell of a grid shows which class: `runs` of 0 (background) and k for `names[k-1]`, row by row."""
    numbers = [1 + kinds.index(thing.kind) for thing, _ in named]
    owner_HW = paste.owners([placed for _, placed in named], numbers, side)
    return {"grid": GRID, "names": kinds, "runs": paste.runs(owner_HW, GRID, len(kinds))}
