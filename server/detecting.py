"""Open-vocabulary detection: the detector of a model's bundle, loaded when it is first asked for.

Pictures are decoded outside the model's thread, and go through it one at a time, so that others get in between.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_pipelines.errors import BadSample, BundleError
from server.engine import BundleEngine, check_picture
from server.errors import ApiError, bad_item, bad_request
from server.model import Model, overloaded, patiently
from server.settings import Settings

if TYPE_CHECKING:
    from vlp.detection.infer import Detection, Detector, View
    from vlp.detection.scores import Options

NO_PARTS = (
    "model {name!r} has no detection parts, so that it cannot find objects: train it with the recipes "
    "detection/pretrain and detection/finetune, and serve that bundle"
)


@dataclass(frozen=True, slots=True)
class FoundIn:
    """What is in one picture."""

    width: int
    """Of the upright picture, pixels."""
    height: int
    detections: "list[Detection]"
    """The best first."""


class Detecting:
    """The detectors of models. Belongs to one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._most = max(settings.batching.queue_images, settings.limits.images)
        self._accepted = 0

    async def detect(
        self, model: Model, pictures: Sequence[tuple[str, bytes]], labels: Sequence[str], options: dict[str, Any]
    ) -> list[FoundIn | ApiError]:
        """Objects in (parameter, encoded picture) inputs; one that cannot be used fails alone.

        `options`: fields of the detector's Options. Raises ApiError 400 for a model without detection parts, 429.
        """
        from vlp.detection.scores import Options

        if self._accepted + len(pictures) > self._most:
            raise overloaded(1)
        self._accepted += len(pictures)
        try:
            detector = await self._detector(model)
            chosen = Options(**options)
            return [await self._one(model, detector, param, data, labels, chosen) for param, data in pictures]
        finally:
            self._accepted -= len(pictures)

    async def _one(
        self, model: Model, detector: "Detector", param: str, data: bytes, labels: Sequence[str], options: "Options"
    ) -> FoundIn | ApiError:
        def view() -> "View":
            check_picture(data, self._settings.limits)
            return detector.view(data)

        try:
            seen = await patiently(asyncio.to_thread(view), self._settings.limits.request_seconds)
            (found,) = await model.run(lambda: detector.detect([seen], labels, options))
        except BadSample as error:
            return bad_item(error, param)
        return FoundIn(seen.width, seen.height, found)

    async def _detector(self, model: Model) -> "Detector":
        """The model's detector, kept on it. Raises ApiError 400."""
        if model.detector is None:
            try:
                model.detector = await model.run(lambda: _load(model))
            except BundleError as error:
                raise bad_request(NO_PARTS.format(name=model.name), "model", "no_detection_parts") from error
        return model.detector


def _load(model: Model) -> "Detector":
    from vlp.detection.infer import Detector, load_detector

    if isinstance(model.engine, BundleEngine):
        detector = Detector.of(model.engine.bundle)
    elif model.folder is not None:
        detector = load_detector(model.folder)
    else:
        raise BundleError("this engine has no bundle")
    if detector.parts.info.stage == "pretrain":
        raise BundleError("its dense head never saw a box")
    return detector
