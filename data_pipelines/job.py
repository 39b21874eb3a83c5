"""A whole sharding job: is it done already, can it go on, may it replace what is there; write, extend, sum up."""

import hashlib
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines.errors import PipelineError, ShardError
from data_pipelines.folders import (
    INPUT,
    JOB,
    Job,
    first_manifest,
    is_whole,
    manifest_of,
    read_finished,
    read_job,
    splits,
    summarise,
)
from data_pipelines.pictures import WriteOptions
from data_pipelines.records import MANIFEST
from data_pipelines.shard_files import json_file
from data_pipelines.shards import Done, load_done
from data_pipelines.sources import Source, names
from data_pipelines.store import TEMP, Store, join
from data_pipelines.write import Part, Parts, conclude, describe, finish, run, write_shards

OURS = re.compile(
    r"\d+(\.tar|\.index\.npy|\.parquet|_stats\.json)|sizes\.json|manifest\.json|job\.json|keep\.txt|\.[\w.]+\.\w{8}"
)
"""Names that a sharding job writes, temp files of a killed one and the keep-list of `dedup` included (in new shards its
keys would name other samples); nothing else is ever removed."""
LATER = "extended"
"""Key of job.json: the sources that `vlp shard extend` added, in order."""


def shard(source: Source, out: Path | str, options: WriteOptions, *, overwrite: bool, progress: bool) -> dict[str, Any]:
    """Shards of `source` below `out` (path or URL); does nothing when they are there already. Returns the summary.

    A job that was interrupted goes on after its finished shards. Other shards are refused unless `overwrite`.
    """
    began = time.monotonic()
    store = Store(out)
    job: Job = {"kind": source.name, "options": options.recorded(), "source": identify(source)}
    with store.alone():
        state = _prepare(store, job, overwrite)
        if state != "whole":
            write_shards(
                source.module.iter_records(source.config),
                out,
                options,
                kind=source.name,
                licences=licences(source),
                progress=progress,
                total=_total(source),
                source=job["source"],
                resume=state == "begun",
                place=place(source),
            )
    return summarise(store) | {"up_to_date": state == "whole", "seconds": round(time.monotonic() - began, 1)}


def extend(source: Source, out: Path | str, options: WriteOptions, *, progress: bool) -> dict[str, Any]:
    """The records of another source as new shards after those of a finished folder; returns the summary.

    Shards that are there stay as they are. `options`: the run's own (workers, fetch, on); what shapes the output is
    taken from the folder. An interrupted extension goes on; one that is part of the folder already does nothing.
    """
    began = time.monotonic()
    store = Store(out)
    added = {"kind": source.name, "source": identify(source)}
    with store.alone():
        job = read_finished(store)
        known = [strip(job), *map(strip, job.get(LATER, []))]
        up_to_date = added in [{"kind": item["kind"], "source": item["source"]} for item in known]
        if not up_to_date:
            _extend(store, job, added, source, recorded_options(job, options), progress)
    return summarise(store) | {"up_to_date": up_to_date, "seconds": round(time.monotonic() - began, 1)}


def _extend(store: Store, job: Job, added: Job, source: Source, options: WriteOptions, progress: bool) -> None:
    after = job | {LATER: [*job.get(LATER, []), added | {INPUT: place(source)}]}
    resume = False
    if (begun := read_job(store, join(TEMP, JOB))) is not None:
        resume = strip_all(begun) == strip_all(after)
        if not resume:
            raise PipelineError(
                f"{store}: another change was interrupted ({differences(strip_all(begun), strip_all(after))}): finish "
                "it first with the same command"
            )
    store.write(join(TEMP, JOB), json_file(after))
    parts = load_parts(store)
    start = {split: len(part.shards) for split, part in parts.items()}
    records = source.module.iter_records(source.config)
    total = _total(source)
    for work, done in run(
        records, store, options, kind=source.name, progress=progress, total=total, resume=True, start=start
    ):
        parts.setdefault(work.split, Part()).add(done)
    manifest = first_manifest(store)
    finish(store, parts, options, manifest.kind, manifest.licences | licences(source))
    conclude(store, after)


def licences(source: Source) -> dict[str, str]:
    """Package -> its licence and whom to credit."""
    return {package.spec: f"{package.licence}; {package.credit}" for package in source.packages}


def _total(source: Source) -> int | None:
    count = getattr(source.module, "count", None)
    return count(source.config) if count else None


def identify(source: Source) -> dict[str, str]:
    """What the records depend on besides the write options: settings, packages or files, and the code."""
    settings = source.config.model_dump(mode="json", exclude={"path", "dir"})
    identity = {"settings": json.dumps(settings, sort_keys=True), "code": code_digest()}
    if source.packages:
        pinned = "\n".join(sorted(package.sha256 for package in source.packages))
        identity["packages"] = hashlib.sha256(pinned.encode()).hexdigest()
    if files := getattr(source.module, "fingerprint", None):
        identity["files"] = files(source.config)
    return identity


def place(source: Source) -> dict[str, str]:
    """Where the source lies: `path` and `dir` of its configuration, made absolute."""
    found = source.config.model_dump(mode="json", include={"path", "dir"}, exclude_none=True)
    return {name: "::".join(map(_absolute, where.split("::"))) for name, where in found.items()}


def _absolute(where: str) -> str:
    return where if "://" in where else str(Path(where).absolute())


def recall(job: Job, where: str) -> Source:
    """The source that job.json speaks of. Raises ShardError when this version cannot read it any more."""
    kind, source = job.get("kind"), job.get("source", {})
    module = names().get(str(kind))
    if module is None or INPUT not in job or "settings" not in source:
        raise ShardError(f"{where} does not say where its records came from: shard the source again")
    return Source(str(kind), module, module.Config(**json.loads(source["settings"]) | job[INPUT]))


def code_digest() -> str:
    """sha256 over the modules that decide what lands in a shard; a changed reader must not pass for the old one."""
    here = Path(__file__).parent
    deciding = ("images.py", "pictures.py", "resize.py", "rows.py", "shard_files.py", "shards.py")
    folders = ("compose", "sources")
    paths = [path for name in folders for path in sorted((here / name).glob("*.py"))]
    paths += (here / name for name in deciding)
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()


def _prepare(store: Store, job: Job, overwrite: bool) -> str:
    """`whole`, `begun` (the same job, interrupted) or `empty`: what is there now; makes room or refuses."""
    before, begun = read_job(store, JOB), read_job(store, join(TEMP, JOB))
    if before is not None:
        if strip(before) == job and is_whole(store) and not _is_changing(store, before, begun):
            store.remove_folder(TEMP)  # a kill after job.json was written leaves it behind
            return "whole"
        if not overwrite and strip(before) == job and begun is not None:
            raise PipelineError(
                f"{store}: an extension or a retry was interrupted: finish it with the same command, or write "
                "everything anew with --overwrite"
            )
        if not overwrite:
            raise PipelineError(
                f"{store} holds other shards (different: {differences(strip(before), job)}): choose another --out, or "
                "replace them with --overwrite"
            )
    elif begun is not None:
        if strip(begun) == job:
            _sweep(store)
            return "begun"
        if not overwrite:
            raise PipelineError(
                f"{store} holds an unfinished job (different: {differences(strip(begun), job)}): finish it with the "
                "same command, choose another --out, or replace it with --overwrite"
            )
    elif (store.names() or {*store.names(kind="directory")} - {TEMP}) and not overwrite:
        raise PipelineError(
            f"{store} is not empty and holds no shards of this tool: choose another --out, or add --overwrite"
        )
    if before is not None or begun is not None:
        _clear(store)
    return "empty"


def _is_changing(store: Store, job: Job, begun: Job | None) -> bool:
    """Whether an extension or a retry of a finished folder was interrupted."""
    return begun is not None and (strip_all(begun) != strip_all(job) or "retry" in store.names(TEMP, "directory"))


def _sweep(store: Store) -> None:
    """Remove temp files that a killed process left, and nothing that has a name."""
    for folder in ("", *store.names(kind="directory")):
        for name in store.names(folder):
            if (folder == TEMP and name != JOB) or (name.startswith(".") and OURS.fullmatch(name)):
                store.remove(join(folder, name))


def strip(job: Job) -> Job:
    """A job without what may differ: its place, and what was added later."""
    return {name: value for name, value in job.items() if name not in (INPUT, LATER)}


def strip_all(job: Job) -> Job:
    """A job with its additions, without places."""
    return strip(job) | {f"{LATER}.{n}": strip(item) for n, item in enumerate(job.get(LATER, []))}


def recorded_options(job: Job, options: WriteOptions) -> WriteOptions:
    """The options a folder was written with; workers, fetch and place of work from `options`."""
    run_time = {name: getattr(options, name) for name in ("workers", "fetch", "fetch_concurrency", "on")}
    return WriteOptions(**job["options"] | run_time)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Dotted names of what changed, with old and new value where they are short."""
    flat_before, flat_after = _flatten(before), _flatten(after)
    changed = [name for name in {**flat_after, **flat_before} if flat_before.get(name) != flat_after.get(name)]
    words = []
    for name in changed:
        old, new = flat_before.get(name), flat_after.get(name)
        hashed = isinstance(new or old, str) and len(new or old or "") == 64
        words.append(name if hashed else f"{name} was {old!r}, is {new!r}")
    return "; ".join(words) or "files are missing or damaged"


def _flatten(job: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in job.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def load_parts(store: Store) -> Parts:
    """The accounts of all shards that the manifests name. Raises ShardError when one is not whole."""
    parts: Parts = {}
    for split in splits(store):
        part = parts[split] = Part()
        for info in manifest_of(store, split).shards:
            part.add(_load(store, split, info.name.removesuffix(".tar")))
    return parts


def _load(store: Store, split: str, name: str) -> Done:
    done = load_done(store, split, name)
    if done is None:
        raise ShardError(
            f"{store}/{join(split, name)}.tar or its files are damaged: see `vlp shard verify {store}`, then shard "
            "the source again with --overwrite"
        )
    return done


def _clear(store: Store) -> None:
    """Remove what a sharding job wrote, and nothing else; job.json first, so that a kill leaves an unfinished job."""
    if (content := read_job(store, JOB)) is not None:
        store.write(join(TEMP, JOB), json_file(content))
        store.remove(JOB)
    for folder in ("", *store.names(kind="directory")):
        shards = any(name.endswith((".tar", MANIFEST)) and OURS.fullmatch(name) for name in store.names(folder))
        if (folder and not shards) or folder == TEMP:
            continue  # not a split of ours
        for name in store.names(folder):
            if OURS.fullmatch(name):
                store.remove(join(folder, name))
        if folder and not store.names(folder) and not store.names(folder, "directory"):
            store.remove_folder(folder)
    store.remove_folder(TEMP)


def lines(result: Mapping[str, Any]) -> list[str]:
    """A summary for people."""
    head = "up to date, nothing to do" if result["up_to_date"] else f"written in {result['seconds']:.1f} s"
    text = [f"{result['out']}: {head}"]
    for split, part in result["splits"].items():
        failed = sum(part["failures"].values())
        why = f" ({describe(part['failures'])})" if failed else ""
        text.append(
            f"  {split or '.':<18}{part['samples']:>9,} samples of {part['records']:,} records, {failed:,} failures"
            f"{why}, {part['shards']} shards, {part['bytes'] / 1e6:,.1f} MB"
        )
    if any(result["failures"].values()):
        text.append("  every failed row is in the .parquet beside its shard, columns status and error_message")
    return text
