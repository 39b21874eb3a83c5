"""report.html of a run, self-contained, with the same pictures as PNG files beside it.

Curves of training and of the evaluations, a sheet of text queries with the pictures they find, and a sheet of
pictures with the captions they find. Queries are drawn at random under a fixed seed, so mistakes appear as often as
they happen.
"""

import base64
import html
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from data_pipelines.images import MAX_PIXELS
from data_pipelines.ledger import Ledger
from data_pipelines.shard_set import Train
from data_pipelines.stream import iterate
from vlp.bundle import Bundle, load_bundle
from vlp.curves import eval_curves, is_share, natural, training_curves
from vlp.infer import encode_pixels, encode_texts
from vlp.runlog import RunLog

GOOD, BAD, INK, MUTED = "#1a7f4b", "#c0392b", "#1f2430", "#7a8194"
QUERIES, PICTURES, SHOWN = 9, 12, 6
MOST = 5000
"""Pictures that queries search; all of a large set would not fit into memory."""
STYLE = """
:root { color-scheme: light dark; --line: #d9dce3; --muted: #6b7280; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .25rem .9rem .25rem 0; text-align: left; }
td.n { text-align: right; font-variant-numeric: tabular-nums; } tr { border-bottom: 1px solid var(--line); }
img { max-width: 100%; background: #fff; border-radius: 6px; } code { font-size: .9em; } .m { color: var(--muted); }
"""


@dataclass(frozen=True, slots=True)
class Gallery:
    """Pictures and captions of one data set with their similarities."""

    pixels: list[Tensor]
    """N pictures, uint8 CHW of the model's size."""
    own: list[tuple[str, ...]]
    """Captions of each picture."""
    texts: list[str]
    """T distinct captions."""
    scores_NT: Tensor


def write_report(folder: Path, data: Train | Path | None = None, commands: Sequence[str] = ()) -> Path:
    """Write report.html into a finished run. `data`: shards for the sheets; default the recipe's first evaluation."""
    runlog = RunLog(folder)
    bundle = load_bundle(folder)
    evals = bundle.provenance.recipe.get("evals") or []
    data = data or (evals[0]["data"] if evals else None)
    figures = {"curves": training_curves(runlog.rows("metrics.jsonl"))}
    evaluation = eval_curves(runlog.rows("evals.jsonl"))
    if evaluation is not None:
        figures["evaluation"] = evaluation
    if data is not None:
        gallery = load_gallery(bundle, data)
        if gallery is not None:
            figures |= {"text_queries": text_sheet(gallery), "picture_queries": picture_sheet(gallery)}
    images = {}
    for name, figure in figures.items():
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=110, facecolor="white")
        images[name] = stream.getvalue()
        (folder / f"{name}.png").write_bytes(images[name])
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    page = _page(bundle, summary, images, str(data) if data else "", commands or summary.get("commands", []))
    (folder / "report.html").write_text(page, encoding="utf-8")
    return folder / "report.html"


def load_gallery(bundle: Bundle, data: Train | Path) -> Gallery | None:
    """Decode and embed the first MOST pictures with a caption; None where there is none."""
    samples = list(
        islice(iterate(data, bundle.image, Ledger(max_share=1.0, max_in_a_row=sys.maxsize), MAX_PIXELS), MOST)
    )
    if not samples:
        return None
    texts = sorted({caption for sample in samples for caption in sample.captions})
    image_ND = encode_pixels(bundle, torch.stack([sample.pixels for sample in samples]))
    return Gallery(
        pixels=[sample.pixels for sample in samples],
        own=[sample.captions for sample in samples],
        texts=texts,
        scores_NT=image_ND @ encode_texts(bundle, texts).T,
    )


def text_sheet(gallery: Gallery) -> Figure:
    """Random captions as queries, one row each, with the pictures they rank highest."""
    chosen = np.random.default_rng(0).permutation(len(gallery.texts))[:QUERIES]
    shown = min(SHOWN, len(gallery.pixels))
    figure = Figure(figsize=(1.25 * shown + 3.2, 1.42 * len(chosen) + 0.5), layout="constrained")
    grid = figure.subplots(len(chosen), shown + 1, squeeze=False, width_ratios=[2.4, *[1] * shown])
    for axes, number in zip(grid, chosen, strict=True):
        query = gallery.texts[number]
        _caption(axes[0], query)
        for axis, row in zip(axes[1:], gallery.scores_NT[:, number].topk(shown).indices.tolist(), strict=True):
            _picture(axis, gallery.pixels[row], GOOD if query in gallery.own[row] else BAD)
            axis.set_title(f"{gallery.scores_NT[row, number]:.2f}", fontsize=8, color=MUTED, pad=2)
    figure.suptitle("text query  →  nearest pictures (green = carries this caption)", fontsize=10, color=INK)
    return figure


def picture_sheet(gallery: Gallery) -> Figure:
    """Random pictures, each with the captions it ranks highest and their cosines."""
    chosen = np.random.default_rng(1).permutation(len(gallery.pixels))[:PICTURES]
    rows = -(-len(chosen) // 3)
    figure = Figure(figsize=(12, 1.75 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, 6, squeeze=False, width_ratios=[1, 2] * 3)
    for axis in grid.flat:
        axis.axis("off")
    for place, row in enumerate(chosen.tolist()):
        left, right = grid[place // 3][place % 3 * 2 : place % 3 * 2 + 2]
        top = gallery.scores_NT[row].topk(min(5, len(gallery.texts)))
        found = [gallery.texts[number] for number in top.indices.tolist()]
        _picture(left, gallery.pixels[row], GOOD if found[0] in gallery.own[row] else BAD)
        for line, (text, score) in enumerate(zip(found, top.values.tolist(), strict=True)):
            hit = text in gallery.own[row]
            weight, colour = ("bold", GOOD) if hit else ("normal", INK)
            right.text(0, 0.9 - 0.17 * line, f"{score:.2f}  {_short(text)}", fontsize=8.5, weight=weight, color=colour)
        if not set(found) & set(gallery.own[row]):
            right.text(0, 0.0, f"is: {_short(gallery.own[row][0])}", fontsize=8, color=BAD, style="italic")
    figure.suptitle("picture  →  nearest captions (bold green = right)", fontsize=10, color=INK)
    return figure


def _caption(axis: Axes, text: str) -> None:
    axis.axis("off")
    axis.text(1, 0.5, _short(text), ha="right", va="center", fontsize=10, color=INK, wrap=True)


def _visible(pixels_CHW: Tensor) -> Tensor:
    """CHW uint8 to look at: RGB as it is; of other bands the first three, or one in grey, over their whole range."""
    if len(pixels_CHW) == 3 and pixels_CHW.dtype == torch.uint8:
        return pixels_CHW
    bands = (pixels_CHW[:3] if len(pixels_CHW) > 2 else pixels_CHW[:1].expand(3, -1, -1)).float()
    low, high = bands.amin((1, 2), keepdim=True), bands.amax((1, 2), keepdim=True)
    return ((bands - low) / (high - low).clamp_(min=1e-6) * 255).to(torch.uint8)


def _picture(axis: Axes, pixels_CHW: Tensor, frame: str) -> None:
    axis.axis("on")
    axis.imshow(_visible(pixels_CHW).permute(1, 2, 0).numpy())
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color(frame)
        spine.set_linewidth(2.5)


def _short(text: str, length: int = 34) -> str:
    plain = text.replace("$", r"\$")
    return plain if len(plain) <= length else plain[: length - 1] + "…"


def _page(
    bundle: Bundle, summary: Mapping[str, Any], images: Mapping[str, bytes], data: str, commands: Sequence[str]
) -> str:
    provenance = bundle.provenance
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td class=n>{_figure(name, value)}</td></tr>"
        for name, value in sorted(summary["metrics"].items(), key=lambda item: natural(item[0]))
    )
    facts = {
        "trained": f"{summary['steps']} steps, {summary['samples']:,} samples, {summary['train_seconds']} s",
        "model": f"{summary['parameters']:,} parameters, {bundle.image.size} px, {bundle.dim} dimensions",
        "data": ", ".join(f"{name} ({digest[:12]})" for name, digest in provenance.data.items()),
        "code": f"vlp {provenance.vlp_version} {provenance.revision}, {provenance.created}",
        "pictures below": data,
    }
    details = "".join(f"<tr><td class=m>{key}</td><td>{html.escape(value)}</td></tr>" for key, value in facts.items())
    pictures = "".join(
        f'<h2>{name.replace("_", " ")}</h2><img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for name, png in images.items()
    )
    todo = "".join(f"<li><code>{html.escape(line)}</code></li>" for line in commands)
    following = f"<h2>go on</h2><ul>{todo}</ul>" if todo else ""
    title = html.escape(bundle.name)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1><table>{details}</table>"
        f"<h2>metrics</h2><table>{rows}</table>{pictures}{following}</html>"
    )


def _figure(name: str, value: float) -> str:
    return f"{100 * value:.1f} %" if is_share(name) else f"{value:,.1f}"
