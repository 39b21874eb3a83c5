"""The account of every sample asked for: seen = delivered + quarantined by reason, per epoch and shard."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from data_pipelines.errors import BadSample, PipelineError
from data_pipelines.shard_set import Place

log = logging.getLogger(__name__)

MAX_RECORDS = 10_000
"""Quarantine records that are kept; further ones are only counted."""
NOWHERE = Place("", -1, "", -1)


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One sample that was left out."""

    place: Place
    reason: str
    detail: str


@dataclass(slots=True)
class Ledger:
    """Counts; stops the job when too much is lost."""

    max_share: float = 0.01
    """Largest tolerated share of bad samples, once 1,000 were seen."""
    max_in_a_row: int = 100
    seen: int = 0
    delivered: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    substituted: int = 0
    """Extra samples that took the place of quarantined ones, so that batches stay full; not part of `seen`."""
    boxes: Counter[str] = field(default_factory=Counter)
    """Boxes of the delivered samples: `given`, and those left out, by reason."""
    shards: dict[tuple[int, str], Counter[str]] = field(default_factory=dict)
    """(epoch, shard) -> delivered and reasons."""
    records: dict[tuple[str, int], Quarantined] = field(default_factory=dict)
    """(shard, row) -> why; a sample that fails in every epoch stands here once."""
    _in_a_row: int = 0

    def good(self, shard: str = "", epoch: int = 0) -> None:
        """Count a delivered sample."""
        self.seen += 1
        self.delivered += 1
        self.shards.setdefault((epoch, shard), Counter())["delivered"] += 1
        self._in_a_row = 0

    def bad(self, error: BadSample, place: Place = NOWHERE, epoch: int = 0) -> None:
        """Count a skipped sample. Raises PipelineError over the limits."""
        self.seen += 1
        self.quarantined[error.reason] += 1
        self.shards.setdefault((epoch, place.shard), Counter())[error.reason] += 1
        self._in_a_row += 1
        if (place.shard, place.row) not in self.records:
            log.warning("sample skipped: %s", error)
        if len(self.records) < MAX_RECORDS:
            self.records[place.shard, place.row] = Quarantined(place, error.reason, str(error))
        self.check(error)

    def check(self, last: BadSample | None = None) -> None:
        """Raise PipelineError over the limits, naming the `last` error."""
        lost = self.quarantined.total()
        if self._in_a_row >= self.max_in_a_row or (self.seen >= 1000 and lost > self.max_share * self.seen):
            raise PipelineError(
                f"{lost} of {self.seen} samples could not be used ({dict(self.quarantined)}), over the limit of "
                f"{self.max_share:.1%} or {self.max_in_a_row} in a row{f'; the last: {last}' if last else ''}: "
                "mend the shards, or raise data.max_bad_share"
            )

    def report(self) -> dict[str, Any]:
        """Content of `ledger.json`. Raises PipelineError if anything is unaccounted for."""
        account = self.delivered + self.quarantined.total()
        if account != self.seen or account != sum(counts.total() for counts in self.shards.values()):
            raise PipelineError(f"{self.seen} samples were read but {account} are accounted for: this is a bug")
        return {
            "seen": self.seen,
            "trained": self.delivered,
            "quarantined": dict(self.quarantined),
            "substituted": self.substituted,
            "epochs": [
                {"epoch": epoch, "shard": shard, "seen": counts.total(), "trained": counts["delivered"]}
                | {"quarantined": {reason: n for reason, n in counts.items() if reason != "delivered"}}
                for (epoch, shard), counts in sorted(self.shards.items())
            ],
            "samples": [
                asdict(item.place) | {"reason": item.reason, "detail": item.detail} for item in self.records.values()
            ],
        } | ({"boxes": dict(self.boxes)} if self.boxes else {})

    def add(self, report: Mapping[str, Any]) -> None:
        """Take over another ledger's account: that of an earlier part of the run, or of another rank."""
        self.seen += report["seen"]
        self.delivered += report["trained"]
        self.substituted += report["substituted"]
        self.quarantined.update(report["quarantined"])
        self.boxes.update(report.get("boxes", {}))
        for row in report["epochs"]:
            counts = self.shards.setdefault((row["epoch"], row["shard"]), Counter())
            counts.update({"delivered": row["trained"]} | row["quarantined"])
        for row in report["samples"]:
            if len(self.records) < MAX_RECORDS:
                place = Place(row["shard"], row["row"], row["key"], row["offset"])
                self.records[place.shard, place.row] = Quarantined(place, row["reason"], row["detail"])
