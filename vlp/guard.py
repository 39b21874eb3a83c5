"""Steps that would spoil the weights: a loss or gradient that is not finite, or a loss far above the last ones."""

import math
from collections import deque
from statistics import fmean, pstdev

WINDOW = 50
"""Losses that a new one is compared with."""
ENOUGH = 10
"""Fewer than so many say nothing yet."""
MARGIN = 1.0
"""A loss this little above the mean is no spike, however small the mean: late in training one batch may well be
ten times as hard as another."""


class Guard:
    """Says which steps to refuse, and counts them. Every rank sees the same numbers and decides alike."""

    def __init__(self, spike: float | None) -> None:
        """`spike`: the multiple of the mean loss that is too much, or of the deviation from it where that is larger;
        None looks at finiteness alone."""
        self.spike = spike
        self.refused = 0
        """Refused steps in all."""
        self.in_a_row = 0
        self.rollbacks = 0
        """Times the run went back, since so many steps in a row were good as the window holds."""
        self._good = 0
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def check(self, loss: float, norm: float) -> str:
        """Why a step must not be applied, "" if it may; enters it into the counts."""
        reason = self._reason(loss, norm)
        if reason:
            self.refused += 1
            self.in_a_row += 1
            self._good = 0
        else:
            self.in_a_row = 0
            self._recent.append(loss)
            self._good += 1
            if self._good >= WINDOW:
                self.rollbacks = 0
        return reason

    def _reason(self, loss: float, norm: float) -> str:
        if not math.isfinite(loss):
            return "loss_not_finite"
        if not math.isfinite(norm):
            return "gradient_not_finite"
        if self.spike is not None and len(self._recent) >= ENOUGH:
            mean, spread = fmean(self._recent), pstdev(self._recent)
            # where a loss may fall below 0 its mean says little about how far single ones lie from it
            if loss > mean + max((self.spike - 1) * max(abs(mean), spread), MARGIN):
                return "loss_spike"
        return ""

    def state_dict(self) -> dict[str, object]:
        """Counts and recent losses: a resumed run refuses the same steps."""
        counts = {"refused": self.refused, "in_a_row": self.in_a_row, "rollbacks": self.rollbacks, "good": self._good}
        return {**counts, "recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue from `state_dict`."""
        self.refused, self.in_a_row = int(str(state["refused"])), int(str(state["in_a_row"]))
        self.rollbacks, self._good = int(str(state["rollbacks"])), int(str(state["good"]))
        recent = state["recent"]
        assert isinstance(recent, list)
        self._recent = deque(recent, maxlen=WINDOW)
