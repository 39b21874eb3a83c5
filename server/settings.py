"""What a server may be told, with its defaults. Every limit bites before the memory it guards is spent."""

import hashlib

from pydantic import Field

from data_pipelines.config import StrictModel


class Limits(StrictModel):
    """Upper bounds on what one request may cost."""

    body_bytes: int = Field(default=10_000_000, ge=1)
    """Length of a request body; counted while it arrives."""
    images: int = Field(default=32, ge=1)
    """Pictures per request."""
    texts: int = Field(default=1024, ge=1)
    """Texts (or prompts: labels x templates) per request."""
    text_bytes: int = Field(default=8192, ge=1)
    """UTF-8 length of one text. Below it, texts longer than the model's context are cut, as CLIP clients expect."""
    pixels: int = Field(default=25_000_000, ge=1)
    """Width x height of one picture."""
    side: int = Field(default=16_384, ge=1)
    """Longer side of one picture."""
    requests: int = Field(default=256, ge=1)
    """Requests in progress; beyond it new ones get 429 before their body is read."""
    hits: int = Field(default=1000, ge=1)
    """Results per search."""
    read_seconds: float = Field(default=10.0, gt=0)
    """Time a client has to send its body."""
    request_seconds: float = Field(default=15.0, gt=0)
    """Time the model has to answer one request, queueing included."""


class Batching(StrictModel):
    """How items of different requests share one model step."""

    size: int = Field(default=32, ge=1)
    """Items per model step."""
    wait_ms: float = Field(default=2.0, ge=0)
    """How long a step waits for items that are already being prepared."""
    queue_images: int = Field(default=128, ge=1)
    """Pictures accepted and not yet answered; beyond it requests get 429."""
    queue_texts: int = Field(default=4096, ge=1)
    """The same for texts."""
    threads: int = Field(default=2, ge=1)
    """Threads that decode pictures and tokenize texts."""
    results: int = Field(default=2048, ge=0)
    """Embeddings of pictures, and as many of texts, kept for inputs that come again; 0 keeps none."""


class Settings(StrictModel):
    """Everything about a server but the model and the index."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes a free port."""
    key_hashes: tuple[str, ...] = ()
    """sha256 of every accepted API key; empty leaves the server open."""
    docs: bool = True
    """Whether /docs and /openapi.json exist."""
    limits: Limits = Limits()
    batching: Batching = Batching()


def hash_key(key: str) -> str:
    """How an API key is kept."""
    return hashlib.sha256(key.encode()).hexdigest()
