"""How thinly the neighbourhood of every sample is settled: poisons lie off the data, in small groups of their own.

Every embedding is compared with a random sample of all of them. In so small a sample even a trigger that is in every
hundredth picture has fewer than k fellows, so its k-th neighbour is a picture of another kind (Huang et al. 2025,
"Detecting backdoor samples in contrastive language image pretraining", arXiv 2502.01385); against all data the poisons
would be each other's neighbours and look dense. Suffixes: N samples, R of the sample, K neighbours, D width.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

SMALL = 1e-6


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The nearest ones of some samples in the reference sample, nearest first."""

    distance_NK: Tensor
    row_NK: Tensor


@dataclass(frozen=True, slots=True)
class Reference:
    """Some samples, and how far their own k-th neighbours are."""

    sample_RD: Tensor
    """L2-normalised."""
    number_R: Tensor
    """Their place among all samples; ascending."""
    reach_R: Tensor
    """Distance of the k-th neighbour."""
    dimension_R: Tensor
    """Local intrinsic dimensionality."""
    k: int


def refer(sample_RD: Tensor, number_R: Tensor, k: int) -> Reference:
    """The reference from its samples, which must be more than k."""
    found = _nearest(sample_RD, sample_RD, torch.arange(len(sample_RD)), k)
    return Reference(sample_RD, number_R, found.distance_NK[:, -1], dimensionality(found.distance_NK), k)


def near(embedding_ND: Tensor, number_N: Tensor, reference: Reference) -> Neighbours:
    """Neighbours in the reference of the samples with these places among all; a sample is no neighbour of its own."""
    place_N = torch.searchsorted(reference.number_R, number_N).clamp_(max=len(reference.number_R) - 1)
    itself_N = torch.where(reference.number_R[place_N] == number_N, place_N, -1)
    return _nearest(embedding_ND, reference.sample_RD, itself_N, reference.k)


def _nearest(rows_ND: Tensor, sample_RD: Tensor, itself_N: Tensor, k: int) -> Neighbours:
    """By Euclidean distance of unit vectors; `itself_N`: place of each row in the sample, or -1."""
    cosine_NR = rows_ND @ sample_RD.T
    inside = (itself_N >= 0).nonzero()[:, 0]
    cosine_NR[inside, itself_N[inside]] = -2.0
    nearest = cosine_NR.topk(k, dim=1)
    return Neighbours((2.0 - 2.0 * nearest.values).clamp_(min=SMALL**2).sqrt_(), nearest.indices)


def dimensionality(distance_NK: Tensor) -> Tensor:
    """N: maximum-likelihood estimate of the local intrinsic dimensionality (Levina and Bickel 2004)."""
    spread_N = -(distance_NK / distance_NK[:, -1:]).log().mean(dim=1)
    return 1.0 / spread_N.clamp_(min=SMALL)


def k_distance(found: Neighbours, reference: Reference) -> Tensor:
    """N: distance of the k-th neighbour."""
    return found.distance_NK[:, -1]


def simplified_lof(found: Neighbours, reference: Reference) -> Tensor:
    """N: mean over the neighbours of own reach by theirs (Schubert, Zimek and Kriegel 2014)."""
    return (found.distance_NK[:, -1:] / reference.reach_R[found.row_NK]).mean(dim=1)


def dimensionality_aware(found: Neighbours, reference: Reference) -> Tensor:
    """N: as the simplified LOF, each ratio to the power of the neighbour's dimensionality; the logarithm of their mean
    (Anderberg et al. 2024, arXiv 2401.05453)."""
    log_NK = (found.distance_NK[:, -1:] / reference.reach_R[found.row_NK]).log() * reference.dimension_R[found.row_NK]
    return log_NK.logsumexp(dim=1) - torch.tensor(float(reference.k)).log()


MEASURES: dict[str, Callable[[Neighbours, Reference], Tensor]] = {
    "k-distance": k_distance,
    "slof": simplified_lof,
    "dao": dimensionality_aware,
}


def densities(blocks: Iterable[tuple[Tensor, Tensor]], reference: Reference, names: Iterable[str]) -> dict[str, Tensor]:
    """Measure -> N, more for what lies further off; `blocks`: embeddings and their places among all."""
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for embedding_ND, number_N in blocks:
        found = near(embedding_ND, number_N, reference)
        for name, rows in parts.items():
            rows.append(MEASURES[name](found, reference))
    return {name: torch.cat(rows) for name, rows in parts.items()}
