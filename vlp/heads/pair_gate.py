"""Gates for pairs of classes: which dimensions of an embedding two classes have in common (Wu et al. 2024, arXiv
2410.18200, "Rethinking positive pairs in contrastive learning", Hydra; in its second version SimLAP).

    gate(y1, y2) = sigmoid(MLP((E[y1] + E[y2]) / 2))

Sizes and order of the layers are those of the authors' code. A device of training: what is served is not gated.
Suffixes: N pairs, D width of the embedding.
"""

from typing import Literal

import torch
from torch import Tensor, nn

Fuse = Literal["mean", "product"]
"""mean: one gate for the mean of both classes' vectors. product: the gates of both classes, multiplied."""


class PairGate(nn.Module):
    """Holds a vector for every class and the MLP. In training, batch norms take the statistics of the pairs given; in
    eval mode, to look at gates, those of all training."""

    def __init__(self, classes: int, dim: int, width: int = 512, hidden: int = 1024, fuse: Fuse = "mean") -> None:
        """`dim`: D. `width`: of the class vectors. `hidden`: of the MLP."""
        super().__init__()
        self.fuse = fuse
        self.embedding = nn.Embedding(classes, width)
        self.mlp = nn.Sequential(
            nn.ReLU(),
            nn.BatchNorm1d(width),
            nn.Linear(width, hidden),
            nn.ReLU(),
            nn.BatchNorm1d(hidden),
            nn.Linear(hidden, dim),
        )

    def forward(self, first_N: Tensor, second_N: Tensor) -> Tensor:
        """ND in (0, 1), of classes by number, the same in either order. In training N is at least 2."""
        vectors = self.embedding(first_N), self.embedding(second_N)
        if self.fuse == "mean":
            gate_ND: Tensor = self.mlp((vectors[0] + vectors[1]) / 2).sigmoid()
            return gate_ND
        both: Tensor = self.mlp(torch.cat(vectors)).sigmoid()
        first_ND, second_ND = both.chunk(2)
        return first_ND * second_ND
