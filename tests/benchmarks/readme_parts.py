"""The parts of README that are written by code: commands, recipes, the picture of what imports what. `make docs`."""

import ast
from collections.abc import Callable
from pathlib import Path

import all_figures
import click
from bench_kit import RESULTS, ROOT, placed, render

from vlp.cli import COMMANDS, cli
from vlp.recipe import load_recipe, recipe_names

README = ROOT / "README.md"
FLOORS = ("data_pipelines", "vlp", "server")


def leaves(command: click.Command, name: str) -> list[tuple[str, click.Command]]:
    """Every command below one, itself included unless it only groups others."""
    if not isinstance(command, click.Group):
        return [(name, command)]
    context = click.Context(command)
    found: list[tuple[str, click.Command]] = [(name, command)] if command.invoke_without_command else []
    for inner in command.list_commands(context):
        below = command.get_command(context, inner)
        assert below is not None
        found += leaves(below, f"{name} {inner}")
    return found


def commands() -> str:
    """Table of every command with the first sentence of its help."""
    lines = ["| command | |", "|---|---|"]
    for name in COMMANDS:
        top = cli.get_command(click.Context(cli), name)
        assert top is not None
        for leaf, command in leaves(top, f"vlp {name}"):
            first = " ".join((command.help or "").partition("\n\n")[0].split())
            lines.append(f"| `{leaf}` | {first} |")
    return "\n".join(lines)


def recipes() -> str:
    """Table of every recipe with its description."""
    rows = [f"| `{name}` | {load_recipe(name).description} |" for name in recipe_names()]
    return "\n".join(["| recipe | |", "|---|---|", *rows])


def room(path: Path) -> str:
    """The folder of a module, at most one below its floor."""
    parts = path.relative_to(ROOT).parts[:-1]
    return "/".join(parts[:2])


def imports() -> set[tuple[str, str]]:
    """(room, room that it imports from), of the three floors."""
    found = set()
    for path in (path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in FLOORS:
                whole = ROOT.joinpath(*node.module.split("."))
                target = room(whole / "x.py") if whole.is_dir() else room(whole.with_suffix(".py"))
                found.add((target, room(path)))
    return {(source, user) for source, user in found if source != user}


def architecture() -> str:
    """Floors with their rooms, as a mermaid graph: an arrow leads from a room to a floor's that imports it."""
    rooms = sorted({room(path) for floor in FLOORS for path in (ROOT / floor).rglob("*.py")})
    lines = ["```mermaid", "flowchart LR"]
    for floor in FLOORS:
        lines.append(f"  subgraph {floor}_floor[{floor}]")
        lines += [
            f"    {name.replace('/', '_')}[{name.rpartition('/')[2]}]" for name in rooms if name.split("/")[0] == floor
        ]
        lines.append("  end")
    found = imports()
    between = {(a.split("/")[0], b.split("/")[0]) for a, b in found}
    lines += [f"  {a}_floor ==> {b}_floor" for a, b in sorted(between) if a != b]
    inner = {(a, b) for a, b in found if a.split("/")[0] == b.split("/")[0] and "/" in a and "/" in b}
    lines += [f"  {a.replace('/', '_')} --> {b.replace('/', '_')}" for a, b in sorted(inner)]
    return "\n".join([*lines, "```"])


def overview() -> str:
    """Every suite of figures, how many of its rows meet their goals, and which do not."""
    return all_figures.overview(all_figures.gathered())


PARTS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "recipes": recipes,
    "architecture": architecture,
    "overview of figures": overview,
}


def renewed(text: str) -> str:
    """README with each part between its markers. Raises ValueError without them."""
    for name, part in PARTS.items():
        text = placed(text, name, part(), README)
    return text


def main() -> None:
    """Write benchmarks.json, and all parts and all tables of figures into README."""
    all_figures.TOGETHER.write_text(all_figures.written(all_figures.gathered()), encoding="utf-8")
    README.write_text(renewed(README.read_text(encoding="utf-8")), encoding="utf-8")
    for result in sorted(RESULTS.glob("*.json")):
        README.write_text(render(README, result), encoding="utf-8")


if __name__ == "__main__":
    main()
