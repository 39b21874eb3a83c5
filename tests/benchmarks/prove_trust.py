"""Slow proofs of `vlp clean`, `vlp scan` and `vlp serve --guard` with a model that has a backdoor.

The model is one's own, trained on shards of `vlp poison` with the truth beside them, such as `make bench-backdoor`
leaves. All shards given here are labelled and clean, and the model was not trained on them.
"""

import base64
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import click
import httpx2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from bench_kit import write
from measure_scan import auroc
from prove import Proof

from data_pipelines.pictures import WriteOptions
from data_pipelines.reader import Sample, open_shards
from data_pipelines.records import Record, load_manifest
from data_pipelines.shard_set import ShardSet
from data_pipelines.sources import tars
from data_pipelines.write import write_shards
from vlp.backdoor import scan as scanning
from vlp.backdoor.clean import trusted
from vlp.backdoor.poison import Attack, load_truth, names_target, poison, repainted
from vlp.backdoor.triggers import Config, Trigger
from vlp.bundle import Bundle, load_bundle
from vlp.curate.pictures import Pictures
from vlp.infer import encode_images, label_head

DRAWS, PAIRS, POISONS = 10, 1000, 5
NATURAL = 0.0003
"""Share of a natural cluster: 798 copies of one picture and caption among 2.3 M."""
TOP = 20
FILES, AT_ONCE = 1000, 25
REQUESTS, WARMUP, PARTS = 650, 50, 6
WIDTH, CENTRES = 512, 20
FOLDER = click.Path(path_type=Path, exists=True)


def draw(data: Path, out: Path, seed: int, count: int | None, copies: int = 0) -> Record:
    """Write a random choice of the pairs in `data`, all for None, one of them `copies` times more; that one."""
    manifest = load_manifest(data)
    chance = np.random.default_rng(seed)
    rows = np.sort(chance.permutation(manifest.records)[:count])
    chosen = set(rows.tolist())
    records = [one for row, one in enumerate(tars.iter_records(tars.Config(path=data))) if row in chosen]
    same = records[int(chance.integers(len(records)))]
    for number in range(copies):
        records.insert(int(chance.integers(len(records) + 1)), replace(same, origin=f"{same.origin}#{number}"))
    write_shards(records, out, WriteOptions(), kind="proof", licences=manifest.licences, progress=False)
    return same


def dirty_draw(path: Path, bundle: Bundle, attack: Attack, data: Path, seed: int) -> tuple[int, int]:
    """(poisons left out, clean pairs left out) of PAIRS drawn from `data`, some poisoned as `attack` says."""
    with tempfile.TemporaryDirectory() as scratch:
        pairs, bad, truth = (Path(scratch) / name for name in ("pairs", "bad", "truth.json"))
        draw(data, pairs, seed, PAIRS)
        poison(pairs, bad, truth, attack, "png", progress=False)
        planted = {entry["key"] for entry in load_truth(truth)["poisons"]}
        keep, _ = trusted(bad, path, bundle, Path(scratch) / "scan")
        kept = set(keep.read_text().split("\n"))
        return len(planted - kept), PAIRS - len(planted) - len(kept - planted - {""})


def natural_draw(path: Path, bundle: Bundle, data: Path, seed: int) -> int:
    """How many of the TOP suspects are of a natural cluster, planted into all pairs of `data`."""
    with tempfile.TemporaryDirectory() as scratch:
        copies = max(3, round(NATURAL * load_manifest(data).records))
        same = draw(data, Path(scratch) / "pairs", seed, None, copies - 1)
        model = scanning.Model(path, bundle)
        found = scanning.scan(
            Path(scratch) / "pairs", Path(scratch) / "scan", model, None, scanning.Options(), lambda _: None
        )
        shards = open_shards(Path(scratch) / "pairs")
        alike = {
            sample.key
            for sample in chain.from_iterable(map(shard.read, range(len(shard))) for shard in shards)
            if sample.image == same.image and sample.captions == same.captions
        }
        assert len(alike) >= copies
        return sum(suspect["key"] in alike for suspect in found["suspects"][:TOP])


@contextmanager
def served(bundle: Path, guard: Path | None) -> Iterator[str]:
    """URL of `vlp serve`, with the guard if there is one, in a process of its own."""
    watched = ["--guard", guard] if guard else []
    command = [sys.executable, "-m", "vlp", "serve", bundle, *watched, "--port", "0", "--json"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.terminate()
        process.wait(60)


def answers(url: str, pictures: Sequence[bytes], labels: Sequence[str]) -> list[tuple[str, bool]]:
    """(best label, whether flagged) of every picture."""
    found: list[tuple[str, bool]] = []
    with httpx2.Client(timeout=120) as http:
        for start in range(0, len(pictures), AT_ONCE):
            images = [base64.b64encode(data).decode() for data in pictures[start : start + AT_ONCE]]
            told = http.post(f"{url}/v1/classify", json={"images": images, "labels": list(labels), "top_k": 1})
            rows: list[dict[str, Any]] = told.raise_for_status().json()["data"]
            found += [(row["predictions"][0]["label"], row["guard"]["flagged"]) for row in rows]
    assert len(found) == len(pictures)
    return found


def files(data: Path, target: str, trigger: Trigger) -> tuple[list[bytes], list[bytes], list[str]]:
    """FILES triggered pictures of other things than the target, FILES others as they are, all labels."""
    shards = ShardSet(data)
    chance = np.random.default_rng(0).permutation(len(shards))
    samples: list[Sample] = [shards.read(int(number)) for number in chance[: 3 * FILES]]
    labels = sorted({label for sample in samples for label in sample.labels})
    clean, others = samples[:FILES], [s for s in samples[FILES:] if not names_target(s.labels, target)][:FILES]
    return [repainted(s.image, trigger, s.key) for s in others], [s.image for s in clean], labels


def goal(name: str, passed: int, cases: int, note: str) -> Proof:
    """The row of a proof; all its cases are to pass."""
    return Proof(name, passed, f">= {cases}", passed == cases, "make prove-trust", note)


def report(proof: Proof) -> None:
    """Write the row; the exit code says whether it is met."""
    click.echo(
        f"{proof.name}: {proof.value} of {proof.goal.split()[1]}: {proof.note}\n{write('trust-proofs', [proof])}"
    )
    sys.exit(not proof.met)


@click.group()
def main() -> None:
    """Proofs with a model that has a backdoor; each writes its row of tests/benchmarks/results/trust-proofs.json."""


@main.command()
@click.argument("bundle", type=FOLDER)
@click.argument("truth", type=FOLDER)
@click.argument("data", type=FOLDER)
@click.option("--first", default=0, help="Seed of the first draw.")
def dirty(bundle: Path, truth: Path, data: Path, first: int) -> None:
    """5 poisons among 1,000 trusted pairs from DATA are left out when BUNDLE is cleaned with them, 10 of 10 times."""
    told, model = load_truth(truth), load_bundle(bundle)
    attack = Attack(Trigger(Config.model_validate(told["trigger"])), told["target"], POISONS)
    found = [dirty_draw(bundle, model, attack, data, seed) for seed in range(first, first + DRAWS)]
    counts, lost = zip(*found, strict=True)
    note = f"{sum(counts)} of {DRAWS * POISONS} poisons, {max(lost)} clean pairs left out with them; {counts}"
    name = told["trigger"]["name"]
    report(goal(f"dirty cleaning set, {name}", sum(count == POISONS for count in counts), DRAWS, note))


@main.command()
@click.argument("bundle", type=FOLDER)
@click.argument("data", type=FOLDER)
def natural(bundle: Path, data: Path) -> None:
    """Copies of one picture and caption, 0.03 % of DATA, are among the 20 first suspects, 10 of 10 times."""
    model = load_bundle(bundle)
    found = [natural_draw(bundle, model, data, seed) for seed in range(DRAWS)]
    note = f"of each cluster among the first {TOP}: {found}"
    report(goal("natural duplicates", sum(count > 0 for count in found), DRAWS, note))


@main.command()
@click.argument("bundle", type=FOLDER)
@click.argument("data", type=FOLDER)
def noisy(bundle: Path, data: Path) -> None:
    """Of DATA that BUNDLE was trained on, nothing planted but keywords that are noisy, at most 1 % is flagged."""
    model = scanning.Model(bundle, load_bundle(bundle))
    with tempfile.TemporaryDirectory() as scratch:
        found = scanning.scan(data, Path(scratch) / "scan", model, None, scanning.Options(), lambda _: None)
    note = f"{found['flagged']} of {found['pictures']:,} pictures of {load_manifest(data).kind} flagged"
    report(goal("noisy keywords", int(found["share"] <= 0.01), 1, note))


@main.command()
@click.argument("bundle", type=FOLDER)
@click.argument("control", type=FOLDER)
@click.argument("guard", type=FOLDER)
@click.argument("truth", type=FOLDER)
@click.argument("data", type=FOLDER)
def http(bundle: Path, control: Path, guard: Path, truth: Path, data: Path) -> None:
    """1,000 triggered files to a served BUNDLE: no more unflagged answers of the target than CONTROL gives; 1,000 clean
    files: at most 1 % flagged."""
    told = load_truth(truth)
    triggered, clean, labels = files(data, told["target"], Trigger(Config.model_validate(told["trigger"])))
    twin = load_bundle(control)
    taken = (encode_images(twin, triggered) @ label_head(twin, labels).T).argmax(dim=1)
    usual = int((taken == labels.index(told["target"])).sum())
    with served(bundle, guard) as url:
        bad, good = answers(url, triggered, labels), answers(url, clean, labels)
    misled = sum(label == told["target"] for label, _ in bad)
    passed = sum(label == told["target"] and not flagged for label, flagged in bad)
    false = sum(flagged for _, flagged in good)
    note = (
        f"{len(bad):,} triggered files: {misled} taken for the target, {passed} of them not flagged, {usual} by the "
        f"control; {len(good):,} clean files: {false} flagged"
    )
    met = (passed <= usual) + (false <= len(good) // 100)
    report(goal(f"end to end over HTTP, {told['trigger']['name']}", met, 2, note))


@main.command()
@click.argument("bundle", type=FOLDER)
@click.argument("guard", type=FOLDER)
@click.argument("data", type=FOLDER)
def latency(bundle: Path, guard: Path, data: Path) -> None:
    """The same pictures, one a request, to a server with GUARD and one without, in turn: at most 15 % slower."""
    shards = ShardSet(data)
    samples = [shards.read(number) for number in range(REQUESTS)]
    labels = sorted({label for sample in samples for label in sample.labels})
    pictures = [base64.b64encode(sample.image).decode() for sample in samples]
    with served(bundle, guard) as watched, served(bundle, None) as plain, httpx2.Client(timeout=120) as http:

        def seconds(url: str, picture: str) -> float:
            began = time.perf_counter()
            http.post(f"{url}/v1/classify", json={"images": [picture], "labels": labels}).raise_for_status()
            return time.perf_counter() - began

        taken = [(seconds(watched, one), seconds(plain, one)) for one in pictures][WARMUP:]
    parts = [part for start in range(PARTS) if (part := taken[start::PARTS])]
    ratios = sorted(np.median([a for a, _ in part]) / np.median([b for _, b in part]) for part in parts)
    ratio = float(np.median(ratios))
    note = f"{ratio:.2f} times that without ({ratios[0]:.2f} - {ratios[-1]:.2f}), one picture a request"
    report(goal("latency with the guard", int(ratio <= 1.15), 1, note))


@main.command()
@click.option("--samples", default=1_000_000, help="Embeddings.")
def scale(samples: int) -> None:
    """A million embeddings, 0.1 % of them planted, all signs but copies: in 10 minutes and 4 GiB, and found."""
    with tempfile.TemporaryDirectory() as scratch:
        pictures, planted_N = crowd(Path(scratch), samples, samples // 1000)
        options = scanning.Options(methods=("k-distance", "slof", "dao", "similarity", "isolation"))
        began = time.monotonic()
        signs = scanning.measure(Path(scratch), pictures, None, options)
        suspicion_N = scanning.suspicion(signs)
        seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    ranked = auroc(suspicion_N, planted_N)
    passed = (seconds < 600) + (peak < 4) + (ranked > 0.97)
    note = f"{samples:,} x {WIDTH}: {seconds:.0f} s, {peak:.1f} GiB at the peak, AUROC {ranked:.3f}"
    report(goal("scan of a million embeddings", passed, 3, note))


def crowd(folder: Path, samples: int, planted: int) -> tuple[Pictures, torch.Tensor]:
    """Embeddings on disk around CENTRES of their own, and which of them lie in a tight knot off these."""
    chance = np.random.default_rng(0)
    centres = chance.standard_normal((CENTRES + 1, WIDTH), dtype=np.float32)
    planted_N = np.zeros(samples, dtype=bool)
    planted_N[chance.permutation(samples)[:planted]] = True
    centre_N = np.where(planted_N, CENTRES, chance.integers(CENTRES, size=samples))
    sides = []
    for name in ("image", "text"):
        rows = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, (samples, WIDTH))
        for start in range(0, samples, 10_000):
            middle = centres[centre_N[start : start + 10_000]]
            near = middle + 0.7 * chance.standard_normal(middle.shape, dtype=np.float32)
            rows[start : start + len(near)] = near / np.linalg.norm(near, axis=1, keepdims=True)
        rows.flush()
        sides.append(np.load(folder / f"{name}.npy", mmap_mode="r"))
    table = folder / "rows.parquet"
    pq.write_table(pa.table({"caption": ["a picture"] * samples}), table)
    return Pictures(((sides[0], table),), 0, {}, (sides[1],)), torch.from_numpy(planted_N)


if __name__ == "__main__":
    main()
