"""Figures of whole training runs: `vlp train` and `open_clip_train.main` as commands, on the same shards and cores."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench_kit import RESULTS, ROOT, Row, compare, missing, take_turns, wall
from bench_loader import PEER_PACKAGES
from safetensors.torch import save_file

from data_pipelines.files import cache_dir
from vlp.bundle import WEIGHTS, save_bundle
from vlp.checkpoint import load_latest
from vlp.curves import compare_curves
from vlp.models import locking
from vlp.models.weights import read_file
from vlp.recipe import Recipe, dump, load_recipe, validate
from vlp.run import current_bundle, prepare, save
from vlp.runlog import RunLog
from vlp.step import train_step

PEER = ("open_clip_train.main", version("open_clip_torch"))
SMALL_VIT = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": 6, "width": 192, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 3},
}
PEER_CODE = """
import sys
from vlp.torchvision_guard import ensure_torchvision
ensure_torchvision()
from open_clip_train.main import main
main(sys.argv[1:])
"""
FOUND = "R@1"
Curve = list[dict[str, Any]]
LINE = re.compile(r"(\S+,\S+) \| INFO \| Train Epoch: \d+ \[ *([\d,]+)/.*Contrastive_loss: ([\d.]+)")


def environment(*first: Path) -> dict[str, str]:
    """Of a command that finds this source tree, and before it other folders."""
    paths = [*map(str, first), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}


def small_recipe(shards: Path, steps: int, batch: int = 64, **run: Any) -> Recipe:
    """A small ViT on photographs, without evaluation."""
    return validate({
        "data": {"train": str(shards), "batch_size": batch, "image": {"size": 64}},
        "model": {"config": SMALL_VIT},
        "optim": {"lr": 5e-4, "warmup": 10, "grad_clip": None},
        "run": {"steps": steps, "log_every": 1, "save_every": 0, **run},
    })  # fmt: skip


def train(recipe: Recipe, folder: Path, cores: str = "0,1") -> float:
    """Train by our command on these cores; seconds of the whole command."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    file = folder.with_suffix(".yaml")
    file.write_text(dump(recipe))
    command = ["taskset", "-c", cores, sys.executable, "-m", "vlp", "train", str(file), "--run-dir", str(folder)]
    began = time.perf_counter()
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    return time.perf_counter() - began


def per_sample(folder: Path, batch: int, warm: int = 5) -> float:
    """Seconds per sample of one of our runs after its first steps, waiting for data included."""
    rows = RunLog(folder).rows("metrics.jsonl")
    return float((rows[-1]["seconds"] - rows[warm]["seconds"]) / (batch * (rows[-1]["step"] - rows[warm]["step"])))


def peer_model(recipe: Recipe, folder: Path) -> Path:
    """The untrained model of a recipe as a folder that open_clip starts from; an earlier one there is replaced."""
    shutil.rmtree(folder / "model", ignore_errors=True)
    return save_bundle(current_bundle(prepare(recipe, folder / "start")), folder / "model")


def peer_train(recipe: Recipe, model: Path, folder: Path, samples: int, epochs: int = 1, seed: int = 0) -> str:
    """Train by the peer's command; its log. Every epoch sees `samples` samples drawn from the shards."""
    tars = "::".join(map(str, sorted(Path(str(recipe.data.train)).glob("*.tar"))))
    command = [
        sys.executable, "-c", PEER_CODE,
        "--model", f"local-dir:{model}", "--train-data", tars, "--dataset-type", "webdataset", "--dataset-resampled",
        "--train-num-samples", samples, "--batch-size", recipe.data.batch_size, "--workers", 2, "--epochs", epochs,
        "--precision", "amp_bf16", "--lr", recipe.optim.lr, "--warmup", recipe.optim.warmup,
        "--wd", recipe.optim.weight_decay, "--beta1", 0.9,
        "--beta2", 0.98, "--eps", 1e-6, "--logs", folder, "--name", "run", "--log-every-n-steps", 1,
        "--seed", seed, "--save-frequency", epochs,
    ]  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    done = subprocess.run(
        list(map(str, command)), env=environment(PEER_PACKAGES), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return (folder / "run" / "out.log").read_text()


def log_lines(log: str) -> list[tuple[datetime, float]]:
    """When each step was logged, and its loss."""
    found = [match for line in log.splitlines() if (match := LINE.search(line))]
    return [(datetime.strptime(m[1], "%Y-%m-%d,%H:%M:%S"), float(m[3])) for m in found]


def peer_per_sample(log: str, batch: int, warm: int = 5) -> float:
    """Seconds per sample of a peer's run after its first steps, from the clock of its log."""
    lines = log_lines(log)
    return (lines[-1][0] - lines[warm][0]).total_seconds() / (batch * (len(lines) - 1 - warm))


def speed_row(shards: Path, rounds: int, steps: int = 60) -> Row:
    """A small model end to end from shards, the loader included."""
    goal = ">= 2"
    if not PEER_PACKAGES.exists():
        return missing("speed", PEER, goal, "the peer's webdataset is not installed: make bench-train does it")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = small_recipe(shards, steps)
        model = peer_model(recipe, folder)
        firsts: dict[str, float] = {}

        def ours() -> float:
            train(recipe, folder / "ours")
            firsts["ours"] = RunLog(folder / "ours").rows("metrics.jsonl")[0]["loss"]
            return per_sample(folder / "ours", 64)

        def theirs() -> float:
            log = peer_train(recipe, model, folder / "peer", 64 * steps)
            firsts["peer"] = log_lines(log)[0][1]
            return peer_per_sample(log, 64)

        taken = take_turns({"ours": ours, "peer": theirs}, rounds)
    apart = abs(firsts["ours"] - firsts["peer"])
    note = (
        f"ViT of width 192 at 64 px, batch 64, {1 / min(taken['ours']):.0f} samples/s, first losses {apart:.3f} apart"
    )
    return compare("speed", PEER, taken["ours"], taken["peer"], goal, apart < 0.2, note)


def overhead_row(shards: Path, rounds: int, steps: int = 50) -> Row:
    """So many steps of one run, begun with a checkpoint or without, in turns; it is written while they go on."""
    with tempfile.TemporaryDirectory() as scratch:
        run = prepare(small_recipe(shards, 1_000_000), Path(scratch))
        locking.set_training(run.model)
        batches = iter(run.loader)

        def window(with_checkpoint: bool) -> None:
            if with_checkpoint:
                save(run)
            for _ in range(steps):
                train_step(run, next(batches))

        taken = take_turns({"every": wall(lambda: window(True)), "none": wall(lambda: window(False))}, rounds)
        run.saver.close()
        _, state = load_latest(run.folder / "checkpoints") or ({}, {"step": -1})
    note = f"a checkpoint every {steps} steps of batch 64; 12.8 M parameters with optimiser"
    peer = ("the same without checkpoints", version("vlp"))
    whole = state["step"] == 2 * steps * rounds
    return compare("checkpoints", peer, taken["every"], taken["none"], "<= 1.03", whole, note)


def ranks_row(shards: Path, rounds: int, steps: int = 40) -> Row:
    """Two gloo ranks of one core each against one rank of one core, equal samples per rank."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        runs = {
            "two": (small_recipe(shards, steps, 128, processes=2, threads=1), 128, "0,1"),
            "one": (small_recipe(shards, steps, 64, processes=1, threads=1), 64, "0"),
        }

        def variant(recipe: Recipe, batch: int, cores: str) -> Callable[[], float]:
            def run() -> float:
                train(recipe, folder / "run", cores)
                return per_sample(folder / "run", batch, warm=20)

            return run

        taken = take_turns({name: variant(*settings) for name, settings in runs.items()}, rounds)
    note = "batch 64 per rank; that N ranks equal one process is a test of its own"
    peer = ("one rank on one core", version("vlp"))
    return compare("two_ranks", peer, taken["two"], taken["one"], ">= 1.8", True, note)


def starter_shards() -> Path:
    """The starter data as shards, written once."""
    out = cache_dir() / "bench/starter"
    command = [sys.executable, "-m", "vlp", "shard", "starter", "--out", str(out)]
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    return out


def recall_on_its_ground(model: Path, shards: Path) -> float:
    """Image-to-text R@1 of a peer's model on pictures over white or black, whichever suits it better: its loader drops
    the alpha channel, after which most transparent pixels are black, where ours composes on white."""
    config = json.loads((model / "open_clip_config.json").read_text())
    found = []
    for ground in (255, 0):
        config["preprocess_cfg"]["fill_color"] = ground
        (model / "open_clip_config.json").write_text(json.dumps(config))
        found.append(recall(model, shards))
    return max(found)


def recall(bundle: Path, shards: Path) -> float:
    """Image-to-text R@1 by `vlp eval`."""
    command = [sys.executable, "-m", "vlp", "eval", str(bundle), "--data", str(shards / "unseen_vendor"), "--json"]
    done = subprocess.run(command, env=environment(), check=True, capture_output=True)
    return float(json.loads(done.stdout.splitlines()[-1])["metrics"]["image_to_text/R@1"])


def curve(log: str) -> list[dict[str, float]]:
    """Step, seconds since the first one, and loss of a peer's run, from its log."""
    lines = log_lines(log)
    return [
        {"step": step, "seconds": (when - lines[0][0]).total_seconds(), "loss": loss}
        for step, (when, loss) in enumerate(lines, 1)
    ]


def starter_pair(shards: Path, folder: Path, seconds: float, seed: int) -> dict[str, tuple[Curve, Curve]]:
    """Ours, and the peer for about as long: the curve of the loss, and R@1 on the unseen vendor at the end."""
    recipe = load_recipe("starter/clip", [
        f"data.train={shards}/train", "evals=[]", f"run.steps={round(10 * seconds)}", f"run.seed={seed}",
    ])  # fmt: skip
    train(recipe, folder / "ours")
    spent = json.loads((folder / "ours/summary.json").read_text())["train_seconds"]
    one = recipe.model_copy(update={"run": recipe.run.model_copy(update={"processes": 1})})
    model = peer_model(one, folder)
    pilot = curve(peer_train(recipe, model, folder / "peer", 128 * 25, seed=seed))
    epochs = max(1, round(spent / max(1.0, pilot[-1]["seconds"])))
    theirs = curve(peer_train(recipe, model, folder / "peer", 128 * 25, epochs, seed))
    weights = read_file(folder / f"peer/run/checkpoints/epoch_{epochs}.pt")
    (model / "bundle.json").unlink()
    save_file({key: value.contiguous() for key, value in weights.items()}, model / WEIGHTS)
    ours = [*RunLog(folder / "ours").rows("metrics.jsonl")]
    sides = {
        "ours": (ours, spent, recall(folder / "ours", shards)),
        "open_clip": (theirs, theirs[-1]["seconds"], recall_on_its_ground(model, shards)),
    }
    return {
        f"{name}, seed {seed}": (rows, [{"step": rows[-1]["step"], "seconds": used, FOUND: found}])
        for name, (rows, used, found) in sides.items()
    }


def starter_rows(seconds: float, seeds: int, picture: Path = RESULTS / "starter.png") -> list[Row]:
    """Starter data, same model, equal wall time: share of the seeds in which ours finds more on the unseen vendor.

    Draws the curves of both sides into `picture`.
    """
    goal = ">= 1"
    if not PEER_PACKAGES.exists():
        return [missing("starter", PEER, goal, "the peer's webdataset is not installed: make bench-train does it")]
    shards, curves, words, ahead = starter_shards(), dict[str, tuple[Curve, Curve]](), list[str](), 0
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(seeds):
            pair = starter_pair(shards, Path(scratch), seconds, seed)
            (ours,), (theirs,) = (ends for _, ends in pair.values())
            ahead += ours[FOUND] > theirs[FOUND]
            words.append(
                " against ".join(f"{100 * end[FOUND]:.1f} in {end['seconds']:.0f} s" for end in (ours, theirs))
            )
            curves |= pair
    compare_curves(curves, [FOUND]).savefig(picture, dpi=80)
    share = ahead / seeds
    note = f"R@1 on the unseen vendor in %: {'; '.join(words)}; curves: {picture.name}"
    return [Row("starter", *PEER, share, share, share, goal, share >= 1, True, note)]
