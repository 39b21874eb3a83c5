"""Makes `import torchvision` succeed beside a torch it was not compiled for; call before open_clip or timm is imported.

Why: the torchvision wheel on the ordinary package index is built for CUDA. Beside a CPU-only torch its compiled library
cannot be loaded, which torchvision itself tolerates, until its `_meta_registrations` module registers fake kernels for
two operators that this library would have declared: `import torchvision` dies with `operator torchvision::nms does not
exist`, and open_clip and timm, which import torchvision, die with it. Declaring the two schemas (names and types, no
kernels) is enough for that import to pass.

What works afterwards: transforms, classification models, box arithmetic. What stays out of reach: `torchvision.io`,
NMS, RoI pooling and deformable convolution. This project uses none of them.

Beside a working torchvision the same declarations would be an error (the operators would exist twice), so the guard
first loads the library the way torchvision will, which is harmless to repeat, and declares only if that fails.
"""

import importlib.util
import logging
import sys
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

MISSING_OPS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def ensure_torchvision() -> None:
    """Prepare the first `import torchvision` of this process; does nothing where that import works anyway.

    Safe to call any number of times, before or after torchvision was imported, and without torchvision installed.
    """
    if "torchvision" in sys.modules or compiled_ops_load() is not False:
        return
    for name in MISSING_OPS:
        if not _declared(name):
            torch.library.define(f"torchvision::{name}", SCHEMA)
    logger.debug("torchvision's compiled library does not load beside torch %s: declared %s", torch.__version__, SCHEMA)


def compiled_ops_load() -> bool | None:
    """Whether torchvision's compiled operators load into this process; None when torchvision is not installed.

    Loads the library, but imports no part of torchvision: a failed import would leave half of it in `sys.modules`.
    """
    spec = importlib.util.find_spec("torchvision")  # a top-level name: found without running any of its code
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0])
    libraries = [path for pattern in ("_C*.so", "_C*.pyd") for path in sorted(folder.glob(pattern))]
    return any(_loads(path) for path in libraries)


def _loads(library: Path) -> bool:
    try:
        torch.ops.load_library(str(library))
    except (OSError, ImportError) as error:  # the two that torchvision.extension expects here
        logger.debug("%s: %s", library.name, error)
        return False
    return _declared("nms")


def _declared(name: str) -> bool:
    return hasattr(torch.ops.torchvision, name)
