"""What every suite of figures shares: taking turns, ratio with spread, the result file and README's table.

A row is measured in rounds. In each round every variant runs once, so that whatever else the machine does hits all of
them; the first round warms up and is dropped; the ratio is the median of the rounds' ratios, with lowest and highest.
"""

import json
import operator
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vlp.claims.results import claims_table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
MEETS = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a result file. `ratio`: peer's time over ours, or ours over the peer's where the goal says `<=`."""

    name: str
    peer: str
    peer_version: str
    ratio: float | None
    low: float | None
    high: float | None
    goal: str
    met: bool
    equal: bool
    note: str


def take_turns(variants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every variant in each round but the first. A variant returns the seconds it wants to be counted."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            seconds = run()
            if number:
                taken[name].append(seconds)
    return taken


def wall(run: Callable[[], object]) -> Callable[[], float]:
    """The same as a variant for `take_turns`, by the clock on the wall."""
    return lambda: _clocked(run, time.perf_counter)


def cpu(run: Callable[[], object]) -> Callable[[], float]:
    """The same by the processor time of this process, all threads together."""
    return lambda: _clocked(run, time.process_time)


def _clocked(run: Callable[[], object], clock: Callable[[], float]) -> float:
    began = clock()
    run()
    return clock() - began


def compare(
    name: str, peer: tuple[str, str], ours: Sequence[float], theirs: Sequence[float], goal: str, equal: bool, note: str
) -> Row:
    """A row from the seconds of both, round by round. `peer`: name and version. `goal`: such as ">= 2.3"."""
    faster = goal.startswith(">=")
    ratios = [b / a if faster else a / b for a, b in zip(ours, theirs, strict=True)]
    sign, limit = goal.split()
    middle, low, high = (round(pick(ratios), 3) for pick in (statistics.median, min, max))
    met = equal and bool(MEETS[sign](middle, float(limit)))
    return Row(name, *peer, middle, low, high, goal, met, equal, note)


def missing(name: str, peer: tuple[str, str], goal: str, why: str) -> Row:
    """A row that could not be measured, and why: it stays in the table, unmet."""
    return Row(name, *peer, None, None, None, goal, False, False, why)


def machine() -> str:
    """Processor, cores and Python of this machine, in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"


def write(suite: str, rows: Sequence[Any], folder: Path = RESULTS, group: str = "", fresh: bool = False) -> Path:
    """Write or update the result file of a suite: rows measured now replace those of the same name, others stay.

    `fresh`: others go.

    `rows`: dataclasses with a `name`, such as Row; those of figures get the command that measures them again, by the
    name of their `group`, or their own.
    """
    path = folder / f"{suite}.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() and not fresh else []
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    when = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "revision": git.stdout.strip() or "unknown",
        "machine": machine(),
    }
    again = {
        row.name: {"command": f"make bench-{suite} ROWS={group or row.name}"} if isinstance(row, Row) else {}
        for row in rows
    }
    now = {row.name: asdict(row) | again[row.name] | when for row in rows}
    merged = [now.pop(row["name"], row) for row in kept]
    result = {"suite": suite, "rows": [*merged, *now.values()]}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return path


def table(result: Path) -> str:
    """README's table of a result file."""
    data = json.loads(result.read_text())
    if data["suite"] == "claims":
        return claims_table(data["rows"])
    if data["suite"] in ("backdoor", "detection"):
        return _table_of_figures(data)
    if "value" in data["rows"][0]:
        return _table_of_proofs(data)
    lines = ["| measure | peer | ratio (low - high) | goal | |", "|---|---|---|---|---|"]
    for row in data["rows"]:
        spread = (
            "not measured" if row["ratio"] is None else f"**{row['ratio']:.2f}** ({row['low']:.2f} - {row['high']:.2f})"
        )
        lines.append(
            f"| {row['name']}: {row['note']} | {row['peer']} {row['peer_version']} | {spread} | {row['goal']} | "
            f"{'met' if row['met'] else 'not met'} |"
        )
    return "\n".join([*lines, "", _measured(data["rows"])])


def _measured(rows: Sequence[Mapping[str, str]]) -> str:
    """Where, when and at which revisions."""
    found = [list(dict.fromkeys(row[name] for row in rows)) for name in ("machine", "date", "revision")]
    machines, dates, revisions = (", ".join(values) for values in found)
    return f"{machines}; {dates}; revision {revisions}."


def _table_of_figures(data: dict[str, Any]) -> str:
    benches = dict.fromkeys(row["name"].partition(":")[0] for row in data["rows"] if row.get("case"))
    lines = []
    for bench in benches:
        lines += _grid(bench, [row for row in data["rows"] if row.get("case") and row["name"].startswith(f"{bench}:")])
    lines += ["| promise | mean ± deviation over seeds | goal, of every seed | |", "|---|---|---|---|"]
    lines += [
        f"| {row['name']}; {row['note']} | **{row['value']}** | {row['goal']} | {'met' if row['met'] else 'not met'} |"
        for row in data["rows"]
        if not row.get("case")
    ]
    return "\n".join([*lines, "", _measured(data["rows"])])


def _grid(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line per promise and a column per case; what misses the goal, of which the mildest is told, has a cross."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    lines = [f"| {name} | {' | '.join(cases)} | goal |", f"|---|{'---|' * len(cases)}---|"]
    for promise in dict.fromkeys(row["promise"] for row in rows):
        found = {row["case"]: row for row in rows if row["promise"] == promise}
        goals = list(dict.fromkeys(row["goal"] for row in found.values()))
        said = [f"{row['cell']}{'' if row['met'] else ' ✗'}" for row in (found[case] for case in cases)]
        lines.append(f"| {promise} | {' | '.join(said)} | {' or '.join(goals)} |")
    return [*lines, ""]


def _table_of_proofs(data: dict[str, Any]) -> str:
    lines = ["| proof | cases passed | |", "|---|---|---|"]
    lines += [f"| {row['name']} | {row['value']} of {row['goal'].split()[1]} | {row['note']} |" for row in data["rows"]]
    return "\n".join([*lines, "", _measured(data["rows"])])


def render(readme: Path, result: Path) -> str:
    """The text of `readme` with the table of `result` between the suite's markers. Raises ValueError without them."""
    return placed(readme.read_text(), f"figures of {result.stem}", table(result), readme)


def placed(text: str, name: str, content: str, readme: Path) -> str:
    """The text of `readme` with `content` between the markers of `name`. Raises ValueError without them."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{readme}: needs the markers {begin!r} and {end!r}, one after the other")
    return f"{head}{begin}\n{content}\n{end}{tail}"


def measure(suite: str, known: Mapping[str, Callable[[], list[Row]]], rows: str, readme: bool) -> None:
    """Measure the named rows (all if none), write the result file after each, renew README's table.

    Raises ValueError for a name that is not known.
    """
    chosen = [name for name in rows.split(",") if name] or list(known)
    if unknown := sorted(set(chosen) - set(known)):
        raise ValueError(f"no such row: {', '.join(unknown)}; rows are {', '.join(known)}")
    for name in chosen:
        for row in known[name]():
            sys.stdout.write(
                f"{row.name}: {row.ratio} ({row.low} - {row.high}), goal {row.goal}, equal {row.equal}: {row.note}\n"
            )
            sys.stdout.flush()
            result = write(suite, [row], group=name)
    if readme:
        page = ROOT / "README.md"
        page.write_text(render(page, result))
