"""One JPEG on all three ways to its features: evaluation in the loop, `vlp eval`'s path, and HTTP."""

import base64
import io
import json
import struct
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path

import pytest
import torch

from data_pipelines.loader import Loader
from data_pipelines.preprocess import ImageConfig, load_image
from data_pipelines.records import Record
from data_pipelines.testing import draw
from data_pipelines.write import WriteOptions, write_shards
from vlp.bundle import load_bundle, save_bundle
from vlp.evals._encode import encode_shards
from vlp.infer import encode_images
from vlp.recipe import validate
from vlp.run import current_bundle, prepare
from vlp.step import train_step


@pytest.fixture(scope="module")
def jpegs() -> list[bytes]:
    """JPEGs of several shapes, larger and smaller than the model's input."""
    return [draw(size, format="JPEG", seed=n) for n, size in enumerate([(640, 480), (30, 41), (64, 64), (500, 90)] * 9)]


def test_loop_command_and_server_give_equal_features(jpegs: list[bytes], tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    records = [Record(data, (f"picture number {n}",), "test", f"{n}.jpg") for n, data in enumerate(jpegs)]
    write_shards(records, shards, WriteOptions(), kind="test", licences={}, progress=False)
    recipe = validate({
        "data": {"train": str(shards), "batch_size": 12, "image": {"size": 32}},
        "tokenizer": {"kind": "learn", "vocab_size": 300, "context_length": 8},
        "model": {"config": {
            "embed_dim": 16, "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
            "text_cfg": {"width": 32, "heads": 2, "layers": 1}}},
        "optim": {"ema": 0.9}, "run": {"steps": 4, "precision": "fp32"},
    })  # fmt: skip
    run = prepare(recipe, tmp_path / "run")
    for _, batch in zip(range(3), run.loader, strict=False):
        train_step(run, batch)
    bundle = current_bundle(run)
    in_loop = encode_shards(bundle, shards).image_ND
    folder = save_bundle(bundle, tmp_path / "bundle")
    by_command = encode_shards(load_bundle(folder), shards).image_ND
    direct = encode_images(load_bundle(folder), jpegs)
    over_http = ask_server(folder, jpegs)
    for other in (by_command, direct, over_http):
        assert (other - in_loop).abs().max() <= 1e-6
    assert (in_loop[0] - in_loop[1]).abs().max() > 1e-3, "the model must tell pictures apart, or this proves nothing"
    assert isinstance(run.loader, Loader)
    batch = run.loader.make_batch(0)
    rows = [int(key[-4:]) for key in batch.keys]
    assert all(
        torch.equal(pixels, load_image(jpegs[row], ImageConfig(size=32)))
        for pixels, row in zip(batch.pixels, rows, strict=True)
    ), "training sees the very pixels that serving sees"
    with tarfile.open(shards / "00000.tar") as tar:
        stored = [tar.extractfile(member) for member in tar if member.name.endswith(".jpg")]
        assert [io.BytesIO(file.read()).getvalue() for file in stored if file] == jpegs, (
            "shards keep the original bytes"
        )


def ask_server(folder: Path, jpegs: list[bytes]) -> torch.Tensor:
    """Features from a real `vlp serve` process."""
    command = [sys.executable, "-m", "vlp", "serve", str(folder), "--port", "0", "--device", "cpu", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["url"]
            rows = []
            for start in range(0, len(jpegs), 16):
                images = [base64.b64encode(data).decode() for data in jpegs[start : start + 16]]
                body = {"input": images, "modality": "image", "encoding_format": "base64"}
                request = urllib.request.Request(
                    f"{url}/v1/embeddings", json.dumps(body).encode(), {"Content-Type": "application/json"}
                )
                with urllib.request.urlopen(request, timeout=60) as response:
                    answer = json.load(response)
                packed = [base64.b64decode(item["embedding"]) for item in answer["data"]]
                rows += [struct.unpack(f"<{len(text) // 4}f", text) for text in packed]
        finally:
            process.terminate()
    return torch.tensor(rows)
