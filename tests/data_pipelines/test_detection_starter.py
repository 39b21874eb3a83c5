"""The composed set from generated cut-outs and backgrounds; the real packages in one slow test."""

import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_pipelines import sources
from data_pipelines.compose import paste
from data_pipelines.compose.dice import Dice
from data_pipelines.compose.objects import NOVEL, TABLE, Thing, distractors, split_things, things
from data_pipelines.compose.scenes import SCENES
from data_pipelines.compose.wording import captions
from data_pipelines.errors import ConfigError
from data_pipelines.records import Record
from data_pipelines.sources import detection_starter
from data_pipelines.sources.detection_starter import Config, Material, compose

RED = (250, 20, 30)


def ellipse(size: tuple[int, int] = (90, 60), colour: tuple[int, int, int] = RED) -> Image.Image:
    image = Image.new("RGBA", size, (0, 255, 0, 0))  # a hidden colour that must never show
    ImageDraw.Draw(image).ellipse((0, 0, size[0] - 1, size[1] - 1), fill=(*colour, 255))
    return image


@pytest.fixture(scope="module")
def material() -> Material:
    """Red ellipses for objects, blue ones for distractors, on dark grounds."""
    objects, others = split_things(things()), split_things(distractors())
    parts = detection_starter.MATERIAL
    return Material(
        cutouts={thing: ellipse() for thing in things()}
        | {thing: ellipse(colour=(20, 30, 250)) for thing in distractors()},
        scenes={scene: Image.new("RGB", (300, 200), (10, 40, 40)) for scene in SCENES},
        shown={
            split: [thing for thing in objects[part] if split != "train" or thing.kind not in NOVEL]
            for split, part in parts.items()
        },
        others={split: others[part] for split, part in parts.items()},
    )


def made(material: Material, split: str, count: int, **options: int) -> list[Record]:
    return [compose(Config.model_validate({"side": 128} | options), material, split, n) for n in range(count)]


def pixels(record: Record) -> np.ndarray:
    assert isinstance(record.image, bytes)
    with Image.open(io.BytesIO(record.image)) as image:
        return np.asarray(image).astype(int)


def test_equal_seeds_give_equal_records_and_others_do_not(material: Material) -> None:
    assert made(material, "test", 5) == made(material, "test", 5)
    assert len({record.image for seed in range(3) for record in made(material, "test", 3, seed=seed)}) == 9
    assert made(material, "pretrain", 1)[0].image != made(material, "train", 1)[0].image


def test_boxes_are_those_of_the_objects_and_nothing_hidden_shows(material: Material) -> None:
    seen = 0
    for record in made(material, "test", 40):
        image_HWC = pixels(record)
        red_HW = (image_HWC[..., 0] > image_HWC[..., 2] + 70) & (image_HWC[..., 0] > image_HWC[..., 1] + 70)
        assert not (image_HWC[..., 1] > image_HWC[..., 0] + 90).any()
        outside_HW = np.ones_like(red_HW)
        for x0, y0, x1, y1, _ in record.boxes:
            left, top, right, bottom = (round(128 * side) for side in (x0, y0, x1, y1))
            rows, columns = np.nonzero(red_HW[top:bottom, left:right])
            found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            assert np.abs(np.array(found) - (0, 0, right - left, bottom - top)).max() <= 2
            outside_HW[max(0, top - 4) : bottom + 4, max(0, left - 4) : right + 4] = False
            seen += 1
        assert not (red_HW & outside_HW).any()  # no object without a box
    assert seen > 50


def test_objects_keep_apart_and_within_the_picture(material: Material) -> None:
    longest = []
    for record in made(material, "val", 60):
        for one, other in itertools.combinations(record.boxes, 2):
            assert one[0] >= other[2] or other[0] >= one[2] or one[1] >= other[3] or other[1] >= one[3]
        for x0, y0, x1, y1, _ in record.boxes:
            assert 0 <= x0 < x1 <= 1
            assert 0 <= y0 < y1 <= 1
            longest.append(max(x1 - x0, y1 - y0))
    assert 0.19 < min(longest) < 0.25
    assert 0.42 < max(longest) < 0.51


def test_what_each_split_tells(material: Material) -> None:
    for split in detection_starter.PICTURES:
        records = made(material, split, 80)
        kinds = {box[4] for record in records for box in record.boxes}
        assert {record.split for record in records} == {split}
        for record in records:
            names = json.loads(str(record.extra["names"]))
            assert 1 <= len(names) <= 3
            assert all(name in record.captions[0] for name in names)
            assert set(names) <= set(record.labels)
            assert len(record.captions) == len(set(record.captions)) >= 2
            assert len(record.boxes) == (0 if split == "pretrain" else len(names))
        if split == "pretrain":
            assert not kinds
            assert any(set(NOVEL) & set(record.labels) for record in records)
            assert not any("segments" in record.extra for record in records)
        elif split == "train":
            assert kinds <= set(TABLE) - set(NOVEL)
            assert not any(set(NOVEL) & set(record.labels) for record in records)
        else:
            assert set(NOVEL) <= kinds


@pytest.mark.parametrize("items", [things(), distractors()])
def test_no_file_and_no_name_is_in_two_splits(items: list[Thing]) -> None:
    parts = split_things(items)
    assert sum(map(len, parts.values())) == len(items) == len({thing.path for thing in items})
    for one, other in itertools.combinations(parts.values(), 2):
        assert not {(thing.kind, thing.name) for thing in one} & {(thing.kind, thing.name) for thing in other}
        assert {thing.kind for thing in one} == {thing.kind for thing in other}


def test_photographs_are_of_one_split_each() -> None:
    assert len({scene.path for scene in SCENES}) == len(SCENES) == 20
    counts = {split: sum(scene.split == split for scene in SCENES) for split in ("train", "val", "test")}
    assert counts == {"train": 12, "val": 3, "test": 5}


def test_the_split_is_the_published_one() -> None:
    # a fixed function of the names: another one would let files of the test part into training
    parts = split_things(things())
    assert {split: len(items) for split, items in parts.items()} == {"train": 145, "val": 29, "test": 51}
    birds = {thing.name for thing in parts["test"] if thing.kind == "bird"}
    assert birds == {
        "pigeon", "albino peahen", "guinea fowl", "pelican", "toucan", "penguin", "drake", "blackbird"
    }  # fmt: skip


def test_captions_say_a_or_an_and_count_classes() -> None:
    owl, crow, apple = Thing("o", "bird", "owl"), Thing("c", "bird", "crow"), Thing("a", "fruit", "apple")
    found = {text for seed in range(40) for text in captions([owl, crow, apple], "at sea", Dice(str(seed)))}
    assert "a photo of two birds and a fruit" in found
    assert "a bird (owl), a fruit (apple) and a bird (crow)" in found
    assert any(text.endswith("at sea") and "an owl" in text and "a crow" in text for text in found)
    mug = Thing("m", "kitchenware", "mug")
    assert "a piece of kitchenware" in {text for seed in range(20) for text in captions([mug], "", Dice(str(seed)))}


def test_runs_of_a_grid_by_hand() -> None:
    # 4 x 4 pixels, 2 x 2 cells. Object 1 covers the upper left cell whole and a quarter of the upper right one, which
    # stays background; object 2 covers half of the lower left cell, which is enough.
    owner_HW = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [2, 2, 0, 0], [0, 0, 0, 0]], np.uint8)
    assert paste.runs(owner_HW, 2, 2) == [1, 1, 0, 1, 2, 1, 0, 1]
    assert paste.runs(np.zeros((5, 5), np.uint8), 3, 1) == [0, 9]


def test_segments_lie_within_the_boxes(material: Material) -> None:
    for record in made(material, "test", 20):
        stored = json.loads(str(record.extra["segments"]))
        values = np.repeat(stored["runs"][::2], stored["runs"][1::2]).reshape(stored["grid"], stored["grid"])
        assert set(values.ravel()) == set(range(len(stored["names"]) + 1))
        for y, x in np.argwhere(values):
            name, middle = stored["names"][values[y, x] - 1], ((x + 0.5) / 32, (y + 0.5) / 32)
            assert any(
                box[4] == name and box[0] <= middle[0] <= box[2] and box[1] <= middle[1] <= box[3]
                for box in record.boxes
            )


def test_small_cutouts_are_not_blown_up() -> None:
    tiny = ellipse((30, 20))
    sides = [
        max(placed.image.size) for n in range(60) if (placed := paste.place(tiny, 320, [], Dice(str(n)))) is not None
    ]
    assert len(sides) == 60
    assert 62 <= min(sides) <= max(sides) <= 75  # at least a fifth of the picture, otherwise 2.5 times 30


def test_an_object_without_a_place_is_left_out() -> None:
    assert paste.place(ellipse(), 128, [(0, 0, 128, 128)], Dice("")) is None


def test_sizes_by_split() -> None:
    assert Config(pictures=["train=7", "test=0"]).pictures == {"pretrain": 4000, "train": 7, "val": 500, "test": 0}
    assert detection_starter.count(Config(pictures={"train": 7})) == 4000 + 7 + 500 + 1000
    with pytest.raises(ConfigError, match="there is no split dev; splits are pretrain, train, val, test"):
        sources.resolve("detection-starter", pictures={"dev": 3})
    with pytest.raises(ConfigError, match="'train' has no number"):
        sources.resolve("detection-starter", pictures=("train=",))


def test_dice_are_the_same_everywhere() -> None:
    # the first draw of Mersenne Twister seeded by sha256("a") as a number
    assert Dice("a").between(0, 1) == Dice("a").between(0, 1) != Dice("b").between(0, 1)
    dice = Dice("c")
    assert {dice.below(3) for _ in range(60)} == {0, 1, 2}
    counts = np.bincount([dice.weighted([1.0, 0.0, 3.0]) for _ in range(4000)], minlength=3) / 4000
    assert counts == pytest.approx([0.25, 0.0, 0.75], abs=0.03)


@pytest.mark.slow
def test_from_the_packages() -> None:
    found = sources.resolve("detection-starter", pictures={"pretrain": 3, "train": 3, "val": 3, "test": 3})
    records = list(found.module.iter_records(found.config))
    assert [record.split for record in records] == [split for split in detection_starter.PICTURES for _ in range(3)]
    assert all(pixels(record).shape == (320, 320, 3) for record in records)
    again = list(found.module.iter_records(found.config))
    assert records == again
