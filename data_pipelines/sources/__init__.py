"""One module per source of records: `Config` and `iter_records(config)`. The module name is the source's name, with -
for _.

A module whose Config has a `path` reads files of the user's; any other is a data set with a name. A module may also
have `count(config)` and `fingerprint(config)` (both without reading content), `PACKAGES`, and `WRITE`, its own options.
"""

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError, PipelineError
from data_pipelines.packages import Package
from data_pipelines.places import Place, place
from data_pipelines.sources import folder, idx, table


@dataclass(frozen=True, slots=True)
class Source:
    """A source module with its configuration."""

    name: str
    module: ModuleType
    config: StrictModel

    @property
    def packages(self) -> tuple[Package, ...]:
        """The pinned packages that the records are read from; empty for the user's own files."""
        found = getattr(self.module, "PACKAGES", ())
        return tuple(found.values() if isinstance(found, Mapping) else found)


def names() -> dict[str, ModuleType]:
    """All source modules by name."""
    found = (info.name for info in pkgutil.iter_modules(__path__))
    return {name.replace("_", "-"): importlib.import_module(f"{__name__}.{name}") for name in found}


def resolve(source: str, kind: str | None = None, **settings: Any) -> Source:
    """The source that a name (`starter`) or a path stands for; `kind` overrules the recognition of a path.

    `settings` go to the module's Config. Raises PipelineError for what does not exist, listing what does.
    """
    modules = names()
    if kind is not None and kind not in modules:
        raise PipelineError(f"kind {kind!r} does not exist; kinds are {', '.join(sorted(modules))}")
    if kind is None:
        kind = source if source in modules and not _reads_path(modules[source]) else _recognise(source, modules)
    module = modules[kind]
    if _reads_path(module):
        # `::` joins several files, `://` is a URL: neither is a path yet.
        settings["path"] = source if "::" in source or "://" in source else Path(source)
    elif source != kind:
        raise PipelineError(
            f"kind {kind!r} is a data set with a name, not a reader of {source!r}: write `{kind}` alone"
        )
    if unknown := sorted(set(settings) - set(module.Config.model_fields)):
        allowed = ", ".join(sorted(set(module.Config.model_fields) - {"path"}))
        raise ConfigError(f"{', '.join(unknown)}: source {kind!r} has no such option; it has {allowed}")
    return Source(kind, module, module.Config(**settings))


def _reads_path(module: ModuleType) -> bool:
    return "path" in module.Config.model_fields


def _recognise(source: str, modules: Mapping[str, ModuleType]) -> str:
    """The kind of a path or URL by its name, and by what a folder holds; several joined by `::` are of one kind."""
    where = place(source.partition("::")[0])
    if not where.exists() and set("*{") & set(where.name):
        return "tars"
    readers = sorted(name for name, module in modules.items() if _reads_path(module))
    if not where.exists():
        named = sorted(set(modules) - set(readers))
        raise PipelineError(f"{source}: no such path, and no data set has this name; data sets are {', '.join(named)}")
    if where.is_dir():
        return _kind_of_folder(where)
    if where.name.endswith(".tar"):
        return "tars"
    if idx.is_idx(where.name):
        return "idx"
    suffix, packed = table.format_of(where.name)
    if suffix == ".json" and not packed:
        with where.open() as stream:  # a table of rows is a list
            return "coco" if stream.read(1 << 10).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") else "table"
    if suffix:
        return "table"
    raise PipelineError(
        f"{source}: no kind reads such a file; kinds are {', '.join(readers)}, and folder takes a folder"
    )


def _kind_of_folder(where: Place) -> str:
    children = where.children()
    folders = (child for child in children if not child.name.lower().endswith(folder.READ) and child.is_dir())
    if _has_tar(children) or any(_has_tar(child.children()) for child in folders):
        return "tars"
    if any(idx.is_idx(child.name) for child in children):
        return "idx"
    suffixes = {table.format_of(child.name)[0] for child in children}
    # A text beside a picture is its caption; a table without such texts speaks for the pictures around it.
    if suffixes & {".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"} and not suffixes & {".txt", ".json"}:
        return "table"
    if not where.local:
        raise PipelineError(f"{where}: holds neither .tar nor tables; other kinds are read from a local disk")
    return "folder"


def _has_tar(children: Iterable[Place]) -> bool:
    return any(child.name.endswith(".tar") for child in children)
