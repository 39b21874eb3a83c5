"""Where the time of a training step goes: the real step, with the clock of vlp.phases running.

What no phase covers is shown as `other`; the phases sum to the wall time of the step. On a GPU every change of phase
waits for the device, so the parts are true and their sum is somewhat longer than an undisturbed step.
"""

import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from data_pipelines.batch import Batch
from data_pipelines.errors import ConfigError
from vlp import distributed
from vlp.flops import device_peak, mfu
from vlp.frozen import FeatureLoader
from vlp.launch import local_ranks
from vlp.models import locking
from vlp.phases import OTHER, PHASES, Recorder, phase, recording
from vlp.recipe import Recipe, dump
from vlp.run import Run, prepare
from vlp.step import train_step

RECIPE, RESULT, PICTURE, TRACE = "profiled.yaml", "profile.json", "profile.png", "trace.json"
WARM_UP, TRACED = 3, 2
"""Steps before the clock is read, and steps in the trace; those are not in the figures, for tracing costs time."""
COLOURS = dict(
    zip(
        (*PHASES, OTHER),
        ("#c2335a", "#e08a3c", "#2563c9", "#6ba3e8", "#8a6d1d", "#8e5bd0", "#2a9d5c", "#158a9e", "#b0b7c3", "#d9dce3"),
        strict=True,
    )
)


def profile(recipe: Recipe, folder: Path, steps: int = 20, trace: bool = False) -> dict[str, Any]:
    """Take `steps` training steps and write profile.json, profile.png and, if asked, trace.json; figures of rank 0.

    The weights are thrown away. Empty on ranks above 0. Raises ConfigError for fewer than one step.
    """
    if steps < 1:
        raise ConfigError(f"--steps {steps}: give at least 1")
    folder.mkdir(parents=True, exist_ok=True)
    if distributed.env_rank() == 0:
        (folder / RECIPE).write_text(dump(recipe), encoding="utf-8")
    command = ["profile", str(folder / RECIPE), "--steps", str(steps), "--out", str(folder), *["--trace"] * trace]
    with local_ranks(recipe.run.processes, folder, False, command), distributed.left_at_the_end():
        run = prepare(recipe, folder)
        locking.set_training(run.model)
        if isinstance(run.loader, FeatureLoader):
            run.loader.fill(lambda _: None)
        batches = iter(run.loader)
        recorder = Recorder(run.device)
        with recording(recorder):
            recorder.step()
            for _ in range(WARM_UP + steps):
                batch = _step(run, batches)
                recorder.step()
        if trace:
            _trace(run, batches, folder)
        if distributed.rank() > 0:
            return {}
        result = _figures(run, batch, recorder.rows[1 + WARM_UP :])
    (folder / RESULT).write_text(json.dumps(result, indent=2), encoding="utf-8")
    stream = io.BytesIO()
    draw(result).savefig(stream, format="png", dpi=110, facecolor="white")
    (folder / PICTURE).write_bytes(stream.getvalue())
    files = [RESULT, PICTURE, *[TRACE] * trace]
    return {**result, "files": [str(folder / name) for name in files]}


def _step(run: Run, batches: Any) -> Batch:
    with phase("data"):
        batch: Batch = next(batches)
    train_step(run, batch)
    return batch


def _trace(run: Run, batches: Any, folder: Path) -> None:
    """A Chrome trace (chrome://tracing, perfetto.dev) of TRACED steps with the phases as named ranges."""
    if distributed.rank() > 0:
        for _ in range(TRACED):
            _step(run, batches)
        return
    with torch.profiler.profile() as profiler, recording(Recorder(run.device, trace=True)):
        for _ in range(TRACED):
            _step(run, batches)
    profiler.export_chrome_trace(str(folder / TRACE))


def _figures(run: Run, batch: Batch, rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    totals = [sum(row.values()) for row in rows]
    mean = statistics.fmean(totals)
    names = [name for name in (*PHASES, OTHER) if any(name in row for row in rows)]
    seconds = {name: statistics.fmean(row.get(name, 0.0) for row in rows) for name in names}
    speed = len(batch.keys) / mean
    result: dict[str, Any] = {
        "description": run.recipe.description,
        "device": torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else str(run.device),
        "ranks": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "precision": run.recipe.run.precision,
        "batch_per_rank": len(batch.keys),
        "side": batch.pixels.shape[-1],
        "steps": len(rows),
        "step_seconds": {"mean": mean, "median": statistics.median(totals), "min": min(totals), "max": max(totals)},
        "samples_per_second": speed * distributed.world_size(),
        "phases": {name: {"seconds": value, "share": value / mean} for name, value in seconds.items()},
        "rows": [dict(row) for row in rows],
    }
    if batch.image_features is None:  # with frozen trunks there is next to nothing to compute
        sample = run.flops.sample_of(batch)
        peak = device_peak(run.device, run.recipe.run.precision)
        result |= {"sample_flops": sample, "peak_flops": peak.flops, "peak_source": peak.source}
        result["mfu"] = mfu(speed, sample, peak)
    return result


def draw(result: Mapping[str, Any]) -> Figure:
    """The steps as stacked bars, their mean as one, and the same as a table."""
    phases: Mapping[str, Mapping[str, float]] = result["phases"]
    figure = Figure(figsize=(11, 5), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[1, 3], width_ratios=[2, 1])
    mean, steps, table = (figure.add_subplot(place) for place in (grid[0, :], grid[1, 0], grid[1, 1]))
    left = 0.0
    for name, value in phases.items():
        width = 1e3 * value["seconds"]
        mean.barh(0, width, left=left, color=COLOURS[name], height=0.8)
        if value["share"] > 0.06:
            ink = "black" if name in ("log", OTHER) else "white"
            mean.text(
                left + width / 2,
                0,
                f"{name}\n{100 * value['share']:.0f} %",
                ha="center",
                va="center",
                color=ink,
                fontsize=8,
            )
        left += width
    mean.set(yticks=[], xlim=(0, left), xlabel="milliseconds, mean step")
    places = range(1, len(result["rows"]) + 1)
    floor = [0.0] * len(places)
    for name in phases:
        heights = [1e3 * row.get(name, 0.0) for row in result["rows"]]
        steps.bar(places, heights, bottom=floor, color=COLOURS[name], width=0.9)
        floor = [below + height for below, height in zip(floor, heights, strict=True)]
    steps.set(xlabel="step", ylabel="milliseconds")
    for axis in (mean, steps):
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(labelsize=8)
    table.axis("off")
    for line, (name, value) in enumerate(phases.items()):
        y = 0.97 - 0.09 * line
        table.text(0.0, y, "■", color=COLOURS[name], fontsize=11, va="center")
        table.text(0.08, y, name, fontsize=9, va="center")
        table.text(0.72, y, f"{1e3 * value['seconds']:,.1f} ms", fontsize=9, va="center", ha="right")
        table.text(1.0, y, f"{100 * value['share']:.1f} %", fontsize=9, va="center", ha="right")
    figure.suptitle(headline(result), fontsize=10)
    return figure


def headline(result: Mapping[str, Any]) -> str:
    """Step time, speed and utilisation in one line."""
    total = result["step_seconds"]
    line = (
        f"{1e3 * total['mean']:,.1f} ms a step ({1e3 * total['min']:,.1f} to {1e3 * total['max']:,.1f}), "
        f"{result['samples_per_second']:,.0f} samples/s, {result['ranks']} rank(s) on {result['device']}, "
        f"{result['batch_per_rank']} x {result['side']} px, {result['precision']}"
    )
    return f"{line}, MFU {100 * result['mfu']:.1f} % (peak {result['peak_source']})" if "mfu" in result else line
