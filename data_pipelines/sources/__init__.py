"""One module per source of records: `Config` and `iter_records(config)`. The module name is the source's name.

A module whose Config has a `path` reads files of the user's; any other is a data set with a name. A module may also
have `count(config)` and `fingerprint(config)` (both without reading content), `PACKAGES`, and `WRITE`, its own options.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from data_pipelines.config import StrictModel
from data_pipelines.errors import ConfigError, PipelineError
from data_pipelines.packages import Package


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
    return {info.name: importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)}


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
        settings["path"] = Path(source)
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
    path = Path(source)
    if path.is_dir():
        return "folder"
    readers = sorted(name for name, module in modules.items() if _reads_path(module))
    if path.exists():
        raise PipelineError(
            f"{source}: no kind reads such a file; kinds are {', '.join(readers)}, and folder takes a folder"
        )
    named = sorted(set(modules) - set(readers))
    raise PipelineError(f"{source}: no such path, and no data set has this name; data sets are {', '.join(named)}")
