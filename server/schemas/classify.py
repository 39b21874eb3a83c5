"""POST /v1/classify: zero-shot classification of pictures."""

from pydantic import Field, model_validator

from server.schemas import Answer, Body, ErrorObject, GuardVerdict


class ClassifyRequest(Body):
    """One `image` or several `images`, and the labels to choose from."""

    image: str | None = Field(default=None, description="base64 or data URI")
    images: list[str] | None = Field(default=None, min_length=1)
    labels: list[str] = Field(min_length=1)
    templates: list[str] = Field(default=["{}"], min_length=1, description="Prompts, averaged; {} is the label.")
    top_k: int | None = Field(default=None, ge=1, description="Best labels to return; all when absent.")
    model: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ClassifyRequest":
        if (self.image is None) == (self.images is None):
            raise ValueError('give either "image" or "images"')
        if not all(self.labels):
            raise ValueError("labels holds an empty label")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels holds a label twice")
        if not all("{}" in template for template in self.templates):
            raise ValueError("every template needs {} where the label goes")
        return self

    def inputs(self) -> list[tuple[str, str]]:
        """(parameter, picture) of all pictures in order."""
        if self.images is None:
            assert self.image is not None
            return [("image", self.image)]
        return [(f"images[{number}]", value) for number, value in enumerate(self.images)]


class Prediction(Answer):
    """One label. Probabilities are a softmax over all labels of the request, with the model's own scale."""

    label: str
    probability: float | None
    cosine: float | None


class Classified(Answer):
    """One picture: predictions, best first, or the reason why it could not be used."""

    index: int
    predictions: list[Prediction] | None
    error: ErrorObject | None
    guard: GuardVerdict | None = None


class ClassifyResponse(Answer):
    """Pictures in the order of the request."""

    model: str
    data: list[Classified]
