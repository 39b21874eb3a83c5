"""Pictures of numbers: the curves of one run, and of several laid over each other."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

Rows = Sequence[Mapping[str, float]]
"""Lines of metrics.jsonl or evals.jsonl; each has its `step`."""

COLOURS = ("#2563c9", "#d9622b", "#2a9d5c", "#8e5bd0", "#c2335a", "#158a9e", "#8a6d1d", "#5b6475")
SHARES = re.compile(r"(R@\d+|top\d+|mean_per_class_top1|mAP|accuracy|chance_R@1|largest_class)$")
"""Names of metrics that are fractions of one."""
PANELS = (
    ("loss", "training loss"),
    ("lr", "learning rate"),
    ("grad_norm", "gradient norm, before clipping"),
    ("logit_scale", "logit scale"),
    ("samples_per_second", "samples per second"),
    ("data_wait", "waiting for data, share of the time"),
    ("mfu", "model FLOPs utilisation"),
)
"""Key in metrics.jsonl -> title."""
SMOOTH = 60
"""Points from which a curve is drawn with its running mean."""


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which R@5 comes before R@10."""
    parts = re.findall(r"\d+|\D+", name)
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts)


def is_share(name: str) -> bool:
    """Whether a metric is a fraction, shown in per cent."""
    return bool(SHARES.search(name))


def training_curves(metrics: Rows) -> Figure:
    """Every quantity of PANELS that was logged, over the steps."""
    panels = [(key, title) for key, title in PANELS if any(key in row for row in metrics)] or [PANELS[0]]
    figure, axes = _grid(len(panels))
    for axis, (key, title) in zip(axes, panels, strict=True):
        axis.set_title(title, fontsize=10)
        _line(axis, _points(metrics, key), COLOURS[0], mean=key not in ("lr", "logit_scale"))
        _dress(axis, "step")
        if key in ("data_wait", "mfu"):
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
            axis.set_ylim(bottom=0)
        if key == "samples_per_second":
            axis.set_ylim(bottom=0)
    return figure


def eval_curves(evals: Rows) -> Figure | None:
    """Every fraction among the metrics, a panel per task and direction; None where there is none."""
    groups: dict[str, list[str]] = {}
    for name in sorted({key for row in evals for key in row if is_share(key)}, key=natural):
        if not PurePosixPath(name).name.startswith(("chance", "largest")):
            groups.setdefault(str(PurePosixPath(name).parent), []).append(name)
    if not groups:
        return None
    figure, axes = _grid(len(groups))
    for axis, (group, names) in zip(axes, groups.items(), strict=True):
        axis.set_title(group, fontsize=10)
        for colour, name in zip(COLOURS, names, strict=False):
            _line(axis, _points(evals, name), colour, PurePosixPath(name).name, marker="o")
        _dress(axis, "step")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8, frameon=False)
    return figure


def compare_curves(runs: Mapping[str, tuple[Rows, Rows]], names: Sequence[str]) -> Figure:
    """Loss and the metrics `names` of several runs, over the steps (above) and over the seconds of training (below)."""
    figure, axes = _grid(2 * (1 + len(names)), columns=1 + len(names))
    for row, unit in enumerate(("step", "seconds")):
        for column, key in enumerate(("loss", *names)):
            axis = axes[row * (1 + len(names)) + column]
            for colour, (run, (metrics, evals)) in zip(COLOURS, runs.items(), strict=False):
                if key == "loss":
                    points = [(_at(item, unit, metrics), item["loss"]) for item in metrics if "loss" in item]
                    _line(axis, points, colour, run, mean=True)
                else:
                    points = [(_at(item, unit, metrics), item[key]) for item in evals if key in item]
                    _line(axis, points, colour, run, marker="o")
            axis.set_title("training loss" if key == "loss" else key, fontsize=10)
            _dress(axis, "step" if unit == "step" else "seconds of training")
            if is_share(key):
                axis.yaxis.set_major_formatter(PercentFormatter(1.0))
                axis.set_ylim(bottom=0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(3, len(labels)), frameon=False, fontsize=9)
    return figure


def _at(item: Mapping[str, float], unit: str, metrics: Rows) -> float:
    """Place of a row on the axis: its step, or the seconds of training that its step had taken."""
    if unit == "step" or unit in item:
        return item[unit]
    timed = [row for row in metrics if "seconds" in row]
    if not timed:
        return math.nan
    return float(np.interp(item["step"], [row["step"] for row in timed], [row["seconds"] for row in timed]))


def _points(rows: Rows, key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if key in row]


def _line(
    axis: Axes,
    points: Sequence[tuple[float, float]],
    colour: str,
    label: str = "",
    marker: str = "",
    mean: bool = False,
) -> None:
    xs, ys = [x for x, _ in points], np.array([y for _, y in points], dtype=float)
    if not mean or len(points) < SMOOTH:
        single = "o" if len(points) == 1 else marker
        axis.plot(xs, ys, color=colour, label=label, linewidth=1.6, marker=single, markersize=3.5)
        return
    axis.plot(xs, ys, color=colour, linewidth=0.8, alpha=0.3)
    window = max(3, len(points) // 30)
    padded = np.pad(ys, (window // 2, window - 1 - window // 2), mode="edge")
    axis.plot(xs, np.convolve(padded, np.full(window, 1 / window), "valid"), color=colour, label=label, linewidth=1.8)


def _grid(count: int, columns: int = 0) -> tuple[Figure, list[Axes]]:
    columns = columns or min(count, 4 if count > 6 else 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.7 * columns if columns > 1 else 5.5, 2.7 * rows + 0.2), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.axis("off")
    return figure, axes[:count]


def _dress(axis: Axes, unit: str) -> None:
    axis.set_xlabel(unit, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.margins(x=0.02)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.ticklabel_format(scilimits=(-3, 5))
