"""What the tests of docker/ share: its files, and whether a command line in them is one of ours."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from vlp.cli import cli
from vlp.recipe import load_recipe

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
VARIABLE = re.compile(r"\$\{(\w+)(?::?([-?])([^}]*))?\}")


def documents(text: str) -> list[dict[str, Any]]:
    """All of a file with several YAML documents."""
    return [document for document in yaml.safe_load_all(text) if document]


def filled(text: str, given: Mapping[str, str]) -> str:
    """Compose's `${NAME:-default}` and `${NAME:?message}` replaced. Raises KeyError for what has neither."""

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        if given.get(name):
            return given[name]
        if kind == "-":
            return str(rest)
        raise KeyError(f"{name}: {rest}")

    return VARIABLE.sub(value, text)


def vlp(arguments: Sequence[str]) -> dict[str, Any]:
    """The values that the command line would give to its command, which does not run; its name under `command`.

    A recipe is resolved with its changes. Raises click.UsageError or PipelineError for what the command would refuse.
    """
    command: click.Command = cli
    context: click.Context | None = None
    names: list[str] = []
    rest = list(arguments)
    while True:
        context = command.make_context(command.name, rest, parent=context)
        if not isinstance(command, click.Group):
            break
        name, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None
        assert name is not None
        names.append(name)
        command = found
    values = {"command": " ".join(names), **context.params}
    if names == ["train"]:
        load_recipe(values["recipe"], values["overrides"])
    return values


def torchrun(arguments: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """(torchrun's own options, the values of the `vlp` command it starts)."""
    from torch.distributed.run import get_args_parser

    outer = {name: value for name, value in os.environ.items() if not name.startswith("PET_")}
    assert outer.keys() == os.environ.keys(), "PET_ variables would stand in for options"
    found = get_args_parser().parse_args(list(arguments))
    assert (found.module, found.training_script) == (True, "vlp"), arguments
    return found, vlp(found.training_script_args)


def run_line(command: Sequence[str], arguments: Sequence[str]) -> dict[str, Any]:
    """The values of a container's command line, started by its entry point (no command) or by torchrun."""
    if not command:
        return vlp(arguments)
    assert list(command) == ["/opt/vlp/bin/torchrun"], command
    return torchrun(arguments)[1]
