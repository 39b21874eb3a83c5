"""`vlp segment`."""

from pathlib import Path

import click

from data_pipelines.console import command, emit, json_option
from data_pipelines.errors import BadSample, ConfigError

FOLDER = click.Path(path_type=Path)


@command(
    epilog="""Examples:

\b
  vlp segment runs/demo picture.jpg --labels "apple,bear" --background "grass,sky,a wall" --out map.png
  vlp segment runs/demo picture.jpg --labels labels.txt --size 512 --json

The map is a PNG of the picture's size whose values are places in the list of labels; background texts are place 0.""",
)
@click.argument("bundle", type=FOLDER)
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--labels", required=True, help="Labels with commas between them, or a file with one per line.")
@click.option("--background", default="", help="Texts of what is none of them, with commas, or a file: one more label.")
@click.option("--templates", default="plain", show_default=True, help="Prompts, as for vlp eval --task zero-shot.")
@click.option("--size", type=int, help="Side of the model's input in pixels, where it takes others; default its own.")
@click.option("--modality", type=click.Choice(["rgb", "grey", "edges"]), default="rgb", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="PNG to write.")
@click.option("--device", default="auto", show_default=True, help="torch device, for example cuda")
@json_option
def segment(
    bundle: Path,
    image: Path,
    labels: str,
    background: str,
    templates: str,
    size: int | None,
    modality: str,
    out: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Say for every pixel of IMAGE which label's text its place is most similar to, by BUNDLE; nothing is trained."""
    from vlp.bundle import load_bundle
    from vlp.detection import segment as dense
    from vlp.distributed import pick_device
    from vlp.evals._labels import read_templates

    classes = dense.classes_of(listed(labels, "--labels"), listed(background, "--background"))
    try:
        prompts = read_templates(templates)
    except ValueError as error:
        raise ConfigError(f"--templates {templates!r}: {error}") from error
    try:
        data = image.read_bytes()
    except OSError as error:
        raise ConfigError(f"{image} cannot be read ({error.strerror}): give a picture") from error
    model = load_bundle(bundle, pick_device(device))
    try:
        prototype_PD = dense.prototypes(model, classes, prompts)
        found = dense.segment(model, data, classes, prototype_PD, size, modality)  # type: ignore[arg-type]  # by click
    except BadSample as error:
        raise ConfigError(f"{image}: {error.reason} ({error})") from error
    if out is not None:
        dense.save_map(found, out)
    shares = dict(sorted(found.shares().items(), key=lambda item: -item[1]))
    height, width = found.label_HW.shape
    content = {"bundle": str(bundle), "image": str(image), "width": width, "height": height, "names": found.names}
    lines = [f"{name:36} {share:7.1%}" for name, share in shares.items() if share]
    emit(content | {"shares": shares, "out": out and str(out)}, as_json, [*lines, *([f"map: {out}"] if out else [])])


def listed(text: str, option: str) -> list[str]:
    """Texts between commas, or the lines of a file of that name. Raises ConfigError."""
    path = Path(text)
    if "," not in text and path.is_file():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{option} {text}: cannot be read ({error}); give a file of texts, one per line"
            ) from error
        return [line.strip() for line in lines if line.strip()]
    return [part.strip() for part in text.split(",") if part.strip()]
