"""Short real training runs on the real starter shards, shared by the tests of this folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlp.recipe import Recipe, validate

MICRO_MODEL = {
    "config": {
        "embed_dim": 16,
        "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"width": 32, "heads": 2, "layers": 1},
    }
}


def micro_settings(shards: Path, **run: Any) -> dict[str, Any]:
    """A recipe that trains in about a second: 16 px, a few thousand parameters, the real validation shards."""
    return {
        "data": {
            "train": str(shards / "val"), "batch_size": 32, "image": {"size": 16, "resize": "longest"},
            "captions": {"labels": 0.3, "with_labels": 0.2}, "augment": {"flip": 0.5, "rotate": 10, "hue": 0.1},
        },
        "tokenizer": {"kind": "learn", "vocab_size": 512, "context_length": 12},
        "model": MICRO_MODEL,
        "objective": {"name": "clip", "mask": "labels"},
        "optim": {"lr": 3e-3, "warmup": 3, "ema": 0.9},
        "run": {"steps": 12, "precision": "fp32", "log_every": 1, "save_every": 5, "threads": 1, **run},
    }  # fmt: skip


@pytest.fixture(scope="session")
def micro_recipe(starter_shards: Path) -> Callable[..., Recipe]:
    """make(**run_options) -> Recipe."""

    def make(**run: Any) -> Recipe:
        return validate(micro_settings(starter_shards, **run))

    return make


@pytest.fixture(scope="session")
def trained(micro_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished micro run with an evaluation; read-only."""
    from vlp.train import train

    folder = tmp_path_factory.mktemp("runs") / "micro"
    recipe = micro_recipe()
    evals = [{"name": "val", "data": recipe.data.train, "every": 6}]
    train(validate({**recipe.model_dump(), "evals": evals}), folder, show=False)
    return folder
