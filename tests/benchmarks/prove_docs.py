"""README's commands, typed section by section in a copy of this checkout; what came of it goes into README's table."""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
import readme_blocks
from bench_kit import ROOT, render, write
from readme_blocks import Block

README = ROOT / "README.md"


@dataclass(frozen=True, slots=True)
class Typed:
    """One section. `value`: blocks that were run; `digest`: of the blocks, so that changed ones are noticed."""

    name: str
    value: int
    goal: str
    met: bool
    digest: str
    note: str
    command: str = "make prove-docs"
    peer: str = ""
    peer_version: str = ""
    equal: bool = True


def sections(found: list[Block]) -> dict[str, list[Block]]:
    """Blocks by section, in README's order."""
    return {
        name: [block for block in found if block.section == name] for name in dict.fromkeys(b.section for b in found)
    }


def account(name: str, some: list[Block], trouble: str, seconds: float) -> Typed:
    """The row of a section."""
    runs = [block for block in some if block.runs]
    shorter = sum(bool(block.added) for block in runs)
    parts = [f"{seconds:.0f} s", f"{shorter} in small" if shorter else ""]
    parts += [f"not run: {block.reason}" for block in some if block.reason]
    note = "; ".join(part for part in parts if part)
    value = 0 if trouble else len(runs)
    return Typed(name, value, f">= {len(runs)}", not trouble, readme_blocks.digest(some), note)


@click.command()
@click.option(
    "--only", default="", help="Sections, by commas; the others keep their rows. They need what stands above."
)
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where it is tried; kept, and gone on with if it exists."
)
@click.option(
    "--shards", type=click.Path(path_type=Path, exists=True), help="Shards of the starter data, if there are any."
)
def main(only: str, folder: Path | None, shards: Path | None) -> None:
    """Run README's blocks, write tests/benchmarks/results/docs-proofs.json, renew README's table."""
    failed = False
    with tempfile.TemporaryDirectory(prefix="vlp-docs-") as scratch:
        place = folder or Path(scratch) / "checkout"
        if not place.exists():
            readme_blocks.checkout(place, shards)
        for name, some in sections(readme_blocks.blocks(README.read_text(encoding="utf-8"))).items():
            if only and name not in only.split(","):
                continue
            trouble, seconds = readme_blocks.run(some, place.resolve())
            row = account(name, some, trouble, seconds)
            click.echo(f"{name}: {row.value} of {row.goal.split()[1]} blocks, {row.note}\n{trouble}")
            result = write("docs-proofs", [row])
            README.write_text(render(README, result), encoding="utf-8")
            failed = failed or bool(trouble)
    sys.exit(failed)


if __name__ == "__main__":
    main()
