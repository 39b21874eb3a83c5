"""Pictures stored as .npy: from a folder through shards, verification and re-sharding to batches."""

import gc
import io
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

from data_pipelines.arrays import array_size, load_array, open_array, read_header
from data_pipelines.augment import AugmentConfig, augment
from data_pipelines.cli import shard
from data_pipelines.errors import BadSample, ConfigError
from data_pipelines.loader import DataConfig, make_loader
from data_pipelines.preprocess import ImageConfig, decode, load_image, normalise
from data_pipelines.reader import open_shards
from data_pipelines.records import load_manifest
from data_pipelines.testing import draw
from data_pipelines.tokens import learn_tokenizer
from data_pipelines.verify import verify

BANDS = 13


def npy(array: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def bands(seed: int = 0, shape: tuple[int, ...] = (BANDS, 16, 20), kind: str = "uint16") -> NDArray[Any]:
    values = np.random.default_rng(seed).integers(0, 250 if kind == "uint8" else 10_000, shape)
    return values.astype(kind)


def spectral(**options: Any) -> ImageConfig:
    chosen = {"size": 8, "channels": BANDS, "values": "float32", "scale": 1, "mean": (5000,) * BANDS}
    return ImageConfig(**{**chosen, "std": (2500,) * BANDS, **options})


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["uint8", "uint16", ">u2", "float32"])
def test_arrays_are_read_as_they_were_saved(kind: str, order: Any) -> None:
    array = np.asarray(bands(), dtype=kind, order=order)
    assert np.array_equal(open_array(npy(array)), array)
    pixels, size = decode(npy(array), spectral())
    assert size == (16, 20)
    assert pixels.dtype == torch.float32
    assert np.array_equal(pixels.numpy(), array.astype(np.float32))
    hwc, _ = decode(npy(array.transpose(1, 2, 0)), spectral(layout="hwc"))
    assert torch.equal(hwc, pixels)


def test_sizes_do_not_depend_on_the_axes_order() -> None:
    assert array_size((13, 16, 20)) == array_size((16, 20, 13)) == array_size((16, 20)) == (20, 16)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy(bands())[:-1], "truncated_image"),
        (npy(bands()) + b"x", "truncated_image"),
        (b"\x93NUMPY\x01\x00", "not_an_array"),
        (npy(bands().astype("float64")), "not_an_array"),
        (npy(bands(shape=(2, 3, 4, 5))), "not_an_array"),
        (npy(np.array([{"a": 1}], dtype=object)), "not_an_array"),
        (npy(bands(shape=(2, 0, 5))), "empty_image"),
        (npy(bands(shape=(2, 3, 5))).replace(b"2, 3, 5", b"-2,-3,5"), "not_an_array"),
        (npy(bands(shape=(2, 400, 500))), "too_many_pixels"),
        (npy(np.full((BANDS, 8, 8), np.nan, np.float32)), "not_finite"),
        (npy(bands(shape=(12, 8, 8))), "wrong_channels"),
        (draw((8, 8)), "wrong_channels"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        load_image(data, spectral(), max_pixels=100_000)
    assert caught.value.reason == reason


@pytest.mark.filterwarnings("ignore")  # NumPy wonders about some of these headers
def test_a_damaged_header_is_a_bad_sample_whatever_it_says() -> None:
    whole = npy(bands(shape=(2, 4, 4)))
    draws = np.random.default_rng(0)
    reasons = set()
    for _ in range(3000):
        data = bytearray(whole)
        for place in draws.integers(6, 128, draws.integers(1, 4)):
            data[place] = draws.choice(list(b"()[]{},:'-0123456789TF<>|uf\n #\xff"))
        try:
            assert open_array(bytes(data)).shape
        except BadSample as error:
            reasons.add(error.reason)
    assert reasons >= {"not_an_array", "truncated_image"}


def test_uint8_batches_take_uint8_arrays_alone() -> None:
    config = ImageConfig(size=8, channels=2, mean=(0.5, 0.5), std=(0.25, 0.25))
    array = bands(shape=(2, 8, 8), kind="uint8")
    assert np.array_equal(load_image(npy(array), config).numpy(), array)
    with pytest.raises(BadSample, match=r"wrong_values: uint16.*values=float32"):
        load_image(npy(array.astype("uint16")), config)


def test_an_rgb_array_is_the_same_picture_as_its_png() -> None:
    picture = Image.open(io.BytesIO(png := draw((20, 16))))
    array = npy(np.asarray(picture.convert("RGB")))
    assert torch.equal(load_image(array, ImageConfig(size=8, layout="hwc")), load_image(png, ImageConfig(size=8)))


def test_one_channel_is_grey_as_pillow_makes_it() -> None:
    png = draw((8, 8))
    grey = np.asarray(Image.open(io.BytesIO(png)).convert("RGB").convert("L"))
    config = ImageConfig(size=8, channels=1, mean=(0.5,), std=(0.5,))
    assert np.array_equal(load_image(png, config)[0].numpy(), grey)
    assert torch.equal(load_image(npy(grey), config), load_image(png, config))


def test_means_are_in_the_units_of_the_data() -> None:
    """(7500 - 5000) / 2500 = 1 with scale 1; and 0.75 of scale 10,000 against 0.5 +- 0.25 is 1 as well."""
    batch = torch.full((1, BANDS, 2, 2), 7500.0)
    shares = spectral(scale=10_000, mean=(0.5,) * BANDS, std=(0.25,) * BANDS)
    for config in (spectral(), shares):
        torch.testing.assert_close(normalise(batch, config), torch.ones(1, BANDS, 2, 2))


def test_settings_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"image.mean has 3 numbers, image.channels=2"):
        ImageConfig(channels=2)
    with pytest.raises(ConfigError, match=r"augment.contrast=0.1 needs RGB.*channels=13.*leave out contrast, hue"):
        DataConfig(train=str(tmp_path), image=spectral(), augment=AugmentConfig(contrast=0.1, hue=0.1, flip=0.5))


def test_geometry_moves_all_bands_alike_and_keeps_the_values() -> None:
    """A mirrored float batch is the mirror image up to interpolation, and nothing is cut to 0..255."""
    pixels = torch.from_numpy(bands(shape=(4, BANDS, 16, 16)).astype(np.float32))
    config = AugmentConfig(flip=1.0, ground=0)
    out = augment(pixels, config, np.random.default_rng(0), 4, range(4))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, pixels.flip(-1), rtol=1e-3, atol=0.5)
    small = augment(pixels, AugmentConfig(), np.random.default_rng(0), 4, range(4), side=8)
    assert small.shape == (4, BANDS, 8, 8)


def run_shard(*arguments: str) -> None:
    outcome = CliRunner().invoke(shard, arguments)
    assert outcome.exit_code == 0, outcome.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures of 13 bands with captions; one of them damaged; an array beside a JPEG, which is no picture."""
    source = tmp_path / "scenes"
    source.mkdir()
    for number in range(12):
        (source / f"{number:02}.npy").write_bytes(npy(bands(number))[: -1 if number == 5 else None])
        (source / f"{number:02}.txt").write_text(f"scene {number}")
    (source / "photo.jpg").write_bytes(draw((20, 20), format="JPEG"))
    (source / "photo.npy").write_bytes(npy(np.arange(4)))
    (source / "photo.txt").write_text("a photo")
    return source


def test_a_folder_of_arrays_becomes_shards_and_batches(folder: Path, tmp_path: Path) -> None:
    run_shard(str(folder), "--out", str(tmp_path / "shards"), "--number_sample_per_shard", "8")
    found = verify(tmp_path / "shards", progress=False)
    assert found["faults"] == []
    assert found["samples"] == 12
    shards = open_shards(tmp_path / "shards")
    assert shards[0].read(0).image == npy(bands(0))
    run_shard(str(tmp_path / "shards"), "--out", str(tmp_path / "again"), "--number_sample_per_shard", "100")
    (again,) = open_shards(tmp_path / "again")
    assert again.read(1).image == npy(bands(1))
    (tmp_path / "again" / "00000.index.npy").unlink()  # found by walking the tar, too
    assert open_shards(tmp_path / "again")[0].read(1).image == npy(bands(1))
    config = DataConfig(train=str(tmp_path / "again"), batch_size=11, image=spectral(), max_bad_share=0.2)
    batch = next(iter(make_loader(config, learn_tokenizer(["scene"], 300, 8), seed=0)))
    assert batch.pixels.shape == (11, BANDS, 8, 8)
    assert batch.pixels.dtype == torch.float32


def test_arrays_are_not_resized_or_encoded_in_silence(folder: Path, tmp_path: Path) -> None:
    (folder / "05.npy").write_bytes(npy(bands(5)))
    run_shard(str(folder), "--out", str(tmp_path / "out"), "--image_size", "8", "--resize_mode", "border")
    assert load_manifest(tmp_path / "out").failures == {"array_kept_as_is": 12}


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads that take turns, and a collector that comes, all the time."""
    turn, threshold = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(20)
    yield
    sys.setswitchinterval(turn)
    gc.set_threshold(*threshold)


@pytest.mark.usefixtures("hasty")
def test_threads_read_headers_at_once() -> None:
    """On Python below 3.12 parsing code in two threads ends in a SystemError now and then."""
    data = npy(np.zeros((3, 4, 4), np.float32))

    def read(_: int) -> tuple[int, ...]:
        assert load_array(io.BytesIO(data)).shape == (3, 4, 4)
        return read_header(data)[0]

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(read, range(2000))) == {(3, 4, 4)}
