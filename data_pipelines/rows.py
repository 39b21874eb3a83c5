"""What a row says about its picture, whatever it came from: captions, labels, boxes, split and passthrough columns.

A row is a mapping of column names to values as CSV, JSON or parquet give them. What cannot be used is a BadSample, so
that it is counted; what is asked for and does not exist is a ConfigError.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator

from data_pipelines.errors import BadSample, ConfigError
from data_pipelines.records import BOX_FIELDS, RESERVED, Box, Record

IMAGES = ("url", "image", "image_path", "filepath", "path", "file_name")
CAPTIONS = ("caption", "captions", "text")
LABELS = ("label", "labels")
BOXES = ("boxes",)

Row = Mapping[str, Any]
Extra = dict[str, str | int | float | None]


class Fields(Protocol):
    """Options of a source that say which column means what; the names are those of the command line."""

    @property
    def caption_col(self) -> tuple[str, ...]:
        """Columns with captions; empty = the usual names."""

    @property
    def label_col(self) -> tuple[str, ...]:
        """Columns with labels; empty = the usual names."""

    @property
    def box_col(self) -> str | None:
        """Column with boxes; None = the usual name."""

    @property
    def columns(self) -> tuple[str, ...] | None:
        """Columns to pass through; None = all others."""

    @property
    def template(self) -> str | None:
        """Caption of a row that has a label only."""

    @property
    def split_by(self) -> str | None:
        """Column that names the split."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The columns chosen for a table."""

    captions: tuple[str, ...]
    labels: tuple[str, ...]
    boxes: str | None
    used: frozenset[str]
    """Columns that are not passed through."""
    passed: tuple[str, ...] | None
    """Columns to pass through; None = all that are not used."""
    template: str | None
    split: str | None
    must_have_text: bool = True


def check_template(template: str) -> str:
    """The caption template as it is. Raises ConfigError for one without a place for the label."""
    if "{label}" not in template:
        raise ConfigError(f"template {template!r} has no {{label}} in it; write for example: a photo of a {{label}}")
    return template


Template = Annotated[str, AfterValidator(check_template)]
"""The type of a source's option `template`."""


def image_column(wanted: str | None, columns: Collection[str], where: str) -> str:
    """Name of the column that holds the picture or its address. Raises ConfigError when none or several may be it."""
    found = usual(IMAGES, columns) if wanted is None else tuple(name for name in columns if name == wanted)
    if len(found) == 1:
        return found[0]
    what = f"several columns may hold the picture ({', '.join(found)})" if found else "no column holds the picture"
    raise ConfigError(
        f"{where}: {what}; columns are {', '.join(map(repr, columns))}; name one with --image-col (usual names are "
        f"{', '.join(IMAGES)}, in the table's first line)"
    )


def choose(fields: Fields, columns: Collection[str], where: str, used: Collection[str] = ()) -> Reading:
    """The columns to read among those of a table; by the usual names unless the options name others."""
    passed = fields.columns or ()
    named = (*fields.caption_col, *fields.label_col, *passed, *filter(None, (fields.box_col, fields.split_by)))
    if unknown := sorted(set(named) - set(columns)):
        raise ConfigError(
            f"{where}: there is no column {', '.join(map(repr, unknown))}; columns are {', '.join(map(repr, columns))}"
        )
    if clash := sorted(RESERVED & set(passed)):
        raise ConfigError(f"{where}: the writer computes {', '.join(clash)} itself, so it cannot be passed through")
    captions = fields.caption_col or usual(CAPTIONS, columns)
    labels = fields.label_col or usual(LABELS, columns)
    others = set(columns) - set(used)
    if others and not captions and not labels and fields.columns is None:
        raise ConfigError(
            f"{where}: none of the columns {', '.join(map(repr, columns))} is a caption or a label; name them with "
            "--caption-col or --label-col, or say with --columns what to keep of a table without text"
        )
    if fields.template is not None and not labels:
        raise ConfigError(f"{where}: template {fields.template!r} has no effect without a label column: --label-col")
    boxes = fields.box_col or next(iter(usual(BOXES, columns)), None)
    return Reading(
        captions=captions,
        labels=labels,
        boxes=boxes,
        used=frozenset((*used, *captions, *labels, *filter(None, (boxes,)))),
        passed=fields.columns,
        template=fields.template,
        split=fields.split_by,
        must_have_text=bool(captions or labels),
    )


def usual(names: tuple[str, ...], columns: Collection[str]) -> tuple[str, ...]:
    """The columns that have one of these names in any case, in the order of the names."""
    return tuple(column for name in names for column in columns if column.lower() == name)


def record(row: Row, reading: Reading, image: bytes | Path | str, origin: str, source: str, split: str = "") -> Record:
    """The row as a Record; what is wrong with it becomes its problem."""
    captions: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    extra: Extra = {}
    problem = ""
    try:
        labels = gather(row, reading.labels)
        captions = gather(row, reading.captions) or templated(reading.template, labels)
        boxes = read_boxes(row.get(reading.boxes)) if reading.boxes else ()
        extra = passthrough(row, reading.used, reading.passed)
        split = _split(row.get(reading.split)) if reading.split else split
        if reading.must_have_text and not captions and not labels:
            raise BadSample("no_caption", f"nothing in {', '.join((*reading.captions, *reading.labels))}")
    except BadSample as error:
        problem = str(error)
    own = row.get("source")
    return Record(
        image=image,
        captions=captions,
        labels=labels,
        boxes=boxes,
        source=own if isinstance(own, str) and own else source,
        origin=origin,
        split=split,
        extra=extra,
        problem=problem,
    )


def templated(template: str | None, labels: tuple[str, ...]) -> tuple[str, ...]:
    """The caption that a template makes of the first label, if there are both."""
    return (template.replace("{label}", labels[0].replace("_", " ")),) if template and labels else ()


def gather(row: Row, names: tuple[str, ...]) -> tuple[str, ...]:
    """All texts of these columns, without blanks and repetitions."""
    return tuple(dict.fromkeys(text for name in names for text in texts(row.get(name), name) if text))


def texts(value: Any, name: str) -> list[str]:
    """The texts in one cell: a text, a number, a list of them, or such a list written as JSON."""
    if is_missing(value):
        return []
    if isinstance(value, str):
        listed = _json_list(value)
        if listed is None or not all(isinstance(item, str | None) for item in listed):
            return [_utf8(value, name).strip()]
        value = listed
    values = value if isinstance(value, list) else [value]
    values = [item for item in values if not is_missing(item)]
    if not all(isinstance(item, str | int | float) for item in values):
        raise BadSample("bad_text", f"{name} must be text or a list of texts, got {value!r:.100}")
    return [_utf8(str(item), name).strip() for item in values]


def is_missing(value: Any) -> bool:
    """Whether a cell is empty; some writers put NaN where there is no text."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _json_list(text: str) -> list[Any] | None:
    if text[:1] != "[" or text[-1:] != "]":
        return None
    try:
        return list(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _utf8(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadSample("bad_text", f"{name} is not UTF-8: {text!r:.100}") from error
    return text


def read_boxes(value: Any) -> tuple[Box, ...]:
    """Boxes of a cell: [[x0, y0, x1, y1, label], ...] or objects with these names, as fractions of the picture."""
    if is_missing(value) or value == "":
        return ()
    found = _json_list(value) if isinstance(value, str) else value
    if not isinstance(found, list):
        raise BadSample("bad_box", f"expected a list of boxes, got {value!r:.100}")
    nested = any(isinstance(item, list | tuple | Mapping) for item in found)
    return tuple(_box(item) for item in (found if nested or not found else [found]))


def _box(item: Any) -> Box:
    if isinstance(item, Mapping):
        item = [item.get(name) for name in BOX_FIELDS]
    try:
        x0, y0, x1, y1 = (float(side) for side in item[:4])
        label = str(item[4]) if len(item) > 4 and item[4] is not None else ""
    except (TypeError, ValueError) as error:
        raise BadSample("bad_box", f"expected x0, y0, x1, y1 and a label, got {item!r:.100}") from error
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise BadSample(
            "bad_box", f"{item!r:.100}: x0, y0, x1, y1 are fractions of the picture, 0 to 1, x0 < x1, y0 < y1"
        )
    return x0, y0, x1, y1, label


def passthrough(row: Row, used: Collection[str], wanted: Collection[str] | None = None) -> Extra:
    """The columns `wanted`, or all that are not `used`; what the writer computes anew is left out."""
    names = wanted if wanted is not None else [name for name in row if name not in used and name not in RESERVED]
    return {name.encode("utf-8", "replace").decode(): _plain(name, row.get(name)) for name in names}


def _plain(name: str, value: Any) -> str | int | float | None:
    """A value that fits a column: lists and objects as JSON text, dates as text."""
    if is_missing(value):
        return None
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, bytes):
        raise ConfigError(
            f"column {name!r} holds binary data, which cannot be passed through: leave it out of --columns"
        )
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | Mapping) else str(value)


def _split(value: Any) -> str:
    split = "" if is_missing(value) else str(value).strip()
    if not split.replace("-", "_").isidentifier():
        raise BadSample("bad_split", f"{value!r:.100} cannot be a folder's name: use letters, digits, - and _")
    return split
