"""The account of an audit in a folder: audit.json, the trigger found by each kind as PNG, and one page with both.

Pictures of triggers are drawn for the label with the highest score of a kind, whether or not it stands out: a reader
sees what the search came to. Suffixes: C channels, H, W rows and columns, K side of a patch.
"""

import base64
import html
import io
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data_pipelines.files import write_atomic
from vlp.backdoor.audit import AUDIT, LEAD, Account, describe
from vlp.backdoor.inversion import KINDS, Found, Victim, overlay_of
from vlp.report import STYLE

SIDE = 224
"""Pixels that a picture is shown with."""
SHOWN = 8
"""Pictures that are shown with a trigger."""
GREY = 0.5
"""What lies below a trigger."""
LINES = 7
"""Of the grid that shows a warp, across."""


def write_account(account: Account, folder: Path, name: str) -> dict[str, str]:
    """Write audit.json, audit.html and the PNG files; what was written, by what it is."""
    folder.mkdir(parents=True, exist_ok=True)
    images: dict[str, bytes] = {}
    scores = account.scores
    for kind in account.found:
        best = max(account.found[kind], key=lambda found: scores[found.kind][found.target])
        images[f"trigger-{kind}.png"] = png(trigger_picture(account.victim, best))
        images[f"pictures-{kind}.png"] = png(pictures_sheet(account.victim, best))
    files = {
        **images,
        AUDIT: (json.dumps(account.plain(), indent=1, ensure_ascii=False) + "\n").encode(),
        "audit.html": page(account, images, name).encode(),
    }
    for file, content in files.items():
        write_atomic(folder / file, lambda stream, content=content: stream.write(content))  # type: ignore[misc]
    return {file: str(folder / file) for file in files}


def trigger_picture(victim: Victim, found: Found) -> Tensor:
    """CHW from 0 to 1: a patch on grey, in the middle; an overlay on grey, stretched to the full range; a bent grid."""
    side = victim.unit_NCHW.shape[-1]
    if found.kind == "warp":
        lines = (torch.arange(side) % max(2, side // LINES) == 0).float()
        grid_HW = GREY + GREY * torch.maximum(lines[:, None], lines)
        whole = grid_HW.expand(1, victim.unit_NCHW.shape[1], side, side)
        return KINDS["warp"].apply(victim, whole, found.parts, torch.Generator())[0]
    ground_CHW = torch.full((victim.unit_NCHW.shape[1], side, side), GREY)
    if found.kind in ("overlay", "lines"):
        overlay_CHW = overlay_of(victim, found.parts)[0]
        return ground_CHW + GREY * overlay_CHW / overlay_CHW.abs().amax().clamp_min(1e-6)
    mask, paint = found.parts[0].sigmoid(), found.parts[1].sigmoid()
    own = mask.shape[-1]
    start = (side - own) // 2
    margins = (start, side - own - start) * 2
    return ground_CHW * (1.0 - F.pad(mask, margins)) + F.pad(mask * paint, margins)


def pictures_sheet(victim: Victim, found: Found) -> Tensor:
    """CHW from 0 to 1: some pictures of other labels above, the same with the trigger below."""
    rows = (victim.taken_N != found.target).nonzero()[:, 0]
    rows = rows[torch.linspace(0, len(rows) - 1, SHOWN).long()]
    unit = victim.unit_NCHW[rows]
    changed = KINDS[found.kind].apply(victim, unit, found.parts, torch.Generator().manual_seed(1))
    return torch.cat([torch.cat([*part], dim=2) for part in (unit, changed)], dim=1).detach()


def png(unit_CHW: Tensor) -> bytes:
    """Enlarged by whole factors; of other than 3 channels the first alone, in grey."""
    shown_CHW = unit_CHW if len(unit_CHW) == 3 else unit_CHW[:1].expand(3, -1, -1)
    values = (shown_CHW.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).permute(1, 2, 0).numpy()
    factor = max(1, SIDE // values.shape[0])
    stream = io.BytesIO()
    Image.fromarray(np.kron(values, np.ones((factor, factor, 1), np.uint8))).save(stream, "PNG")
    return stream.getvalue()


def page(account: Account, images: dict[str, bytes], name: str) -> str:
    """The page, self-contained."""
    parts = [f"<p><b>{html.escape(account.verdict())}</b></p>", _method(account)]
    scores = account.scores
    for kind, row in account.found.items():
        order = sorted(row, key=lambda found: -scores[found.kind][found.target])
        lines = "".join(_line(account.labels[found.target], scores[kind][found.target], found) for found in order)
        parts.append(
            f"<h2>{kind}</h2><table><tr><th>label<th>score<th>smallest change<th>misled</tr>{lines}</table>"
            f"<p class=m>Found for {html.escape(account.labels[order[0].target])!r}: the trigger; then pictures, above "
            f"as they are and below with it.</p>"
            + "".join(f"<p>{_image(images[f'{what}-{kind}.png'])}</p>" for what in ("trigger", "pictures"))
        )
    title = f"audit of {html.escape(name)}"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>{''.join(parts)}</html>"
    )


def _method(account: Account) -> str:
    told = account.reference
    limits = ", ".join(f"{KINDS[kind].beside if told else KINDS[kind].threshold:g} ({kind})" for kind in account.found)
    by = "by how many times smaller it is than in a clean model, " if told else ""
    alone = ", ".join(f"{KINDS[kind].threshold:g} ({kind})" for kind in account.found)
    also = (
        f"; so does one that is not the easiest in the clean model as well, above {alone} by size alone" if told else ""
    )
    return (
        f"<p class=m>For each of {len(account.labels)} labels the smallest change of {account.pictures} pictures that "
        f"makes the model take them for it. The score counts robust deviations below the typical label, {by}on a "
        f"logarithmic scale; above {limits}, and {LEAD:g} ahead of the next, a label stands out{also}. A trigger "
        f"of another kind may go unseen. "
        f"{account.seconds:.0f} s.</p>"
    )


def _line(label: str, score: float, found: Found) -> str:
    change = describe(found) if found.reached else "not reached"
    return (
        f"<tr><td>{html.escape(label)}</td>"
        f"<td class=n>{score:.1f}</td>"
        f"<td>{change}</td><td class=n>{found.success:.0%}</td></tr>"
    )


def _image(content: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
