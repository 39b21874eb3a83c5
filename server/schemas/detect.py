"""POST /v1/detect: objects in pictures, by any names."""

from pydantic import Field, model_validator

from server.schemas import Answer, Body, ErrorObject, GuardVerdict
from server.schemas.classify import Image, Images, Labels, LabelSetName, Templates, check_choice, check_pictures


class DetectRequest(Body):
    """One `image` or several `images`, and what to look for."""

    image: Image
    images: Images
    labels: Labels
    templates: Templates
    label_set: LabelSetName
    threshold: float | None = Field(default=None, ge=0, lt=1, description="Lowest score; default 0.3.")
    top_k: int | None = Field(default=None, ge=1, description="Most objects per picture; default 100.")
    nms: float | None = Field(
        default=None, ge=0, le=1, description="IoU above which the worse of two boxes of one label goes; default 0.5."
    )
    model: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "DetectRequest":
        check_pictures(self.image, self.images)
        check_choice(self.labels, self.templates, self.label_set)
        return self


class Box(Answer):
    """Pixels of the upright picture; x to the right, y down."""

    xmin: float
    ymin: float
    xmax: float
    ymax: float


class Detected(Answer):
    """One object."""

    label: str
    score: float | None
    box: Box


class DetectedIn(Answer):
    """One picture: its objects, best first, or the reason why it could not be used."""

    index: int
    width: int | None
    height: int | None
    detections: list[Detected] | None
    error: ErrorObject | None
    guard: GuardVerdict | None = None


class DetectResponse(Answer):
    """Pictures in the order of the request."""

    model: str
    data: list[DetectedIn]
