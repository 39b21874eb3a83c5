"""StrictModel, the base of every configuration, and the one place where its errors become readable."""

from pydantic import BaseModel, ConfigDict, ValidationError


class StrictModel(BaseModel):
    """Frozen pydantic model that refuses unknown keys and checks its own defaults.

    Numeric strings are coerced, because YAML reads `1e-3` as a string.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


def explain(error: ValidationError, known: dict[str, list[str]] | None = None) -> str:
    """One line per problem: dotted path, value got, what is allowed. `known` maps a dotted prefix to its valid keys."""
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            prefix = path.rpartition(".")[0]
            allowed = ", ".join((known or {}).get(prefix, []))
            lines.append(f"unknown key {path!r}" + (f"; known here: {allowed}" if allowed else ""))
        elif item["type"] == "missing":
            lines.append(f"missing key {path!r}")
        else:
            lines.append(f"{path}: {item['msg']}, got {item['input']!r}")
    return "\n".join(lines)
