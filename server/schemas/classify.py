"""POST /v1/classify: zero-shot classification of pictures."""

from typing import Annotated

from pydantic import Field, model_validator

from server.schemas import Answer, Body, ErrorObject, GuardVerdict
from server.schemas.label_sets import check_labels, check_templates

UNKNOWN = "unknown"


Image = Annotated[str | None, Field(default=None, description="base64 or data URI")]
Images = Annotated[list[str] | None, Field(default=None, min_length=1)]
Labels = Annotated[
    list[str] | None, Field(default=None, min_length=1, description="What to choose from, or label_set.")
]
Templates = Annotated[
    list[str] | None,
    Field(default=None, min_length=1, description='Prompts of the labels, averaged; {} is the label. Default: ["{}"].'),
]
LabelSetName = Annotated[str | None, Field(default=None, description="A set made by POST /v1/label-sets.")]


def check_pictures(image: str | None, images: list[str] | None) -> None:
    """One picture or several. Raises ValueError."""
    if (image is None) == (images is None):
        raise ValueError('give either "image" or "images"')


def check_choice(labels: list[str] | None, templates: list[str] | None, label_set: str | None) -> None:
    """Labels given here, or a set by name. Raises ValueError."""
    if (labels is None) == (label_set is None):
        raise ValueError('give either "labels" or "label_set"')
    if label_set is not None and templates is not None:
        raise ValueError('templates belong to the label set: leave them out, or give "labels"')
    check_labels(labels or [])
    check_templates(templates or [])


def inputs_of(image: str | None, images: list[str] | None) -> list[tuple[str, str]]:
    """(parameter, picture) of all pictures in order."""
    if images is None:
        assert image is not None
        return [("image", image)]
    return [(f"images[{number}]", value) for number, value in enumerate(images)]


class Unknown(Body):
    """When a picture shows none of the labels. At least one way to tell has to be given."""

    prompts: list[str] = Field(
        default=[], description="Texts of what else a picture may show; they compete with the labels."
    )
    min_cosine: float | None = Field(default=None, ge=-1, le=1)
    min_probability: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="after")
    def _some(self) -> "Unknown":
        if not self.prompts and self.min_cosine is None and self.min_probability is None:
            raise ValueError("give prompts, min_cosine or min_probability")
        if not all(self.prompts):
            raise ValueError("prompts holds an empty text")
        return self


class ClassifyRequest(Body):
    """One `image` or several `images`, and the labels to choose from."""

    image: Image
    images: Images
    labels: Labels
    templates: Templates
    label_set: LabelSetName
    top_k: int | None = Field(default=None, ge=1, description="Best labels to return; all when absent.")
    unknown: Unknown | None = Field(default=None, description="Let a picture be none of the labels.")
    model: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ClassifyRequest":
        check_pictures(self.image, self.images)
        check_choice(self.labels, self.templates, self.label_set)
        return self


class Prediction(Answer):
    """One label. Probabilities are a softmax over all labels (and prompts for unknown), with the model's own scale."""

    label: str
    probability: float | None
    cosine: float | None


class UnknownVerdict(Answer):
    """Whether a picture shows none of the labels; there when the request asks."""

    is_unknown: bool
    reason: str | None
    """`prompts`: one of them is likelier than every label; `min_cosine`, `min_probability`: the best label is below."""
    probability: float | None
    """Of all prompts for unknown together; null without any."""


class Classified(Answer):
    """One picture: predictions, best first, or the reason why it could not be used."""

    index: int
    predictions: list[Prediction] | None
    error: ErrorObject | None
    label: str | None = None
    """The best label, or `unknown`; there when the request asks for `unknown`."""
    unknown: UnknownVerdict | None = None
    guard: GuardVerdict | None = None


class ClassifyResponse(Answer):
    """Pictures in the order of the request."""

    model: str
    data: list[Classified]
