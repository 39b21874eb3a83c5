"""Regions of sharded towers: what runs between a tower's parts sees them whole, and N ranks equal one process."""

import pytest
import torch

from vlp import distributed
from vlp.distributed import Strategy
from vlp.models import instantiate
from vlp.objectives import base
from vlp.testing import MICRO, MICRO_OPTIONS, full_batch, network_input, run_ranks

COUNT = 8
VIT = {
    **MICRO,
    "custom_text": True,
    "vision_cfg": {**MICRO["vision_cfg"], "image_size": 16, "patch_size": 4, "layers": 2},
}
OPTIONS = {
    "name": "detection_pretrain",
    **MICRO_OPTIONS["detection_pretrain"],
    "parts": {
        **MICRO_OPTIONS["detection_pretrain"]["parts"],
        "residual": True,
        "window": {"windows": 2, "global_layers": 1, "shift": True},
    },
    "clip_weight": 0.5,
}


def gradients(rank: int, strategy: Strategy, crop_weight: float = 0) -> dict[str, list[float]]:
    batch = full_batch(COUNT).split(distributed.world_size())[distributed.rank()]
    torch.manual_seed(0)
    model = instantiate(VIT)
    distributed.wrap(model, strategy)
    module, config = base.load({**OPTIONS, "crop_weight": crop_weight})
    objective = module.build(config, base.Dims(16, 2.0, weights="no/folder"))
    torch.manual_seed(1)
    objective.attach(model)
    torch.nn.init.normal_(objective.parts.region.out.weight)
    features = objective.encode(model, *network_input(batch))
    objective(features, model.logit_scale.exp()).loss.backward()  # type: ignore[operator]
    named = {n: p for part in (model, objective) for n, p in part.named_parameters() if p.grad is not None}
    distributed.average_gradients(list(named.values()))
    return {name: distributed.whole(p.grad).flatten().tolist() for name, p in named.items() if p.grad is not None}


@pytest.mark.parametrize(("strategy", "crop_weight"), [("ddp", 0.0), ("ddp", 2.0), ("fsdp", 0.0)])
def test_two_ranks_equal_one_process(strategy: Strategy, crop_weight: float) -> None:
    expected = gradients(0, "ddp", crop_weight)
    assert len(expected) > 60
    for found in run_ranks(gradients, 2, (strategy, crop_weight)):
        assert found.keys() == expected.keys()
        wanted, got = (torch.cat([torch.tensor(part[name]) for name in expected]) for part in (expected, found))
        assert (got - wanted).norm() <= 2e-5 * wanted.norm()
