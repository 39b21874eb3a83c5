"""Outcomes of claims: means, spread and verdict; the file they are kept in, and the tables made of it."""

import hashlib
import importlib
import json
import math
import os
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import vlp
from data_pipelines.errors import ConfigError
from data_pipelines.files import cache_dir, write_atomic
from vlp.claims import PLACE, Claim, checks, claim_names, load_claim
from vlp.objectives import base as objectives
from vlp.recipe import load_recipe, recipe_names
from vlp.runlog import now, revision

SUITE = "claims"
Row = dict[str, Any]


def outcome(name: str, claim: Claim, found: Mapping[tuple[str, int], Mapping[str, Any]], seeds: int) -> Row:
    """One row of the result file. Raises ConfigError for a metric that the runs do not have."""
    values = {key: [_number(claim, key, found, seed) for seed in range(seeds)] for key in claim.values}
    means = {key: statistics.fmean(numbers) for key, numbers in values.items()}
    tried = [_check(check, values, means, seeds) for check in claim.checks]
    held = sum(check["holds"] for check in tried)
    seconds = sum(entry["seconds"] for entry in found.values())
    return {
        "name": name,
        "peer": claim.baseline,
        "peer_version": claim.recipe,
        "value": held,
        "goal": f">= {len(tried)}",
        "met": held == len(tried),
        "command": f"vlp claims run {name}" + (f" --seeds {seeds}" if seeds != claim.seeds else ""),
        "note": claim.statement,
        "paper": claim.paper,
        "objective": claim.objective,
        "claim": identity(claim),
        "seeds": seeds,
        "core_seconds": round(seconds),
        "values": {key: _spread(numbers) for key, numbers in values.items()},
        "checks": tried,
        "date": now().partition("T")[0],
        "revision": revision()[:12],
        "machine": machine(),
    }


def _number(claim: Claim, key: str, found: Mapping[tuple[str, int], Mapping[str, Any]], seed: int) -> float:
    job, metric = claim.values[key]
    numbers = found[job, seed]["numbers"]
    if metric not in numbers:
        raise ConfigError(f"values.{key}: {job} has no {metric!r}; it has {', '.join(sorted(numbers))}")
    return float(numbers[metric])


def _check(check: str, values: Mapping[str, Sequence[float]], means: Mapping[str, float], seeds: int) -> Row:
    by_seed = [{key: numbers[seed] for key, numbers in values.items()} for seed in range(seeds)]
    return {
        "check": check,
        "holds": checks.holds(check, means),
        "left": round(checks.left_side(check, means), 6),
        "seeds_that_hold": sum(checks.holds(check, one) for one in by_seed),
    }


def _spread(numbers: Sequence[float]) -> Row:
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else math.nan
    return {
        "mean": round(statistics.fmean(numbers), 6),
        "deviation": None if math.isnan(deviation) else round(deviation, 6),
        "low": round(min(numbers), 6),
        "high": round(max(numbers), 6),
    }


def machine() -> str:
    """Processor, cores and Python of this machine, in words."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"


# -- the file ----------------------------------------------------------------------------------------------------------


def results_file() -> Path:
    """Where outcomes are kept: in a checkout its file of figures, else one in the cache beside the wheel's."""
    checkout = Path(vlp.__file__ or "").parent.parent / "tests" / "benchmarks" / "results"
    return checkout / f"{SUITE}.json" if checkout.is_dir() else cache_dir() / SUITE / "results.json"


def read_rows(path: Path | None = None) -> list[Row]:
    """All outcomes known; empty without a file. Raises ConfigError for a file that is none of ours."""
    path = path or results_file()
    shipped = Path(__file__).with_name("results.json")
    path = path if path.is_file() else shipped
    if not path.is_file():
        return []
    try:
        rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: no file of results ({error})") from error
    return rows


def keep(row: Row, path: Path | None = None) -> Path:
    """Enter an outcome in place of the claim's former one; returns the file."""
    path = path or results_file()
    rows = {old["name"]: old for old in read_rows(path)} | {row["name"]: row}
    content = {"suite": SUITE, "rows": [rows[name] for name in sorted(rows)]}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, lambda stream: stream.write(text.encode()))
    return path


def identity(claim: Claim) -> str:
    """Short digest of the claim and of what the recipes of its arms say."""
    recipes = []
    for name, arm in claim.arms.items():
        overrides = [PLACE.sub(r"\1", text) for text in (*claim.common, *arm)]
        recipes.append(load_recipe(claim.recipe_of(name), overrides).model_dump(mode="json", exclude_unset=True))
    unsaid = set() if claim.recipes else {"recipes"}  # so that claims from before there were any keep their outcomes
    own = claim.model_dump(mode="json", exclude=unsaid)
    content = json.dumps([own, recipes], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def is_of(row: Row, claim: Claim) -> bool:
    """Whether an outcome belongs to the claim as it stands now."""
    return bool(row["claim"] == identity(claim))


def verdict(name: str, rows: Sequence[Row]) -> str:
    """holds, fails, or not run yet."""
    claim = load_claim(name)
    found = [row for row in rows if row["name"] == name and is_of(row, claim)]
    return _in_a_word(found[0]) if found else "not run yet"


def _in_a_word(row: Row) -> str:
    return "holds" if row["met"] else "fails"


# -- the tables --------------------------------------------------------------------------------------------------------


def percent(entry: Mapping[str, Any]) -> str:
    """`0.412 ± 0.010` of a value's spread."""
    spread = "" if entry["deviation"] is None else f" ± {entry['deviation']:.3f}"
    return f"{entry['mean']:.3f}{spread}"


def claims_table(rows: Sequence[Row]) -> str:
    """The outcomes as Markdown; claims that were never run stand in it too."""
    lines = [
        "| claim | what it says | measured, mean ± deviation | checks | minutes on two cores | verdict |",
        "|---|---|---|---|---|---|",
    ]
    known = {row["name"]: row for row in rows}
    shipped = claim_names()
    for name in dict.fromkeys((*shipped, *known)):
        row = known.get(name)
        if name in shipped:
            claim, state = load_claim(name), verdict(name, rows)
            statement, paper = claim.statement, claim.paper
        else:  # from a file of the user's
            statement, paper, state = known[name]["note"], known[name]["paper"], _in_a_word(known[name])
        measured = checked = spent = ""
        if row is not None and state != "not run yet":
            measured = "<br>".join(f"{key} {percent(entry)}" for key, entry in row["values"].items())
            checked = "<br>".join(
                f"{check['check']}: {check['left']:.3f}, {'yes' if check['holds'] else '**no**'} "
                f"({check['seeds_that_hold']} of {row['seeds']} seeds)"
                for check in row["checks"]
            )
            spent = f"{row['core_seconds'] / 120:.1f}"
        lines.append(f"| `{name}` | {statement} ({paper}) | {measured} | {checked} | {spent} | {state} |")
    dates = [", ".join(sorted({row[key] for row in rows})) for key in ("machine", "date", "revision")]
    return "\n".join([*lines, *(["", "; ".join(dates) + "."] if rows else [])])


def zoo(rows: Sequence[Row]) -> dict[str, Row]:
    """Objective -> title, paper, needs, coupling, options, recipe, claims and their verdicts."""
    recipes = {name: load_recipe(name).objective["name"] for name in recipe_names() if not name.startswith("claims/")}
    claims = {name: load_claim(name).objective for name in claim_names()}
    found = {}
    for name in objectives.names():
        module = importlib.import_module(f"vlp.objectives.{name}")
        title, paper = title_and_paper(str(module.__doc__))
        users = [recipe for recipe, used in recipes.items() if used == name]
        namesakes = [recipe for recipe in users if recipe.endswith(f"/{name}")]
        found[name] = {
            "title": title,
            "paper": paper,
            "needs": list(module.NEEDS),
            "coupling": module.COUPLING,
            "options": {key: item.default for key, item in module.Config.model_fields.items()},
            "recipe": next(iter(namesakes + users), None),
            "claims": {claim: verdict(claim, rows) for claim, about in claims.items() if about == name},
        }
    return found


def title_and_paper(text: str) -> tuple[str, str]:
    """From a module's header: what stands before the first sentence's bracket, and the paper named in it.

    >>> title_and_paper("CLIP: symmetric cross-entropy (Radford et al. 2021, arXiv 2103.00020, figure 3).")
    ('CLIP: symmetric cross-entropy', 'Radford et al. 2021, arXiv 2103.00020')
    """
    flat = " ".join(text.split())
    bracket = re.search(r"\(([^()]*?arXiv[: ]\d{4}\.\d{4,5})[^()]*\)", flat)
    number = re.search(r"arXiv[: ]\d{4}\.\d{4,5}", flat)
    paper = bracket[1] if bracket else number[0] if number else ""
    first = re.split(r"\.(?:\s|$)", flat)[0]
    return (flat[: bracket.start()].strip() if bracket and bracket.start() < len(first) else first), paper


def zoo_table(rows: Sequence[Row]) -> str:
    """The objectives as Markdown."""
    lines = ["| objective | paper | needs | coupling | recipe | claim: verdict |", "|---|---|---|---|---|---|"]
    for name, row in zoo(rows).items():
        claims = ", ".join(f"`{claim}`: {state}" for claim, state in row["claims"].items()) or "none"
        recipe = f"`{row['recipe']}`" if row["recipe"] else "none"
        needs = ", ".join(row["needs"])
        lines.append(
            f"| `{name}`: {row['title']} | {row['paper']} | {needs} | {row['coupling']} | {recipe} | {claims} |"
        )
    return "\n".join(lines)


def renew(page: Path, rows: Sequence[Row]) -> str:
    """The text of README with both tables between their markers. Raises ConfigError without these."""
    text = page.read_text(encoding="utf-8")
    for name, table in ((SUITE, claims_table(rows)), ("objectives", zoo_table(rows))):
        begin, end = f"<!-- figures of {name}: begin -->", f"<!-- figures of {name}: end -->"
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not (found and closed):
            raise ConfigError(f"{page}: needs the markers {begin!r} and {end!r}, one after the other")
        text = f"{head}{begin}\n{table}\n{end}{tail}"
    return text
