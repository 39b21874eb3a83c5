"""Models and health."""

from typing import Literal

from server.schemas import Answer


class GuardState(Answer):
    """The guard in use, and what it did since the server started."""

    mode: Literal["fast", "standard", "thorough"]
    fpr: float
    """Share of clean pictures that it flags."""
    threshold: float
    pictures: int
    """Looked at."""
    flagged: int


class ModelCard(Answer):
    """One model, as OpenAI lists it, with what it can do."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    capabilities: list[str]
    dimensions: int
    guard: GuardState | None = None


class ModelList(Answer):
    """All models of this server."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(Answer):
    """`ok`, or why not."""

    status: str
    reason: str | None = None


class Reloaded(Answer):
    """A model that was exchanged."""

    model: str
    weights_sha256: str
    dimensions: int
