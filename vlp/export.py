"""Handing a model over: the open_clip folder, with a model card."""

import shutil
import tempfile
from pathlib import Path

from data_pipelines.errors import BundleError
from vlp.bundle import Bundle, write_open_clip

CARD = """---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags: [clip]
---
# {name}

Image-text model with {dim} dimensions, {size} px input, trained with vlp {version} for {steps} steps.

```python
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")
tokenizer = open_clip.get_tokenizer("local-dir:{folder}")
```
"""


def export_open_clip(bundle: Bundle, out: Path) -> Path:
    """Write the folder whole or not at all; its weights file is also what open_clip takes as `pretrained=FILE`.

    Raises BundleError when `out` exists and is not empty, and for a model that open_clip has no words for.
    """
    if channels := bundle.model_cfg["vision_cfg"].get("channels"):
        raise BundleError(
            f"{bundle.name}: open_clip builds its own image towers for RGB alone, this one takes {channels} channels; "
            "only a timm image tower (vision_cfg.timm_model_name) of other channels can be exported"
        )
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BundleError(f"--out {out} exists and is not empty: choose a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        temp = Path(scratch) / "export"
        temp.mkdir()
        write_open_clip(bundle, temp, out)
        card = CARD.format(
            name=bundle.name,
            dim=bundle.dim,
            size=bundle.image.size,
            version=bundle.provenance.vlp_version,
            steps=bundle.provenance.steps,
            folder=out,
        )
        (temp / "README.md").write_text(card, encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        temp.rename(out)
    return out
