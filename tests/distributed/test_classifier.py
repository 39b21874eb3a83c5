"""The classifier's weights are shared out over real ranks; trained, saved and resumed they equal one process's."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlp import distributed
from vlp.heads.partial_fc import PartialFC, class_mean, softmax_loss
from vlp.testing import run_ranks

COUNT, WIDTH, STEPS = 8, 4, 3
State = dict[str, dict[str, Any]]


class Trained:
    """A classifier and its optimiser, and one step as the trainer takes it."""

    def __init__(self, classes: int) -> None:
        torch.manual_seed(0)
        self.head = PartialFC(classes, WIDTH, 8.0, 0.2, "arc")
        self.head.share_out()
        self.named: dict[str, nn.Parameter] = dict(self.head.named_parameters())
        groups = [{"params": part} for part in distributed.kinds(self.named.values())]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
        self.classes = classes

    def step(self, number: int) -> float:
        """Gradient norm of update `number`."""
        generator = torch.Generator().manual_seed(number)
        features = F.normalize(torch.randn(COUNT, WIDTH, generator=generator), dim=1)
        ids = torch.randint(-1, self.classes, (COUNT, 2), generator=generator)
        rows = slice(
            distributed.rank() * COUNT // distributed.world_size(),
            (distributed.rank() + 1) * COUNT // distributed.world_size(),
        )
        scores = self.head(features[rows], ids[rows], self.head.drawn(3, ids), "ring" if number % 2 else "local")
        self.optimizer.zero_grad()
        class_mean(softmax_loss(scores), scores.real_BS).backward()
        parameters = list(self.named.values())
        distributed.average_gradients(parameters)
        norm = distributed.clip_grad_norm(parameters, 0.5)
        self.optimizer.step()
        self.head.advance()
        return float(norm)

    def state(self) -> State:
        """Whole tensors, as lists."""
        parts = {
            "head": distributed.full_state(self.head.state_dict()),
            "optimizer": distributed.full_optimizer_state(self.optimizer, self.named),
        }
        return {part: {name: value.tolist() for name, value in found.items()} for part, found in parts.items()}

    def load(self, state: State) -> None:
        """From whole tensors."""
        tensors = {p: {name: torch.tensor(value) for name, value in found.items()} for p, found in state.items()}
        distributed.load_full_state(self.head.state_dict(), tensors["head"])
        distributed.load_full_optimizer_state(self.optimizer, self.named, tensors["optimizer"])


def run(classes: int, begin: int, end: int, state: State | None = None) -> tuple[list[float], State, int]:
    trained = Trained(classes)
    if state is not None:
        trained.load(state)
    norms = [trained.step(number) for number in range(begin, end)]
    return norms, trained.state(), len(distributed.local(trained.head.weight))


def on_ranks(rank: int, classes: int, state: State) -> tuple[tuple[list[float], State, int], State]:
    return run(classes, 0, STEPS), run(classes, STEPS - 1, STEPS, state)[1]


@pytest.mark.parametrize(("world", "classes", "held"), [(2, 7, [4, 3]), (4, 5, [2, 2, 1, 0])])
def test_shared_out_weights_equal_one_process(world: int, classes: int, held: list[int]) -> None:
    norms, whole, _ = run(classes, 0, STEPS)
    early = run(classes, 0, STEPS - 1)[1]
    results = run_ranks(on_ranks, world, (classes, early))
    assert [result[0][2] for result in results] == held
    for (found_norms, found, _), resumed in results:
        assert found_norms == pytest.approx(norms, rel=1e-5)
        for state in (found, resumed):
            for part, tensors in whole.items():
                for name, expected in tensors.items():
                    torch.testing.assert_close(
                        torch.tensor(state[part][name]), torch.tensor(expected), rtol=1e-4, atol=1e-6
                    )
