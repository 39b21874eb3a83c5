"""`vlp detect`: what it prints and draws, pictures that fail alone, and what it says about wrong arguments."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from vlp.bundle import save_bundle
from vlp.cli import cli
from vlp.detection.infer import Detection
from vlp.detection.overlay import draw_detections
from vlp.testing import micro_bundle, micro_detector, picture


def test_overlay_draws_box_and_tag() -> None:
    """The box's line has one colour, the picture itself is as before, and nothing is written beyond its sides."""
    image = Image.new("RGB", (200, 120), (128, 128, 128))
    drawn = draw_detections(
        image, [Detection("apple", 0.9, (50, 40, 150, 100)), Detection("bear", 0.3, (0, 0, 200, 120))]
    )
    assert drawn.size == image.size
    assert image.getpixel((50, 70)) == (128, 128, 128)
    left, right = drawn.getpixel((50, 70)), drawn.getpixel((150, 70))
    assert left == right != (128, 128, 128)
    assert drawn.getpixel((100, 80)) == (128, 128, 128)
    assert draw_detections(image.convert("L"), []).mode == "RGB"
    tiny = draw_detections(Image.new("RGB", (3, 3)), [Detection("a very long name", 0.5, (0, 0, 3, 3))])
    assert tiny.size == (3, 3)


def vlp(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["detect", *arguments])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_bundle(micro_detector(), tmp_path_factory.mktemp("detect") / "bundle"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    path.write_bytes(picture(0, (120, 90)))
    return path


def test_command_finds_and_draws(bundle: str, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "found" / "overlay.png"
    result = vlp(
        bundle,
        str(photo),
        "--labels",
        "red circle,bear",
        "--threshold",
        "0",
        "--top-k",
        "3",
        "--out",
        str(out),
        "--json",
    )
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["images"]
    assert {key: row[key] for key in ("path", "width", "height")} == {"path": str(photo), "width": 120, "height": 90}
    assert len(row["detections"]) == 3
    for item in row["detections"]:
        assert item["label"] in ("red circle", "bear")
        x0, y0, x1, y1 = item["box"]
        assert 0 <= x0 < x1 <= 120
        assert 0 <= y0 < y1 <= 90
    with Image.open(out) as drawn:
        assert drawn.size == (120, 90)
    told = vlp(bundle, str(photo), "--labels", "bear", "--threshold", "0", "--top-k", "1").stdout
    assert "120 x 90, 1 found" in told
    assert "nothing found" in vlp(bundle, str(photo), "--labels", "bear", "--threshold", "0.999").stdout


def test_command_takes_labels_from_a_file_and_finds_crops(bundle: str, photo: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("bear, brown\n\ncat\n")
    result = vlp(bundle, str(photo), "--labels", str(names), "--threshold", "0", "--json")
    labels = {item["label"] for item in json.loads(result.stdout)["images"][0]["detections"]}
    assert labels == {"bear, brown", "cat"}
    result = vlp(bundle, str(photo), "--find", "a tall tree", "--top-k", "2", "--json")
    found = json.loads(result.stdout)["images"][0]["detections"]
    assert 1 <= len(found) <= 2
    assert found[0]["label"] == "a tall tree"


def test_a_bad_picture_fails_alone(bundle: str, photo: Path, tmp_path: Path) -> None:
    bad, out = tmp_path / "bad.jpg", tmp_path / "drawn"
    bad.write_bytes(b"\xff\xd8 no picture")
    missing = tmp_path / "missing.png"
    result = vlp(
        bundle, str(bad), str(photo), str(missing), str(photo), "--labels", "bear", "--out", str(out), "--json"
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["images"]
    assert ["error" in row for row in rows] == [True, False, True, False]
    assert "not_an_image" in rows[0]["error"]
    assert "unreadable" in rows[2]["error"]
    assert sorted(path.name for path in out.iterdir()) == ["photo-2.png", "photo.png"]
    result = vlp(bundle, str(bad), str(missing), "--labels", "bear", "--json")
    assert result.exit_code == 1
    assert "error" in json.loads(result.stdout.splitlines()[0])["images"][1]
    assert "none of the pictures could be used" in result.stderr


def test_an_array_is_searched_but_not_drawn(bundle: str, photo: Path, tmp_path: Path) -> None:
    array = tmp_path / "bands.npy"
    np.save(array, np.zeros((3, 30, 40), np.uint8))
    result = vlp(bundle, str(array), str(photo), "--labels", "bear", "--threshold", "0", "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert "40 x 30" in result.stdout
    assert "not drawn: " in result.stdout
    assert (tmp_path / "out" / "photo.png").is_file()
    blocked = vlp(bundle, str(photo), "--labels", "bear", "--out", str(photo / "below.png"))
    assert "cannot be written" in blocked.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --labels"),
        (["--labels", "a", "--find", "b"], "give either --labels"),
        (["--labels", " , "], "labels: none are given"),
        (["--labels", "a", "--set", "nms"], "expected key=value"),
        (["--labels", "a", "--set", "nm=0.4"], "nms"),
        (["--labels", "a", "--set", "top_k=4", "--top-k", "3"], "given twice"),
        (["--labels", "a", "--threshold", "1.5"], "threshold"),
        (["--labels", "a", "--set", "ensemble=false", "--set", "base=0.5"], "base=0.5 has no effect"),
        (["--find", "a", "--threshold", "0.5"], "no effect with --find"),
        (["--labels", "a", "--out", "overlay.xyz"], "name a picture"),
    ],
)
def test_command_says_what_is_wrong(bundle: str, photo: Path, arguments: list[str], message: str) -> None:
    result = vlp(bundle, str(photo), *arguments)
    assert result.exit_code == 1, result.output
    assert message in result.stderr


def test_command_wants_a_detector(photo: Path, tmp_path: Path) -> None:
    plain = save_bundle(micro_bundle(), tmp_path / "plain")
    result = vlp(str(plain), str(photo), "--labels", "a")
    assert result.exit_code == 1
    assert "detection/finetune" in result.stderr
