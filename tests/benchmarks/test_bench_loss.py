"""The equality part of the loss's figures at small size. Nothing here reads a clock."""

import pytest
import torch
from bench_loss import VARIANTS, equal, inputs, outcome
from bench_objectives import ALONE, objective_row

from vlp.objectives import base


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_gives_the_peers_loss_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    route = torch.get_float32_matmul_precision()
    monkeypatch.setattr(base, "UNTILED", 0)
    leaves = inputs(1500, 64)
    try:
        found, expected = outcome(name, leaves), outcome("peer", leaves)
    finally:
        torch.set_float32_matmul_precision(route)
    assert equal(found, expected, VARIANTS[name][1] or "fp32")
    assert not equal([found[0] * 1.01, *found[1:]], expected, "bf16")


@pytest.mark.parametrize("name", sorted({*base.names()} - ALONE))
def test_a_step_of_every_objective_can_be_measured(name: str) -> None:
    row = objective_row(name, 8, 16, 1)
    assert row.equal, "the loss is finite"
    assert row.ratio is not None
    assert row.ratio > 0
