"""The data sets of the claims: written once, into the cache, from the pinned packages.

Recipes name them as `shards/NAME/...`, where `vlp claims data NAME --out shards/NAME` puts them for `vlp train`; a
claim reads the copy in the cache.
"""

import fcntl
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from data_pipelines import job, sources
from data_pipelines.compose import dice, objects, paste, scenes, wording
from data_pipelines.errors import ConfigError
from data_pipelines.files import cache_dir, write_atomic
from data_pipelines.parquet import read_columns
from data_pipelines.pictures import WriteOptions
from data_pipelines.sources import Source, fashion_mnist
from data_pipelines.sources import clipart as all_clipart
from data_pipelines.sources import emoji as all_emoji
from vlp.claims import clipart, emoji

COMPOSING = (dice, objects, paste, scenes, wording)
RATIO = 100
"""Pictures of the largest class over those of the smallest in fashion's `longtail.txt`."""
LARGEST = 4500


@dataclass(frozen=True, slots=True)
class DataSet:
    """Where the records come from, and what is written beside the shards."""

    source: Source
    finish: Callable[[Path], Mapping[str, str]]
    """Folder of the shards -> files for it, name -> text."""
    made_by: tuple[ModuleType, ...] = ()
    """Modules beside the source's own whose code decides what is written."""


def _emoji_files(folder: Path) -> Mapping[str, str]:
    concepts = all_emoji.load_concepts(all_emoji.Config())
    names: dict[str, list[str]] = {}  # of those that share a name, the aliases of all
    for concept in concepts:
        names.setdefault(concept.name, []).extend(concept.short_names)
    return {
        "labels.txt": "".join(f"{label}\n" for label in emoji.frequent_labels(concepts)),
        "entities.json": json.dumps(names, indent=0, ensure_ascii=False) + "\n",
    }


def _clipart_files(folder: Path) -> Mapping[str, str]:
    labels = clipart.frequent_labels(all_clipart.iter_records(clipart.Config()))
    return {"labels.txt": "".join(f"{label}\n" for label in labels)}


def _fashion_files(folder: Path) -> Mapping[str, str]:
    """Keep-lists of equal length: all classes alike, or falling from the largest to a hundredth of it."""
    keys: dict[str, list[str]] = {name: [] for name in fashion_mnist.CLASSES}
    for path in sorted((folder / "train").glob("*.parquet")):
        for row in read_columns(path, ["key", "labels"]).to_pylist():
            keys[row["labels"][0]].append(row["key"])
    last = len(keys) - 1
    tail = [round(LARGEST * RATIO ** (-place / last)) for place in range(len(keys))]
    even = [(sum(tail) + place) // len(keys) for place in range(len(keys))]
    lists = {"longtail.txt": tail, "balanced.txt": even}
    return {
        name: "".join(
            f"{key}\n" for key in sorted(k for part, n in zip(keys.values(), sizes, strict=True) for k in part[:n])
        )
        for name, sizes in lists.items()
    }


def data_sets() -> dict[str, DataSet]:
    """All data sets of the claims by name."""
    return {
        "claims-emoji": DataSet(Source("claims-emoji", emoji, emoji.Config()), _emoji_files),
        "claims-clipart": DataSet(Source("claims-clipart", clipart, clipart.Config()), _clipart_files),
        "claims-fashion": DataSet(sources.resolve("fashion-mnist"), _fashion_files),
        "claims-detection": DataSet(sources.resolve("detection-starter"), lambda folder: {}, COMPOSING),
    }


def find(name: str) -> DataSet:
    """The data set of a name. Raises ConfigError."""
    known = data_sets()
    if name not in known:
        raise ConfigError(f"data set {name!r} of the claims does not exist; there are {', '.join(known)}")
    return known[name]


def write(name: str, out: Path, *, overwrite: bool = False, progress: bool = True) -> dict[str, Any]:
    """Shards and files of a data set below `out`; does nothing when they are there already. Returns job's summary."""
    found = find(name)
    summary = job.shard(found.source, out, _options(found), overwrite=overwrite, progress=progress)
    for file, text in found.finish(out).items():
        if not (out / file).is_file() or (out / file).read_text(encoding="utf-8") != text:
            write_atomic(out / file, lambda stream, text=text: stream.write(text.encode()))  # type: ignore[misc]
    return summary


def _options(found: DataSet) -> WriteOptions:
    return WriteOptions(**getattr(found.source.module, "WRITE", {}))


def identity(name: str) -> str:
    """Short digest of everything the data set depends on."""
    found = find(name)
    parts = [job.identify(found.source), _options(found).recorded()]
    code = [Path(module.__file__ or "").read_bytes() for module in (found.source.module, *found.made_by)]
    code.append(Path(__file__).read_bytes())
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode() + b"".join(code)).hexdigest()[:16]


def prepared(name: str, progress: bool = True) -> Path:
    """The data set's folder in the cache, written if it is not there. Two that ask at once wait for each other."""
    out = cache_dir() / "claims" / "data" / f"{name}-{identity(name)}"
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write(name, out, overwrite=True, progress=progress)
    return out
