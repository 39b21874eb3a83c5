"""The page of a report: the verdict, what triggers do to the models, and every step with its pictures and digests."""

import base64
import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.errors import BadSample
from data_pipelines.reader import open_shards
from vlp.backdoor.chain import REPORT
from vlp.backdoor.poison import repainted
from vlp.backdoor.triggers import Config, Trigger
from vlp.loggers import flat
from vlp.report import STYLE

PAGE = "backdoor.html"
SHOWN = 4
"""Test pictures that are shown with each trigger."""
LOOKED = 200
"""Test pictures from which they are taken."""
TITLES = {
    "poison": "Which samples were planted", "scan": "The search for planted samples", "train": "The training",
    "audit": "The search for a trigger in the model", "clean": "The cleaning", "certify": "The test with triggers",
}  # fmt: skip
OWN_STYLE = """
:root { --soft: color-mix(in srgb, currentColor 9%, transparent); --bad: #d0453a; --good: #2f9e63; }
@media (prefers-color-scheme: dark) { :root { --line: #3a3f4a; --muted: #9aa3b2; } }
.verdict { background: var(--soft); border-left: 4px solid var(--muted); padding: .8rem 1rem; font-size: 1.1rem; }
.way { display: flex; flex-wrap: wrap; gap: .4rem; list-style: none; padding: 0; }
.way a { display: block; padding: .2rem .8rem; border-radius: 1rem; background: var(--soft); color: inherit;
  text-decoration: none; } .way .off { background: none; outline: 1px dashed var(--muted); color: var(--muted); }
.scroll { overflow-x: auto; } th { font-weight: 600; vertical-align: bottom; } td { vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; } .ci { color: var(--muted); font-size: .85em; }
.bar { position: relative; width: 9rem; height: .7rem; margin-top: .4rem; background: var(--soft); }
.bar i { position: absolute; inset: 0 auto 0 0; background: var(--bad); } .bar.k i { background: var(--muted); }
.bar b { position: absolute; top: 50%; height: 2px; background: currentColor; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; align-items: end; } figure { margin: 0; max-width: 100%; }
figcaption { color: var(--muted); font-size: .85rem; }
.audit { display: grid; grid-template-columns: auto 1fr; } .audit img { max-height: 9.5rem; }
.few img { width: 5.5rem; height: 5.5rem; object-fit: contain; image-rendering: pixelated; margin-right: .3rem; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--muted); } code { overflow-wrap: anywhere; }
h2 span { font-weight: 400; color: var(--muted); font-size: .8em; }
"""


def page(report: Mapping[str, Any], folder: Path, test: Path | None) -> str:
    """The page, self-contained, of a report whose paths are seen from `folder`; `test`: shards of the last step."""
    title = f"Backdoor report: {html.escape(report['name'])}"
    way = "".join(
        f"<li><a href='#{step['name']}'{'' if step['ran'] else ' class=off'}>{step['name']}"
        f"{'' if step['ran'] else ' (not run)'}</a>"
        for step in report["steps"]
    )
    *before, last = report["steps"]  # what comes out first, then how it came about
    steps = "".join(
        f"<h2 id={name}>{name} <span>{TITLES[name]}</span></h2>{''.join(_step(step, folder, test))}"
        for name, step in ((step["name"], step) for step in (last, *before))
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{title}</title><style>{STYLE}{OWN_STYLE}</style><h1>{title}</h1>"
        f"<p class=verdict>{html.escape(report['verdict'])}</p><ul class=way>{way}</ul>{steps}"
        f"<p class=m>{report['created']}, vlp {report['version']} {report['revision']}. Every file named here "
        f"has its sha256 in {REPORT}, and every step the digest of the one before: "
        f"<code>vlp backdoor verify {REPORT}</code> tells what has changed since.</p></html>"
    )


def _step(step: Mapping[str, Any], folder: Path, test: Path | None) -> Iterator[str]:
    if not step["ran"]:
        yield f"<p>Not run: {html.escape(step['missing'])}.</p>"
        yield _details(step)
        return
    if step["name"] == "certify":
        yield _table(step)
        if test is not None:
            yield f"<div class=row>{''.join(_examples(step['settings']['triggers'], test))}</div>"
    else:
        yield "".join(f"<p>{html.escape(line)}</p>" for line in TOLD[step["name"]](step["settings"], step["results"]))
    yield f"<div class='row {step['name']}'>"
    for item in sorted(step["inputs"], key=_kind):
        if item["path"].endswith(".png"):
            image = _image((folder / item["path"]).read_bytes())
            yield f"<figure>{image}<figcaption>{html.escape(item['what'].removesuffix('.png'))}</figcaption></figure>"
    yield "</div>"
    yield _details(step)


def _kind(item: Mapping[str, str]) -> tuple[str, bool]:
    """An audit's trigger stands before the pictures with it."""
    what, _, kind = item["what"].rpartition("-")
    return kind, "trigger" not in what


def _poison(settings: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[str]:
    for item in results["planted"]:
        yield f"{item['pictures']:,} pictures with the trigger {item['trigger']}, for {item['target']!r}."


def _scan(settings: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[str]:
    yield f"{results['flagged']:,} of {results['pictures']:,} samples flagged ({results['share']:.2%})."
    if "planted" in results:
        yield f"Of the {results['planted']:,} planted ones {results['planted_flagged']:,} are among them."
    yield f"Signs looked for: {', '.join(settings['methods'])}. A sample without a flag may be planted all the same."


def _train(settings: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[str]:
    yield f"{results['steps']:,} steps, {results['samples']:,} samples, seed {settings['seed']}."
    yield (
        "Trained by the list of the scan." if results["scan_applied"]
        else "No list of the scan was applied: trained on all samples, flagged or not."
    )  # fmt: skip


def _audit(settings: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[str]:
    for item in results["audits"]:
        yield f"{'After cleaning' if item['of'] == 'cleaned' else 'The model'}: {item['verdict']}."


def _clean(settings: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[str]:
    method = results.get("method", "its own recipe")
    rate = f", rate {settings['lr']:g}" if "lr" in settings else ""
    yield f"{results['steps']:,} steps of {method}{rate}, seed {settings['seed']}."
    if results.get("pairs_left_out"):
        yield f"{results['pairs_left_out']:,} of the trusted pairs looked planted and were left out."
    if results.get("accuracy_before") is not None:
        yield f"Accuracy on others: before {results['accuracy_before']:.1%}, after {results['accuracy_after']:.1%}."


TOLD = {"poison": _poison, "scan": _scan, "train": _train, "audit": _audit, "clean": _clean}


def _table(step: Mapping[str, Any]) -> str:
    head = (
        "<tr><th>trigger<th>model<th class=n>clean accuracy<th>attack success<th class=n>accuracy under trigger"
        "<th class=n>seed</tr>"
    )
    lines = []
    rows: Sequence[Mapping[str, Any]] = step["results"]["rows"]
    for trigger in dict.fromkeys(row["trigger"] for row in rows):
        own = [row for row in rows if row["trigger"] == trigger]
        cells = [(row["of"], row, "", row["seed"]) for row in own]
        cells.append(("control", own[0], "control_", step["settings"]["control_seed"]))
        for number, (name, row, side, seed) in enumerate(cells):
            first = f"<b>{html.escape(trigger)}</b> for {html.escape(row['target'])!r}" if number == 0 else ""
            lines.append(
                f"<tr><td>{first}<td>{name}{_share(row, side + 'accuracy')}{_bar(row, side)}"
                f"{_share(row, side + 'under')}<td class=n>{'' if seed is None else seed}</tr>"
            )
    unlike = ", ".join(step["settings"]["control_differs_in"])
    twin = f"It is no twin of the model, for its recipe differs in {html.escape(unlike)}." if unlike else ""
    return (
        f"<div class=scroll><table>{head}{''.join(lines)}</table></div><p class=m>{step['results']['pictures']:,} test "
        f"pictures. Attack success: share of the pictures of other labels that the trigger makes the target; small are "
        f"intervals of 95 %, over test pictures alone: each model is one training, with the seed named. The control "
        f"met no planted sample. {twin}</p>"
    )


def _share(row: Mapping[str, Any], key: str) -> str:
    return f"<td class=n>{row[key]:.1%} {_interval(row, key)}"


def _interval(row: Mapping[str, Any], key: str) -> str:
    return f"<span class=ci>{100 * row[f'{key}_low']:.1f}–{100 * row[f'{key}_high']:.1f}</span>"


def _bar(row: Mapping[str, Any], side: str) -> str:
    value, low, high = (100 * row[f"{side}asr{end}"] for end in ("", "_low", "_high"))
    return (
        f"<td>{value:.1f}% {_interval(row, side + 'asr')}<div class='bar{' k' if side else ''}'>"
        f"<i style='width:{value:.1f}%'></i><b style='left:{low:.1f}%;width:{high - low:.1f}%'></b></div>"
    )


def _examples(triggers: Sequence[Mapping[str, Any]], test: Path) -> Iterator[str]:
    """Test pictures as they are, and with each trigger."""
    samples = [shard.read(row) for shard in open_shards(test)[:1] for row in range(min(LOOKED, len(shard)))]
    apart = list({sample.labels[:1]: sample for sample in samples}.values())[:SHOWN]
    kinds = [("without", None), *((item["name"], Trigger(Config.model_validate(item))) for item in triggers)]
    for name, trigger in kinds:
        images = []
        for sample in apart:
            try:
                images.append(_image(repainted(sample.image, trigger, sample.key)))
            except BadSample:
                continue
        yield f"<figure class=few>{''.join(images)}<figcaption>{html.escape(name)}</figcaption></figure>"


def _image(content: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(content).decode()}">'


def _details(step: Mapping[str, Any]) -> str:
    facts = flat(step["settings"]).items()
    files = [(f"{item['what']}: {item['path']}", item["sha256"]) for item in step["inputs"]]
    chain = [("vlp", step["version"] or "not known"), ("previous", step["previous"]), ("this step", step["digest"])]
    rows = "".join(
        f"<tr><td class=m>{html.escape(str(name))}<td><code>{html.escape(str(value))}</code></tr>"
        for name, value in [*facts, *files, *step["digests"].items(), *chain]
    )
    return f"<details><summary>settings, files and digests</summary><table>{rows}</table></details>"
