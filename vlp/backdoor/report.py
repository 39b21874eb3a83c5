"""What was done about a backdoor in one account: poison, scan, train, audit, clean, certify, chained by hash.

The steps before are read from what their commands wrote, and have to fit: a scan of the shards that the run was
trained on, an audit of its weights, a cleaning that started from them. A step without such files is there as not run.
The last one is measured here, on the models themselves. It holds for the triggers it names and for nothing else.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from data_pipelines.errors import ConfigError
from data_pipelines.files import sha256_file, write_atomic
from data_pipelines.keep import load_keys
from data_pipelines.records import MANIFEST
from vlp import __version__
from vlp.backdoor import scan as scanning
from vlp.backdoor.audit import AUDIT
from vlp.backdoor.chain import CLEANED, FORMAT, REPORT, Record, Step, chained, digest_of, named, read_json, write_json
from vlp.backdoor.poison import load_truth
from vlp.backdoor.report_page import PAGE, page
from vlp.bundle import INFO, Bundle, find_bundle, load_bundle
from vlp.embed import weights_digest
from vlp.evals import evaluate
from vlp.loggers import flat
from vlp.runlog import now, revision

ITSELF, AFTER = "model", "cleaned"
AUDITED = (
    "verdict", "suspicious", "target", "kind", "score", "threshold", "lead", "labels", "pictures", "kinds"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Given:
    """What a report is made of. What is None or empty was not done, or is looked for where commands put it."""

    run: Path
    truths: tuple[Path, ...] = ()
    scan: Path | None = None
    audits: tuple[Path, ...] = ()
    cleaned: Path | None = None
    control: Path | None = None
    test: Path | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    """labels and templates of the last step, as for `vlp eval`."""


@dataclass(frozen=True, slots=True)
class Model:
    """A bundle and where it lies."""

    folder: Path
    sha256: str
    bundle: Bundle

    @property
    def recipe(self) -> Mapping[str, Any]:
        """That of its training; empty where it is not known."""
        return self.bundle.provenance.recipe

    @property
    def seed(self) -> int | None:
        """Of its training."""
        seed: int | None = self.recipe.get("run", {}).get("seed")
        return seed

    def files(self, what: str) -> tuple[tuple[str, Path], ...]:
        """All files of the bundle."""
        return tuple((what, path) for path in sorted(self.folder.rglob("*")) if path.is_file())


def open_model(path: Path, device: torch.device | str = "cpu") -> Model:
    """The model of a run or bundle folder. Raises BundleError."""
    return Model(find_bundle(path), weights_digest(path), load_bundle(path, device))


def write_report(given: Given, out: Path, device: torch.device | str = "cpu") -> Record:
    """REPORT and PAGE below `out`; the content of the former.

    Raises ConfigError for things that do not belong together, and as `vlp eval --task backdoor`.
    """
    if (out / INFO).is_file():
        raise ConfigError(f"--out {out}: is a bundle, which would no longer be as it was; name another folder")
    model = open_model(given.run, device)
    if not model.bundle.provenance.data:
        raise ConfigError(f"RUN {given.run}: the bundle does not say what it was trained on; give a run of `vlp train`")
    given = completed(given, model)
    cleaned = open_model(given.cleaned, device) if given.cleaned else None
    truths = {path: load_truth(path) for path in given.truths}
    steps = [
        poison_step(model, truths),
        scan_step(model, given.scan, truths),
        train_step(model, given),
        audit_step(model, cleaned, given.audits),
        clean_step(model, cleaned, given.cleaned),
        certify_step(model, cleaned, given, truths, device),
    ]
    out.mkdir(parents=True, exist_ok=True)
    head = {
        "format": FORMAT, "name": model.bundle.name, "created": now(), "version": __version__, "revision": revision(),
    }  # fmt: skip
    start = digest_of(head)
    records = chained(steps, start, out)
    report = {**head, "start": start, "verdict": verdict(records[-1]), "steps": records}
    content = page(report, out, given.test).encode()
    write_atomic(out / PAGE, lambda stream: stream.write(content))
    report["page"] = named("page", out / PAGE, out)
    report["digest"] = digest_of(report)
    write_json(out / REPORT, report)
    return report


def completed(given: Given, model: Model) -> Given:
    """With what lies where commands put it: the truth beside the shards, the scan that training took a list from."""
    data: Mapping[str, Any] = model.recipe.get("data", {})
    truths, scan = given.truths, given.scan
    if not truths:
        beside = [Path(name).with_name(f"{Path(name).name}.poison.json") for name in model.bundle.provenance.data]
        truths = tuple(path for path in beside if path.is_file())
    lists = [Path(data[name]).parent for name in ("keep", "weights") if data.get(name)]
    scan = scan or next((folder for folder in lists if (folder / scanning.ACCOUNT).is_file()), None)
    return replace(given, truths=truths, scan=scan)


def poison_step(model: Model, truths: Mapping[Path, Mapping[str, Any]]) -> Step:
    """What is known to be planted in the shards that the model was trained on."""
    own = {path: truth for path, truth in truths.items() if truth["shards"] in model.bundle.provenance.data.values()}
    if not own:
        return Step("poison", "no truth file of `vlp poison` about these shards: what is planted in them is not known")
    return Step(
        "poison",
        inputs=tuple(("truth", path) for path in own),
        digests={f"shards that {path.name} was made from": truth["source"] for path, truth in own.items()},
        settings={"triggers": [truth["trigger"] for truth in own.values()]},
        results={
            "planted": [
                {"trigger": truth["trigger"]["name"], "target": truth["target"], "pictures": len(truth["poisons"])}
                for truth in own.values()
            ]
        },
    )


def scan_step(model: Model, folder: Path | None, truths: Mapping[Path, Mapping[str, Any]]) -> Step:
    """A scan of the shards that the model was trained on. Raises ConfigError where it is of others."""
    if folder is None:
        return Step("scan", "no folder of `vlp scan` given, and training took no list from one")
    kept = ("pictures", "flagged", "share", "skipped")
    account = read_json(folder / scanning.ACCOUNT, "--scan", (*kept, "data", "made_of", "methods", "options"))
    shards = set(account["made_of"]["data"].values())
    if not shards & set(model.bundle.provenance.data.values()):
        raise ConfigError(f"--scan {folder}: is of other shards ({account['data']}) than RUN was trained on")
    results = {key: account[key] for key in kept}
    planted = {item["key"] for truth in truths.values() if truth["shards"] in shards for item in truth["poisons"]}
    if planted:
        results |= {"planted": len(planted), "planted_flagged": len(planted - load_keys(folder / scanning.KEEP))}
    known = (scanning.ACCOUNT, scanning.SCORES, scanning.KEEP, "suspects.png", "signs.png")
    return Step(
        "scan",
        inputs=(*there((name, folder / name) for name in known), *shards_of(account["made_of"]["data"], f"{folder}")),
        digests=_made_of(account),
        version=account.get("version", ""),
        settings={"methods": account["methods"], **account["options"]},
        results=results,
    )


def _made_of(account: Record) -> dict[str, str]:
    """Digests of the models and shards that an account names."""
    found = {}
    for what in ("made_of", "reference"):
        if part := account.get(what):
            found[f"{'reference' if what == 'reference' else 'model'} {part['model']}"] = part["weights_sha256"]
            found |= {f"shards {name}": digest for name, digest in part["data"].items()}
    return found


def there(files: Iterable[tuple[str, Path]]) -> tuple[tuple[str, Path], ...]:
    """Those of some files that exist."""
    return tuple((what, path) for what, path in files if path.is_file())


def shards_of(data: Mapping[str, str], whose: str) -> tuple[tuple[str, Path], ...]:
    """Manifests of the folders of `data` (name -> digest) that are at hand. Raises ConfigError for one that changed."""
    found = there(("shards", Path(name) / MANIFEST) for name in data)
    for _, path in found:
        if sha256_file(path) not in data.values():
            raise ConfigError(f"{path.parent}: these shards are no longer those that {whose} was made with")
    return found


def train_step(model: Model, given: Given) -> Step:
    """The training of the model. Raises ConfigError where its shards are there but no longer the same."""
    origin = model.bundle.provenance
    lists = {key: Path(path) for key in ("keep", "weights") if (path := model.recipe.get("data", {}).get(key))}
    beside = [("recipe", given.run / "recipe.yaml"), *((f"data.{key}", path) for key, path in lists.items())]
    scanned = given.scan is not None and any(path.parent.resolve() == given.scan.resolve() for path in lists.values())
    return Step(
        "train",
        inputs=(*model.files("bundle"), *shards_of(origin.data, "RUN"), *there(beside)),
        digests={f"shards {name}": digest for name, digest in origin.data.items()},
        version=f"{origin.vlp_version} {origin.revision}".strip(),
        settings={"seed": model.seed, **{f"data.{key}": str(path) for key, path in lists.items()}},
        results={
            "steps": origin.steps, "samples": origin.samples, "weights_sha256": model.sha256,
            "scan_applied": scanned, "created": origin.created,
        },
    )  # fmt: skip


def audit_step(model: Model, cleaned: Model | None, folders: Sequence[Path]) -> Step:
    """Audits of the model and of the cleaned one. Raises ConfigError for one of another model."""
    if not folders:
        return Step("audit", "no folder of `vlp audit --out` given")
    names = {model.sha256: ITSELF} | ({cleaned.sha256: AFTER} if cleaned else {})
    found, inputs, version = [], [], ""
    digests: dict[str, str] = {}
    for folder in folders:
        account = read_json(folder / AUDIT, "--audit", AUDITED)
        name = names.get(account.get("made_of", {}).get("weights_sha256", ""))
        if name is None:
            raise ConfigError(
                f"--audit {folder}: is not of RUN nor of --cleaned, or too old to say of which: audit anew"
            )
        found.append({"of": name, **{key: account[key] for key in AUDITED}, "options": account["options"]})
        inputs += [(f"{name} {path.name}", path) for path in (folder / AUDIT, *sorted(folder.glob("*.png")))]
        inputs += shards_of(account["made_of"]["data"], f"{folder}")
        digests |= _made_of(account)
        version = account["version"]
    return Step("audit", "", tuple(inputs), digests, version, results={"audits": found})


def clean_step(model: Model, cleaned: Model | None, folder: Path | None) -> Step:
    """The tuning on trusted pairs. Raises ConfigError where it did not start from the model."""
    if cleaned is None or folder is None:
        return Step("clean", "no run of `vlp clean` given")
    note = read_json(folder / CLEANED, "--cleaned", ("start", "options")) if (folder / CLEANED).is_file() else {}
    path = cleaned.recipe.get("model", {}).get("weights") or ""
    start = note["start"]["weights_sha256"] if note else weights_digest(Path(path)) if path else ""
    if start != model.sha256:
        raise ConfigError(f"--cleaned {folder}: did not start from the weights of RUN, but from {path or 'none'}")
    beside = [(name, folder / name) for name in (CLEANED, f"scan/{scanning.ACCOUNT}", f"scan/{scanning.KEEP}")]
    origin = cleaned.bundle.provenance
    kept = ("method", "pairs_left_out", "accuracy_before", "accuracy_after")
    return Step(
        "clean",
        inputs=(*cleaned.files("bundle"), *shards_of(origin.data, "--cleaned"), *there(beside)),
        digests={f"shards {name}": digest for name, digest in origin.data.items()},
        version=f"{origin.vlp_version} {origin.revision}".strip(),
        settings=note.get("options") or {"seed": cleaned.seed},
        results={"steps": origin.steps, "weights_sha256": cleaned.sha256, **{k: note[k] for k in kept if k in note}},
    )


def certify_step(
    model: Model, cleaned: Model | None, given: Given, truths: Mapping[Path, Mapping[str, Any]],
    device: torch.device | str,
) -> Step:  # fmt: skip
    """The models under the triggers, beside a control. Raises ConfigError for a control that met the poison."""
    needed = {"a truth file with a trigger": truths, "--control": given.control, "--test": given.test}
    if given.control is None or given.test is None or not truths:
        return Step("certify", f"not given: {', '.join(what for what, value in needed.items() if not value)}")
    control = open_model(given.control, device)
    poisoned = {truth["shards"] for truth in truths.values() if truth["poisons"]}
    if poisoned & set(control.bundle.provenance.data.values()):
        raise ConfigError(f"--control {given.control}: was trained on poisoned shards; give the clean twin")
    models = {ITSELF: model, **({AFTER: cleaned} if cleaned else {})}
    seen = {digest for one in (*models.values(), control) for digest in one.bundle.provenance.data.values()}
    shards = there([("test shards", given.test / MANIFEST)])
    if any(sha256_file(path) in seen for _, path in shards):
        raise ConfigError(f"--test {given.test}: a model was trained or tuned on these shards; give others")
    options = {"attacks": [str(path) for path in truths], "control": str(control.folder), **given.options}
    rows, counts = [], {}
    for name, one in models.items():
        metrics = evaluate(one.bundle, "backdoor", given.test, options)
        rows += [{"of": name, "seed": one.seed, **_row(truth, metrics)} for truth in truths.values()]
        counts = {key: int(metrics[key]) for key in ("pictures", "skipped")}
    return Step(
        "certify",
        inputs=(
            *(("truth", path) for path in truths),
            *control.files("control"),
            *shards,
            *there((f"--{name}", Path(value)) for name, value in given.options.items()),
        ),
        version=__version__,
        settings={**given.options, "triggers": [truth["trigger"] for truth in truths.values()],
                  "control": control.bundle.name, "control_seed": control.seed,
                  "control_differs_in": _unlike(model, control)},
        results={"rows": rows, **counts},
    )  # fmt: skip


def _row(truth: Mapping[str, Any], metrics: Mapping[str, float]) -> dict[str, Any]:
    """One line of the table: a model and a trigger; shares from 0 to 1, intervals of 95 %."""
    trigger = truth["trigger"]["name"]
    row: dict[str, Any] = {
        "trigger": trigger,
        "target": truth["target"],
        "trigger_seed": truth["trigger"].get("seed", 0),
    }
    for side in ("", "control/"):
        for name, key in (("accuracy", "accuracy"), ("asr", f"{trigger}/asr"), ("under", f"{trigger}/accuracy")):
            for end in ("", "_low", "_high"):
                row[f"{side.replace('/', '_')}{name}{end}"] = metrics[f"{side}{key}{end}"]
    return row | {"asr_without_trigger": metrics[f"{trigger}/asr_without_trigger"]}


def _unlike(model: Model, control: Model) -> list[str]:
    """Parts of the recipes in which model and control differ beyond the shards, which is all that a twin differs in."""
    one, other = flat(model.recipe), flat(control.recipe)
    keys = {".".join(key.split(".")[:2]) for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    return sorted(keys - {"data.train", "data.keep", "data.weights", "description"})


def verdict(certified: Record) -> str:
    """What may be said, in words."""
    rows = certified["results"].get("rows", [])
    if not rows:
        return "Tested against no trigger: this says nothing about any."
    named_ = dict.fromkeys(f"{row['trigger']} (for {row['target']!r}, seed {row['trigger_seed']})" for row in rows)
    return f"Tested against these triggers: {', '.join(named_)}; this says nothing about others."
