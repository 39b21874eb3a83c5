"""What labels say of the pairs of a batch: who is no negative of whom, and who is whose positive and how much.

A Known is labels and the judge that compares them. An empty label says nothing: its sample is like no other one.
Suffixes: B samples, R rows and C columns of some pairs, S ids of a sample, K classes.
"""

from typing import Literal

import torch
from torch import Tensor

from vlp.objectives._kernel import Judge, Pairs, Side

Known = tuple[Side, Judge | None]
NOTHING: Known = ((), None)
Likeness = Literal["label", "intersect", "jaccard", "cosine"]
"""label: 1 for an equal class number. The others compare sets of labels: intersect, 1 if they share one; jaccard, the
shared ones by all of both; cosine, of the rows of zeros and ones."""


def either(first: Known, second: Known) -> Known:
    """Labels and judge of two kinds together: pairs that one or the other excludes."""
    (labels, judge), (more, other) = first, second
    if judge is None or other is None:
        return second if judge is None else first
    return (*labels, *more), _join(judge, len(labels), other)


def _join(judge: Judge, count: int, other: Judge) -> Judge:
    def both(rows: Side, columns: Side) -> Pairs:
        found = judge(rows[:count], columns[:count]), other(rows[count:], columns[count:])
        masks = [pairs.excluded_RC for pairs in found if pairs.excluded_RC is not None]
        return Pairs(torch.stack(masks).any(dim=0) if masks else None)

    return both


def same(rows: Side, columns: Side) -> Pairs:
    """Pairs that share an id, for ids of one number (B) or several (BS) a sample; those below 0 are none."""
    return Pairs(share_an_id(rows[0], columns[0]))


def share_an_id(ids_RS: Tensor, ids_CS: Tensor) -> Tensor:
    """RC bool."""
    ids_RS, ids_CS = (ids[:, None] if ids.ndim == 1 else ids for ids in (ids_RS, ids_CS))
    shared_RC = torch.zeros(len(ids_RS), len(ids_CS), dtype=torch.bool, device=ids_RS.device)
    for ids_R in ids_RS.where(ids_RS >= 0, -1).unbind(1):
        for ids_C in ids_CS.where(ids_CS >= 0, -2).unbind(1):
            shared_RC |= ids_R[:, None] == ids_C
    return shared_RC


def sets_touch(rows: Side, columns: Side) -> Pairs:
    """Pairs that share a label, for labels as rows of zeros and ones."""
    return Pairs(rows[0].float() @ columns[0].float().T > 0)


def known(labels: Tensor) -> Tensor:
    """B bool: of class numbers, those from 0 on; of rows of zeros and ones, those that are not empty."""
    return labels >= 0 if labels.ndim == 1 else (labels > 0).any(dim=1)


def likeness(kind: Likeness, labels_R: Tensor, labels_C: Tensor) -> Tensor:
    """RC in [0, 1]: how much alike the labels are; 0 where one side is unknown."""
    if kind == "label":
        return share_an_id(labels_R, labels_C).float()
    labels_RK, labels_CK = labels_R.float(), labels_C.float()
    both_RC = labels_RK @ labels_CK.T
    if kind == "intersect":
        return both_RC.clamp_(max=1.0)
    count_R, count_C = labels_RK.sum(dim=1), labels_CK.sum(dim=1)
    if kind == "jaccard":
        return both_RC / (count_R[:, None] + count_C - both_RC).clamp_(min=1.0)
    return both_RC.mul_(count_R.clamp(min=1.0).rsqrt()[:, None]).mul_(count_C.clamp(min=1.0).rsqrt())


def guided_by(kind: Likeness) -> Judge:
    """Targets by likeness of labels. Unknown samples take no part: they have no positives and are nobody's negatives.

    Beside the labels it takes the samples' own numbers, if there are any: a sample is then no pair with itself.
    """

    def judge(rows: Side, columns: Side) -> Pairs:
        target_RC = likeness(kind, rows[0], columns[0])
        excluded_RC = ~(known(rows[0])[:, None] & known(columns[0]))
        if len(rows) > 1:
            itself_RC = rows[1][:, None] == columns[1]
            target_RC = target_RC.masked_fill_(itself_RC, 0.0)
            excluded_RC |= itself_RC
        return Pairs(excluded_RC, target_RC=target_RC)

    return judge


def with_partner(labels: Tensor) -> Tensor:
    """B bool: which samples share a label with another one of the batch."""
    if labels.ndim == 1:
        _, number_B, count = labels.unique(return_inverse=True, return_counts=True)
        found: Tensor = (labels >= 0) & (count[number_B] > 1)
        return found
    shared_K = labels.sum(dim=0, dtype=torch.int64) > 1
    return ((labels > 0) & shared_K).any(dim=1)
