"""COCO annotations: captions_*.json for captions, instances_*.json for labels and boxes, or both joined by `::`.

The pictures lie in `images`, or in a folder beside the annotations that is found by its usual names. Labels are the
category names; boxes become fractions of the picture, and those of crowds or without area are left out and counted in
the column `dropped_boxes`. Pictures keep the order of the first file; one without any annotation is a counted failure.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines import rows
from data_pipelines.config import StrictModel
from data_pipelines.errors import BadSample, PipelineError
from data_pipelines.places import place
from data_pipelines.records import Box, Record


class Config(StrictModel):
    """Where the annotations and the pictures lie."""

    path: Path | str
    images: Path | None = None
    """Folder of the pictures. None: the annotations' folder, the one around it, or train2017 or images in them."""
    image_col: str = "file_name"
    """Field that holds a picture's name; `coco_url` fetches the pictures instead of looking for a folder."""
    template: rows.Template | None = None
    """Caption of a picture that has labels only, made of the first one."""


@dataclass(slots=True)
class _Picture:
    """What all the files together say about one picture."""

    columns: dict[str, Any]
    captions: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    dropped: int = 0
    problem: str = ""


def iter_records(config: Config) -> Iterator[Record]:
    """One record per picture."""
    pictures = _load(config)
    stem = _files(config)[0].stem
    source = stem.partition("_")[2] or stem  # captions_train2017 -> train2017
    base: Path | None = None
    for number, picture in pictures.items():
        name = picture.columns.get(config.image_col)
        if not isinstance(name, str) or not name:
            yield Record(b"", (), source, f"image {number}", problem=f"no_image: no {config.image_col}")
            continue
        if "://" not in name and base is None:
            base = config.images or _folder(config, name)
        captions = tuple(dict.fromkeys(picture.captions))
        labels = tuple(dict.fromkeys(picture.labels))
        captions = captions or rows.templated(config.template, labels)
        missing = "" if captions or labels else "no_caption: no caption and no object in the annotations"
        yield Record(
            image=name if base is None else base / name,
            captions=captions,
            labels=labels,
            boxes=tuple(picture.boxes),
            source=source,
            origin=name,
            extra={"image_id": number} | ({"dropped_boxes": picture.dropped} if picture.dropped else {}),
            problem=picture.problem or missing,
        )


def _load(config: Config) -> dict[int | str, _Picture]:
    """Pictures by their id, in the order of the files. Raises PipelineError for what is no COCO file."""
    pictures: dict[int | str, _Picture] = {}
    for path in _files(config):
        try:
            with path.open("rb") as stream:
                _merge(pictures, json.load(stream, object_hook=_without_outline))
        except OSError as error:
            raise PipelineError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise PipelineError(f"{path}: is not JSON: {error}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise PipelineError(
                f"{path}: no COCO annotations, that is lists `images` and `annotations` joined by ids ({error!r})"
            ) from error
    return pictures


def _without_outline(found: dict[str, Any]) -> dict[str, Any]:
    """Outlines are most of an instances file and are not used."""
    found.pop("segmentation", None)
    return found


def _merge(pictures: dict[int | str, _Picture], found: dict[str, Any]) -> None:
    """Add what one file says. Raises KeyError for an annotation whose picture is unknown."""
    for image in found["images"]:
        pictures.setdefault(image["id"], _Picture(image))
    categories = {category["id"]: str(category["name"]) for category in found.get("categories", ())}
    for annotation in found["annotations"]:
        _annotate(pictures[annotation["image_id"]], annotation, categories)


def _annotate(picture: _Picture, annotation: dict[str, Any], categories: dict[Any, str]) -> None:
    try:
        picture.captions += rows.texts(annotation.get("caption"), "caption")
        if "category_id" in annotation:
            label = categories.get(annotation["category_id"])
            if label is None:
                raise BadSample("bad_box", f"category {annotation['category_id']!r} is not among the categories")
            picture.labels.append(label)
            _add_box(picture, annotation, label)
    except BadSample as error:
        picture.problem = picture.problem or str(error)


def _add_box(picture: _Picture, annotation: dict[str, Any], label: str) -> None:
    """The box as fractions of the picture, cut at its edges."""
    if "bbox" not in annotation:
        return
    try:
        x, y, width, height = (float(side) for side in annotation["bbox"])
        across, down = float(picture.columns["width"]), float(picture.columns["height"])
        left, right = (min(max(side / across, 0.0), 1.0) for side in (x, x + width))
        top, bottom = (min(max(side / down, 0.0), 1.0) for side in (y, y + height))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise BadSample("bad_box", f"bbox {annotation['bbox']!r} or size of the picture: {error!r}") from error
    if annotation.get("iscrowd") or not (left < right and top < bottom):
        picture.dropped += 1
    else:
        picture.boxes.append((left, top, right, bottom, label))


def _files(config: Config) -> list[Path]:
    return [Path(part.strip()) for part in str(config.path).split("::")]


def _folder(config: Config, name: str) -> Path:
    """The folder beside the annotations that holds the first picture."""
    path = _files(config)[0]
    around = [path.parent, path.parent.parent]
    inner = ("", path.stem.rpartition("_")[2], "images", f"images/{path.stem.rpartition('_')[2]}")
    places = [folder / below for folder in around for below in inner]
    for folder in places:
        if (folder / name).is_file():
            return folder
    raise PipelineError(
        f"{name}, the first picture of {path}, is in none of {', '.join(map(str, places))}: name the folder with "
        "--images, or fetch the pictures with --image-col coco_url"
    )


def fingerprint(config: Config) -> str:
    """Changes when the annotations are written; the pictures are not looked at."""
    lines = (f"{path.name}\0{place(path).state()}\n" for path in _files(config))
    return hashlib.sha256("".join(lines).encode("utf-8", "replace")).hexdigest()
