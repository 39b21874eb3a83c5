"""`vlp plan`."""

import click

from data_pipelines.console import command, emit, json_option
from data_pipelines.errors import ConfigError


@command(
    epilog="""Examples:

\b
  vlp plan --images 400M --model ViT-L-14 --gpus 256
  vlp plan --images 2.3B --model ViT-H-14 --gpus 824 --gpu a100 --gpu-memory 40 --batch 79104 --samples-seen 34B
  vlp plan --images 12M --model ViT-B-16 --gpus 8 --epochs 30 --mfu 0.35 --price 1.9 --json"""
)
@click.option("--images", required=True, help="Pairs in the data set, as 400M.")
@click.option("--model", default="ViT-B-32", show_default=True, help="A config of ours or of open_clip.")
@click.option("--gpus", default=8, show_default=True, type=click.IntRange(min=1))
@click.option("--gpu", default="H100", show_default=True, help="Kind of GPU, as h100, a100, l40s.")
@click.option("--gpu-memory", type=click.FloatRange(0, min_open=True), help="GB; default by the kind.")
@click.option("--teraflops", type=click.FloatRange(0, min_open=True), help="Peak of one device; default by the kind.")
@click.option("--batch", default="32768", show_default=True, help="Global batch size.")
@click.option("--epochs", type=click.FloatRange(0, min_open=True), help="Passes over the data; default 32.")
@click.option("--samples-seen", help="Instead of --epochs, as 13B.")
@click.option("--text-length", type=click.IntRange(min=1), help="Tokens computed per text; default the whole context.")
@click.option("--mfu", type=click.FloatRange(0, 1, min_open=True), help="Share of the peak; default as published runs.")
@click.option(
    "--pictures", default="shard", show_default=True, type=click.Choice(["shard", "original"]), help="Stored size."
)
@click.option("--kb-per-sample", default=25.0, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--cache", is_flag=True, help="The nodes' disks hold the shards after the first epoch.")
@click.option("--price", default=2.5, show_default=True, type=click.FloatRange(0), help="$ per GPU hour.")
@click.option("--storage-price", default=0.023, show_default=True, type=click.FloatRange(0), help="$ per GB and month.")
@json_option
def plan(
    images: str, model: str, gpus: int, gpu: str, gpu_memory: float | None, teraflops: float | None, batch: str,
    epochs: float | None, samples_seen: str | None, text_length: int | None, mfu: float | None, pictures: str,
    kb_per_sample: float, cache: bool, price: float, storage_price: float, as_json: bool,
) -> None:  # fmt: skip
    """Say what a training run would take: time, memory, cores, storage, bandwidth, index, money; trains nothing.

    Every line names what it assumes. The README's section Scale says how well it tells published runs.
    """
    from vlp import scale

    if epochs is not None and samples_seen is not None:
        raise ConfigError("--epochs and --samples-seen say the same thing: give one of them")
    pairs = scale.count(images)
    seen = scale.count(samples_seen) if samples_seen else round(pairs * epochs) if epochs else None
    job = scale.Job(
        images=pairs, model=model, gpus=gpus, gpu=gpu, batch=scale.count(batch), samples=seen, text_length=text_length,
        mfu=mfu, teraflops=teraflops, memory_gb=gpu_memory, decode=pictures, sample_bytes=round(1000 * kb_per_sample),
        price=price, storage_price=storage_price, cache=cache,
    )  # fmt: skip
    figures = scale.plan(job)
    found = {line.name: {"value": line.value, "unit": line.unit, "assumption": line.assumption} for line in figures}
    lines = [
        f"{line.name:31} {line.value:>16,.{_digits(line.value)}f} {line.unit:6} {line.assumption}" for line in figures
    ]
    emit({"model": model, "gpus": gpus, "figures": found}, as_json, lines)


def _digits(value: float) -> int:
    """Three significant ones, none behind the point for whole numbers."""
    return 0 if value >= 100 or value == round(value) else 1 if value >= 10 else 3
