"""Handing a model over as a folder: open_clip's, transformers' or ONNX's. Each is written whole or not at all."""

import shutil
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from data_pipelines.errors import BundleError
from vlp.bundle import Bundle, write_open_clip

FORMATS = ("open_clip", "hf", "onnx")

CARD = """---
library_name: {library}
pipeline_tag: zero-shot-image-classification
tags: [clip]
---
# {name}

Image-text model with {dim} dimensions, {size} px input, trained with vlp {version} for {steps} steps.

```python
{use}
```
"""

USE_OPEN_CLIP = """import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")
tokenizer = open_clip.get_tokenizer("local-dir:{folder}")"""


def export(bundle: Bundle, form: str, out: Path) -> dict[str, Any]:
    """Write `out` in one of FORMATS; what to tell the user: `out`, `use` (code) and, where checked, differences.

    Raises BundleError when `out` is not empty, when the format cannot express the model, or when what was written does
    not give the features of the bundle; nothing is left behind then.
    """
    if form == "open_clip":
        return _publish(bundle, out, "open_clip", lambda folder, final: _open_clip(bundle, folder, final))
    module = import_module(f"vlp.export_{form}")
    return _publish(bundle, out, module.LIBRARY, lambda folder, final: module.write(bundle, folder, final))


def export_open_clip(bundle: Bundle, out: Path) -> Path:
    """The open_clip folder, loadable as `local-dir:`; its weights file is what open_clip takes as `pretrained=FILE`."""
    return Path(export(bundle, "open_clip", out)["out"])


def _open_clip(bundle: Bundle, folder: Path, final: Path) -> dict[str, Any]:
    if channels := bundle.model_cfg["vision_cfg"].get("channels"):
        raise BundleError(
            f"{bundle.name}: open_clip builds its own image towers for RGB alone, this one takes {channels} channels; "
            "only a timm image tower (vision_cfg.timm_model_name) of other channels can be exported"
        )
    write_open_clip(bundle, folder, final)
    return {"use": USE_OPEN_CLIP.format(folder=final)}


def _publish(bundle: Bundle, out: Path, library: str, write: Callable[[Path, Path], dict[str, Any]]) -> dict[str, Any]:
    """Run `write(temporary folder, final folder)`, add a model card, rename."""
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BundleError(f"--out {out} exists and is not empty: choose a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        temp = Path(scratch) / "export"
        temp.mkdir()
        result = write(temp, out)
        card = CARD.format(
            library=library,
            name=bundle.name,
            dim=bundle.dim,
            size=bundle.image.size,
            version=bundle.provenance.vlp_version,
            steps=bundle.provenance.steps,
            use=result["use"],
        )
        (temp / "README.md").write_text(card, encoding="utf-8")
        for path in temp.iterdir():
            if path.is_file():
                path.chmod(0o644)  # safetensors makes its files 0600, and another user may be the one who serves them
        if out.exists():
            shutil.rmtree(out)
        temp.rename(out)
    return {"out": str(out), **result}
