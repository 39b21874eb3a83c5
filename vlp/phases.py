"""Where a step's time goes: `with phase("backward"):` around a part of the step, counted only while someone records.

Every moment of the recording thread belongs to exactly one phase, the innermost that is open, or to `other`; the
phases of a step therefore sum to its wall time whatever is nested in what. Phases of other threads do not count: they
overlap the step instead of lengthening it.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

PHASES = (
    "data",
    "to_device",
    "forward_image",
    "forward_text",
    "gather",
    "loss",
    "backward",
    "optimizer",
    "log",
)
"""In the order of a step. `gather`: features and gradients exchanged between ranks."""
OTHER = "other"

_recorders: "list[Recorder]" = []
_NOTHING: AbstractContextManager[None] = nullcontext()


def phase(name: str) -> AbstractContextManager[None]:
    """Time spent inside goes to `name`, one of PHASES, if this thread is being recorded; else this does nothing."""
    mine = [recorder for recorder in _recorders if recorder.thread == threading.get_ident()]
    return mine[-1].measure(name) if mine else _NOTHING


class Recorder:
    """The clock of one thread: wall seconds per phase, a row for every step."""

    def __init__(self, device: torch.device | None = None, trace: bool = False) -> None:
        """`device`: waits for this GPU at every change of phase, else a phase ends when its work is only queued.

        Leave it out where the run must not be slowed down. `trace` names the phases to torch.profiler as well.
        """
        self.rows: list[dict[str, float]] = []
        self.thread = threading.get_ident()
        self._device = device if device is not None and device.type == "cuda" else None
        self._trace = trace
        self._open = [OTHER]
        self._row: dict[str, float] = {}
        self._since = time.perf_counter()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """The block's time to `name`, less what phases inside it take."""
        assert name in PHASES, f"phase {name!r} is none of {PHASES}"
        self._charge()
        self._open.append(name)
        try:
            with torch.profiler.record_function(name) if self._trace else _NOTHING:
                yield
        finally:
            self._charge()
            self._open.pop()

    def step(self) -> dict[str, float]:
        """Close the step: seconds per phase since the last call, their sum the time that passed."""
        self._charge()
        row, self._row = self._row, {}
        self.rows.append(row)
        return row

    def _charge(self) -> None:
        """Book the time since the last change to the phase that was open."""
        if self._device is not None:
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._row[self._open[-1]] = self._row.get(self._open[-1], 0.0) + now - self._since
        self._since = now


@contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder]:
    """Phases of the recorder's thread go to it; a recorder inside another takes over until it ends."""
    _recorders.append(recorder)
    try:
        yield recorder
    finally:
        _recorders.remove(recorder)
