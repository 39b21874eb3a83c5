"""From folders on the command line to models: what `vlp serve` loads, and loads again."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipelines.errors import PipelineError
from server.settings import Limits

if TYPE_CHECKING:
    from server.index import IndexInfo
    from server.model import Loaded
    from server.registry import Source


def named(given: Sequence[str]) -> list[tuple[str, Path]]:
    """(name, folder) of arguments like `runs/demo` or `cats=runs/demo`; the name is empty when the bundle decides."""
    pairs = []
    for argument in given:
        name, equals, folder = argument.partition("=")
        if equals and "/" not in name and not Path(argument).exists():
            if not name or not folder:
                raise PipelineError(f"{argument!r}: a bundle is given as FOLDER or NAME=FOLDER")
            pairs.append((name, Path(folder)))
        else:
            pairs.append(("", Path(argument)))
    return pairs


def load_sources(given: Sequence[str], guard: Path | None, device: str, backend: str, limits: Limits) -> "list[Source]":
    """All models in memory; the guard is the first's. Raises PipelineError for a bad folder, or two of one name."""
    from server.registry import Source

    sources: list[Source] = []
    for number, (name, folder) in enumerate(named(given)):
        watching = guard if number == 0 else None

        def load(name: str = name, folder: Path = folder, watching: Path | None = watching) -> "Loaded":
            return load_model(name, folder, watching, device, backend, limits)

        loaded = load()
        # loaded again under the name it is known by, whatever the new bundle calls itself
        known = loaded.engine.name
        if any(source.loaded.engine.name == known for source in sources):
            raise PipelineError(f"two bundles are named {known!r}: tell them apart with NAME={folder}")
        sources.append(Source(loaded, lambda load=load, known=known: load(name=known)))  # type: ignore[misc]
    return sources


def load_model(name: str, folder: Path, guard: Path | None, device: str, backend: str, limits: Limits) -> "Loaded":
    """One model with its guard. Raises PipelineError."""
    from server.backends import choose, plain_towers
    from server.engine import BundleEngine
    from server.guarding import Guarding
    from server.model import Loaded
    from vlp.backdoor.guard import Guard, load_guard
    from vlp.bundle import load_bundle
    from vlp.distributed import pick_device
    from vlp.embed import weights_digest

    bundle = load_bundle(folder, pick_device(device))
    digest = weights_digest(folder)
    if guard is not None and backend not in ("auto", "torch"):
        raise PipelineError(f"--guard looks into the model as torch runs it: --backend {backend} cannot be guarded")
    # a lean tower runs its last block for the pooled token alone, and the guard watches all of what that block gives
    towers = plain_towers(bundle) if guard is not None else choose(bundle, backend)
    engine = BundleEngine(bundle, limits, name, towers)
    guarding = Guarding(Guard(*load_guard(guard, digest), bundle)) if guard is not None else None
    return Loaded(engine, guarding, digest, folder)


def check_same_model(info: "IndexInfo", sources: "Sequence[Source]") -> None:
    """Raises PipelineError when no served model made the vectors of an index: distances would mean nothing."""
    for source in sources:
        loaded = source.loaded
        if info.dim == loaded.engine.dim and info.weights_sha256 in ("", loaded.digest):
            return
    served = ", ".join(f"{source.loaded.engine.name!r} (width {source.loaded.engine.dim})" for source in sources)
    raise PipelineError(
        f"--index: made with model {info.model or 'unknown'!r} (width {info.dim}), but {served} is served and would "
        "not understand it: run `vlp embed` and `vlp index build` with this bundle"
    )
