"""Hugging Face's inference tasks on pictures: `inputs` and `parameters`."""

from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

from server.errors import bad_request
from server.schemas import Answer, Body
from server.schemas.label_sets import check_labels, check_prompts, check_templates
from server.settings import Limits

TEMPLATE = "This is a photo of {}."
"""What the task's own pipeline says when the request does not."""
PICTURE_SCHEMA = {
    "anyOf": [
        {"type": "string", "description": "base64 or data URI"},
        {"type": "object", "properties": {"image": {"type": "string"}}, "required": ["image"]},
    ]
}
LABELS_SCHEMA = {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "string"}]}


class Parameters(Body):
    """Of both zero-shot tasks."""

    candidate_labels: Annotated[Any, WithJsonSchema(LABELS_SCHEMA)] = Field(
        default=None, description="a list, or labels separated by commas"
    )
    text_queries: Annotated[Any, WithJsonSchema(LABELS_SCHEMA)] = Field(
        default=None, description="another word for candidate_labels"
    )
    hypothesis_template: str | None = Field(
        default=None, description=f"Default: {TEMPLATE!r}, of detection the model's own."
    )
    threshold: float = Field(default=0.1, ge=0, lt=1, description="Of detection.")
    top_k: int | None = Field(default=None, ge=1, description="Most objects, of detection.")

    def labels(self, limits: Limits, most: int) -> list[str]:
        """The labels, checked, `most` of them at most. Raises ApiError 400."""
        where = "parameters.candidate_labels"
        given = self.candidate_labels if self.candidate_labels is not None else self.text_queries
        if isinstance(given, str):
            given = [part.strip() for part in given.split(",")]
        if not isinstance(given, list) or not given or not all(isinstance(label, str) for label in given):
            raise bad_request(f"{where}: expected a list of labels, or labels separated by commas", where, "missing")
        template = self.hypothesis_template or TEMPLATE
        try:
            check_labels(given)
            check_templates([template])
        except ValueError as error:
            raise bad_request(f"parameters: {error}", where) from error
        check_prompts(given, [template], limits, most)
        return given


class ZeroShotRequest(Body):
    """One picture and its candidate labels; detection takes a list of pictures too."""

    inputs: Annotated[
        Any, WithJsonSchema({"anyOf": [*PICTURE_SCHEMA["anyOf"], {"type": "array", "items": PICTURE_SCHEMA}]})
    ]
    parameters: Parameters
    model: str | None = None

    def picture(self) -> tuple[str, str]:
        """(parameter, picture) of the only one. Raises ApiError 400."""
        return _picture(self.inputs, "inputs")

    def pictures(self) -> list[tuple[str, str]]:
        """(parameter, picture) of all. Raises ApiError 400."""
        if not isinstance(self.inputs, list):
            return [self.picture()]
        if not self.inputs:
            raise bad_request("inputs is an empty list", "inputs", "empty_input")
        return [_picture(given, f"inputs[{number}]") for number, given in enumerate(self.inputs)]


class LabelScore(Answer):
    """One label with its probability."""

    label: str
    score: float | None


class PixelBox(Answer):
    """Whole pixels of the upright picture."""

    xmin: int
    ymin: int
    xmax: int
    ymax: int


class LabelBox(Answer):
    """One object."""

    label: str
    score: float | None
    box: PixelBox


def _picture(given: Any, param: str) -> tuple[str, str]:
    if isinstance(given, dict):
        given, param = given.get("image"), f"{param}.image"
    if not isinstance(given, str) or not given:
        raise bad_request(
            f'{param}: expected a picture as base64 or data URI, or {{"image": ...}}', param, "invalid_item"
        )
    return param, given
