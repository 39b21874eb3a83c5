"""Figures of the loader: stored JPEGs to normalised float batches and token ids, ours against open_clip's `get_data`.

Each side runs in a process of its own (this file, as a script), one at a time on the same cores with the same number of
workers: ours are threads, the peer's are processes. Only the steady state is timed, after the first batches. The peer's
training data code asks for webdataset <= 0.2.86, which lies in a folder of its own that only its process sees.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from bench_kit import ROOT, Row, compare, take_turns
from torch import Tensor

from data_pipelines.loader import DataConfig, make_loader
from data_pipelines.preprocess import ImageConfig, normalise
from data_pipelines.tokens import clip_tokenizer
from vlp.torchvision_guard import ensure_torchvision

Side = Literal["ours", "peer"]
PEER_PACKAGES = Path(sys.prefix) / "peers/open_clip"
PEER = ("open_clip get_data", version("open_clip_torch"))


@dataclass(frozen=True)
class Job:
    """What one process reads and how long."""

    side: Side
    shards: Path
    batch: int = 64
    warm: int = 3
    batches: int = 12
    workers: int = 2
    scaled: bool = False
    max_bad_share: float = 0.01


def our_batches(job: Job) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (normalised float BCHW, ids BL) of our loader, each valid until the next; nothing decoded is kept."""
    image = ImageConfig(scaled_decode=job.scaled)
    config = DataConfig(
        train=job.shards, batch_size=job.batch, threads=job.workers, image=image, cache_mb=0,
        max_bad_share=job.max_bad_share,
    )  # fmt: skip
    room = torch.empty(job.batch, 3, image.size, image.size)
    for batch in make_loader(config, clip_tokenizer(), seed=0):
        yield normalise(batch.pixels, image, out=room[: len(batch.pixels)]), batch.tokens


def peer_batches(job: Job) -> Iterator[tuple[Tensor, Tensor]]:
    """The same from open_clip's training pipeline, with its validation transform: the geometry of ours."""
    ensure_torchvision()
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from open_clip_train.data import get_data

    tars = sorted(job.shards.glob("*.tar"))
    args = SimpleNamespace(
        train_data="::".join(map(str, tars)), val_data=None, dataset_type="webdataset", dataset_resampled=False,
        train_num_samples=job.batch * (job.warm + job.batches) * 2, train_data_upsampling_factors=None, seed=0,
        batch_size=job.batch, workers=job.workers, world_size=1, imagenet_val=None, imagenet_v2=None,
    )  # fmt: skip
    transform = image_transform_v2(PreprocessCfg(), is_train=False)
    data = get_data(args, (transform, transform), tokenizer=open_clip.get_tokenizer("ViT-B-32"))["train"]
    epoch = 0
    while True:
        data.set_epoch(epoch)
        yield from data.dataloader
        epoch += 1


SIDES: dict[Side, Callable[[Job], Iterator[tuple[Tensor, Tensor]]]] = {"ours": our_batches, "peer": peer_batches}

EACH: tuple[Side, ...] = ("ours", "peer")


def time_batches(job: Job) -> float:
    """Seconds per batch once both sides have filled their queues."""
    batches = SIDES[job.side](job)
    for _ in islice(batches, job.warm):
        pass
    began = time.perf_counter()
    for pixels, ids in islice(batches, job.batches):
        assert pixels.shape[1:] == (3, 224, 224)
        assert 0.8 * job.batch < len(pixels) == len(ids) <= job.batch  # damaged samples may leave gaps
    return (time.perf_counter() - began) / job.batches


def in_process(job: Job, save: Path | None = None) -> Callable[[], float]:
    """The timing of a job in a fresh process, as a variant for `take_turns`; with `save`, its pictures go to a file."""
    paths = [str(PEER_PACKAGES)] * (job.side == "peer") + [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": os.pathsep.join(paths),
        "BENCH_JOB": json.dumps(asdict(job) | {"shards": str(job.shards), "save": str(save or "")}),
    }  # fmt: skip

    def run() -> float:
        done = subprocess.run([sys.executable, __file__], env=environment, check=True, stdout=subprocess.PIPE)
        return float(json.loads(done.stdout.splitlines()[-1]))

    return run


def save_pictures(job: Job, path: Path) -> float:
    """Write ids and uint8 pixels of `job.batches` batches into a file; returns how far values were from whole ones."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (ImageConfig().mean, ImageConfig().std))
    ids, pixels = zip(
        *((ids, (p * std + mean) * 255) for p, ids in islice(SIDES[job.side](job), job.batches)), strict=True
    )
    whole = [batch.round() for batch in pixels]
    np.savez(path, ids=torch.cat(ids).numpy(), pixels=torch.cat(whole).to(torch.uint8).numpy())
    return float(max((a - b).abs().max() for a, b in zip(pixels, whole, strict=True)))


def agreement(shards: Path, scaled: bool, samples: int, batch: int = 64) -> tuple[float, float, int]:
    """Mean and lowest PSNR in dB over the samples that both sides delivered, and their number, of one epoch.

    The same ids on both sides make two samples the same, so the tokens are compared as well.
    """
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for side in EACH:
            job = Job(side, shards, batch, 0, samples // batch, workers=1, scaled=scaled)
            assert in_process(job, Path(scratch) / f"{side}.npz")() < 0.01
            with np.load(Path(scratch) / f"{side}.npz") as saved:
                found.append({row.tobytes(): pixels for row, pixels in zip(saved["ids"], saved["pixels"], strict=True)})
    ours, peer = found
    common = sorted(peer.keys() & ours.keys())
    errors = [float(np.square(peer[key].astype(np.float32) - ours[key]).mean()) for key in common]
    values = 10 * np.log10(255**2 / np.maximum(errors, 1e-12))
    return float(values.mean()), float(values.min()), len(common)


def loader_row(
    name: str,
    shards: Path,
    goal: str,
    needed: float,
    rounds: int,
    samples: int,
    scaled: bool = False,
    batches: int = 12,
) -> Row:
    """Time of the peer over ours, once the pixels of an epoch of `samples` agree to `needed` dB in the mean."""
    mean, lowest, common = agreement(shards, scaled, samples)
    sides: dict[str, Callable[[], float]] = {
        side: in_process(Job(side, shards, scaled=scaled, batches=batches)) for side in EACH
    }
    taken = take_turns(sides, rounds)
    note = f"{mean:.1f} dB (lowest {lowest:.1f}) over {common} samples, {64 / min(taken['ours']):.0f} img/s"
    return compare(name, PEER, taken["ours"], taken["peer"], goal, common == samples and mean >= needed, note)


if __name__ == "__main__":
    given = json.loads(os.environ["BENCH_JOB"])
    save = given.pop("save")
    job = Job(**given | {"shards": Path(given["shards"])})
    sys.stdout.write(f"{json.dumps(save_pictures(job, Path(save)) if save else time_batches(job))}\n")
    sys.stdout.flush()
    os._exit(0)  # the endless iterators of both sides are left as they are
