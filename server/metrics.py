"""Counters and histograms in Prometheus' text format, summed over the workers of one server.

Workers write their numbers into a folder of their own server every second; whichever is asked adds the others' to its
own. Names of labels come from this program, never from a client, so that their number stays small.
"""

import json
import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0)
ITEMS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)

HELP: Mapping[str, tuple[str, str]] = {
    "vlp_requests_total": ("counter", "Requests answered."),
    "vlp_request_seconds": ("histogram", "Time from the first byte of a request's head to the end of its answer."),
    "vlp_refusals_total": ("counter", "Answers of 400 and above by their error code."),
    "vlp_requests_running": ("gauge", "Requests in progress."),
    "vlp_items_waiting": ("gauge", "Pictures and texts accepted and not yet answered."),
    "vlp_items_total": ("counter", "Pictures and texts asked for: computed, joined to one in flight, or kept."),
    "vlp_batch_items": ("histogram", "Items per model step."),
    "vlp_batch_seconds_total": ("counter", "Time in model steps."),
    "vlp_backlog_seconds": ("gauge", "Estimated time until what is accepted is answered."),
    "vlp_guard_pictures_total": ("counter", "Pictures judged by the guard."),
    "vlp_model_reloads_total": ("counter", "Models exchanged."),
    "vlp_ready": ("gauge", "Workers that are not about to stop."),
    "vlp_process_resident_bytes": ("gauge", "Memory of the workers."),
    "vlp_process_open_files": ("gauge", "Open file descriptors of the workers."),
}
Series = tuple[str, tuple[tuple[str, str], ...]]
"""(name, sorted labels)."""


class Metrics:
    """Numbers of one process. Used by one thread; reading them out takes no lock."""

    def __init__(self) -> None:
        self._values: defaultdict[Series, float] = defaultdict(float)
        self._gauges: dict[Series, float] = {}

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """To a counter."""
        self._values[name, tuple(sorted(labels.items()))] += value

    def observe(self, name: str, value: float, bounds: tuple[float, ...] = SECONDS, **labels: str) -> None:
        """Into a histogram."""
        if (f"{name}_count", tuple(sorted(labels.items()))) not in self._values:
            for bound in bounds:  # a reader needs every bound, also those that nothing has fallen under
                self.add(f"{name}_bucket", 0, **{**labels, "le": f"{bound:g}"})
        at = bisect_left(bounds, value)
        self.add(f"{name}_bucket", 1, **{**labels, "le": f"{bounds[at]:g}" if at < len(bounds) else "+Inf"})
        self.add(f"{name}_sum", value, **labels)
        self.add(f"{name}_count", 1, **labels)

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Set to the present value."""
        self._gauges[name, tuple(sorted(labels.items()))] = value

    def state(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "counters": [[name, labels, value] for (name, labels), value in self._values.items()],
            "gauges": [[name, labels, value] for (name, labels), value in self._gauges.items()],
        }

    def process(self) -> None:
        """Set what the system knows of this process; nothing where there is no /proc."""
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.gauge("vlp_process_resident_bytes", pages * os.sysconf("SC_PAGE_SIZE"))
            self.gauge("vlp_process_open_files", len(os.listdir("/proc/self/fd")))  # noqa: PTH208 - names alone
        except OSError:
            return


def write_state(folder: Path, metrics: Metrics) -> None:
    """Let the other workers know. A reader sees the old or the new numbers, never half of them."""
    target = folder / f"{os.getpid()}.json"
    scratch = target.with_suffix(".new")
    scratch.write_text(json.dumps(metrics.state()), encoding="utf-8")
    scratch.replace(target)


def others(folder: Path) -> list[dict[str, Any]]:
    """States of the other processes; of ended ones the counters alone, so that no counter ever falls."""
    states = []
    for path in folder.glob("*.json"):
        if path.stem != str(os.getpid()):
            try:
                state = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            states.append(state if _runs(path.stem) else {**state, "gauges": []})
    return states


def _runs(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (OSError, ValueError):
        return False
    return True


def text(states: Iterable[Mapping[str, Any]]) -> str:
    """Prometheus' text format, version 0.0.4, of the sum of all states."""
    total: defaultdict[Series, float] = defaultdict(float)
    for state in states:
        for name, labels, value in (*state["counters"], *state["gauges"]):
            total[name, tuple((str(key), str(content)) for key, content in labels)] += value
    lines: list[str] = []
    for family, (kind, explained) in HELP.items():
        members = [series for series in total if _family(series[0]) == family or series[0] == family]
        if members:
            lines += [f"# HELP {family} {explained}", f"# TYPE {family} {kind}"]
            lines += _histogram(family, total) if kind == "histogram" else _plain(sorted(members), total)
    return "\n".join(lines) + "\n"


def _family(name: str) -> str:
    for ending in ("_bucket", "_sum", "_count"):
        name = name.removesuffix(ending)
    return name


def _plain(members: list[Series], total: Mapping[Series, float]) -> list[str]:
    return [f"{name}{_labels(labels)} {total[name, labels]:.17g}" for name, labels in members]


def _histogram(family: str, total: Mapping[Series, float]) -> list[str]:
    lines = []
    for name, labels in sorted(series for series in total if series[0] == f"{family}_count"):
        bounds = {
            dict(other)["le"]: value
            for (bucket, other), value in total.items()
            if bucket == f"{family}_bucket" and tuple(pair for pair in other if pair[0] != "le") == labels
        }
        running = 0.0
        for bound in sorted({*bounds, "+Inf"}, key=float):
            running += bounds.get(bound, 0)
            lines.append(f"{family}_bucket{_labels((*labels, ('le', bound)))} {running:.17g}")
        lines.append(f"{family}_sum{_labels(labels)} {total[f'{family}_sum', labels]:.17g}")
        lines.append(f"{name}{_labels(labels)} {total[name, labels]:.17g}")
    return lines


def _labels(labels: Iterable[tuple[str, str]]) -> str:
    written = ",".join(f'{key}="{_escaped(value)}"' for key, value in labels)
    return f"{{{written}}}" if written else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
