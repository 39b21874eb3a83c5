"""/v1/label-sets: named lists of labels for /v1/classify and /v1/detect."""

from typing import Literal

from pydantic import Field, field_validator

from server.errors import bad_request
from server.label_sets import NAME
from server.schemas import Answer, Body
from server.schemas.items import check_text
from server.settings import Limits


class LabelSetRequest(Body):
    """What to keep under which name. The texts are embedded at once, so that the first use is as fast as the next."""

    name: str = Field(description="small letters, digits, '.', '_' and '-', at most 64")
    labels: list[str] = Field(min_length=1)
    templates: list[str] = Field(default=["{}"], min_length=1, description="Prompts, averaged; {} is the label.")
    replace: bool = Field(default=False, description="Whether a set of that name may be replaced.")
    model: str | None = Field(default=None, description="The model that embeds the texts now; others do when asked.")

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if NAME.fullmatch(name) is None:
            raise ValueError("1 to 64 small letters, digits, '.', '_' and '-', and none of the last three first")
        return name

    @field_validator("labels")
    @classmethod
    def _labels(cls, labels: list[str]) -> list[str]:
        return check_labels(labels)

    @field_validator("templates")
    @classmethod
    def _templates(cls, templates: list[str]) -> list[str]:
        return check_templates(templates)


class LabelSetCard(Answer):
    """A set without its labels."""

    name: str
    object: Literal["label_set"] = "label_set"
    count: int
    """Labels in it."""
    templates: list[str]
    created: int


class LabelSetContent(Answer):
    """A set."""

    name: str
    object: Literal["label_set"] = "label_set"
    count: int
    templates: list[str]
    created: int
    labels: list[str]


class LabelSetList(Answer):
    """All sets, by name."""

    object: Literal["list"] = "list"
    data: list[LabelSetCard]


class Deleted(Answer):
    """What is gone."""

    name: str
    deleted: Literal[True] = True


def check_labels(labels: list[str]) -> list[str]:
    """Labels that are there and differ. Raises ValueError."""
    if not all(label.strip() for label in labels):
        raise ValueError("labels holds an empty label")
    if len(set(labels)) != len(labels):
        raise ValueError("labels holds a label twice")
    return labels


def check_templates(templates: list[str]) -> list[str]:
    """Templates with a place for the label. Raises ValueError."""
    if not all("{}" in template for template in templates):
        raise ValueError("every template needs {} where the label goes")
    return templates


def check_prompts(labels: list[str], templates: list[str], limits: Limits, most: int) -> None:
    """Refuse too many and too long prompts before they are made. Raises ApiError 400."""
    count = len(labels) * len(templates)
    if count > most:
        message = f"labels x templates makes {count} prompts, at most {most} are possible here"
        raise bad_request(message, "labels", "too_many_items")
    # looked at before they are multiplied, so that a long template cannot cost memory
    for name, texts in (("labels", labels), ("templates", templates)):
        for number, text in enumerate(texts):
            check_text(text, f"{name}[{number}]", limits)
    label = max(map(len, labels))
    longest = max(len(template) + template.count("{}") * label for template in templates)
    if longest > limits.text_bytes:
        raise bad_request(f"templates: a prompt would have {longest} characters", "templates", "text_too_long")
