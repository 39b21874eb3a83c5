"""What a method is said to gain, measured: one YAML file per claim, `vlp/claims/NAME.yaml`, and what runs it.

Arms differ in nothing but their overrides: same initial weights, data order, steps and seeds. The keys of a claim are
the fields of `Claim`; `vlp claims run NAME` trains every arm with every seed, evaluates, and says whether it holds.
"""

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from data_pipelines.config import StrictModel, explain
from data_pipelines.errors import ConfigError
from vlp.claims.checks import names_in, parse

PLACE = re.compile(r"\{(\w+)\}")
"""`{name}` in an override or a command: the folder of that arm or step with the same seed."""


class Claim(StrictModel):
    """One claim. Arms, steps and values have short names of letters, digits and underscores."""

    paper: str
    """Short name, authors and year, arXiv number."""
    statement: str
    """One sentence with the numbers that count as success."""
    objective: str
    """The objective it is about."""
    recipe: str
    """Base recipe of all arms, whose evaluations are read."""
    recipes: dict[str, str] = {}
    """Arm -> its own base recipe, where one begins from what another made in a different way."""
    seeds: int = Field(3, ge=1)
    common: tuple[str, ...] = ()
    """Overrides of all arms, before their own."""
    arms: dict[str, tuple[str, ...]]
    """Name -> overrides as on the command line; the first is the baseline."""
    steps: dict[str, str] = {}
    """Name -> a command without its `vlp`, run once per seed before the arms that name it as `{name}`. It writes what
    it likes into its folder, `{name}`, and the numbers of its --json object may be used as values."""
    values: dict[str, tuple[str, str]]
    """Name -> (arm, metric as in evals.jsonl, or train/PART, the mean over the last lines of metrics.jsonl); or (step,
    number)."""
    checks: tuple[str, ...]
    """Arithmetic with one comparison over the means of the values, such as `a - b >= 0.03`; all must hold."""

    @model_validator(mode="after")
    def _consistent(self) -> "Claim":
        if not self.arms or not self.checks:
            raise ConfigError("a claim needs one arm and one check at least")
        if twice := self.arms.keys() & self.steps.keys():
            raise ConfigError(f"{', '.join(sorted(twice))}: an arm and a step of the same name")
        if odd := [name for name in self.recipes if name not in self.arms]:
            raise ConfigError(f"recipes.{odd[0]}: there is no arm of that name; there are {', '.join(self.arms)}")
        jobs = self.arms.keys() | self.steps.keys()
        if odd := [name for name in (*jobs, *self.values) if not re.fullmatch(r"[A-Za-z_]\w*", name)]:
            raise ConfigError(f"{odd[0]!r} is no name: letters, digits and underscores, no digit first")
        for name, (job, _) in self.values.items():
            if job not in jobs:
                raise ConfigError(
                    f"values.{name}: there is no arm or step {job!r}; there are {', '.join(sorted(jobs))}"
                )
        for check in self.checks:
            if unknown := names_in(parse(check)) - self.values.keys():
                raise ConfigError(f"check {check!r}: {min(unknown)} is no value; values are {', '.join(self.values)}")
        return self

    def recipe_of(self, arm: str) -> str:
        """Base recipe of an arm."""
        return self.recipes.get(arm, self.recipe)

    @property
    def baseline(self) -> str:
        """The first arm."""
        return next(iter(self.arms))


def claim_names() -> list[str]:
    """All claims that come with the package."""
    files = (item.name for item in resources.files("vlp.claims").iterdir())
    return sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


def load_claim(name: str) -> Claim:
    """A claim of the package, or of a YAML file. Raises ConfigError."""
    if name in claim_names():
        text = resources.files("vlp.claims").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    elif name.endswith((".yaml", ".yml")) and Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        raise ConfigError(
            f"claim {name!r} is unknown; known: {', '.join(claim_names())}; or give the path of a .yaml file"
        )
    try:
        return parse_claim(yaml.safe_load(text))
    except (yaml.YAMLError, ConfigError) as error:
        raise ConfigError(f"claim {name!r}: {error}") from error


def parse_claim(settings: Mapping[str, Any]) -> Claim:
    """A claim from plain data. Raises ConfigError with one line per problem."""
    if not isinstance(settings, Mapping):
        raise ConfigError("expected keys such as paper, statement, arms")
    try:
        return Claim.model_validate(dict(settings))
    except ValidationError as error:
        raise ConfigError(explain(error, {"": list(Claim.model_fields)})) from error
