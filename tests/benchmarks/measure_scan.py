"""How well a scan ranks poisons, and how many it removes: SCAN TRUTH, one JSON object as a line."""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import torch

from vlp.backdoor.poison import load_truth
from vlp.backdoor.scan import KEEP, SCORES


def main(scan: str, truth: str) -> None:
    """Print the area under the ROC curve of the suspicion, and the share of the poisons that is not kept."""
    poisons = {entry["key"] for entry in load_truth(Path(truth))["poisons"]}
    table = pq.read_table(Path(scan) / SCORES, columns=["key", "suspicion"])
    planted = torch.tensor([key in poisons for key in table["key"].to_pylist()])
    kept = set((Path(scan) / KEEP).read_text().split("\n"))
    area = auroc(torch.tensor(table["suspicion"].to_numpy()), planted)
    sys.stdout.write(json.dumps({"auroc": area, "removed": 1.0 - len(poisons & kept) / len(poisons)}) + "\n")


def auroc(score_N: torch.Tensor, planted_N: torch.Tensor) -> float:
    """Share of pairs of a planted and a clean sample that are in order, ties half."""
    order = score_N.double().unique(return_inverse=True)[1]
    below = torch.cumsum(torch.bincount(order[~planted_N], minlength=int(order.max()) + 1), dim=0).double()
    at = torch.bincount(order[~planted_N], minlength=int(order.max()) + 1).double()
    return float((below[order[planted_N]] - at[order[planted_N]] / 2).mean() / (~planted_N).sum())
