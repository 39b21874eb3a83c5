"""The guard at work: verdicts on pictures, on their way to answers and headers, and how many there were."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from server.engine import Vectors
from vlp.backdoor.guard import Guard


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the guard makes of one picture."""

    score: float
    flagged: bool

    def content(self) -> dict[str, Any]:
        """As answers say it."""
        return {"score": self.score, "flagged": self.flagged}


class Guarding:
    """A guard and its counts. Encoding is done by the model's thread, counting by the event loop."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self.pictures = 0
        self.flagged = 0

    def encode(self, encode: Callable[[], Vectors]) -> Vectors:
        """N(D+1): embeddings as `encode` makes them with the guarded bundle, beside them the scores."""
        embedding_ND, score_N = self._guard.scored(lambda: torch.from_numpy(encode()))
        return np.column_stack([embedding_ND.numpy(), score_N.numpy()])

    def judge(self, score: float) -> Verdict:
        """The verdict, counted."""
        # NaN, from a picture that the model makes nothing of, is above no threshold and yet nothing to trust
        verdict = Verdict(score, not score <= self._guard.info.threshold)
        self.pictures += 1
        self.flagged += verdict.flagged
        return verdict

    def state(self) -> dict[str, Any]:
        """What is told about it."""
        info = self._guard.info
        return {
            "mode": info.mode, "fpr": info.fpr, "threshold": info.threshold,
            "pictures": self.pictures, "flagged": self.flagged,
        }  # fmt: skip


def headers(verdicts: list[Verdict]) -> dict[str, str]:
    """Response headers, for clients whose answers have no place for verdicts: one entry per usable picture."""
    if not verdicts:
        return {}
    return {
        "X-Guard-Flagged": ",".join(str(int(verdict.flagged)) for verdict in verdicts),
        "X-Guard-Score": ",".join(f"{verdict.score:.3f}" for verdict in verdicts),
    }
