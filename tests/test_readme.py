"""What README says is what the code does: generated parts are fresh, and no command or key in it is made up."""

import re
import shlex
from pathlib import Path

import click
import pytest
import readme_parts

from vlp.cli import COMMANDS, cli

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def test_generated_parts_are_fresh() -> None:
    assert readme_parts.renewed(README) == README, "renew them with `make docs`"


def test_the_reference_knows_every_command_and_the_picture_every_floor() -> None:
    table = readme_parts.commands()
    assert all(f"| `vlp {name}" in table for name in COMMANDS)
    assert "| `vlp train` | Train RECIPE" in table
    assert ("data_pipelines", "vlp") in readme_parts.imports()
    assert not {(a, b) for a, b in readme_parts.imports() if a.startswith("server") and not b.startswith("server")}


def calls() -> list[str]:
    """Every call of vlp in README's indented shell blocks, continued lines joined, comments and other programs cut."""
    text = README.replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    parts = [part.strip() for line in lines for part in re.split(r"; |(?:^|\s)#", line.partition("  # ")[0])]
    return [part for part in parts if re.match(r"vlp\s", part)]


def test_enough_of_them_are_found() -> None:
    assert len(calls()) > 40
    assert any("--remove 0.05" in call for call in calls())


@pytest.mark.parametrize("call", sorted(set(calls())))
def test_every_call_of_vlp_in_readme_parses(call: str) -> None:
    """Names of commands and options exist and their values are allowed; nothing runs."""
    command: click.Command = cli
    words = shlex.split(call, comments=True)[1:]
    while isinstance(command, click.Group) and words:
        context = click.Context(command)
        below = command.get_command(context, words[0])
        if below is None:
            break
        command, words = below, words[1:]
    assert command is not cli, f"no such command: {call}"
    if command.invoke_without_command if isinstance(command, click.Group) else True:
        command.make_context(call, list(words))
