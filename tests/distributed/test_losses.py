"""N ranks equal one process on the whole batch, for every objective and every way of sharing the loss out."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vlp import distributed
from vlp.distributed import Way
from vlp.objectives import base
from vlp.objectives._kernel import Job, two_way
from vlp.objectives.base import Dims
from vlp.testing import (
    FULL_BOX_LABELS,
    FULL_CLASSES,
    FULL_CLUSTERS,
    MICRO_OPTIONS,
    attached,
    full_batch,
    micro_bundle,
    micro_model,
    network_input,
    run_ranks,
)

COUNT = 8
DIMS = Dims(16, 2.0, FULL_CLASSES, FULL_CLUSTERS, tokenizer=micro_bundle().tokenizer, box_labels=FULL_BOX_LABELS)
WAYS = ("gather", "local", "ring")
LABELLED: list[dict[str, Any]] = [
    {"name": "supcon", "positives": "jaccard", "clip": {"mask": "labels", "exchange": "ring"}},
    {"name": "soft_multilabel", "form": "soft_ce", "clip": {"exchange": "gather"}},
    {"name": "soft_multilabel", "pairs": "image_text", "bias": "learned", "clip": {"exchange": "ring"}},
    {"name": "mlcd", "loss": "mlc", "clip": {"mask": "captions", "exchange": "ring"}},
    {"name": "entity", "samples": 1, "entity_mask": False},
]
CASES: list[dict[str, Any]] = [
    {"name": "clip", "exchange": way, **options}
    for way in WAYS
    for options in ({}, {"mask": "labels", "smoothing": 0.2, "image_weight": 0.75})
] + [{"name": "siglip", "exchange": way, "mask": mask} for way in WAYS for mask in ("none", "labels")]
SHARED = list(CASES)
"""Every way of sharing a loss out; the other cases add options, which two ranks are enough for."""
CASES += LABELLED + [{"name": name, **MICRO_OPTIONS.get(name, {})} for name in base.names()]
CASES += [
    {"name": "decoupled", "between": "views", "positive_weight": "vmf", "exchange": way} for way in ("gather", "ring")
] + [{"name": "decoupled", "temperature": None, "max_scale": 20.0, "positive_weight": "vmf", "mask": "labels"}]
CASES += [{"name": name, "between": "texts", "mask": "labels"} for name in ("cacr", "groco")]
CASES += [{"name": name, "clip_weight": 0.0} for name in ("cacr", "groco", "pair_gate")]
CASES += [{"name": "pair_gate", "source": "clusters", "fuse": "product", "renormalise": True}]
CASES += [
    {
        "name": "detection_pretrain",
        "pool": "attention",
        "clip": {"mask": "labels"},
        **MICRO_OPTIONS["detection_pretrain"],
    },
    {"name": "detection_pretrain", "clip_weight": 0.5, **MICRO_OPTIONS["detection_pretrain"]},
]
CASES += [
    {"name": "dense_distill", **MICRO_OPTIONS["dense_distill"], **options}
    for options in ({"region": "image"}, {"region": "none", "clip_weight": 0.5, "clip": {"mask": "labels"}})
]
STRONG: dict[str, Any] = {"name": "strong_baseline", "clip": {"mask": "captions"}, **MICRO_OPTIONS["strong_baseline"]}
CASES += [{**STRONG, "ssl": ssl, "ssl_hidden": 12, "ssl_dim": 6} for ssl in ("simclr", "siamlip", "byolip", "barlip")]
CASES += [{**STRONG, "ssl": "swalip", "smoothing": 0.0}]


def gradients(options: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and averaged gradients of model and objective, from this rank's share of the batch, as the trainer does."""
    batch = full_batch(COUNT).split(distributed.world_size())[distributed.rank()]
    torch.manual_seed(0)
    model = micro_model(options["name"])
    module, config = base.load(options)
    objective = attached(module.build(config, DIMS), model)
    features = objective.encode(model, *network_input(batch))
    output = objective(features, model.logit_scale.exp())  # type: ignore[operator]
    output.loss.backward()
    named = {n: p for part in (model, objective) for n, p in part.named_parameters() if p.grad is not None}
    distributed.average_gradients(list(named.values()))
    grads = {name: distributed.whole(p.grad).clone() for name, p in named.items() if p.grad is not None}
    return float(output.loss.detach()), grads


def cases(world: int) -> list[dict[str, Any]]:
    return CASES if world == 2 else SHARED


def all_gradients(rank: int) -> list[tuple[float, dict[str, list[float]]]]:
    base.UNTILED = 4  # the default then shares out this small batch as it does a large one
    found = [gradients(options) for options in cases(distributed.world_size())]
    return [(loss, {name: value.flatten().tolist() for name, value in grads.items()}) for loss, grads in found]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process(world: int) -> None:
    results = run_ranks(all_gradients, world)
    for number, options in enumerate(cases(world)):
        loss, expected = gradients(options)
        assert len(expected) > 10
        for result in results:
            other_loss, found = result[number]
            assert other_loss == pytest.approx(loss, rel=2e-6, abs=1e-8), options
            assert found.keys() == expected.keys()
            wanted, got = (
                torch.cat([torch.as_tensor(grads[n]).flatten() for n in expected]) for grads in (expected, found)
            )
            assert (got - wanted).norm() <= 2e-5 * wanted.norm(), options
            for name in {"logit_scale", "logit_bias"} & expected.keys():  # the scale of a fixed temperature has none
                assert found[name][0] == pytest.approx(float(expected[name]), rel=2e-5, abs=1e-6), options


class Largest(TorchDispatchMode):
    """Remembers how many entries the largest tensor had that anything returned."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = out if isinstance(out, tuple | list) else [out]
        self.entries = max([self.entries, *(item.numel() for item in found if isinstance(item, torch.Tensor))])
        return out


def largest(rank: int, way: Way) -> int:
    """Entries of the largest tensor of a rank with 64 samples while the loss is shared out this way."""
    image, text = (F.normalize(torch.randn(64, 4), dim=1).requires_grad_() for _ in range(2))
    with Largest() as seen:  # type: ignore[no-untyped-call]
        forward, backward = two_way(image, text, torch.tensor(10.0), (), Job(way, tile=16))
        (forward + backward).backward()
    return int(seen.entries)


def test_on_the_ring_a_rank_holds_no_more_than_its_own_samples() -> None:
    """64 samples x 5 sums, twice while two are merged; the matrix of all pairs has 256 x 256 entries."""
    assert max(run_ranks(largest, 4, ("ring",))) <= 2 * 5 * 64
