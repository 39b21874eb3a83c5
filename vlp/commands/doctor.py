"""`vlp doctor`."""

from collections.abc import Iterator
from dataclasses import asdict

import click

from data_pipelines.console import command, emit, json_option
from vlp import doctor as checkup
from vlp.doctor import Check


@command("doctor")
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine has, what is missing and what to do, one line each.

    Exit code 1 when something required is missing.

    \b
    Example:
      vlp doctor
      vlp doctor --json
    """
    checks: list[Check] = []

    def lines() -> Iterator[str]:
        for check in checkup.run_checks():
            checks.append(check)
            yield check.line()
        yield _verdict(checks)

    if as_json:
        checks.extend(checkup.run_checks())
    emit({"ok": _fine(checks), "checks": [asdict(check) for check in checks]}, as_json, lines())
    if not _fine(checks):
        click.get_current_context().exit(1)


def _fine(checks: list[Check]) -> bool:
    return all(check.status != "missing" for check in checks)


def _verdict(checks: list[Check]) -> str:
    count = sum(check.status == "missing" for check in checks)
    return (
        "ready" if count == 0 else f"{count} required {'thing is' if count == 1 else 'things are'} missing, see above"
    )
