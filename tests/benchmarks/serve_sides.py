"""Servers that are compared: ours, open_clip behind a plain route, and infinity; the same weights in all of them.

Each runs in a process of its own on the first core with one thread, all of them at the same time, and only one is asked
at a time; whoever asks has the other cores.
"""

import base64
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from bench_kit import ROOT
from numpy.typing import NDArray

from data_pipelines.files import cache_dir
from data_pipelines.preprocess import ImageConfig
from data_pipelines.tokens import clip_tokenizer
from vlp.bundle import Bundle, save_bundle
from vlp.export import export
from vlp.models import ModelConfig, build_model

HERE = Path(__file__).resolve().parent
INFINITY = Path(sys.prefix) / "peers/infinity/bin/python"
START_SECONDS = 300
WEIGHTS = ("bundle", "open_clip", "hf")
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Side:
    """How one server is started and asked."""

    name: str
    version: str
    command: Callable[[Path, int], list[str]]
    """From the folder of weights and a port."""
    path: str
    images: Callable[[Sequence[bytes]], dict[str, Any]]
    texts: Callable[[Sequence[str]], dict[str, Any]]
    rows: Callable[[Any], list[list[float]]]
    environment: Mapping[str, str] = field(default_factory=dict)


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _data(answer: Any) -> list[list[float]]:
    return [item["embedding"] for item in sorted(answer["data"], key=lambda item: int(item["index"]))]


def ours(backend: str = "auto", *options: str) -> Side:
    """`vlp serve` as it comes, but for the back-end."""
    return Side(
        "vlp serve", version("vlp"),
        lambda weights, port: [
            sys.executable, "-m", "vlp", "serve", str(weights / "bundle"), "--port", str(port), "--backend", backend,
            *options,
        ],
        "/v1/embeddings",
        lambda images: {"input": [{"image": _b64(data)} for data in images]},
        lambda texts: {"input": list(texts)},
        _data,
    )  # fmt: skip


def open_clip() -> Side:
    """The plain route."""
    return Side(
        "open_clip behind a FastAPI route", version("open_clip_torch"),
        lambda weights, port: [sys.executable, str(HERE / "peer_open_clip.py"), str(weights / "open_clip"), str(port)],
        "/embed",
        lambda images: {"images": [_b64(data) for data in images]},
        lambda texts: {"texts": list(texts)},
        lambda answer: list(answer["embeddings"]),
    )  # fmt: skip


def infinity() -> Side:
    """infinity-emb with its torch engine; of a CLIP model's dtypes it has float32 alone on a CPU."""

    def command(weights: Path, port: int) -> list[str]:
        return [
            str(INFINITY), str(HERE / "peer_infinity.py"), "v2", "--model-id", str(weights / "hf"),
            "--served-model-name", "m", "--engine", "torch", "--device", "cpu",
            "--no-vector-disk-cache", "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning",
        ]  # fmt: skip

    def images(given: Sequence[bytes]) -> dict[str, Any]:
        uris = [f"data:image/jpeg;base64,{_b64(data)}" for data in given]
        return {"model": "m", "modality": "image", "input": uris}

    return Side(
        "infinity-emb torch", "0.0.78", command, "/embeddings", images,
        lambda texts: {"model": "m", "modality": "text", "input": list(texts)}, _data,
        {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
    )  # fmt: skip


def weights_of(name: str) -> Path:
    """A model of that name with its first weights, as bundle, for open_clip and for transformers; kept in the cache."""
    folder = cache_dir() / "bench" / f"serve-{name}"
    if all((folder / form).exists() for form in WEIGHTS):
        return folder
    import torch

    tokenizer, image = clip_tokenizer(), ImageConfig()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, model_cfg = build_model(
            ModelConfig(name=name), image.size, tokenizer.config.context_length, tokenizer.vocab_size
        )
    bundle = Bundle(name, model.eval(), model_cfg, image, tokenizer)
    for form in ("open_clip", "hf"):
        if not (folder / form).exists():
            export(bundle, form, folder / form)
    # infinity cuts texts at the config's `max_length`, where transformers 4 has 20 for want of anything better
    config = folder / "hf" / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"max_length": bundle.tokenizer.config.context_length})
    )
    save_bundle(bundle, folder / "bundle")
    return folder


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    side: Side
    port: int
    pid: int
    log: Path

    def post(self, bodies: Sequence[bytes]) -> list[Any]:
        """Answers of requests sent one after the other on one connection. Raises RuntimeError for a refusal."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            return [self._one(connection, body) for body in bodies]
        finally:
            connection.close()

    def _one(self, connection: http.client.HTTPConnection, body: bytes) -> Any:
        connection.request("POST", self.side.path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{self.side.name} answered {answer.status}: {content[:500]!r}")
        return json.loads(content)

    def embed(self, images: Sequence[bytes] = (), texts: Sequence[str] = ()) -> Vectors:
        """Vectors of one request."""
        body = self.side.images(images) if images else self.side.texts(texts)
        (answer,) = self.post([json.dumps(body).encode()])
        return np.asarray(self.side.rows(answer), np.float32)


@contextmanager
def running(side: Side, weights: Path, cores: set[int] | None = None) -> Iterator[Running]:
    """A server in a process of its own, on these cores, the first by default; ended at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT),
        **side.environment,
    }  # fmt: skip
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process = subprocess.Popen(
            side.command(weights, port), cwd=weights, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        os.sched_setaffinity(process.pid, cores or {min(os.sched_getaffinity(0))})
        try:
            found = Running(side, port, process.pid, Path(log.name))
            _until_it_answers(found, process)
            yield found
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _until_it_answers(server: Running, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            server.embed(texts=["a"])
            return
        except (OSError, http.client.HTTPException) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                told = server.log.read_text()[-3000:]
                raise RuntimeError(f"{server.side.name} does not answer ({error}):\n{told}") from error
            time.sleep(0.2)
