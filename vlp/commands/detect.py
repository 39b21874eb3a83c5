"""`vlp detect`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml
from pydantic import ValidationError

from data_pipelines.config import explain
from data_pipelines.console import command, emit, json_option
from data_pipelines.errors import BadSample, ConfigError, PipelineError

if TYPE_CHECKING:
    from vlp.detection.infer import Detection, Detector, View
    from vlp.detection.scores import Options

PATH = click.Path(path_type=Path)
PICTURES = {".png", ".jpg", ".jpeg", ".webp"}
"""What overlays are written as."""


@command(
    epilog="""The labels may be any; how well they are found is another matter. Boxes are x0, y0, x1, y1 in pixels of
the picture as people see it, turned as its EXIF says. --out draws them: a file for one picture, a folder for several.

A label that fine-tuning saw trusts the detector more, another one the frozen image-level tower (--set base, novel).

Options for --set, with their defaults:

\b
  proposals=100  nms=0.5  base=0.35  novel=0.65  objectness=3  ensemble=true
  temperature=learned  frozen_temperature=of the model  templates=of fine-tuning

A picture that cannot be used is reported alone; the exit code is 1 if none could.

Examples:

\b
  vlp detect runs/detector photo.jpg --labels "red apple,bear"
  vlp detect runs/detector photo.jpg --labels fruit.txt --threshold 0.5 --out found.png
  vlp detect runs/detector *.jpg --labels "dog,cat" --json
  vlp detect runs/detector photo.jpg --find "a bird on a branch" --top-k 3 --out crops.png"""
)
@click.argument("bundle", type=PATH)
@click.argument("images", type=PATH, nargs=-1, required=True)
@click.option("--labels", help="What to look for: names joined by commas, or a file with one per line.")
@click.option("--find", help="Instead of labels: a text; the parts of each picture that match it best.")
@click.option("--threshold", type=float, help="Lowest score.  [default: 0.3]")
@click.option("--top-k", type=int, help="Most detections of a picture.  [default: 100, with --find 5]")
@click.option(
    "--frozen", type=PATH, help="Image-level bundle that scores too.  [default: what the detector began with]"
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Further option; may be repeated.")
@click.option("--out", type=PATH, help="Picture with the boxes drawn, or a folder for them.")
@click.option("--device", default="auto", show_default=True, help="torch device, for example cuda")
@json_option
def detect(
    bundle: Path, images: tuple[Path, ...], labels: str | None, find: str | None, threshold: float | None,
    top_k: int | None, frozen: Path | None, settings: tuple[str, ...], out: Path | None, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Find what --labels name in IMAGES with BUNDLE, a bundle or a run of recipe detection/finetune."""
    from vlp.detection.infer import AT_ONCE, load_detector
    from vlp.distributed import pick_device

    if (labels is None) == (find is None):
        raise ConfigError("give either --labels, what to look for, or --find, a text that parts of a picture match")
    if find is not None and threshold is not None:
        raise ConfigError(f"--threshold {threshold} has no effect with --find, which ranks crops: leave it out")
    options = _options(threshold, top_k, settings)
    names = _labels(labels) if labels is not None else []
    targets = _targets(images, out)
    detector = load_detector(bundle, pick_device(device), frozen)
    rows = []
    for first in range(0, len(images), AT_ONCE):
        chunk = slice(first, first + AT_ONCE)
        views = [_view(detector, path) for path in images[chunk]]
        good = [view for view in views if not isinstance(view, BadSample)]
        if find is not None:
            found = iter([detector.find_crop(view, find, top_k or 5, options) for view in good])
        else:
            found = iter(detector.detect(good, names, options))
        for path, target, view in zip(images[chunk], targets[chunk], views, strict=True):
            if isinstance(view, BadSample):
                rows.append({"path": str(path), "error": str(view)})
                continue
            detections = next(found)
            rows.append(_row(path, view, detections))
            if target is not None:
                rows[-1] |= _draw(path, detections, target)
    emit({"bundle": str(bundle), "images": rows}, as_json, [line for row in rows for line in _lines(row)])
    if all("error" in row for row in rows):
        raise PipelineError(f"none of the pictures could be used; the first: {rows[0]['error']}")


def _options(threshold: float | None, top_k: int | None, settings: tuple[str, ...]) -> "Options":
    """Raises ConfigError naming the option."""
    from vlp.detection.scores import Options

    given: dict[str, Any] = {"threshold": threshold, "top_k": top_k}
    given = {key: value for key, value in given.items() if value is not None}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {text!r}: expected key=value, for example nms=0.4")
        if key in given:
            raise ConfigError(f"--set {text!r}: {key} is given twice")
        given[key] = yaml.safe_load(value)
    if isinstance(given.get("templates"), str):
        given["templates"] = (given["templates"],)
    try:
        return Options.model_validate(given)
    except ValidationError as error:
        raise ConfigError(explain(error, {"": sorted(Options.model_fields)})) from error


def _labels(value: str) -> list[str]:
    """Names joined by commas, or the lines of a file. Raises ConfigError for a file that is no text."""
    path = Path(value)
    try:
        if not path.is_file():
            return [name for name in value.split(",") if name.strip()]
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        if not path.is_file():  # longer than a file name may be
            return [name for name in value.split(",") if name.strip()]
        raise ConfigError(f"--labels {path}: cannot be read ({error}); give text, one name per line") from error


def _targets(images: tuple[Path, ...], out: Path | None) -> list[Path | None]:
    """File for each drawn picture: `out` itself for a single one, else a file of the same name in the folder `out`."""
    if out is None:
        return [None] * len(images)
    if len(images) == 1 and not out.is_dir():
        if out.suffix.lower() not in PICTURES:
            raise ConfigError(f"--out {out}: name a picture ({', '.join(sorted(PICTURES))}), or a folder that exists")
        return [out]
    if out.is_file():
        raise ConfigError(f"--out {out}: is a file, and there are {len(images)} pictures: name a folder")
    used: dict[str, int] = {}
    targets: list[Path | None] = []
    for path in images:
        number = used[path.stem] = used.get(path.stem, 0) + 1
        targets.append(out / f"{path.stem}{f'-{number}' if number > 1 else ''}.png")
    return targets


def _view(detector: "Detector", path: Path) -> "View | BadSample":
    """The picture ready for the model, or why it cannot be used."""
    from data_pipelines.fetch import FetchOptions, read_bytes

    try:
        return detector.view(read_bytes(path, FetchOptions()))
    except BadSample as error:
        return error


def _draw(path: Path, found: "list[Detection]", target: Path) -> dict[str, str]:
    """Draw them, and say where; or why not, for a picture of bands that nobody sees."""
    from data_pipelines.fetch import FetchOptions, read_bytes
    from data_pipelines.images import flatten, open_checked, upright
    from vlp.detection.overlay import draw_detections

    try:
        image = flatten(upright(open_checked(read_bytes(path, FetchOptions()))))
    except BadSample as error:
        return {"not_drawn": str(error)}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draw_detections(image, found).save(target)
    except OSError as error:
        raise ConfigError(f"--out {target}: cannot be written ({error.strerror or error})") from error
    return {"overlay": str(target)}


def _row(path: Path, view: "View", found: "list[Detection]") -> dict[str, Any]:
    detections = [
        {"label": item.label, "score": round(item.score, 4), "box": [round(side, 1) for side in item.box]}
        for item in found
    ]
    return {"path": str(path), "width": view.width, "height": view.height, "detections": detections}


def _lines(row: dict[str, Any]) -> list[str]:
    """One picture for people."""
    if "error" in row:
        return [f"{row['path']}: {row['error']}"]
    found = row["detections"]
    lines = [f"{row['path']}: {row['width']} x {row['height']}, {len(found) or 'nothing'} found"]
    for item in found:
        x0, y0, x1, y1 = item["box"]
        lines.append(f"  {item['score']:6.3f}  {item['label']:24} {x0:.0f} {y0:.0f} {x1:.0f} {y1:.0f}")
    told = {"overlay": "drawn", "not_drawn": "not drawn"}
    return lines + [f"  {word}: {row[key]}" for key, word in told.items() if key in row]
