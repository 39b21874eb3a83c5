"""Stop anywhere, go on with other ranks and threads: the global batches stay the same, bit for bit.

The processes are real: this file, run as a script, imports everything once and forks a process per rank or per life,
which keeps a campaign of hundreds of kills affordable.
"""

import hashlib
import io
import itertools
import json
import os
import random
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from data_pipelines.files import write_atomic
from data_pipelines.loader import DataConfig, Loader
from data_pipelines.sidecar import CLUSTERS, write_sidecar
from data_pipelines.testing import draw
from data_pipelines.tokens import learn_tokenizer

BATCH = 8
SAMPLES = 100
"""12 steps per epoch, four samples left out."""
STOPS = {"first step": 1, "middle": 7, "end of epoch": 12, "after a resume": 13}
COMBINATIONS = list(itertools.product((1, 2, 4), (1, 3), STOPS))
"""ranks x threads x stop = 24."""


def make_data(folder: Path) -> dict[str, Any]:
    """Three folders of shards in a mixture, one picture in 50 damaged, every option that draws random numbers on."""
    for part, (name, count) in enumerate((("a", SAMPLES), ("b", 37), ("c", 1))):
        (folder / name).mkdir(parents=True)
        for shard in range(min(3, count)):
            with tarfile.open(folder / name / f"{shard}.tar", "w") as tar:
                for number in range(shard, count, 3):
                    image = draw((20, 20), format="JPEG", seed=1000 * part + number)
                    image = image[:-90] if number % 50 == 49 else image
                    text = f"The picture {number} of {name}. It is small. It has {number % 7} colours and no frame."
                    for suffix, content in (("jpg", image), ("txt", text.encode())):
                        info = tarfile.TarInfo(f"{name}{number:04}.{suffix}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    settings = {
        "train": {str(folder / "a"): 4, str(folder / "b"): 2, str(folder / "c"): 0.5},
        "batch_size": BATCH, "window": 2, "views": 2, "texts": 2, "cache_mb": 0,
        "image": {"size": 16}, "augment": {"flip": 0.5, "rotate": 10, "hue": 0.1, "erase": 0.3},
        "captions": {"sentence": 0.5, "alternative": 0.2, "eda": {"first": 0.3}}, "max_bad_share": 0.5,
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    return settings


def make_one_folder(folder: Path) -> dict[str, Any]:
    """The plain case: one folder, whose epochs end inside the run; four partitions."""
    settings = {**make_data(folder), "train": str(folder / "a"), "partitions": 4}
    (folder / "settings.json").write_text(json.dumps(settings))
    return settings


def make_sampled(folder: Path, name: str = "label_paired") -> dict[str, Any]:
    """One folder, whose labels and clusters come from sidecars and decide who shares a batch."""
    settings = make_one_folder(folder)
    keys = [f"a{number:04}" for number in range(SAMPLES)]
    labels = [["even", "small"] if number % 2 == 0 else ["odd"] for number in range(SAMPLES)]
    write_sidecar(folder / "labels.parquet", [pa.table({"key": keys, "labels": labels})], {})
    clusters = [[number % 9, number % 5] for number in range(SAMPLES)]
    write_sidecar(folder / "clusters.parquet", [pa.table({"key": keys, CLUSTERS: clusters})], {})
    settings |= {
        "labels": {"sidecar": str(folder / "labels.parquet"), "multi": True},
        "clusters": str(folder / "clusters.parquet"),
        "captions": {**settings["captions"], "labels": 0.3},
        "strong": {"flip": 0.5, "grey": 0.5},
        "sampler": {"name": name, "by": "labels" if name == "label_paired" else "clusters"},
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    return settings


def make_balanced(folder: Path) -> dict[str, Any]:
    """The same with all clusters equally often."""
    return make_sampled(folder, "class_balanced")


def open_loader(folder: Path, rank: int = 0, world: int = 1, **changes: Any) -> Loader:
    settings = json.loads((folder / "settings.json").read_text())
    tokenizer = learn_tokenizer(["the picture of small colours frame"], vocab_size=300, context_length=24)
    return Loader(DataConfig.model_validate({**settings, **changes}), tokenizer, 5, rank, world)


def digests(loader: Loader, steps: int) -> Iterator[list[str]]:
    """One digest per sample of every batch: key, pixels of all views, tokens of all texts, phrases, part."""
    for batch in itertools.islice(loader, steps):
        tensors = [batch.pixels, batch.tokens, batch.phrase_ids, batch.text_phrase_ids, batch.source_ids]
        tensors += [batch.label_ids, batch.multi_labels, batch.cluster_ids]
        tensors += [*(batch.views or ()), *(batch.extra_tokens or ())]
        found = [tensor for tensor in tensors if tensor is not None]
        yield [
            hashlib.sha256(key.encode() + b"".join(t[row].numpy().tobytes() for t in found)).hexdigest()[:16]
            for row, key in enumerate(batch.keys)
        ]


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def live(folder: Path, out: Path, rank: int, world: int, threads: int, stop: int) -> None:
    """One life of a rank: go on from the last saved state, note every batch, save the state after it."""
    torch.set_num_threads(1)
    loader = open_loader(folder, rank, world, threads=threads)
    state = out / f"state-{rank}-{world}.json"
    if state.is_file():
        loader.load_state_dict(json.loads(state.read_text()))
    with (out / f"digests-{rank}-{world}.jsonl").open("a") as log:
        for number, row in enumerate(digests(loader, stop - loader.step), start=loader.step):
            log.write(json.dumps([number, row]) + "\n")
            log.flush()
            if number % 2 == 0 or number + 1 == stop:  # like checkpoints: not after every step
                content = json.dumps(loader.state_dict()).encode()
                write_atomic(state, lambda stream, content=content: stream.write(content))  # type: ignore[misc]


def fork(*arguments: Any) -> int:
    """A forked process that lives `live(*arguments)`; its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        live(*arguments)
        code = 0
    finally:
        os._exit(code)


def run_combinations(folder: Path, out: Path, names: list[str], steps: int) -> None:
    """For each combination: one rank up to the stop, then other ranks and threads from its state to the end."""
    for name in names:
        world, threads, stop = json.loads(name)
        place = out / name
        place.mkdir()
        first = min(STOPS[stop], steps - 1)
        for begin in [first - 1, first] if stop == "after a resume" else [first]:
            assert os.waitpid(fork(folder, place, 0, 1, 2, begin), 0)[1] == 0
        for rank in range(world):
            (place / f"state-{rank}-{world}.json").write_bytes((place / "state-0-1.json").read_bytes())
        ranks = [fork(folder, place, rank, world, threads, steps) for rank in range(world)]
        assert all(os.waitpid(rank, 0)[1] == 0 for rank in ranks)


def run_kills(folder: Path, out: Path, kills: int, more: int) -> None:
    """Kill a loading process again and again at random moments, then let it go `more` steps on and end."""
    rng, log = random.Random(kills), out / "digests-0-1.jsonl"
    for _ in range(kills):
        goal = lines(log) + rng.randrange(6)
        child = fork(folder, out, 0, 1, rng.choice((1, 2, 4)), sys.maxsize)
        while lines(log) < goal:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, 9)
        assert os.waitpid(child, 0)[1] == 9, "it ended by itself"
    state = out / "state-0-1.json"
    begin = json.loads(state.read_text())["step"] if state.is_file() else 0
    assert os.waitpid(fork(folder, out, 0, 1, 2, begin + more), 0)[1] == 0


def script(*arguments: object) -> None:
    """This file in a fresh interpreter that has started no thread, so that it may fork."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def logged(path: Path) -> dict[int, list[str]]:
    """Step -> digests; a step noted twice, before and after a kill, must be the same both times."""
    rows: dict[int, list[str]] = {}
    for line in path.read_text().splitlines():
        if line.endswith("]]"):  # the last line of a killed process may be cut
            number, row = json.loads(line)
            assert rows.setdefault(number, row) == row
    return rows


def check_combinations(folder: Path, names: list[str], steps: int) -> None:
    reference = list(digests(open_loader(folder), steps))
    out = folder / "out"
    out.mkdir()
    script("combinations", folder, out, json.dumps(names), steps)
    for name in names:
        world, _, stop = json.loads(name)
        before = logged(out / name / "digests-0-1.jsonl")
        parts = [logged(out / name / f"digests-{rank}-{world}.jsonl") for rank in range(world)]
        first = min(STOPS[stop], steps - 1)
        assert [before[step] for step in range(first)] == reference[:first]
        assert all(set(part) >= set(range(first, steps)) for part in parts), "equal steps on every rank"
        joined = [[digest for part in parts for digest in part[step]] for step in range(first, steps)]
        assert joined == reference[first:], name


@pytest.mark.parametrize("make", [make_data, make_one_folder, make_sampled, make_balanced])
def test_other_ranks_and_threads_go_on_with_the_same_batches(tmp_path: Path, make: Any) -> None:
    """A fifth of the combinations in each case; every rank count, thread count and stop occurs."""
    make(tmp_path)
    chosen = COMBINATIONS[{make_data: 2, make_sampled: 1, make_balanced: 3}.get(make, 0) :: 5]
    check_combinations(tmp_path, [json.dumps(item) for item in chosen], 15)


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_data, make_one_folder, make_sampled, make_balanced])
def test_all_24_combinations_over_300_steps(tmp_path: Path, make: Any) -> None:
    make(tmp_path)
    check_combinations(tmp_path, [json.dumps(item) for item in COMBINATIONS], 300)


def check_kills(folder: Path, kills: int) -> None:
    out = folder / "out"
    out.mkdir()
    script("kills", folder, out, kills, 4)
    found = logged(out / "digests-0-1.jsonl")
    assert len(found) > kills / 2, "too few steps between the kills to mean anything"
    assert [found[step] for step in range(len(found))] == list(digests(open_loader(folder), len(found)))


def test_twenty_kills_during_loading_change_nothing(tmp_path: Path) -> None:
    make_data(tmp_path)
    check_kills(tmp_path, 20)


@pytest.mark.slow
def test_two_hundred_kills_during_loading_change_nothing(tmp_path: Path) -> None:
    make_one_folder(tmp_path)
    check_kills(tmp_path, 200)


if __name__ == "__main__":
    kind, data_folder, out_folder, what, last = sys.argv[1:]
    if kind == "combinations":
        run_combinations(Path(data_folder), Path(out_folder), json.loads(what), int(last))
    else:
        run_kills(Path(data_folder), Path(out_folder), int(what), int(last))
