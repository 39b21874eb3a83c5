"""Zero-shot classification: the first label of every picture against all first labels of the data set."""

from collections.abc import Iterator
from pathlib import Path

import torch

from data_pipelines.errors import PipelineError
from vlp.bundle import Bundle
from vlp.evals._encode import encode_shards
from vlp.evals.retrieval import best_ranks
from vlp.infer import label_head

KS = (1, 5)


def run(bundle: Bundle, data: Path) -> Iterator[tuple[str, float]]:
    """top1 and top5 as fractions, the mean over classes, and the share of the largest class to compare with."""
    encoded = encode_shards(bundle, data)
    named = [row for row, labels in enumerate(encoded.labels) if labels]
    if not named:
        raise PipelineError(f"{data}: no sample carries a label, which zero-shot classification needs")
    classes = sorted({encoded.labels[row][0] for row in named})
    targets = torch.tensor([classes.index(encoded.labels[row][0]) for row in named])
    scores_NL = encoded.image_ND[named] @ label_head(bundle, classes).T
    ranks = best_ranks(scores_NL, torch.nn.functional.one_hot(targets, len(classes)).bool())
    yield from ((f"top{k}", float((ranks < k).float().mean())) for k in KS)
    per_class = [float((ranks[targets == number] < 1).float().mean()) for number in range(len(classes))]
    yield "mean_per_class_top1", sum(per_class) / len(classes)
    yield "largest_class", float(torch.bincount(targets).max()) / len(named)
    yield "classes", float(len(classes))
    yield "pictures", float(len(named))
