"""Retrieval by label: pictures, and optionally the names of labels, find the pictures that carry the same label.

Picture to picture as GPR1200 counts (Schall et al. 2021, arXiv 2111.13122): every picture is a query against all the
others, itself left out; mAP is the mean over the queries. A query that no other picture shares a label with has no
answer and is left out. Suffixes: N pictures, Q queries of a tile, L labels, D embedding width.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data_pipelines.config import StrictModel
from data_pipelines.errors import MissingField
from data_pipelines.shard_set import Train
from vlp.evals._encode import Encoder, in_shares
from vlp.evals._labels import Labels, Templates, firsts, label_sets, labelled
from vlp.evals._scores import TILE, Rights, average_precision, mask_of
from vlp.infer import make_prompts

KS = (1, 5)
Metrics = Iterator[tuple[str, float]]


class Config(StrictModel):
    """Options of `label-retrieval`."""

    labels: Labels | None = None
    """Labels that count, as for zero-shot; default the shards'."""
    column: str = "labels"
    """Where a sample says its labels: `labels`, `cls`, or a json column."""
    match: Literal["first", "any"] = "first"
    """first: pictures with the same first label belong together. any: pictures that share a label."""
    templates: Templates | None = None
    """Also let every label find its pictures, by texts made with these; as for zero-shot."""


def run(encoder: Encoder, data: Train | Path, config: Config) -> Metrics:
    """image/mAP, image/P@1, image/P@5 and image/chance_mAP; with `templates` the same under text/."""
    encoded = encoder.pictures(data, config.column)
    single, every = label_sets(config.labels, encoded)
    labels = single if config.match == "first" else every
    rows, classes = labelled(encoded, labels, data, config.column)
    classes = [list(found) for found in firsts(classes)] if config.match == "first" else classes
    image_ND = encoded.image_ND[rows]
    yield from among_pictures(image_ND, classes, len(labels.names), data)
    if config.templates is not None:
        text_LD = encoder.prompts([make_prompts(texts, config.templates) for texts in labels.texts])
        yield from from_texts(text_LD, image_ND, classes)
    yield "pictures", float(len(rows))
    yield "without_label", float(len(encoded.keys) - len(rows))
    yield "skipped", float(encoded.skipped)


def among_pictures(image_ND: Tensor, classes: Rights, labels: int, data: Train | Path) -> Metrics:
    """Every picture as a query against the others."""
    carried_NL = mask_of(classes, labels).float()

    def tile(queries: range) -> Tensor:
        part = slice(queries.start, queries.stop)
        right_QN = carried_NL[part] @ carried_NL.T > 0
        scores_QN = image_ND[part] @ image_ND.T
        itself_Q = torch.arange(queries.start, queries.stop)[:, None]
        return _of_queries(scores_QN.scatter_(1, itself_Q, float("-inf")), right_QN.scatter_(1, itself_Q, False))

    found_N4 = in_shares(len(image_ND), max(1, TILE // len(image_ND)), tile)
    answered_N = found_N4[:, -1] > 0
    if not answered_N.any():
        raise MissingField(f"{data}: no two pictures share a label, which this task needs")
    yield from _means("image", found_N4[answered_N], len(image_ND) - 1)


def from_texts(text_LD: Tensor, image_ND: Tensor, classes: Rights) -> Metrics:
    """Every label that a picture carries as a query against all pictures."""
    members: list[list[int]] = [[] for _ in range(len(text_LD))]
    for row, numbers in enumerate(classes):
        for number in numbers:
            members[number].append(row)

    def tile(queries: range) -> Tensor:
        part = slice(queries.start, queries.stop)
        return _of_queries(text_LD[part] @ image_ND.T, mask_of(members[part], len(image_ND)))

    found_L4 = in_shares(len(text_LD), max(1, TILE // len(image_ND)), tile)
    yield from _means("text", found_L4[found_L4[:, -1] > 0], len(image_ND))


def _of_queries(scores_QN: Tensor, right_QN: Tensor) -> Tensor:
    """Q rows: average precision, precision at each of KS, number of right pictures; float64."""
    k = min(max(KS), scores_QN.shape[1])
    best_QK = right_QN.gather(1, scores_QN.topk(k).indices).double()
    precision = [best_QK[:, :count].sum(dim=1) / count for count in KS]
    return torch.stack([average_precision(scores_QN.T, right_QN.T), *precision, right_QN.sum(dim=1).double()], dim=1)


def _means(name: str, found_Q4: Tensor, candidates: int) -> Metrics:
    yield f"{name}/mAP", float(found_Q4[:, 0].mean())
    yield from ((f"{name}/P@{k}", float(found_Q4[:, 1 + place].mean())) for place, k in enumerate(KS))
    yield f"{name}/chance_mAP", float(found_Q4[:, -1].mean()) / candidates
    yield f"{name}/queries", float(len(found_Q4))
