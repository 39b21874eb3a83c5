"""What the commands of all floors share: readable errors, `--json`, progress on stderr, sub-commands loaded on use.

Standard output carries the result alone; everything else goes to standard error.
"""

import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import click
from pydantic import ValidationError

from data_pipelines.config import explain
from data_pipelines.errors import PipelineError

F = TypeVar("F", bound=Callable[..., Any])
Advance = Callable[[int], None]

CONTEXT: Mapping[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


def debug() -> bool:
    """Whether VLP_DEBUG asks for tracebacks."""
    return os.environ.get("VLP_DEBUG", "") not in ("", "0")


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn errors a user can put right into a message and exit code 1; VLP_DEBUG=1 shows the traceback instead."""
    try:
        yield
    except PipelineError as error:
        if debug():
            raise
        raise click.ClickException(str(error)) from error
    except ValidationError as error:
        if debug():
            raise
        raise click.ClickException(explain(error)) from error


class Command(click.Command):
    """A click command with readable errors."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run, with errors made readable."""
        with readable_errors():
            return super().invoke(ctx)


class Group(click.Group):
    """A click group with readable errors; its `command` decorator makes `Command`s."""

    command_class = Command

    def invoke(self, ctx: click.Context) -> Any:
        """Run, with errors made readable."""
        with readable_errors():
            return super().invoke(ctx)


class LazyGroup(Group):
    """Group whose sub-commands are imported when invoked, so that `--help` of one never loads what another needs."""

    def __init__(
        self, *args: Any, lazy: Mapping[str, tuple[str, str]] | None = None, default: str | None = None, **kwargs: Any
    ) -> None:
        """`lazy`: command name -> ("module:attribute", "short help"); `default`: runs when no command is named."""
        super().__init__(*args, **kwargs)
        self.lazy = dict(lazy or {})
        self.default = default

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default command's name before arguments that name none."""
        names = {*self.list_commands(ctx), *ctx.help_option_names}
        if self.default and args and args[0] not in names:
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The default command's options, then the other commands."""
        if self.default and (command := self.get_command(ctx, self.default)) is not None:
            click.Command.format_options(command, ctx, formatter)
            self.format_commands(ctx, formatter)
        else:
            super().format_options(ctx, formatter)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all sub-commands."""
        return sorted({*super().list_commands(ctx), *self.lazy})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The sub-command; imports it."""
        if cmd_name not in self.lazy:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = self.lazy[cmd_name][0].partition(":")
        found = getattr(importlib.import_module(module), attribute)
        assert isinstance(found, click.Command), f"{self.lazy[cmd_name][0]} is no click command"
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List all sub-commands by their short help without importing the lazy ones."""
        rows = []
        for name in self.list_commands(ctx):
            if name in self.lazy:
                rows.append((name, self.lazy[name][1]))
            elif (eager := super().get_command(ctx, name)) is not None and not eager.hidden:
                rows.append((name, eager.get_short_help_str(limit=formatter.width)))
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


def command(name: str | None = None, **attributes: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """`click.command` with readable errors."""
    attributes.setdefault("context_settings", dict(CONTEXT))
    return click.command(name, cls=Command, **attributes)


def json_option(function: F) -> F:
    """Adds `--json`, passed as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")(function)


def emit(result: Mapping[str, Any], as_json: bool, lines: Iterable[str] = ()) -> None:
    """The result of a command on stdout: one line of JSON, or the lines for people."""
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False, default=str))
        return
    for line in lines:
        click.echo(line)


@contextmanager
def progress(title: str, total: int | None = None, enabled: bool = True, unit: str = "") -> Iterator[Advance]:
    """Progress bar on stderr; yields a function that advances it. `total` None shows a count without an end."""
    if not enabled:
        yield _ignore
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda step: bar.advance(task, step)


def _ignore(step: int) -> None:
    """Advance of a bar that is not shown."""
