"""Open-vocabulary detection: boxes of whatever is named, in pixels of the picture as people see it.

As DITO's released code does it (Kim et al. 2023, arXiv 2310.00161): class-agnostic proposals; p, the softmax of the
detector's head over labels and a background; q, that of a frozen image-level tower over the labels, from its own
features averaged in the region; both made one (scores.py), whose geometric mean with the objectness is the score; then
the best boxes of each label. Where the frozen tower is the detector's own, unchanged, one pass serves both.

Suffixes: B pictures, C channels, S side of the model's input, M and R regions, K labels, D embedding width, T
detections.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_pipelines.errors import BundleError
from data_pipelines.geometry import Placement, placement
from data_pipelines.preprocess import decode, fit, normalise
from vlp.bundle import WEIGHTS, Bundle, find_bundle, load_bundle
from vlp.detection.boxes import clip, is_valid, nms_batch
from vlp.detection.losses import class_logits
from vlp.detection.maps import maps_of
from vlp.detection.model import ROI_BASE, DetectionParts, Levels, parts_of
from vlp.detection.propose import join_levels, propose
from vlp.detection.roi import roi_mean
from vlp.detection.scores import DEFAULT, Found, Options, choose, ensemble, frozen_weights, merge_labels
from vlp.detection.window import WindowConfig, vit_of
from vlp.infer import label_head

log = logging.getLogger(__name__)

AT_ONCE = 8
"""Pictures that go through the tower together."""
HEADS = 8
"""Lists of labels whose texts are kept."""
FIND_FROZEN = 0.5
"""Share of the frozen tower in the cosine by which crops are found."""


@dataclass(frozen=True, slots=True)
class Detection:
    """One thing that was found."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    """x0, y0, x1, y1 in pixels of the upright picture."""


@dataclass(frozen=True, slots=True)
class View:
    """A picture as the model gets it, and the way back."""

    pixels_CSS: Tensor
    place: Placement
    width: int
    """Of the upright picture, pixels."""
    height: int


@dataclass(frozen=True, slots=True)
class Seen:
    """One pass over pictures: what regions are taken from."""

    levels: Levels
    frozen_BDHW: Tensor | None
    """The frozen tower's features in the shared space; None where it has no say."""


@dataclass(slots=True)
class Detector:
    """A model with the parts of a detector and the frozen tower beside it. Keeps the texts of the last label lists."""

    bundle: Bundle
    parts: DetectionParts
    frozen: Bundle
    """The image-level model; `bundle` itself where its tower was not trained since."""
    _heads: OrderedDict[tuple[bool, tuple[str, ...], tuple[str, ...]], Tensor] = field(default_factory=OrderedDict)

    @classmethod
    def of(cls, bundle: Bundle, frozen: Bundle | None = None) -> "Detector":
        """A detector of a bundle that may be in memory only; `frozen` as for `load_detector`, but loaded.

        Raises BundleError for a model without the parts of a detector.
        """
        return cls(bundle, parts_of(bundle), frozen or start_of(bundle))

    @property
    def shared(self) -> bool:
        """Whether one pass of one tower serves both scores."""
        return self.frozen is self.bundle and self.parts.config.window is None

    def view(self, data: bytes) -> View:
        """An encoded picture made ready: upright and composed on the model's ground. Raises BadSample."""
        image_CHW, (height, width) = decode(data, self.bundle.image)
        place = placement((height, width), self.bundle.image)
        return View(fit(image_CHW, (height, width), self.bundle.image), place, width, height)

    def detect(
        self, images: Iterable[bytes | View], labels: Iterable[str], options: Options = DEFAULT
    ) -> list[list[Detection]]:
        """What is in each picture, best first. Raises ConfigError without labels, BadSample for an unusable picture.

        With `image.resize=shortest` the sides that the model's square crops off are not looked at.
        """
        merged = merge_labels(labels)
        views = [image if isinstance(image, View) else self.view(image) for image in images]
        found: list[list[Detection]] = []
        for first in range(0, len(views), AT_ONCE):
            chunk = views[first : first + AT_ONCE]
            batch = self.detect_pixels(torch.stack([view.pixels_CSS for view in chunk]), merged, options)
            found += [in_pixels(view, batch, row) for row, view in enumerate(chunk)]
        return found

    @torch.inference_mode()
    def detect_pixels(self, pixels_BCSS: Tensor, labels: Iterable[str], options: Options = DEFAULT) -> Found:
        """What is in pictures that have the model's size already, uint8. Raises ConfigError, BundleError."""
        return self.find(self.look(pixels_BCSS, options.ensemble), merge_labels(labels), options)

    def find(self, seen: Seen, labels: tuple[str, ...], options: Options) -> Found:
        """What is in pictures that were looked at already; `labels` are distinct. Raises BundleError."""
        boxes_BR4, objectness_BR = self.propose(seen, options.proposals)
        share = 1 / (1 + options.objectness)
        factor_BR = objectness_BR ** (options.objectness * share)
        # what no label can lift above the threshold need not be looked at; proposals come best first
        count = max(1, int((factor_BR > options.threshold).sum(dim=1).max()))
        boxes_BR4, factor_BR = boxes_BR4[:, :count], factor_BR[:, :count]
        scores_BRK = self.classify(seen, boxes_BR4, labels, options)
        return choose(boxes_BR4, scores_BRK**share * factor_BR[..., None], labels, options)

    @torch.inference_mode()
    def score_regions(
        self, pixels_BCSS: Tensor, boxes_BM4: Tensor, labels: Iterable[str], options: Options = DEFAULT
    ) -> Tensor:
        """BMK: how likely each of the distinct labels is for given boxes, fractions of the model's input."""
        seen = self.look(pixels_BCSS, options.ensemble)
        return self.classify(seen, boxes_BM4.to(self.bundle.device).float(), merge_labels(labels), options)

    @torch.inference_mode()
    def find_crop(self, image: bytes | View, text: str, top_k: int = 5, options: Options = DEFAULT) -> list[Detection]:
        """The parts of a picture that match a text best, the best first.

        Scores are cosines between region and text, of the detector's head and the frozen tower in equal shares;
        `threshold` and `objectness` do not matter. Raises ConfigError for an empty text, BadSample.
        """
        labels = merge_labels([text])
        view = image if isinstance(image, View) else self.view(image)
        seen = self.look(view.pixels_CSS[None], options.ensemble)
        boxes_BR4, objectness_BR = self.propose(seen, options.proposals)
        cosine_BRK = self._embed(seen, boxes_BR4) @ self.head(False, labels, options).T
        if seen.frozen_BDHW is not None:
            theirs_BRK = _frozen_regions(seen.frozen_BDHW, boxes_BR4) @ self.head(True, labels, options).T
            cosine_BRK = (1 - FIND_FROZEN) * cosine_BRK + FIND_FROZEN * theirs_BRK.to(cosine_BRK.device)
        score_BR = cosine_BRK[..., 0]
        place_BT, valid_BT = nms_batch(boxes_BR4, score_BR, options.nms, valid_BN=objectness_BR > 0, keep=top_k)
        boxes_BT4 = boxes_BR4.gather(1, place_BT[..., None].expand(-1, -1, 4))
        found = Found(boxes_BT4, score_BR.gather(1, place_BT), torch.zeros_like(place_BT), valid_BT, labels)
        return in_pixels(view, found, 0)

    def look(self, pixels_BCSS: Tensor, frozen: bool = True) -> Seen:
        """Towers and pyramid on uint8 pictures of the model's size; `frozen`: whether the frozen tower is asked too."""
        parts, window = self.parts, self.parts.config.window
        own = normalise(pixels_BCSS.to(self.bundle.device), self.bundle.image)
        both, residual = frozen and self.shared, parts.config.residual
        maps = maps_of(self.bundle.model)(own, window, dense=both or residual)
        levels = parts.levels_of(maps)
        if both or not frozen:
            return Seen(levels, maps.dense_BDHW if frozen else None)
        theirs = normalise(_seen_by(self.frozen, pixels_BCSS).to(self.frozen.device), self.frozen.image)
        # as in the paper's code: the scorer attends in windows in all layers but the last
        narrow = WindowConfig(windows=window.windows, global_layers=1) if window and window.windows > 1 else None
        return Seen(levels, maps_of(self.frozen.model)(theirs, narrow, dense=True).dense_BDHW)

    def propose(self, seen: Seen, count: int) -> tuple[Tensor, Tensor]:
        """(boxes BR4, objectness BR 0..1), the best first; where there are fewer, objectness 0. Raises BundleError."""
        if self.parts.info.stage == "pretrain":
            raise BundleError(
                f"{self.bundle.name}: its dense head never saw a box, so it cannot find objects: fine-tune it with "
                "recipe detection/finetune (model.weights=BUNDLE)"
            )
        boxes_BR4, objectness_BR, _ = propose(*join_levels(self.parts.dense(seen.levels.maps)), keep=count)
        return boxes_BR4, objectness_BR

    def classify(self, seen: Seen, boxes_BR4: Tensor, labels: tuple[str, ...], options: Options) -> Tensor:
        """BRK: scores of distinct labels in regions, which with that of the background sum to one."""
        parts = self.parts
        scale = parts.log_scale.exp() if options.temperature is None else torch.tensor(1 / options.temperature)
        texts_KD = self.head(False, labels, options)
        logits_BRK1 = class_logits(self._embed(seen, boxes_BR4), texts_KD, parts.background_D, scale)
        if seen.frozen_BDHW is None or not options.ensemble:
            return logits_BRK1.softmax(dim=-1)[..., :-1]
        own_scale = float(self.frozen.model.logit_scale.detach().exp())  # type: ignore[operator]
        frozen_scale = own_scale if options.frozen_temperature is None else 1 / options.frozen_temperature
        cosine_BRK = _frozen_regions(seen.frozen_BDHW, boxes_BR4) @ self.head(True, labels, options).T
        weights_K = frozen_weights(labels, parts.info.base_labels, options).to(logits_BRK1.device)
        return ensemble(logits_BRK1, frozen_scale * cosine_BRK.to(logits_BRK1.device), weights_K)

    def head(self, frozen: bool, labels: tuple[str, ...], options: Options) -> Tensor:
        """KD, normalised: texts of distinct labels as the detector's or the frozen tower reads them; kept for later."""
        bundle = self.frozen if frozen else self.bundle
        frozen = bundle is not self.bundle
        key = (frozen, labels, options.templates or self.parts.info.templates)
        if key not in self._heads:
            self._heads[key] = label_head(bundle, labels, key[2]).to(bundle.device)
        self._heads.move_to_end(key)
        while len(self._heads) > HEADS:
            self._heads.popitem(last=False)
        return self._heads[key]

    def _embed(self, seen: Seen, boxes_BR4: Tensor) -> Tensor:
        """BRD, normalised: pretraining teaches every level alike, fine-tuning the one that fits a region's size."""
        pretrained = self.parts.info.stage == "pretrain"
        embed = self.parts.embed_mean if pretrained else self.parts.embed_assigned
        return embed(seen.levels, boxes_BR4)


def load_detector(path: Path | str, device: torch.device | str = "cpu", frozen: Path | str | None = None) -> Detector:
    """The detector of a bundle or a run. `frozen`: the image-level bundle; default: what the run started from.

    Raises BundleError for a bundle without the parts of a detector.
    """
    bundle = load_bundle(path, device)
    return Detector.of(bundle, load_bundle(frozen, device) if frozen is not None else None)


def start_of(bundle: Bundle) -> Bundle:
    """The model that a run started from, or the bundle itself where its image tower is still the same.

    A start that is not there any more is a warning, and the bundle takes its place.
    """
    model = bundle.provenance.recipe.get("model") or {}
    objective = bundle.provenance.recipe.get("objective") or {}
    start = model.get("weights")
    if start is None or objective.get("backbone_rate") == 0:
        return bundle
    try:
        folder = find_bundle(Path(start))
        return bundle if _same_tower(bundle, folder / WEIGHTS) else load_bundle(folder, bundle.device)
    except (BundleError, OSError, SafetensorError) as error:
        log.warning(
            "%s: the model it started from cannot be read (%s), so its own tower scores regions as well: name an "
            "image-level bundle as the frozen one", bundle.name, error,
        )  # fmt: skip
        return bundle


def _same_tower(bundle: Bundle, weights: Path) -> bool:
    own = {name: value for name, value in bundle.model.state_dict().items() if name.startswith("visual.")}
    with safe_open(weights, "pt") as stored:
        names = {name for name in stored.keys() if name.startswith("visual.")}  # noqa: SIM118 - no mapping
        return names == own.keys() and all(torch.equal(stored.get_tensor(name), own[name].cpu()) for name in names)


def _seen_by(bundle: Bundle, pixels_BCSS: Tensor) -> Tensor:
    """Pictures in the size that a tower is built for; towers of maps take any."""
    size = bundle.image.size
    if vit_of(bundle.model.visual) is None or pixels_BCSS.shape[-1] == size:  # type: ignore[arg-type]
        return pixels_BCSS
    return F.interpolate(pixels_BCSS.float(), (size, size), mode="bilinear", antialias=True)


def _frozen_regions(dense_BDHW: Tensor, boxes_BR4: Tensor) -> Tensor:
    """BRD, normalised: the tower's own features averaged in each region."""
    return F.normalize(roi_mean(dense_BDHW.float(), boxes_BR4.to(dense_BDHW.device), ROI_BASE), dim=-1)


def in_pixels(view: View, found: Found, row: int) -> list[Detection]:
    """Detections of one picture, boxes in its own pixels; what lies beyond its sides (padding) is cut off."""
    valid_T = found.valid_BT[row]
    boxes_T4 = torch.from_numpy(view.place.to_original(found.boxes_BT4[row][valid_T].cpu()))
    boxes_T4 = clip(boxes_T4, view.width, view.height)
    rows = zip(found.label_BT[row][valid_T].tolist(), found.scores_BT[row][valid_T].tolist(), boxes_T4, strict=True)
    return [
        Detection(found.labels[label], score, tuple(box_4.tolist())) for label, score, box_4 in rows if is_valid(box_4)
    ]
