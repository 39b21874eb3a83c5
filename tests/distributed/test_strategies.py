"""Both strategies on real ranks equal one process; checkpoints are whole and pass between all of them."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from data_pipelines.errors import BundleError
from vlp import distributed
from vlp.distributed import Strategy
from vlp.models import instantiate
from vlp.objectives import base
from vlp.testing import MICRO, run_ranks

COUNT, STEPS = 8, 3
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp")
State = dict[str, dict[str, Any]]


class Trained:
    """A micro model with everything a trainer keeps, and one step as the trainer takes it."""

    def __init__(self, strategy: Strategy, limit: float) -> None:
        torch.manual_seed(0)
        self.model = instantiate(MICRO | {"custom_text": True})
        distributed.wrap(self.model, strategy)
        module, config = base.load({"name": "clip", "exchange": "local"})
        self.objective, self.limit = module.build(config, base.Dims(16, 2.0)), limit
        self.named: dict[str, nn.Parameter] = dict(self.model.named_parameters())
        groups = [{"params": part} for part in distributed.kinds(self.named.values())]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2, eps=1e-3, fused=True)

    def step(self, number: int) -> float:
        """Gradient norm of update `number`."""
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randn(COUNT, 3, 16, 16, generator=generator)
        tokens = torch.randint(1, 96, (COUNT, 12), generator=generator)
        world, rank = distributed.world_size(), distributed.rank()
        rows = slice(rank * COUNT // world, (rank + 1) * COUNT // world)
        model: Any = self.model
        features = base.Features(model.encode_image(pixels[rows], True), model.encode_text(tokens[rows], True))
        self.optimizer.zero_grad()
        self.objective(features, model.logit_scale.exp()).loss.backward()
        parameters = list(self.named.values())
        distributed.average_gradients(parameters)
        norm = distributed.clip_grad_norm(parameters, self.limit)
        self.optimizer.step()
        return float(norm)

    def state(self) -> State:
        """Whole tensors."""
        model = distributed.full_state(self.model.state_dict())
        return {"model": model, "optimizer": distributed.full_optimizer_state(self.optimizer, self.named)}

    def load(self, state: State) -> None:
        """From whole tensors."""
        distributed.load_full_state(self.model.state_dict(), state["model"])
        distributed.load_full_optimizer_state(self.optimizer, self.named, state["optimizer"])


def run(strategy: Strategy, begin: int, end: int, limit: float, state: State | None) -> tuple[list[float], State]:
    trained = Trained(strategy, limit)
    if state is not None:
        trained.load({part: {k: torch.tensor(v) for k, v in tensors.items()} for part, tensors in state.items()})
    norms = [trained.step(number) for number in range(begin, end)]
    return norms, trained.state()


def on_ranks(rank: int, strategy: Strategy, state: State, limit: float) -> tuple[list[float], State, State, int]:
    """All steps at once; the last step alone from another run's state; whole tensors as lists, and what is sharded."""
    norms, found = run(strategy, 0, STEPS, limit, None)
    _, resumed = run(strategy, STEPS - 1, STEPS, limit, state)
    sharded = sum(isinstance(p, DTensor) for p in Trained(strategy, limit).named.values())
    return norms, listed(found), listed(resumed), sharded


def listed(state: State) -> State:
    return {part: {name: value.tolist() for name, value in tensors.items()} for part, tensors in state.items()}


def assert_near(found: State, expected: State) -> None:
    for part in ("model", "optimizer"):
        assert found[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            torch.testing.assert_close(torch.as_tensor(found[part][name]), value, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_equal_one_process_after_three_steps(strategy: Strategy) -> None:
    """From the start, and from a state that one process saved; and one process continues from what two saved."""
    norms, expected = run("ddp", 0, STEPS, 0.5, None)
    earlier = listed(copy.deepcopy(run("ddp", 0, STEPS - 1, 0.5, None)[1]))
    assert max(norms) > 0.5, "the limit must bite"
    for found_norms, found, resumed, sharded in run_ranks(on_ranks, 2, (strategy, earlier, 0.5)):
        assert found_norms == pytest.approx(norms, rel=1e-4)
        assert_near(found, expected)
        assert_near(resumed, expected)
        assert (sharded > 20) == (strategy == "fsdp")
    assert_near(run("ddp", STEPS, STEPS, 0.5, found)[1], expected)


def test_a_state_of_another_model_is_refused() -> None:
    with pytest.raises(BundleError, match="other tensors than the model: extra"):
        distributed.load_full_state({"a": torch.zeros(1)}, {"a": torch.ones(1), "extra": torch.ones(1)})
