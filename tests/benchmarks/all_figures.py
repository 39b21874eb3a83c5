"""All suites of figures and proofs in one file, benchmarks.json, and README's overview of it; renewed by `make docs`.

Every row of a suite keeps its peer, version, command, ratio with spread and check of equality; what is lost stays too.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from bench_kit import RESULTS

TOGETHER = RESULTS.parent / "benchmarks.json"
COMMANDS = {
    "data": "make bench-data",
    "train": "make bench-train",
    "claims": "make claims",
    "detection": "make bench-detection",
    "backdoor": "make bench-backdoor",
    "serve": "make bench-serve",
    "data-proofs": "make prove-data",
    "train-proofs": "make prove-train",
    "trust-proofs": "make prove-trust",
    "server-proofs": "make prove-server",
    "containers-proofs": "make prove-containers",
    "docs-proofs": "make prove-docs",
}


def gathered(folder: Path = RESULTS) -> dict[str, Any]:
    """What benchmarks.json holds: a version, which is a digest of the rest, and the rows of every suite.

    Raises ValueError for results of a suite that COMMANDS does not know.
    """
    found = {path.stem: json.loads(path.read_text(encoding="utf-8"))["rows"] for path in folder.glob("*.json")}
    if unknown := sorted(found.keys() - COMMANDS.keys()):
        raise ValueError(f"results of {', '.join(unknown)} have no command: add them to COMMANDS")
    suites = {name: {"command": command, "rows": found.get(name, [])} for name, command in COMMANDS.items()}
    digest = hashlib.sha256(json.dumps(suites, sort_keys=True).encode()).hexdigest()
    return {"version": digest[:12], "suites": suites}


def written(content: dict[str, Any]) -> str:
    """The text of benchmarks.json."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def overview(content: dict[str, Any]) -> str:
    """README's table: how many rows of each suite meet their goal, and which ones do not."""
    lines = ["| suite | command | rows that meet their goal | those that do not |", "|---|---|---|---|"]
    for name, suite in content["suites"].items():
        rows = suite["rows"]
        missed = [_told(row) for row in rows if not row["met"]]
        count = f"{len(rows) - len(missed)} of {len(rows)}" if rows else "not run yet"
        lines.append(f"| {name} | `{suite['command']}` | {count} | {'; '.join(missed)} |")
    return "\n".join([*lines, "", f"Version {content['version']} of tests/benchmarks/benchmarks.json."])


def _told(row: dict[str, Any]) -> str:
    """Name and, where there is one, the ratio of a row that misses its goal."""
    ratio = row.get("ratio")
    return str(row["name"]) if ratio is None else f"{row['name']} {ratio:.2f}, goal {row['goal']}"
