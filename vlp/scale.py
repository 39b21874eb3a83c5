"""What a training run would need, on paper: time, memory, cores, storage, bandwidth, an index and money.

Seconds per sample and GPU = FLOPs / (peak x utilisation). FLOPs and activations are counted by the project's own code
on a model without data. What is assumed stands in the constants below, each with its source, and in every printed line.

Utilisation. Published runs of open_clip (`PUBLISHED` in tests/vlp/test_scale.py) follow 0.20 x F / (F + 42.5 GFLOP) of
the peak, F being the FLOPs done per sample, those computed twice under activation checkpointing included: small models
are held up by what does not grow with them (launches, data, communication). Fitted to six runs on 128 to 824 A100, it
tells each of them within 20 %; the same source lists runs with a slower network or disk at a third of that.
"""

from dataclasses import dataclass
from math import ceil

import torch
from torch import nn

from data_pipelines.errors import ConfigError
from vlp.flops import TERAFLOPS, StepFlops, listed_peak
from vlp.memory import saved_bytes
from vlp.models import ModelConfig, instantiate, resolve_config

TOP, HALF = 0.20, 42.5e9
"""Utilisation of an endlessly large model, and the FLOPs per sample at which half of that is reached."""
MEMORY = {
    "B200": 180, "H200": 141, "H200 NVL": 141, "GH200": 96, "H100": 80, "H100 NVL": 94, "H100 PCIe": 80, "A100": 80,
    "A40": 48, "A30": 24, "A10G": 24, "A10": 24, "L40S": 48, "L40": 48, "L4": 24, "T4": 16, "V100-PCIE": 16, "V100": 32,
    "RTX 5090": 32, "RTX 4090": 24, "RTX 3090": 24, "RTX A6000": 48,
}  # fmt: skip
"""GB of the GPUs in `vlp.flops.TERAFLOPS`, from the same data sheets; the larger one where two were sold."""
DECODE = {"shard": 706.0, "original": 497.0}
"""Samples per second and core of our loader, JPEG to pixels and tokens: 256 px shards and 640 x 480 originals
(rows loader_256 and loader_640 of tests/benchmarks/results/data.json; AMD EPYC, two cores)."""
SHARDING = 418.0
"""Pictures per second and core of `vlp shard` (row shard_img2dataset of the same file), the network left out."""
SAMPLE_BYTES = 25_000
"""Of a pair in 256 px shards: LAION-400M has 10 TB, 190 million others 5 TB (github.com/rom1504/img2dataset,
dataset_examples/laion400m.md and README.md, section Benchmark)."""
STATE_BYTES = 16
"""Per parameter in float32: weight, gradient and two averages of AdamW."""
SAVED_BYTES = 12
"""Of them in a checkpoint."""
LINKS = 16
"""Neighbours of a point in the index's graph (M); twice as many on the ground level, 4 bytes each."""
PAYLOAD = 400
"""Bytes of a point's payload and its log on disk."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be trained, on what; the defaults are assumptions."""

    images: int
    model: str = "ViT-B-32"
    gpus: int = 8
    gpu: str = "H100"
    batch: int = 32_768
    """Global."""
    samples: int | None = None
    """Seen in all; None for 32 epochs."""
    text_length: int | None = None
    """Tokens per text that are computed; None for the model's context, as open_clip pads. Our trainer trims."""
    mfu: float | None = None
    """Share of the peak, recomputation not counted; None for the curve of published runs."""
    teraflops: float | None = None
    """Peak of one device; None for the data sheet's of `gpu`."""
    memory_gb: float | None = None
    decode: str = "shard"
    sample_bytes: int = SAMPLE_BYTES
    price: float = 2.5
    """Of a GPU hour."""
    storage_price: float = 0.023
    """Of a GB and month on an object store: S3's list price in 2024."""
    cache: bool = False
    """Whether nodes keep shards on their disks, so that the store is read in the first epoch only."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the plan."""

    name: str
    value: float
    unit: str
    assumption: str


@dataclass(frozen=True, slots=True)
class Cost:
    """What one sample costs. FLOPs forward and backward; bytes of activations of one rank's batch."""

    flops: int
    done: int
    """With what is computed twice."""
    parameters: int
    embed: int
    memory: int
    """Bytes of one rank."""
    checkpointing: bool


def count(text: str) -> int:
    """A number as people write it: 400M, 2.3B, 12k, 5e6. Raises ConfigError."""
    factors = {"k": 10**3, "m": 10**6, "b": 10**9}
    letter = text[-1:].lower()
    try:
        number = float(text[:-1]) * factors[letter] if letter in factors else float(text)
    except ValueError:
        number = 0
    if not 1 <= number < 1e15:
        raise ConfigError(f"{text!r}: expected a number of at least 1, such as 400M, 2.3B, 12k or 5e6")
    return round(number)


def cost(job: Job) -> Cost:
    """FLOPs and memory of a sample, counted on a model without data. Raises ConfigError for an unknown model."""
    model_cfg = resolve_config(ModelConfig(name=job.model))
    side = model_cfg["vision_cfg"].get("image_size", 224)
    side = side if isinstance(side, int) else side[0]
    length = int(model_cfg["text_cfg"].get("context_length", 77))
    if "hf_model_name" in model_cfg["text_cfg"]:
        raise ConfigError(
            f"model {job.model!r}: its text tower is Hugging Face's; plan with a config of open_clip's own"
        )
    if job.text_length is not None and not 1 <= job.text_length <= length:
        raise ConfigError(f"text length {job.text_length}: the model takes 1 to {length} tokens")
    with torch.device("meta"):
        model = instantiate(model_cfg)
    flops = _flops(model, side, job.text_length or length, length)
    parameters = sum(p.numel() for p in model.parameters())
    share, limit = ceil(job.batch / job.gpus), 1e9 * (job.memory_gb or _listed(job, MEMORY))
    held = STATE_BYTES * parameters
    memory = held + kept(model, share, side, length)
    checkpointing = memory > limit and hasattr(model, "set_grad_checkpointing")
    if checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
        memory = held + kept(model, share, side, length)
    done = flops * 4 // 3 if checkpointing else flops
    return Cost(flops, done, parameters, int(model_cfg["embed_dim"]), memory, checkpointing)


def _flops(model: nn.Module, side: int, length: int, whole: int) -> int:
    """Of a sample with a text of so many tokens; a tower that attends to all of them is counted in proportion."""
    counted = StepFlops(model)
    padded = counted.sample(side, whole)
    if length == whole:
        return padded
    trimmed = counted.sample(side, length)
    if trimmed == padded:
        raise ConfigError(f"text length {length} has no effect: this model computes all {whole} tokens")
    return trimmed


def kept(model: nn.Module, samples: int, side: int, length: int) -> int:
    """Bytes of activations that a batch of one rank keeps in bfloat16, weights left out; `model` on `meta`."""

    def forward(many: int) -> object:
        with torch.autocast("cpu", torch.bfloat16):
            pixels_BCHW = torch.empty(many, 3, side, side, device="meta")
            tokens_BL = torch.zeros(many, length, dtype=torch.int64, device="meta")
            return model.encode_image(pixels_BCHW), model.encode_text(tokens_BL)  # type: ignore[operator]

    return saved_bytes(forward, samples, model.train())


def _listed(job: Job, table: dict[str, int]) -> float:
    names = {name.lower(): name for name in table}
    if job.gpu.lower() not in names:
        raise ConfigError(
            f"gpu {job.gpu!r} is unknown; known: {', '.join(table)}; for others give --teraflops and --gpu-memory"
        )
    return float(table[names[job.gpu.lower()]])


def rate(job: Job, needs: Cost) -> tuple[float, str]:
    """Samples per second of all GPUs, and what that assumes."""
    if job.teraflops is None:
        _listed(job, MEMORY)
        peak = 1e12 * (listed_peak(job.gpu, "amp_bf16") or 0)
        source = f"{peak / 1e12:.0f} TFLOP/s per {job.gpu.upper()}, data sheet"
    else:
        peak, source = 1e12 * job.teraflops, f"{job.teraflops:g} TFLOP/s per device, as given"
    if job.mfu is not None:
        return job.gpus * peak * job.mfu / needs.flops, f"{source}; utilisation {job.mfu:g}, as given"
    share = TOP * needs.done / (needs.done + HALF)
    used = share * needs.flops / needs.done
    words = f"{source}; utilisation {used:.3f}, as in published runs of open_clip on A100"
    return job.gpus * peak * share / needs.done, words


def index_bytes(points: int, dim: int) -> tuple[int, int]:
    """(in memory, on disk) of a search index: int8 vectors and the graph; float32 vectors and payload beside them."""
    memory = points * (dim + 2 * LINKS * 4)
    return memory, memory + points * (4 * dim + PAYLOAD)


def plan(job: Job) -> list[Figure]:
    """All figures. Raises ConfigError for options that make no sense together."""
    if job.batch % job.gpus:
        raise ConfigError(f"batch {job.batch} is no multiple of {job.gpus} GPUs")
    if job.decode not in DECODE:
        raise ConfigError(f"pictures {job.decode!r}: expected one of {', '.join(DECODE)}")
    needs = cost(job)
    speed, words = rate(job, needs)
    seen = job.samples or 32 * job.images
    hours = seen / speed / 3600
    stored = job.images * job.sample_bytes
    return [
        Figure("samples seen", seen, "", f"{seen / job.images:.1f} epochs; {ceil(seen / job.batch):,} steps"),
        Figure("GFLOP per sample", needs.flops / 1e9, "", "forward and backward, counted by vlp.flops"),
        Figure("samples per second", speed, "", words),
        Figure("training time", hours / 24, "days", "evaluations, restarts and queues left out"),
        Figure("GPU hours", hours * job.gpus, "", f"{job.gpus} x {hours:,.1f} h"),
        *_of_a_rank(job, needs),
        *_of_the_data(job, speed, stored),
        *_of_the_index(job, needs),
        *_money(job, hours, stored),
    ]


def _of_a_rank(job: Job, needs: Cost) -> list[Figure]:
    limit = job.memory_gb or _listed(job, MEMORY)
    how = "with activation checkpointing" if needs.checkpointing else "without activation checkpointing"
    fits = "" if needs.memory <= 1e9 * limit else "; DOES NOT FIT: a smaller batch, optim.accumulate or FSDP"
    assumed = f"{job.batch // job.gpus} samples {how}, {limit:g} GB there{fits}"
    return [
        Figure("memory of a GPU", needs.memory / 1e9, "GB", assumed),
        Figure("a checkpoint", SAVED_BYTES * needs.parameters / 1e9, "GB", f"{needs.parameters:,} parameters, AdamW"),
    ]


def _of_the_data(job: Job, speed: float, stored: int) -> list[Figure]:
    pictures = "256 px shards" if job.decode == "shard" else "640 x 480 originals"
    read = "first epoch only, then the nodes' disks" if job.cache else "all the time; --cache: first epoch only"
    each = DECODE[job.decode]
    written = f"{SHARDING:.0f}/s each, measured; downloads left out"
    size = f"{job.sample_bytes / 1000:g} kB per pair" + (", as in LAION-400M" * (job.sample_bytes == SAMPLE_BYTES))
    return [
        Figure("cores to decode", ceil(speed / each), "cores", f"{each:.0f}/s each, {pictures}"),
        Figure("cores per GPU", speed / each / job.gpus, "cores", "our loader on AMD EPYC, measured"),
        Figure("storage of the shards", stored / 1e12, "TB", size),
        Figure("shards", ceil(job.images / 10_000), "", "10,000 samples each"),
        Figure("reading from the store", speed * job.sample_bytes / 1e9, "GB/s", read),
        Figure("core hours to write the shards", job.images / SHARDING / 3600, "", written),
    ]


def _of_the_index(job: Job, needs: Cost) -> list[Figure]:
    memory, disk = index_bytes(job.images, needs.embed)
    holds = f"all images, {needs.embed} int8 values and a graph of M {LINKS}"
    return [
        Figure("memory of an index", memory / 1e9, "GB", holds),
        Figure("disk of an index", disk / 1e9, "GB", "float32 vectors and payload beside them"),
    ]


def _money(job: Job, hours: float, stored: int) -> list[Figure]:
    months = max(1.0, hours / 730)
    return [
        Figure("price of the GPUs", hours * job.gpus * job.price, "$", f"{job.price:g} $ per GPU hour: --price"),
        Figure("price of the storage", stored / 1e9 * months * job.storage_price, "$",
               f"{job.storage_price:g} $ per GB and month, {months:.1f} months; requests and egress left out"),
    ]  # fmt: skip


def gpus() -> list[str]:
    """Names of the GPUs whose peak and memory are known."""
    return [name for name in TERAFLOPS if name in MEMORY]
