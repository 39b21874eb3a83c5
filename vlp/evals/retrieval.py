"""Cross-modal retrieval R@k, with every right answer accepted.

Candidates are the distinct captions of the data set. A picture is answered right at k if one of its captions is among
its k nearest; a caption is, if one of the pictures that carry it is among its k nearest. Ties count against the model.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vlp.bundle import Bundle
from vlp.evals._encode import encode_shards
from vlp.infer import encode_texts

KS = (1, 5, 10)


def run(bundle: Bundle, data: Path) -> Iterator[tuple[str, float]]:
    """image_to_text/R@k and text_to_image/R@k as fractions, ranks, sizes and chance."""
    encoded = encode_shards(bundle, data)
    texts = sorted({caption for captions in encoded.captions for caption in captions})
    numbers = {text: number for number, text in enumerate(texts)}
    right_NT = torch.zeros(len(encoded.keys), len(texts), dtype=torch.bool)
    for row, captions in enumerate(encoded.captions):
        right_NT[row, [numbers[caption] for caption in captions]] = True
    scores_NT = encoded.image_ND @ encode_texts(bundle, texts).T
    for name, scores, right in (
        ("image_to_text", scores_NT, right_NT),
        ("text_to_image", scores_NT.T, right_NT.T),
    ):
        ranks = best_ranks(scores, right)
        yield from ((f"{name}/R@{k}", float((ranks < k).float().mean())) for k in KS)
        yield f"{name}/median_rank", float(ranks.float().median()) + 1
        yield f"{name}/mean_rank", float(ranks.float().mean()) + 1
        yield f"{name}/chance_R@1", float(right.float().mean())
    yield "pictures", float(len(encoded.keys))
    yield "captions", float(len(texts))
    yield "skipped", float(encoded.skipped)


def best_ranks(scores_QC: Tensor, right_QC: Tensor) -> Tensor:
    """0-based rank of the best right candidate of each query; wrong candidates with an equal score come first."""
    best_Q = scores_QC.masked_fill(~right_QC, float("-inf")).amax(dim=1)
    ahead = (scores_QC >= best_Q[:, None]) & ~right_QC
    return ahead.sum(dim=1)
