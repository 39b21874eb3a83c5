"""The slow proofs of the server: `make prove-server`, or some, or fewer cases: `make prove-server PROOFS=kills=20`."""

import time
from collections.abc import Callable

import click
from bench_kit import ROOT, render, write
from prove import Proof
from server_campaigns import (
    Outcome,
    fuzz_parsers,
    fuzz_requests,
    hostile_addresses,
    hostile_pictures,
    kills,
    sigterms,
)

CAMPAIGNS: dict[str, tuple[Callable[[int], Outcome], int, str]] = {
    "requests": (fuzz_requests, 50_000, "fuzzed requests: schemathesis, and spoilt bytes"),
    "parsers": (fuzz_parsers, 1_000_000, "atheris on the parsers of strangers' bytes"),
    "images": (hostile_pictures, 2_000, "hostile pictures get the right answer"),
    "addresses": (hostile_addresses, 1_000, "addresses that lead inside are never dialled"),
    "kills": (kills, 200, "every acknowledged write of an index survives kill -9"),
    "sigterms": (sigterms, 100, "SIGTERM under load resets nobody"),
}
"""Name -> (campaign, cases that a row of the result file needs, what it proves)."""


def numbers(chosen: tuple[str, ...]) -> dict[str, int]:
    """Cases of each campaign that is to run. Raises click.UsageError."""
    found = {}
    for given in chosen or tuple(CAMPAIGNS):
        name, _, count = given.partition("=")
        if name not in CAMPAIGNS or (count and not (count.isdecimal() and int(count))):
            raise click.UsageError(f"{given!r}: NAME or NAME=CASES, where NAME is one of {', '.join(CAMPAIGNS)}")
        found[name] = int(count) if count else CAMPAIGNS[name][1]
    return found


@click.command()
@click.argument("chosen", nargs=-1, metavar="[NAME[=CASES]]...")
def main(chosen: tuple[str, ...]) -> None:
    """Run campaigns; those with all their cases go into results/server-proofs.json and README's table."""
    met = True
    for name, cases in numbers(chosen).items():
        campaign, whole, what = CAMPAIGNS[name]
        began = time.monotonic()
        outcome = campaign(cases)
        note = f"{outcome.note}; {time.monotonic() - began:.0f} s"
        click.echo(f"{name}: {outcome.passed:,} of {outcome.cases:,}, {'met' if outcome.met else 'NOT MET'}: {note}")
        met = met and outcome.met
        if cases >= whole:
            goal = f">= {outcome.cases}"
            result = write("server-proofs", [Proof(what, outcome.passed, goal, outcome.met, "make prove-server", note)])
            page = ROOT / "README.md"
            page.write_text(render(page, result))
    raise SystemExit(0 if met else 1)


if __name__ == "__main__":
    main()
