"""Boxes in batches: they move with the pixels, bad ones are counted, and every option does what it says."""

import io
import itertools
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.augment import AugmentConfig, traced
from data_pipelines.batch import Batch
from data_pipelines.boxes import BoxConfig, box_fields, moved
from data_pipelines.errors import BadSample, ConfigError, MissingField, PipelineError
from data_pipelines.loader import DataConfig, Loader
from data_pipelines.preprocess import ImageConfig
from data_pipelines.reader import Sample
from data_pipelines.stream import Boxes, Decoded, decode
from data_pipelines.testing import draw
from data_pipelines.tokens import Tokenizer, learn_tokenizer

SIDE = 64


def decoded(*boxes: tuple[float, float, float, float, str]) -> Decoded:
    sides = torch.tensor([box[:4] for box in boxes], dtype=torch.float64).reshape(-1, 4)
    return Decoded(
        "key", torch.zeros(3, SIDE, SIDE), ("text",), (), "here", {}, Boxes(sides, tuple(b[4] for b in boxes))
    )


def painted(box: tuple[int, int, int, int]) -> torch.Tensor:
    picture = torch.zeros(1, 3, SIDE, SIDE)
    picture[:, :, box[1] : box[3], box[0] : box[2]] = 255
    return picture


@st.composite
def pixel_boxes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    x0, y0 = draw(st.integers(0, SIDE - 14)), draw(st.integers(0, SIDE - 14))
    return x0, y0, draw(st.integers(x0 + 14, SIDE)), draw(st.integers(y0 + 14, SIDE))


upright = st.fixed_dictionaries(
    {"flip": st.sampled_from([0.0, 1.0]), "scale": st.floats(0, 0.3), "shift": st.floats(0, 0.2),
     "aspect": st.floats(0, 0.1), "crop": st.sampled_from([0.0, 0.4, 0.8])}
)  # fmt: skip


@settings(max_examples=150)
@given(pixel_boxes(), upright, st.integers(0, 10_000), st.sampled_from([SIDE, 48]))
def test_a_box_moves_with_its_pixels(
    box: tuple[int, int, int, int], strengths: dict[str, float], seed: int, side: int
) -> None:
    config = AugmentConfig(**strengths, ground=0)
    pixels, matrix = traced(painted(box), config, np.random.default_rng(seed), 1, [0], side)
    there = torch.tensor([[box]], dtype=torch.float64) / SIDE
    there = there if matrix is None else moved(there, matrix)
    left, top, right, bottom = (there[0, 0] * side).clamp(0, side).tolist()
    if min(right - left, bottom - top) < 4:
        return
    shown = pixels[0, 0]
    middle = shown[int((top + bottom) / 2)], shown[:, int((left + right) / 2)]
    for line, first, last in zip(middle, (left, top), (right, bottom), strict=True):
        inside = torch.nonzero(line > 127)[:, 0]
        assert abs(float(inside[0]) - first) <= 1
        assert abs(float(inside[-1]) + 1 - last) <= 1


@given(st.integers(0, 10_000))
def test_turned_boxes_enclose_their_pixels_tightly(seed: int) -> None:
    config = AugmentConfig(rotate=30, shear=15, ground=0)
    box = (24, 20, 40, 44)
    pixels, matrix = traced(painted(box), config, np.random.default_rng(seed), 1, [0])
    assert matrix is not None
    found = moved(torch.tensor([[box]], dtype=torch.float64) / SIDE, matrix)[0, 0] * SIDE
    rows, columns = torch.nonzero(pixels[0, 0] > 20, as_tuple=True)
    extent = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert (extent - found).abs().max() <= 2


def test_fields_by_hand() -> None:
    # two samples, room for two boxes. First: `dog` is no class; of the cats the smallest, in the middle, gives way.
    # Second: a box that reaches out of the picture to the left by a half keeps what is seen of it.
    config = BoxConfig(labels=("cat", "cow"), max=2)
    samples = [
        decoded((0, 0, 0.5, 0.5, "cat"), (0, 0, 1, 1, "dog"), (0.5, 0.5, 0.6, 0.6, "cat"), (0.5, 0, 1, 0.5, "cow")),
        decoded((-0.5, 0.25, 0.5, 0.75, "cow")),
        decoded(),
    ]
    fields, notes = box_fields(samples, config, None, SIDE)
    assert fields["boxes"].tolist() == [
        [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5]], [[0, 0.25, 0.5, 0.75], [0, 0, 0, 0]], [[0, 0, 0, 0]] * 2,
    ]  # fmt: skip
    assert fields["box_mask"].tolist() == [[True, True], [True, False], [False, False]]
    assert fields["box_labels"].tolist() == [[0, 1], [1, -1], [-1, -1]]
    assert dict(notes) == {"given": 5, "other_label": 1, "over_max": 1}
    assert {name: value.dtype for name, value in fields.items()} == {
        "boxes": torch.float32, "box_mask": torch.bool, "box_labels": torch.int64,
    }  # fmt: skip


def test_other_labels_may_stay_without_a_number() -> None:
    sample = [decoded((0, 0, 0.5, 0.5, "dog"), (0, 0, 1, 1, "cat"))]
    kept, _ = box_fields(sample, BoxConfig(labels=("cat",), others="keep", max=3), None, SIDE)
    assert kept["box_labels"].tolist() == [[-1, 0, -1]]
    assert kept["box_mask"].tolist() == [[True, True, False]]
    unnumbered, _ = box_fields(sample, BoxConfig(max=2), None, SIDE)
    assert unnumbered["box_labels"].tolist() == [[-1, -1]]
    assert unnumbered["box_mask"].all()


def test_boxes_that_crops_take_away() -> None:
    # of 1.0 x 0.5, a fifth, a quarter and all is left in view; and one that is thinner than a pixel
    sample = [
        decoded((-0.8, 0, 0.2, 0.5, "a"), (-0.75, 0, 0.25, 0.5, "a"), (0, 0, 1, 0.5, "a"), (0, 0, 0.01, 1, "a"),
                (1.2, 0, 1.5, 1, "a"))
    ]  # fmt: skip
    fields, notes = box_fields(sample, BoxConfig(), None, SIDE)
    assert fields["boxes"][0, :3].tolist() == [[0, 0, 0.25, 0.5], [0, 0, 1, 0.5], [0, 0, 0, 0]]
    assert dict(notes) == {"given": 5, "cut_away": 3}
    fields, _ = box_fields(sample, BoxConfig(min_visible=0.9), None, SIDE)
    assert fields["box_mask"].sum() == 1


def test_no_sample_with_boxes_gives_empty_fields() -> None:
    fields, notes = box_fields([decoded(), decoded()], BoxConfig(max=3), torch.eye(3)[None, :2].repeat(2, 1, 1), SIDE)
    assert fields["boxes"].shape == (2, 3, 4)
    assert not fields["box_mask"].any()
    assert (fields["box_labels"] == -1).all()
    assert notes["given"] == 0


@pytest.mark.parametrize(
    ("stored", "says"),
    [([[0.5, 0, 0.5, 1, "t"]], "x0 < x1"), ([[0, 0, 1.2, 1, "o"]], "0 to 1"), ([[0, 0, "x", 1, "?"]], "expected"),
     ([[0, 0, float("nan"), 1, "n"]], "fractions"), ("nonsense", "expected a list"), ([[0.4, 0, 0.2, 1, "r"]], "x0 <"),
     ([[10, 20, 200, 150, "pixels"]], "fractions of the picture")],
)  # fmt: skip
def test_what_is_no_box_is_a_bad_sample(stored: Any, says: str) -> None:
    sample = Sample("k7", draw(), ("text",), (), "here", {"boxes": stored})
    with pytest.raises(BadSample, match=says) as caught:
        decode(sample, ImageConfig(size=32), 10**6, boxes=True)
    assert caught.value.reason == "bad_box"
    assert "k7" in str(caught.value)
    assert decode(sample, ImageConfig(size=32), 10**6).boxes is None  # unread where nobody asks


def test_boxes_of_turned_pictures_are_those_of_the_upright_one() -> None:
    # EXIF 6: stored lying, shown upright. A 60 x 40 file is a 40 x 60 picture; its lower half is the box.
    image = Image.new("RGB", (60, 40))
    exif = image.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    sample = Sample(
        "k", buffer.getvalue(), ("t",), (), "", {"boxes": [{"x0": 0, "y0": 0.5, "x1": 1, "y1": 1, "label": "a"}]}
    )
    found = decode(sample, ImageConfig(size=30, resize="longest"), 10**6, boxes=True).boxes
    assert found is not None
    assert found.sides_M4.tolist() == [[5 / 30, 0.5, 25 / 30, 1.0]]
    assert found.names == ("a",)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return learn_tokenizer(["a red thing"], vocab_size=300, context_length=8)


def shard(folder: Path, boxes: list[Any]) -> Path:
    """A foreign tar: one sample per item, red inside its first box."""
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number, found in enumerate(boxes):
            picture = np.zeros((80, 120, 3), np.uint8)
            if found and isinstance(found[0], list):
                x0, y0, x1, y1 = (
                    round(side * 120) if axis % 2 == 0 else round(side * 80) for axis, side in enumerate(found[0][:4])
                )
                picture[y0:y1, x0:x1, 0] = 255
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "PNG")
            members = {"png": buffer.getvalue(), "txt": b"a red thing", "json": json.dumps({"boxes": found}).encode()}
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return folder


def config(folder: Path, **changes: Any) -> DataConfig:
    given = {"train": folder, "batch_size": 8, "image": ImageConfig(size=48), "boxes": BoxConfig(labels=("a",), max=4)}
    return DataConfig.model_validate({**given, **changes})


MANY = [[[0.2 + 0.01 * n, 0.1, 0.5 + 0.01 * n, 0.6, "a"]] for n in range(24)]


def test_batches_hold_boxes_where_the_pixels_are(tmp_path: Path, tokenizer: Tokenizer) -> None:
    moving = AugmentConfig(flip=0.5, scale=0.2, shift=0.1, ground=0)
    loader = Loader(config(shard(tmp_path / "s", MANY), augment=moving), tokenizer, seed=3)
    seen = 0
    for batch in itertools.islice(loader, 3):
        boxes, mask = batch.require("boxes", "test"), batch.require("box_mask", "test")
        assert boxes.shape == (8, 4, 4)
        for pixels_CHW, sides, real in zip(batch.pixels, boxes, mask, strict=True):
            if not real[0]:
                continue
            rows, columns = torch.nonzero(pixels_CHW[0] > 127, as_tuple=True)
            extent = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (extent - 48 * sides[0]).abs().max() <= 1
            seen += 1
    assert seen > 20
    assert loader.ledger.boxes["given"] == 24
    assert loader.ledger.report()["boxes"]["given"] == 24
    assert loader.box_names == ("a",)


def test_ranks_and_a_resumed_run_see_the_same_boxes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    chosen = config(shard(tmp_path / "s", MANY), augment=AugmentConfig(flip=0.5, crop=0.4))
    first, second = itertools.islice(Loader(chosen, tokenizer, seed=1), 2)
    parts = [next(iter(Loader(chosen, tokenizer, 1, rank, 2))) for rank in range(2)]
    resumed = Loader(chosen, tokenizer, seed=1)
    resumed.load_state_dict({**resumed.state_dict(), "step": 1})
    for field in ("boxes", "box_mask", "box_labels"):
        assert torch.equal(torch.cat([part.require(field, "t") for part in parts]), first.require(field, "t"))
        assert torch.equal(next(iter(resumed)).require(field, "t"), second.require(field, "t"))
        resumed.step = 1
    other = Loader(config(tmp_path / "s", boxes=BoxConfig(labels=("b",), max=4)), tokenizer, seed=1)
    with pytest.raises(ConfigError, match="boxes.labels"):
        other.load_state_dict(resumed.state_dict())


def test_bad_boxes_are_counted_and_replaced(tmp_path: Path, tokenizer: Tokenizer) -> None:
    loader = Loader(config(shard(tmp_path / "s", [*MANY[:23], [[0.5, 0.5, 0.1, 0.9, "a"]]])), tokenizer, seed=0)
    batches = list(itertools.islice(loader, loader.plan.steps))
    assert loader.ledger.quarantined == {"bad_box": 1}
    assert all(len(batch.keys) == 8 for batch in batches)
    assert all("0023" not in batch.keys for batch in batches)


def test_data_without_a_box_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    loader = Loader(config(shard(tmp_path / "s", [[]] * 24)), tokenizer, seed=0)
    with pytest.raises(PipelineError, match="data.boxes: 24 samples of .* carry not one box"):
        list(itertools.islice(loader, 4))


def test_without_data_boxes_there_are_none_and_the_error_says_what_to_set(tmp_path: Path, tokenizer: Tokenizer) -> None:
    loader = Loader(config(shard(tmp_path / "s", MANY), boxes=None), tokenizer, seed=0)
    batch: Batch = next(iter(loader))
    assert loader.box_names == ()
    with pytest.raises(MissingField, match="needs the batch field 'boxes', .*: set data.boxes"):
        batch.require("boxes", "an objective")


@pytest.mark.parametrize(
    ("labels", "content"),
    [(("a", "a"), None), ((), None), (("a", ""), None), (Path("names.json"), '{"a": 1}'), (Path("names.txt"), "a\na\n"),
     (Path("missing.txt"), None)],
)  # fmt: skip
def test_labels_that_cannot_be(labels: Any, content: str | None, tmp_path: Path) -> None:
    if isinstance(labels, Path):
        labels = tmp_path / labels
        if content is not None:
            labels.write_text(content)
    with pytest.raises(ConfigError, match=r"data\.boxes\.labels"):
        _ = BoxConfig(labels=labels).names


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="others=keep has no effect without data.boxes.labels"):
        BoxConfig(others="keep")
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    assert BoxConfig(labels=names).names == ("cat", "dog")
