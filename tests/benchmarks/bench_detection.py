"""Detection-oriented pretraining and what is made of it: `make bench-detection`; results/detection.json, the README's.

The figures are those of three claims, whose arms a user would train by the same recipes. They are read on the test
split of the composed set, whose cut-outs and backgrounds no training has seen. Beside them stands the time it takes.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backdoor_rows import Figure
from bench_kit import ROOT, render, write
from measure_detect import ratio_of

from vlp.claims import checks, engine, load_claim
from vlp.claims.results import percent, read_rows
from vlp.cli import cli

SUITE = "detection"
PROMISES = {
    "detection_pretrain": (
        "regions named right after pretraining without boxes, over the image-level tower",
        "the same, over the region heads before they learned",
        "AP50 of novel categories, pretraining by regions over equal steps by pictures",
    ),
    "detection_finetune": (
        "AP50 of novel categories, unseen cut-outs and backgrounds",
        "the same, geometric ensemble over the detector alone",
    ),
    "shifted_windows": (
        "change of features under a shift that shifted windows take away",
        "AP with shifted windows over that without",
    ),
}
"""Claim -> what each of its checks says."""


def rows_of(outcomes: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """A row for every check of the claims that have an outcome; a goal is met when it is in every seed."""
    known = {row["name"]: row for row in outcomes}
    rows = []
    for name in PROMISES.keys() & known.keys():
        found, seeds = known[name], known[name]["seeds"]
        for promise, check in zip(PROMISES[name], found["checks"], strict=True):
            spoken = checks.names_in(checks.parse(check["check"]))
            values = [f"{key} {percent(entry)}" for key, entry in found["values"].items() if key in spoken]
            held = check["seeds_that_hold"]
            goal = f"{check['check']}, {held} of {seeds} seeds"
            rows.append(Figure(promise, f"{check['left']:.3f}", goal, held == seeds, ", ".join(values)))
    order = [promise for promises in PROMISES.values() for promise in promises]
    return sorted(rows, key=lambda row: order.index(row.name))


def detector() -> Path:
    """Run of the fine-tuned detector of the first seed."""
    claim = load_claim("detection_finetune")
    jobs = engine.plan(claim, 1, engine.places_of(claim, show=True), "test")
    return next(job.folder for job in jobs if job.name == "tuned")


def main() -> None:
    """Run what is not known and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--known", action="store_true", help="write the table of what is known, run nothing")
    if not parser.parse_args().known:
        cli.main(["claims", "run", *PROMISES], standalone_mode=False)
    rows = rows_of(read_rows())
    if (
        run := detector()
    ).is_dir():  # by itself, when nothing else runs; elsewhere the row of the machine that had it stays
        rows.append(ratio_of(run))
    page = ROOT / "README.md"
    page.write_text(render(page, write(SUITE, rows)))


if __name__ == "__main__":
    main()
