"""The page of a scan: the top suspects as pictures with their captions, and how the signs are distributed."""

import base64
import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data_pipelines.errors import BadSample
from data_pipelines.images import flatten, open_checked, upright
from data_pipelines.parquet import read_columns
from data_pipelines.reader import Sample, open_shards
from vlp.backdoor.scan import SCORES
from vlp.embed_files import own_caption
from vlp.report import BAD, INK, MUTED, STYLE

PAGE = "report.html"
ACROSS = 8


def write_page(data: Path, out: Path, account: Mapping[str, Any]) -> Path:
    """report.html, suspects.png and signs.png below `out`, from the account of `scan.scan`."""
    suspects = {item["key"]: item for item in account["suspects"]}
    figures = {"suspects": _sheet(suspects, _read(data, frozenset(suspects))), "signs": _curves(out, account)}
    images = []
    for name, figure in figures.items():
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=110, facecolor="white")
        (out / f"{name}.png").write_bytes(stream.getvalue())
        encoded = base64.b64encode(stream.getvalue()).decode()
        images.append(f'<h2>{name}</h2><img alt="{name}" src="data:image/png;base64,{encoded}">')
    facts = {
        "shards": account["data"],
        "pictures": f"{account['pictures']:,}",
        "flagged": f"{account['flagged']:,} ({account['share']:.2%})",
        "signs looked for": ", ".join(account["methods"]),
        "model": f"{account['made_of']['model']} ({account['made_of']['weights_sha256'][:12]})",
    }
    rows = "".join(f"<tr><td class=m>{name}</td><td>{html.escape(value)}</td></tr>" for name, value in facts.items())
    note = (
        "<p>A flag is a reason to look, not a proof; a sample without one may be planted all the same. Below are the "
        "most unusual samples by all signs together; red frames are flagged.</p>"
    )
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>scan</title><style>{STYLE}</style><h1>Scan for planted samples</h1><table>{rows}</table>{note}"
        f"{''.join(images)}</html>"
    )
    (out / PAGE).write_text(page, encoding="utf-8")
    return out / PAGE


def _read(data: Path, keys: frozenset[str]) -> dict[str, Sample]:
    found = {}
    for shard in open_shards(data):
        for row in range(len(shard)):
            if shard.key(row) in keys:
                found[shard.key(row)] = shard.read(row)
    return found


def _sheet(suspects: Mapping[str, Mapping[str, Any]], samples: Mapping[str, Sample]) -> Figure:
    down = max(1, -(-len(suspects) // ACROSS))
    figure = Figure(figsize=(1.5 * ACROSS, 1.9 * down), layout="constrained")
    axes: list[Axes] = list(figure.subplots(down, ACROSS, squeeze=False).flat)
    for axis in axes:
        axis.axis("off")
    for axis, (key, item) in zip(axes, suspects.items(), strict=False):
        axis.axis("on")
        axis.set_xticks([])
        axis.set_yticks([])
        try:
            axis.imshow(flatten(upright(open_checked(samples[key].image))))
        except (BadSample, KeyError):
            axis.text(0.5, 0.5, "cannot be read", ha="center", fontsize=8)
        caption = own_caption(samples[key]).replace("$", r"\$") if key in samples else ""
        axis.set_title(f"{caption[:24]}\n{item['suspicion']:.2f}", fontsize=7, color=INK)
        for spine in axis.spines.values():
            spine.set_color(BAD if item["flagged"] else MUTED)
            spine.set_linewidth(2.0)
    return figure


def _curves(out: Path, account: Mapping[str, Any]) -> Figure:
    names = account["methods"]
    columns = read_columns(out / SCORES, names)
    figure = Figure(figsize=(3.2 * len(names), 2.4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False).flat, names, strict=True):
        axis.hist(columns.column(name).to_numpy(), bins=60, color=MUTED, log=True)
        axis.set_title(name, fontsize=9, color=INK)
        axis.tick_params(labelsize=7)
    return figure
