"""What a server may be told, with its defaults. Every limit bites before the memory it guards is spent."""

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import Field

from data_pipelines.config import StrictModel
from data_pipelines.fetch import FetchOptions


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
    points: int = Field(default=1000, ge=1)
    """Points per request that writes, reads or deletes them."""
    payload_bytes: int = Field(default=65_536, ge=1)
    """Length of one point's payload as JSON."""
    queries: int = Field(default=32, ge=1)
    """Texts, pictures, vectors and points that one search combines."""
    collections: int = Field(default=100, ge=0)
    """Collections that are kept."""
    set_prompts: int = Field(default=16_384, ge=1)
    """Prompts (labels x templates) of a label set."""
    label_sets: int = Field(default=100, ge=0)
    """Label sets that are kept."""
    detect_prompts: int = Field(default=256, ge=1)
    """Prompts that one request may look for in pictures; the detector embeds them in one go."""
    detections: int = Field(default=300, ge=1)
    """Objects per picture."""
    read_seconds: float = Field(default=10.0, gt=0)
    """Time a client has to send its body."""
    request_seconds: float = Field(default=15.0, gt=0)
    """Time the model has to answer one request, queueing included."""
    header_bytes: int = Field(default=32_768, ge=1024)
    """Request line and headers."""
    connections: int = Field(default=1024, ge=1)
    """Open connections per worker; further ones are closed at once."""


class Batching(StrictModel):
    """How items of different requests share one model step."""

    size: int = Field(default=32, ge=1)
    """Items per model step."""
    patience: float = Field(default=2.0, gt=0)
    """Seconds that work accepted before may take, as measured lately; beyond it requests get 429."""
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


Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = ("read", "write", "admin")
"""What a key may do, each including those before it: ask; change collections and label sets; steer the server."""

BACKENDS = ("auto", "torch", "torch-bf16", "torch-compile", "onnx", "openvino")
"""What can run a model; see `backends`."""


class Rate(StrictModel):
    """A token bucket: `per_second` requests in the long run, `burst` at once."""

    per_second: float = Field(gt=0)
    burst: int = Field(default=10, ge=1)


class Key(StrictModel):
    """An API key as the server knows it: by its hash."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """Stands in logs, metrics and the audit log."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scope: Scope = "read"
    rate: Rate | None = None
    """In place of the server's own rate."""


class Settings(StrictModel):
    """Everything about a server but the models and the index."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes a free port."""
    keys: tuple[Key, ...] = ()
    """None leaves the server open to whoever reaches it."""
    rate: Rate | None = None
    """For every key, without keys for every client address; none by default."""
    hosts: tuple[str, ...] = ()
    """Names that a Host header may have. Empty: this machine's own on a loopback address, any otherwise."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of these origins may ask, for example https://search.example; none by default."""
    label_sets: Path | None = None
    """Folder of named label sets; without one they are gone when the server ends."""
    docs: bool = True
    """Whether /docs and /openapi.json exist."""
    audit: Path | None = None
    """File that gets one hash-chained line per request that changes something."""
    fetch: FetchOptions | None = None
    """How pictures given as URLs are fetched; None refuses them."""
    workers: int = Field(default=1, ge=1, le=256)
    """Processes that share the port; rates are divided among them."""
    shared: Path | None = None
    """Folder in which the workers tell each other their metrics."""
    limits: Limits = Limits()
    batching: Batching = Batching()


def hash_key(key: str) -> str:
    """How an API key is kept. Keys are random and long, so that no slow hash is needed."""
    return hashlib.sha256(key.encode()).hexdigest()
