"""What is where in a picture, by text alone: every patch is compared with the texts of labels (MaskCLIP).

Zhou et al. 2022, arXiv 2112.01071: an image-level model's patches, pooled alone, lie in the space of its texts
(`dense.dense_features`); prompts of a label are averaged; nothing is trained. A picture that the model would crop is
seen in windows that overlap by half, and one that it would pad is seen padded, so that every pixel gets a label.

Suffixes: N windows, C channels, S side of the model's input, D width of the shared space, H, W rows and columns of
pixels or of cells (places of the map); P prototypes (embedded labels and background texts).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data_pipelines.errors import ConfigError
from data_pipelines.images import MAX_PIXELS
from data_pipelines.preprocess import ImageConfig, decode, normalise
from vlp.bundle import Bundle
from vlp.detection.dense import dense_features
from vlp.detection.modality import Modality, render
from vlp.infer import encode_texts, make_prompts, pool_prompts

BACKGROUND = "background"
"""Name of the class that all background texts stand for."""
AT_ONCE = 16
"""Windows that go through the tower together."""
MOST_VALUES = 2**26
"""Similarities at picture size that are held at a time; more labels take turns."""


@dataclass(frozen=True, slots=True)
class Classes:
    """What patches can be taken for: classes, and the prototypes whose texts stand for them."""

    names: tuple[str, ...]
    """Of the classes; the background, if there is one, is the first."""
    texts: tuple[tuple[str, ...], ...]
    """Of every prototype: texts whose prompts are averaged."""
    owners: tuple[int, ...]
    """Of every prototype: the class it stands for."""


def classes_of(labels: Mapping[str, Sequence[str]] | Sequence[str], background: Sequence[str] = ()) -> Classes:
    """Classes of labels (or label -> synonyms), each with one prototype, and of background texts with one each.

    Labels named twice count once. Raises ConfigError without labels, and for a text that is label and background.
    """
    named = labels if isinstance(labels, Mapping) else dict.fromkeys(labels, ())
    if not named:
        raise ConfigError("labels: none is given; give at least one, for example --labels 'apple,bear'")
    if empty := [name for name in (*named, *background) if not str(name).strip()]:
        raise ConfigError(f"labels: {empty[0]!r} is empty; give texts")
    behind = tuple(dict.fromkeys(background))
    if both := [text for text in behind if text in named]:
        raise ConfigError(f"{both[0]!r} is a label and a background text: leave it out of one of them")
    if behind and BACKGROUND in named:
        raise ConfigError(f"a label may not be called {BACKGROUND!r} where there are background texts: rename it")
    first = 1 if behind else 0
    texts = tuple(tuple(texts) or (name,) for name, texts in named.items())
    return Classes(
        names=(*([BACKGROUND] if behind else []), *named),
        texts=(*((text,) for text in behind), *texts),
        owners=(*(0 for _ in behind), *range(first, first + len(named))),
    )


def prototypes(bundle: Bundle, classes: Classes, templates: Sequence[str]) -> Tensor:
    """PD, normalised: the mean over templates and synonyms of every prototype."""
    prompts = [make_prompts(texts, templates) for texts in classes.texts]
    rows = encode_texts(bundle, [text for texts in prompts for text in texts])
    return torch.cat([pool_prompts(part, 1) for part in rows.split([*map(len, prompts)])])


@torch.inference_mode()
def dense_embeddings(bundle: Bundle, pixels_NCSS: Tensor, image: ImageConfig, modality: Modality = "rgb") -> Tensor:
    """NDHW float32, every place normalised, on the CPU, of uint8 pictures; a chunk at a time. `image`: their size."""
    found = []
    for chunk in pixels_NCSS.split(AT_ONCE):
        seen = render(normalise(chunk.to(bundle.device), image), modality, image)
        found.append(F.normalize(dense_features(bundle.model, seen).float(), dim=1).cpu())
    return torch.cat(found)


@dataclass(frozen=True, slots=True)
class Segmentation:
    """A label for every pixel of a picture."""

    names: tuple[str, ...]
    label_HW: Tensor
    """int32, place in `names`."""
    cosine_HW: Tensor
    """float32, similarity with that label."""

    def shares(self) -> dict[str, float]:
        """Name -> share of the picture."""
        counts = torch.bincount(self.label_HW.flatten(), minlength=len(self.names))
        return {name: float(n) / self.label_HW.numel() for name, n in zip(self.names, counts.tolist(), strict=True)}


def segment(
    bundle: Bundle,
    data: bytes,
    classes: Classes,
    prototype_PD: Tensor,
    size: int | None = None,
    modality: Modality = "rgb",
    max_pixels: int = MAX_PIXELS,
) -> Segmentation:
    """Label every pixel of an encoded picture. `size`: side of the windows, default the model's own.

    Raises BadSample for a picture that cannot be used, ConfigError for a size that the tower does not take.
    """
    image = sized(bundle.image, size)
    picture_CHW, full_size = decode(data, image, max_pixels)
    features_DHW = picture_embeddings(bundle, picture_CHW, full_size, image, modality)
    prototype_HW, cosine_HW = best_prototype(features_DHW, prototype_PD, full_size)
    owners_P = torch.tensor(classes.owners, dtype=torch.int32)
    return Segmentation(classes.names, owners_P[prototype_HW], cosine_HW)


def sized(image: ImageConfig, size: int | None) -> ImageConfig:
    """The same preparation at another side. Raises ConfigError for one below 1."""
    if size is not None and size < 1:
        raise ConfigError(f"size={size}: give a side in pixels")
    return image if size is None else image.model_copy(update={"size": size})


def picture_embeddings(
    bundle: Bundle, picture_CHW: Tensor, full_size: tuple[int, int], image: ImageConfig, modality: Modality = "rgb"
) -> Tensor:
    """DHW, normalised: a map of the whole picture from windows of the model's size, means where they overlap."""
    channels, side = picture_CHW.shape[0], image.size
    blank = torch.zeros(1, channels, side, side, dtype=picture_CHW.dtype)
    cells = min(dense_embeddings(bundle, blank, image).shape[-2:])
    rows, columns = covered(full_size, image.resize, cells)
    cell = side / cells
    wanted = round(rows * cell), round(columns * cell)
    resized = F.interpolate(picture_CHW[None].float(), wanted, mode=image.interpolation, antialias=True)[0]
    if picture_CHW.dtype == torch.uint8:
        resized = resized.round_().clamp_(0, 255)
    above, before = max(0, (cells - rows) // 2), max(0, (cells - columns) // 2)
    top, left = round(above * cell), round(before * cell)
    margins = (left, max(0, side - wanted[1] - left), top, max(0, side - wanted[0] - top))
    padded = F.pad(resized, margins, value=image.ground).to(picture_CHW.dtype)
    places = [(y, x) for y in starts(rows, cells) for x in starts(columns, cells)]
    corners = [(round(y * cell), round(x * cell)) for y, x in places]
    windows = torch.stack([_window(padded, y, x, side) for y, x in corners])
    maps = dense_embeddings(bundle, windows, image, modality)
    whole = maps.new_zeros(maps.shape[1], max(rows, cells), max(columns, cells))
    for found, (y, x) in zip(maps, places, strict=True):
        whole[:, y : y + cells, x : x + cells] += found[:, :cells, :cells]
    return F.normalize(whole[:, above : above + rows, before : before + columns], dim=0)


def covered(full_size: tuple[int, int], resize: str, cells: int) -> tuple[int, int]:
    """Rows and columns of cells that a picture takes where the model's square has `cells` on a side."""
    height, width = full_size
    if resize == "squash":
        return cells, cells
    unit = min(full_size) if resize == "shortest" else max(full_size)
    return max(1, round(cells * height / unit)), max(1, round(cells * width / unit))


def starts(length: int, cells: int) -> list[int]:
    """First cells of windows that cover `length` cells, half of a window apart; the last ends with the picture."""
    last = max(0, length - cells)
    return [*range(0, last, max(1, cells // 2)), last]


def _window(padded_CHW: Tensor, top: int, left: int, side: int) -> Tensor:
    """A square of the picture; rounding may put the last one a pixel beyond the edge, which is moved back."""
    top, left = min(top, padded_CHW.shape[1] - side), min(left, padded_CHW.shape[2] - side)
    return padded_CHW[:, top : top + side, left : left + side]


def best_prototype(features_DHW: Tensor, prototype_PD: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(place of the most similar prototype, its cosine), both at picture size: similarities are interpolated."""
    cosine_PHW = torch.einsum("pd,dhw->phw", prototype_PD, features_DHW)
    best_HW = torch.full(size, -torch.inf)
    place_HW = torch.zeros(size, dtype=torch.int64)
    step = max(1, MOST_VALUES // (size[0] * size[1]))
    for first in range(0, len(cosine_PHW), step):
        part_PHW = F.interpolate(cosine_PHW[None, first : first + step], size, mode="bilinear")[0]
        value_HW, own_HW = part_PHW.max(dim=0)
        better_HW = value_HW > best_HW
        best_HW = torch.where(better_HW, value_HW, best_HW)
        place_HW = torch.where(better_HW, own_HW + first, place_HW)
    return place_HW, best_HW


def save_map(found: Segmentation, path: Path) -> None:
    """A PNG whose values are places in `names`: with a palette up to 256 names, in 16 bits above.

    Raises ConfigError for more than 65,536 names.
    """
    if len(found.names) > 2**16:
        raise ConfigError(f"{len(found.names)} labels: a map in PNG holds 65,536; leave --out out, or give fewer")
    if len(found.names) <= 256:
        picture = Image.fromarray(found.label_HW.to(torch.uint8).numpy(), "P")
        picture.putpalette([value for number in range(256) for value in colour(number)])
    else:
        picture = Image.fromarray(found.label_HW.numpy().astype("uint16"))
    picture.save(path, format="PNG")


def colour(number: int) -> tuple[int, int, int]:
    """PASCAL VOC's colours: black for 0, bits of the number spread over the three channels."""
    channels = [0, 0, 0]
    for bit in range(8):
        for place in range(3):
            channels[place] |= (number >> place & 1) << (7 - bit)
        number >>= 3
    return channels[0], channels[1], channels[2]
