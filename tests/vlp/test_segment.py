"""Zero-shot segmentation: classes and prompts, windows over pictures of any shape, maps, the command."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from data_pipelines.errors import BadSample, ConfigError
from data_pipelines.preprocess import ImageConfig, load_image
from vlp.bundle import Bundle, save_bundle
from vlp.cli import cli
from vlp.commands.segment import listed
from vlp.detection import segment as dense
from vlp.detection.modality import edges, render
from vlp.infer import encode_texts
from vlp.testing import micro_bundle, picture


def encoded(pixels: Any, form: str = "PNG", **options: Any) -> bytes:
    """Bytes of a picture from an array."""
    stream = io.BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(stream, format=form, **options)
    return stream.getvalue()


def test_classes_by_hand() -> None:
    """Two background texts are one class, the first; labels keep their order, each once; synonyms share a prototype."""
    found = dense.classes_of(["bear", "apple", "bear"], ["sky", "grass", "sky"])
    assert found.names == ("background", "bear", "apple")
    assert found.texts == (("sky",), ("grass",), ("bear",), ("apple",))
    assert found.owners == (0, 0, 1, 2)
    found = dense.classes_of({"fruit": ["apple", "pear"], "bear": []})
    assert (found.names, found.texts, found.owners) == (("fruit", "bear"), (("apple", "pear"), ("bear",)), (0, 1))


@pytest.mark.parametrize(
    ("labels", "background", "named"),
    [
        ([], ["sky"], "labels: none is given"),
        (["a", " "], [], "' ' is empty"),
        (["sky", "a"], ["sky"], "'sky' is a label and a background text"),
        (["background"], ["sky"], "may not be called 'background'"),
    ],
)
def test_classes_that_make_no_sense_are_refused(labels: list[str], background: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        dense.classes_of(labels, background)


def test_prototypes_are_means_over_templates_and_synonyms() -> None:
    bundle = micro_bundle()
    found = dense.prototypes(bundle, dense.classes_of({"cat": ["cat", "red cat"], "tree": []}), ["{}", "a {}"])
    both = F.normalize(encode_texts(bundle, ["cat", "a cat", "red cat", "a red cat"]).mean(dim=0), dim=0)
    torch.testing.assert_close(found[0], both)
    torch.testing.assert_close(found[1], F.normalize(encode_texts(bundle, ["tree", "a tree"]).mean(dim=0), dim=0))


def test_windows_by_hand() -> None:
    """A picture twice as wide as high, 4 cells a side: 4 x 8 cells, windows at 0, 2 and 4; padded, it takes 2 x 4."""
    assert dense.covered((100, 200), "shortest", 4) == (4, 8)
    assert dense.covered((100, 200), "longest", 4) == (2, 4)
    assert dense.covered((100, 200), "squash", 4) == (4, 4)
    assert dense.covered((1, 1000), "longest", 4) == (1, 4)
    assert dense.starts(8, 4) == [0, 2, 4]
    assert dense.starts(7, 4) == [0, 2, 3]
    assert dense.starts(4, 4) == dense.starts(2, 4) == [0]
    assert dense.starts(3, 1) == [0, 1, 2]


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(32, 32), (32, 80), (90, 32), (33, 71), (400, 20)])
def test_every_place_of_a_picture_gets_its_own_colours(
    resize: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the mean colour of every cell in place of a tower's features, the map is the picture itself, made small.

    Red grows to the right, green downwards, blue says the rest, so that a cell in a wrong place would show.
    """

    def colours(bundle: Bundle, pixels_NCSS: Tensor, image: ImageConfig, modality: str = "rgb") -> Tensor:
        return F.normalize(F.adaptive_avg_pool2d(pixels_NCSS.float() + 1.0, 4), dim=1)

    monkeypatch.setattr(dense, "dense_embeddings", colours)
    height, width = size
    down, right = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    pixels = (torch.stack([right, down, 1 - 0.5 * (right + down)]) * 255).round().to(torch.uint8)
    image = ImageConfig(size=32, resize=resize, ground=0, interpolation="bilinear")
    found = dense.picture_embeddings(micro_bundle(), pixels, size, image)
    rows, columns = dense.covered(size, resize, 4)
    assert found.shape[1:] == (rows, columns)
    expected = F.normalize(F.adaptive_avg_pool2d(pixels.float() + 1.0, (rows, columns)), dim=0)
    if min(rows, columns) > 1:  # a picture thinner than half a cell is stretched to fill one, beside the ground
        assert (found - expected).abs().max() < 0.06


def test_a_square_picture_is_seen_as_ever() -> None:
    bundle = micro_bundle()
    data = picture(3, (16, 16), "PNG")
    pixels = load_image(data, bundle.image)
    found = dense.picture_embeddings(bundle, pixels, (16, 16), bundle.image)
    torch.testing.assert_close(found, dense.dense_embeddings(bundle, pixels[None], bundle.image)[0], atol=1e-5, rtol=0)


def test_the_best_prototype_by_hand_and_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cells, on the axes: halfway between them both labels are equally near, and beyond that the nearer one wins.

    Four pixels over two cells lie at -0.25, 0.25, 0.75, 1.25 of the way, so that cosines are 1, 3/4, 1/4, 0 and back.
    """
    features = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    place, cosine = dense.best_prototype(features, torch.eye(2), (1, 4))
    assert place.tolist() == [[0, 0, 1, 1]]
    torch.testing.assert_close(cosine, torch.tensor([[1.0, 0.75, 0.75, 1.0]]))
    prototypes = F.normalize(torch.randn(1000, 8), dim=1)
    features = F.normalize(torch.randn(8, 3, 5), dim=0)
    whole = dense.best_prototype(features, prototypes, (20, 30))
    monkeypatch.setattr(dense, "MOST_VALUES", 7 * 600)
    parts = dense.best_prototype(features, prototypes, (20, 30))
    assert torch.equal(whole[0], parts[0])
    torch.testing.assert_close(whole[1], parts[1])


@pytest.mark.parametrize("kind", ["grey", "rgba", "turned", "palette", "wide"])
def test_pictures_of_all_kinds_get_a_map_of_their_own_size(kind: str) -> None:
    generator = np.random.default_rng(0)
    size = (20, 90) if kind == "wide" else (24, 40)
    pixels = generator.integers(0, 256, (*size, 4 if kind == "rgba" else 3))
    data = encoded(pixels[..., 0] if kind == "grey" else pixels)
    if kind == "turned":  # by EXIF: seen, it is higher than wide
        exif = Image.Exif()
        exif[0x0112] = 6
        data, size = encoded(pixels, "JPEG", exif=exif), (40, 24)
    if kind == "palette":
        stream = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).convert("P").save(stream, format="GIF")
        data = stream.getvalue()
    bundle, classes = micro_bundle(), dense.classes_of(["cat", "tree"], ["sky"])
    found = dense.segment(bundle, data, classes, dense.prototypes(bundle, classes, ["{}"]))
    assert found.label_HW.shape == found.cosine_HW.shape == size
    assert set(found.label_HW.unique().tolist()) <= {0, 1, 2}
    assert sum(found.shares().values()) == pytest.approx(1.0)


def test_what_cannot_be_segmented_is_named() -> None:
    bundle, classes = micro_bundle(), dense.classes_of(["cat"])
    head = dense.prototypes(bundle, classes, ["{}"])
    with pytest.raises(BadSample, match="image"):
        dense.segment(bundle, b"no picture", classes, head)
    with pytest.raises(ConfigError, match="no pictures of 24 x 24 pixels"):
        dense.segment(bundle, picture(), classes, head, size=24)
    with pytest.raises(ConfigError, match="size=0: give a side"):
        dense.segment(bundle, picture(), classes, head, size=0)


def test_renderings_by_hand() -> None:
    """A step from black to white: the two columns beside it answer 4, which becomes 1; even ground answers 0."""
    step = torch.zeros(1, 1, 4, 6)
    step[..., 3:] = 1.0
    assert edges(step)[0, 0].tolist() == [[0.0, 0.0, 1.0, 1.0, 0.0, 0.0]] * 4
    assert torch.equal(edges(step.transpose(2, 3)), edges(step).transpose(2, 3))
    image = ImageConfig(size=4, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    unit = torch.rand(2, 3, 4, 4)
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (image.mean, image.std))
    pixels = ((unit - mean) / deviation).contiguous(memory_format=torch.channels_last)
    assert render(pixels, "rgb", image) is pixels
    grey = render(pixels, "grey", image)
    luma = 0.299 * unit[:, 0] + 0.587 * unit[:, 1] + 0.114 * unit[:, 2]
    for channel in range(3):
        torch.testing.assert_close(grey[:, channel] * image.std[channel] + image.mean[channel], luma)
    drawn = render(pixels, "edges", image)
    assert drawn.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(drawn[:, 0] * 0.2 + 0.5, edges(luma[:, None])[:, 0])
    one = torch.rand(1, 5, 4, 4)
    torch.testing.assert_close(render(one, "grey", None), one.mean(dim=1, keepdim=True).expand(-1, 5, -1, -1))
    assert render(one.bfloat16(), "edges", None).dtype == torch.bfloat16


def test_the_command_writes_a_map(tmp_path: Path) -> None:
    save_bundle(micro_bundle(), tmp_path / "bundle")
    (tmp_path / "picture.png").write_bytes(picture(0, (50, 30), "PNG"))
    out = tmp_path / "map.png"
    words = ["segment", str(tmp_path / "bundle"), str(tmp_path / "picture.png"), "--labels", "cat, tree,cat", "--json"]
    done = CliRunner().invoke(cli, [*words, "--background", "sky,a wall", "--out", str(out), "--modality", "edges"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["names"] == ["background", "cat", "tree"]
    assert sum(found["shares"].values()) == pytest.approx(1.0)
    with Image.open(out) as drawn:
        assert (drawn.mode, drawn.size) == ("P", (found["width"], found["height"]))
        values = np.bincount(np.asarray(drawn).ravel(), minlength=3) / np.asarray(drawn).size
        assert drawn.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    assert values.tolist() == pytest.approx([found["shares"][name] for name in found["names"]])
    for wrong, named in (
        (["--labels", " , "], "labels: none is given"),
        (["--templates", "no braces"], "--templates 'no braces'"),
        (["--size", "40"], "no pictures of 40 x 40"),
    ):
        done = CliRunner().invoke(cli, [*words, *wrong])
        assert done.exit_code == 1
        assert named in done.output
    words[2] = str(tmp_path / "none.png")
    assert "none.png cannot be read" in CliRunner().invoke(cli, words).output


def test_more_labels_than_a_palette_holds(tmp_path: Path) -> None:
    """10,000 labels, of which the last wins: 16 bits a pixel."""
    names = tuple(f"label {number}" for number in range(10_000))
    features = F.normalize(torch.randn(4, 2, 2), dim=0)
    head = F.normalize(torch.randn(10_000, 4), dim=1)
    place, cosine = dense.best_prototype(features, head, (8, 8))
    place[0, 0] = 9_999
    found = dense.Segmentation(names, place.to(torch.int32), cosine)
    dense.save_map(found, tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as drawn:
        assert np.asarray(drawn).tolist() == place.tolist()


def test_labels_come_from_a_text_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("red apple\n\n bear \n")
    assert listed(str(tmp_path / "labels.txt"), "--labels") == ["red apple", "bear"]
    assert listed("red apple, bear,,", "--labels") == ["red apple", "bear"]
    assert listed("bear", "--labels") == ["bear"]
    assert listed("", "--background") == []
    (tmp_path / "labels.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"--labels .*labels\.txt: cannot be read"):
        listed(str(tmp_path / "labels.txt"), "--labels")
