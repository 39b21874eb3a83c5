"""Geometry of the embedding space: how many dimensions are used, how close pairs lie, how evenly the rest spreads.

- effective rank: exp(-sum p_i ln p_i), p_i = s_i / sum s, over the singular values s of the ND features
  (Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality", EUSIPCO)
- RankMe: the same with p_i = s_i / sum s + 1e-7 (Garrido et al. 2023, arXiv 2210.02885)
- alignment: mean over pairs of picture and caption of |x - y|^alpha (Wang & Isola 2020, arXiv 2005.10242, L_align)
- uniformity: ln of the mean over all pairs of different rows of exp(-t |x - y|^2) (there, L_uniform); lower is evener
- modality gap: |mean of the pictures - mean of the captions| (Liang et al. 2022, arXiv 2203.02053)

All on L2-normalised features, not centred, in float64. Texts are the distinct captions.
Suffixes: N pictures or texts, P pairs, D embedding width.
"""

from collections.abc import Iterator
from math import log
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from data_pipelines.config import StrictModel
from data_pipelines.errors import PipelineError
from data_pipelines.shard_set import Train
from vlp.evals._encode import Encoder, in_shares
from vlp.evals._scores import TILE

ROWS = 256


class Config(StrictModel):
    """Options of `geometry`."""

    alpha: float = Field(2.0, gt=0)
    """Exponent of the alignment."""
    t: float = Field(2.0, gt=0)
    """Factor in the uniformity."""


def run(encoder: Encoder, data: Train | Path, config: Config) -> Iterator[tuple[str, float]]:
    """image/ and text/ effective_rank, rankme, uniformity; alignment, modality_gap. Without captions: image/ alone."""
    encoded = encoder.pictures(data)
    texts = sorted({caption for captions in encoded.captions for caption in captions})
    text_ND = encoder.texts(texts)
    for name, features_ND in (("image", encoded.image_ND), ("text", text_ND)):
        if name == "text" and not texts:
            continue
        if len(features_ND) < 2:
            raise PipelineError(f"{data}: {len(features_ND)} {name} alone has no geometry")
        values_D = singular_values(features_ND)
        yield f"{name}/effective_rank", effective_rank(values_D)
        yield f"{name}/rankme", effective_rank(values_D, 1e-7)
        yield f"{name}/uniformity", uniformity(features_ND, config.t)
    if texts:
        numbers = {text: number for number, text in enumerate(texts)}
        pairs = [(row, numbers[text]) for row, found in enumerate(encoded.captions) for text in dict.fromkeys(found)]
        image_P, text_P = torch.tensor(pairs).T
        yield "alignment", alignment(encoded.image_ND, text_ND, image_P, text_P, config.alpha)
        yield "modality_gap", float((encoded.image_ND.double().mean(dim=0) - text_ND.double().mean(dim=0)).norm())
        yield "pairs", float(len(pairs))
    yield "pictures", float(len(encoded.keys))
    yield "captions", float(len(texts))
    yield "skipped", float(encoded.skipped)


def singular_values(features_ND: Tensor) -> Tensor:
    """D singular values in float64, by way of the DD Gram matrix, so that memory does not grow with N.

    Those below the rounding of the Gram matrix count as 0.
    """
    gram_DD = torch.zeros(features_ND.shape[1], features_ND.shape[1], dtype=torch.float64)
    for part_ND in features_ND.split(TILE // features_ND.shape[1] or 1):
        gram_DD += part_ND.double().T @ part_ND.double()
    squares_D = torch.linalg.eigvalsh(gram_DD)
    floor = squares_D.max() * len(squares_D) * torch.finfo(torch.float64).eps
    return torch.where(squares_D > floor, squares_D, 0.0).sqrt()


def effective_rank(values_D: Tensor, epsilon: float = 0.0) -> float:
    """exp of the entropy of the singular values' shares, `epsilon` added to each; between 1 and D."""
    share_D = values_D / values_D.sum() + epsilon
    return float(torch.special.entr(share_D).sum().exp())


def alignment(image_ND: Tensor, text_ND: Tensor, image_P: Tensor, text_P: Tensor, alpha: float) -> float:
    """Mean of |x - y|^alpha over P pairs, given by their row numbers."""
    total = 0.0
    for images, texts in zip(image_P.split(TILE // 256), text_P.split(TILE // 256), strict=True):
        apart_P = (image_ND[images].double() - text_ND[texts].double()).norm(dim=1)
        total += float(apart_P.pow(alpha).sum())
    return total / len(image_P)


def uniformity(features_ND: Tensor, t: float) -> float:
    """ln of the mean of exp(-t |x - y|^2) over all pairs of different rows; 0 where all rows are equal."""
    rows_ND = features_ND.double()

    def sums(run: range) -> Tensor:
        part_QD = rows_ND[run.start : run.stop]
        total_Q = torch.zeros(len(part_QD), dtype=torch.float64)
        for start in range(0, len(rows_ND), TILE // ROWS):
            other_CD = rows_ND[start : start + TILE // ROWS]
            squares_QC = part_QD.square().sum(1)[:, None] + other_CD.square().sum(1) - 2 * part_QD @ other_CD.T
            total_Q += squares_QC.clamp_(min=0).mul_(-t).exp_().sum(dim=1)
        return total_Q

    count = len(rows_ND)
    with_itself = in_shares(count, ROWS, sums).sum()
    return log(float(with_itself - count)) - log(count * (count - 1))
