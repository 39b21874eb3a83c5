"""POST /v1/classify: zero-shot classification of pictures."""

from pydantic import Field, model_validator

from server.schemas import Answer, Body, ErrorObject, GuardVerdict
from server.schemas.label_sets import check_labels, check_templates

UNKNOWN = "unknown"


class Pictures(Body):
    """One `image` or several `images`."""

    image: str | None = Field(default=None, description="base64 or data URI")
    images: list[str] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one_or_several(self) -> "Pictures":
        if (self.image is None) == (self.images is None):
            raise ValueError('give either "image" or "images"')
        return self

    def inputs(self) -> list[tuple[str, str]]:
        """(parameter, picture) of all pictures in order."""
        if self.images is None:
            assert self.image is not None
            return [("image", self.image)]
        return [(f"images[{number}]", value) for number, value in enumerate(self.images)]


class Labelled(Body):
    """The labels to choose from: given here, or a set made by POST /v1/label-sets."""

    labels: list[str] | None = Field(default=None, min_length=1)
    templates: list[str] | None = Field(
        default=None, min_length=1, description='Prompts, averaged; {} is the label. Default: ["{}"].'
    )
    label_set: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Labelled":
        if (self.labels is None) == (self.label_set is None):
            raise ValueError('give either "labels" or "label_set"')
        if self.label_set is not None and self.templates is not None:
            raise ValueError('templates belong to the label set: leave them out, or give "labels"')
        check_labels(self.labels or [])
        check_templates(self.templates or [])
        return self


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


class ClassifyRequest(Pictures, Labelled):
    """Pictures, and the labels to choose from."""

    top_k: int | None = Field(default=None, ge=1, description="Best labels to return; all when absent.")
    unknown: Unknown | None = Field(default=None, description="Let a picture be none of the labels.")
    model: str | None = None


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
