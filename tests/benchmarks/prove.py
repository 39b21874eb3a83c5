"""The slow proofs of one part of the project, run by pytest; the cases that passed go into a result file and README."""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import click
from bench_kit import ROOT, render, write

SUITES = {"data": "tests/data_pipelines", "train": "tests/vlp", "containers": "tests/docker"}


@dataclass(frozen=True, slots=True)
class Proof:
    """One slow test with all its cases. `value`: cases that passed."""

    name: str
    value: int
    goal: str
    met: bool
    command: str
    note: str
    peer: str = ""
    peer_version: str = ""
    equal: bool = True


def proofs(report: Path, command: str) -> list[Proof]:
    """The cases of a JUnit report, counted by test function."""
    cases: Counter[str] = Counter()
    passed: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for case in ET.parse(report).iter("testcase"):
        name = case.get("name", "").partition("[")[0].removeprefix("test_").replace("_", " ")
        cases[name] += 1
        passed[name] += case.find("failure") is None and case.find("error") is None and case.find("skipped") is None
        seconds[name] += round(float(case.get("time", "0")))
    return [
        Proof(name, passed[name], f">= {count}", passed[name] == count, command, f"{seconds[name]} s")
        for name, count in cases.items()
    ]


@click.command()
@click.argument("suite", type=click.Choice(sorted(SUITES)))
@click.option("--only", default="", help="Expression of pytest's -k; proofs left out keep their figures.")
def main(suite: str, only: str) -> None:
    """Run the slow tests of SUITE, write tests/benchmarks/results/SUITE-proofs.json, renew README's table."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "slow", SUITES[suite], f"--junitxml={report}"]
        command += ["-k", only] if only else []
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        result = write(f"{suite}-proofs", proofs(report, f"make prove-{suite}"))
    page = ROOT / "README.md"
    page.write_text(render(page, result))
    click.echo(f"written: {result}")
    sys.exit(code)


if __name__ == "__main__":
    main()
