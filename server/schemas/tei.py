"""text-embeddings-inference: /embed, /similarity, /info. Hugging Face's feature extraction has the same requests."""

from typing import Any, Literal

from pydantic import Field, model_validator

from server.errors import bad_request
from server.schemas import Answer, Body
from server.schemas.items import check_text
from server.settings import Limits


class TeiRequest(Body):
    """One text or several. `truncate` false refuses texts longer than the model's context, as TEI does."""

    inputs: str | list[str]
    truncate: bool | None = None
    truncation_direction: str = "Right"
    normalize: bool | None = True
    dimensions: int | None = Field(default=None, ge=0)
    prompt_name: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    model: str | None = None

    @model_validator(mode="after")
    def _possible(self) -> "TeiRequest":
        if self.truncation_direction.lower() != "right":
            raise ValueError("truncation_direction: this model reads the beginning of a text: Right")
        if self.normalize is False:
            raise ValueError("normalize: vectors always have length 1 here; leave it out")
        if self.prompt_name:
            raise ValueError("prompt_name: this model has no prompts; leave it out")
        return self

    def texts(self, limits: Limits) -> list[str]:
        """All texts. Raises ApiError 400."""
        texts = [self.inputs] if isinstance(self.inputs, str) else self.inputs
        check_texts(texts, "inputs", limits)
        return texts


class Sentences(Body):
    """One sentence, and those it is compared with."""

    source_sentence: str
    sentences: list[str]


class TeiSimilarityRequest(Body):
    """Cosines between one sentence and others."""

    inputs: Sentences
    parameters: dict[str, Any] | None = Field(default=None, description="truncate: true cuts long texts.")
    model: str | None = None


class TeiInfo(Answer):
    """What the model is and what a client may send."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_type: dict[str, Any]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    sha: str | None = None
    docker_label: str | None = None


def check_texts(texts: list[str], where: str, limits: Limits) -> None:
    """Refuse none, too many, empty and too long ones. Raises ApiError 400."""
    if not texts:
        raise bad_request(f"{where} is empty", where, "empty_input")
    if len(texts) > limits.texts:
        raise bad_request(
            f"{where} holds {len(texts)} texts, a request may hold {limits.texts}", where, "too_many_items"
        )
    for number, text in enumerate(texts):
        param = f"{where}[{number}]"
        if not text:
            raise bad_request(f"{param} is empty", param, "empty_input")
        check_text(text, param, limits)
