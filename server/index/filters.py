"""What payloads may hold and filters may ask, checked before any engine sees them.

A filter is a mapping; every field has to match:

    {"source": "noto"}                 equal
    {"labels": ["cat", "dog"]}         any of them
    {"width": {"gte": 64, "lt": 512}}  in a range, numbers alone
    {"source": {"not": "noto"}}        none of them; points without the field pass
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

FieldKind = Literal["keyword", "integer", "float", "bool"]
Value = str | int | bool | float | Sequence[str] | Sequence[int] | Mapping[str, Any]
"""What a field is compared with."""
Where = Mapping[str, Value]

KINDS: Mapping[FieldKind, tuple[tuple[type, ...], str]] = {
    "keyword": ((str,), "str"),
    "integer": ((int,), "int"),
    "float": ((int, float), "number"),
    "bool": ((bool,), "bool"),
}
"""Kind -> Python types of its values, and what users are told."""
MOST_VALUES = 10_000
"""In one list of a filter."""
BOUNDS = ("gte", "gt", "lte", "lt")


class FilterError(ValueError):
    """A filter names an undeclared field or a value of the wrong type; the message says what is possible."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class PayloadError(ValueError):
    """A declared payload field holds a value of another type, which no filter would ever find."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def check_filter(where: Where, fields: Mapping[str, FieldKind]) -> None:
    """Refuse what would be wrong or slow: an undeclared field has no index, and the graph has no links for it."""
    for field, value in where.items():
        if field not in fields:
            known = ", ".join(sorted(fields)) or "none"
            raise FilterError(field, f"field {field!r} cannot be filtered by; this index has: {known}")
        kind = fields[field]
        if isinstance(value, Mapping):
            _check_operator(field, value, kind)
        else:
            _check_match(field, value, kind)


def _check_operator(field: str, value: Mapping[str, Any], kind: FieldKind) -> None:
    if set(value) == {"not"} and not isinstance(value["not"], Mapping):
        _check_match(field, value["not"], kind)
        return
    if not value or not set(value) <= set(BOUNDS):
        raise FilterError(field, f'field {field!r}: an object is a range of {", ".join(BOUNDS)}, or {{"not": value}}')
    if kind not in ("integer", "float"):
        raise FilterError(field, f"field {field!r} holds {KINDS[kind][1]} values, which have no ranges")
    if not all(is_of("float", bound) for bound in value.values()):
        raise FilterError(field, f"field {field!r}: the bounds of a range are numbers")


def _check_match(field: str, value: Any, kind: FieldKind) -> None:
    if kind == "float":
        raise FilterError(field, f"field {field!r} holds fractions: ask for a range, for example {{'gte': 0.5}}")
    several = isinstance(value, Sequence) and not isinstance(value, str)
    if several and len(value) > MOST_VALUES:
        raise FilterError(field, f"field {field!r}: {len(value)} values, at most {MOST_VALUES}")
    values = list(value) if several else [value]
    if not values or not all(is_of(kind, item) for item in values) or (several and kind == "bool"):
        wanted = "true or false" if kind == "bool" else f"{KINDS[kind][1]} or a list of them"
        raise FilterError(field, f"field {field!r} is compared with {wanted}")


def check_payload(payload: Mapping[str, Any], fields: Mapping[str, FieldKind], captions: str = "") -> None:
    """Raises PayloadError for a declared field whose value is not of its kind, nor a list of such values."""
    for name, kind in fields.items():
        value = payload.get(name)
        if value is None:
            continue
        values = value if isinstance(value, list) and kind != "bool" else [value]
        if not all(is_of(kind, item) for item in values):
            lists = "" if kind == "bool" else ", or a list of such"
            raise PayloadError(name, f"field {name!r} is declared {kind}: its value has to be {KINDS[kind][1]}{lists}")
    if captions and not isinstance(payload.get(captions, ""), str | None):
        raise PayloadError(captions, f"field {captions!r} holds the caption that keywords are searched in: a string")


def is_of(kind: FieldKind, value: Any) -> bool:
    """Whether a value fits a kind and the engine can hold it: integers have 64 bits."""
    types, _ = KINDS[kind]
    if isinstance(value, bool) != (kind == "bool") or not isinstance(value, types):
        return False
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or -(2**63) <= value < 2**63
