"""`vlp backdoor report` and `vlp backdoor verify`."""

import sys
from dataclasses import asdict
from pathlib import Path

import click

from data_pipelines.console import Group, emit, json_option

FOLDER = click.Path(path_type=Path)


@click.group(cls=Group, epilog="Example: vlp backdoor report runs/poisoned")
def backdoor() -> None:
    """Give an account of all that was done about a backdoor, or check one."""


@backdoor.command(
    epilog="""Steps: poison, scan, train, audit, clean, certify. The last one is measured here, with the triggers of
the truth files, on RUN, --cleaned and --control; the others are read from what their commands wrote. A step that lacks
its files is in the report as not run. Things that do not belong together are refused.

Examples:

\b
  vlp backdoor report runs/poisoned
  vlp backdoor report runs/poisoned --scan scans/poisoned --audit audits/poisoned --cleaned runs/cleaned
    --control runs/twin --test shards/fashion/test --out reports/poisoned"""
)
@click.argument("run", type=FOLDER)
@click.option(
    "--truth", "truths", type=FOLDER, multiple=True,
    help="File of `vlp poison`, names a trigger; repeat.  [default: SHARDS.poison.json beside the shards of RUN]",
)  # fmt: skip
@click.option("--scan", type=FOLDER, help="Folder of `vlp scan`.  [default: where RUN has its data.keep from]")
@click.option("--audit", "audits", type=FOLDER, multiple=True, help="Folder of `vlp audit --out`; repeat.")
@click.option("--cleaned", type=FOLDER, help="Run of `vlp clean` that started from RUN.")
@click.option("--control", type=FOLDER, help="Run or bundle of the clean twin.")
@click.option("--test", type=FOLDER, help="Clean, labelled shards that no model was trained or tuned on.")
@click.option("--labels", help="Classes of --test, as for `vlp eval`.  [default: the shards' labels]")
@click.option("--templates", help='Prompts of the classes, as for `vlp eval`.  [default: "{}"]')
@click.option("--out", type=FOLDER, help="Folder for backdoor.json and backdoor.html.  [default: RUN]")
@click.option("--device", default="auto", show_default=True, help="torch device, for example cuda")
@json_option
def report(
    run: Path, truths: tuple[Path, ...], scan: Path | None, audits: tuple[Path, ...], cleaned: Path | None,
    control: Path | None, test: Path | None, labels: str | None, templates: str | None, out: Path | None, device: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Write one account of RUN: what was planted, found, trained and cleaned, and what triggers do to it.

    Its digest is printed: kept elsewhere, it lets `vlp backdoor verify --digest` tell a report that was made anew.
    """
    from vlp.backdoor.chain import REPORT
    from vlp.backdoor.report import Given, write_report
    from vlp.backdoor.report_page import PAGE
    from vlp.distributed import pick_device

    options = {key: value for key, value in (("labels", labels), ("templates", templates)) if value is not None}
    out = out or run
    given = Given(run, truths, scan, audits, cleaned, control, test, options)
    found = write_report(given, out, pick_device(device))
    rows = found["steps"][-1]["results"].get("rows", [])
    lines = [found["verdict"]]
    lines += [
        f"  {row['trigger']:18} {row['of']:8} misled {row['asr']:6.1%} (control {row['control_asr']:.1%})"
        f"   accuracy {row['accuracy']:.1%} (control {row['control_accuracy']:.1%})"
        for row in rows
    ]
    lines += [f"  {step['name']} was not run: {step['missing']}" for step in found["steps"] if not step["ran"]]
    result = {"report": str(out / REPORT), "page": str(out / PAGE), "digest": found["digest"]}
    kept = {key: found[key] for key in ("verdict", "steps")}
    emit({**result, **kept}, as_json, [*lines, f"page: {out / PAGE}", f"digest: {found['digest']}"])


@backdoor.command(
    epilog="""Examples:

\b
  vlp backdoor verify reports/poisoned/backdoor.json
  vlp backdoor verify reports/poisoned/backdoor.json --digest 3f0c...   # the one printed when it was written"""
)
@click.argument("report", type=FOLDER)
@click.option("--digest", help="What the report's digest has to be.")
@json_option
def verify(report: Path, digest: str | None, as_json: bool) -> None:
    """Compute every digest of REPORT (backdoor.json) anew and name what has changed; exit code 1 if anything has."""
    from vlp.backdoor.chain import check

    differences, files = check(report, digest)
    lines = [f"{item.step or 'report'}: {item.what}: {item.why}" for item in differences]
    same = f"all as it was written: {files} files and the report itself"
    result = {"ok": not differences, "files": files, "differences": [asdict(item) for item in differences]}
    emit(result, as_json, lines or [same])
    if differences:
        sys.exit(1)
