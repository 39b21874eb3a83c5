"""Fashion-MNIST whole, from a pinned Debian package: 70,000 grey photographs of clothing, 28 x 28, ten classes.

Splits: `train` 50,000, `val` the last 10,000 of the training part, `test` 10,000. Captions come from templates over
the class names, so that many pictures share a caption.
"""

from collections.abc import Iterator
from pathlib import Path

from data_pipelines.config import StrictModel
from data_pipelines.files import cache_dir
from data_pipelines.packages import Package, fetch_package, read_members
from data_pipelines.records import Record
from data_pipelines.sources import idx

PACKAGES = {
    "pictures": Package(
        "deb",
        "dataset-fashion-mnist",
        "0.0~git20200523.55506a9-1",
        "dataset-fashion-mnist_0.0.deb",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        "MIT",
        "Zalando SE",
    ),
}
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
TEMPLATES = ("a photo of a {label}", "a grey photo of a {label}", "a {label} on a black ground", "{label}")
VAL = 10_000
FOLDER = "usr/share/datasets/fashion-mnist/"


class Config(StrictModel):
    """The caption templates, and where the package lies."""

    templates: tuple[str, ...] = TEMPLATES
    dir: Path | None = None


def iter_records(config: Config) -> Iterator[Record]:
    """All records, split by split."""
    archive = fetch_package(PACKAGES["pictures"], config.dir or cache_dir() / "packages")
    files = {
        name.removeprefix(FOLDER): idx.parse(idx.unpack(content, name), name)
        for name, content in read_members(archive, lambda name: name.startswith(FOLDER) and name.endswith(".gz"))
    }
    train, classes = (files[f"train-{kind}-ubyte.gz"] for kind in ("images-idx3", "labels-idx1"))
    test, test_classes = (files[f"t10k-{kind}-ubyte.gz"] for kind in ("images-idx3", "labels-idx1"))
    parts = {
        "train": (train[:-VAL], classes[:-VAL]),
        "val": (train[-VAL:], classes[-VAL:]),
        "test": (test, test_classes),
    }

    def captions(label: str) -> tuple[str, ...]:
        return tuple(template.replace("{label}", label).replace("a ankle", "an ankle") for template in config.templates)

    for split, (pictures, labels) in parts.items():
        name = f"{PACKAGES['pictures'].spec}/{split}"
        yield from idx.records(pictures, labels, CLASSES, captions, name, "fashion-mnist", split)


def count(config: Config) -> int:
    """Number of records."""
    return 70_000
