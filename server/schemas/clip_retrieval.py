"""clip-retrieval's back end. Its clients send every key, null or "" for what they do not use."""

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from server.schemas import Answer, Body


class KnnRequest(Body):
    """The first of text, image, image_url and embedding_input that is there is the query.

    `use_safety_model`, `use_violence_detector`, `use_mclip` and the aesthetic score are taken and change nothing,
    because this server has no such models.
    """

    text: str | None = None
    image: str | None = Field(default=None, description="base64")
    image_url: str | None = None
    embedding_input: list[float] | None = None
    modality: Literal["image", "text"] = "image"
    """What the index was made of."""
    num_images: int = Field(default=100, ge=0, description="Results with metadata.")
    num_result_ids: int | None = Field(default=None, ge=0, description="Results in all; default num_images.")
    indice_name: str | None = None
    deduplicate: bool = False
    """Leave out what looks like a better result: pictures whose cosine is 0.94 or more, directly or over others."""
    use_safety_model: bool = False
    use_violence_detector: bool = False
    use_mclip: bool = False
    aesthetic_score: int | None = None
    aesthetic_weight: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _empty_is_absent(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value != ""} if isinstance(given, dict) else given


class KnnHit(Answer):
    """One result; the payload follows as further fields. Past num_images only these two."""

    model_config = ConfigDict(extra="allow")

    id: int | str
    similarity: float | None


class MetadataRequest(Body):
    """Which entries of which index."""

    ids: list[int | str]
    indice_name: str | None = None


class Metadata(Answer):
    """One entry."""

    id: int | str
    metadata: dict[str, object]
