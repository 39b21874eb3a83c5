"""Back-ends: each answers as float32 torch does, or is refused and says so; the fastest right one is taken."""

import copy
import itertools
import logging
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from shutil import which
from typing import Any

import pytest
import torch

from data_pipelines.errors import PipelineError
from server import backends
from server.backends import COSINE, Towers, choose, plain_towers
from server.engine import BundleEngine
from server.settings import BACKENDS, Limits
from vlp.bundle import Bundle
from vlp.testing import micro_bundle

TEXTS = ["a", "red circle", "many words in one text that is cut", ""]


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return micro_bundle()


def needs(name: str) -> Any:
    missing = {"onnx": ("onnxscript", "onnxruntime"), "openvino": ("openvino",)}.get(name, ())
    absent = [package for package in missing if find_spec(package) is None]
    marks = [pytest.mark.skipif(bool(absent), reason=f"{absent} not installed")]
    if name == "torch-compile":
        marks += [pytest.mark.slow, pytest.mark.skipif(which("g++") is None, reason="no C++ compiler")]
        marks.append(pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"))  # of torch's own code
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [needs(name) for name in BACKENDS if name != "auto"])
def test_a_back_end_answers_as_torch_does(name: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other pictures and texts than the canary's; batches of one and of several.

    The bundle's vectors have 16 components, too few for rounding errors to average out: the limit is lower here.
    """
    lowest = COSINE if name in ("torch", "openvino") else 0.995
    monkeypatch.setattr(backends, "COSINE", lowest)
    towers, plain = choose(bundle, name), plain_towers(bundle)
    side = bundle.image.size
    pixels = torch.randint(0, 256, (5, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
    tokens = bundle.tokenizer(TEXTS)
    for found, expected in (
        (towers.image(pixels), plain.image(pixels)),
        (towers.image(pixels[:1]), plain.image(pixels[:1])),
        (towers.text(tokens), plain.text(tokens)),
        (towers.text(tokens[:1]), plain.text(tokens[:1])),
    ):
        assert found.shape == expected.shape
        assert found.dtype == torch.float32
        assert float(torch.nn.functional.cosine_similarity(found, expected).min()) >= lowest - 2e-3
        assert torch.allclose(found.norm(dim=-1), torch.ones(len(found)), atol=1e-4)
    assert towers.name == name
    if name == "torch":
        assert torch.allclose(towers.text(tokens), plain.text(tokens), atol=2e-6)


def test_a_compiled_back_end_knows_all_sizes_from_the_start(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compiler's front half, which decides what is compiled anew; requests must never wait for that."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(backends, "COSINE", 0.995)
    towers, plain, side = choose(bundle, "torch-compile"), plain_towers(bundle), bundle.image.size
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in (1, 2, 5, 9):
            pixels = torch.zeros(size, 3, side, side, dtype=torch.uint8)
            tokens = bundle.tokenizer((TEXTS * 3)[:size])
            assert torch.cosine_similarity(towers.image(pixels), plain.image(pixels)).min() > 0.99
            assert torch.cosine_similarity(towers.text(tokens), plain.text(tokens)).min() > 0.99


def test_on_a_gpu_compiled_towers_are_measured_too(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda _name: None)
    gpu = replace(bundle, model=copy.deepcopy(bundle.model).to("meta"))  # any device that is no CPU
    assert list(backends._candidates(gpu, "auto")) == ["torch", "torch-bf16", "torch-compile"]
    assert "torch-compile" not in backends._candidates(bundle, "auto")


def wrong(bundle: Bundle) -> Towers:
    """Off by an angle whose cosine is just too low."""
    plain = plain_towers(bundle)

    def turned(rows_ND: Any) -> Any:
        noise_ND = torch.randn(rows_ND.shape, generator=torch.Generator().manual_seed(0))
        noise_ND -= (noise_ND * rows_ND).sum(-1, keepdim=True) * rows_ND
        noise_ND /= noise_ND.norm(dim=-1, keepdim=True)
        angle = torch.acos(torch.tensor(COSINE - 0.0001))
        return rows_ND * angle.cos() + noise_ND * angle.sin()

    return Towers(lambda x: turned(plain.image(x)), plain.text, "torch-bf16")


def nan(bundle: Bundle) -> Towers:
    plain = plain_towers(bundle)
    return Towers(plain.image, lambda x: plain.text(x) * float("nan"), "torch-bf16")


@pytest.mark.parametrize(
    ("made", "kind", "chosen"),
    [(wrong, "images", "torch (images), torch-bf16 (texts)"), (nan, "texts", "torch-bf16 (images), torch (texts)")],
)
def test_a_back_end_that_is_wrong_is_refused_for_that_tower(
    made: Any, kind: str, chosen: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Asked for by name, one wrong tower is too many; `auto` takes the other, were it the faster one."""
    monkeypatch.setattr(backends, "bfloat16_towers", made)
    with pytest.raises(PipelineError, match=f"torch-bf16 refused for {kind}: cosine"):
        choose(bundle, "torch-bf16")
    times = itertools.count(9, -1)
    monkeypatch.setattr(backends, "_seconds", lambda _encode, _inputs: next(times))
    monkeypatch.setattr(backends, "_fast_bfloat16", lambda: True)
    monkeypatch.setattr(backends, "find_spec", lambda _name: None)
    with caplog.at_level(logging.WARNING):
        assert choose(bundle, "auto").name == chosen
    assert f"torch-bf16 refused for {kind}" in caplog.text


def test_one_that_does_not_run_is_passed_over(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_bundle: Bundle) -> Towers:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(backends, "bfloat16_towers", broken)
    monkeypatch.setattr(backends, "_fast_bfloat16", lambda: True)
    monkeypatch.setattr(backends, "find_spec", lambda _name: None)
    assert choose(bundle, "auto").name == "torch"
    with pytest.raises(PipelineError, match="does not run this model"):
        choose(bundle, "torch-bf16")


def test_the_fastest_is_taken_for_each_tower(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"a": plain_towers(bundle), "b": plain_towers(bundle)}
    taken = {id(found["a"].image): 1.0, id(found["b"].image): 2.0, id(found["a"].text): 2.0, id(found["b"].text): 1.0}
    monkeypatch.setattr(backends, "_seconds", lambda encode, _inputs: taken[id(encode)])
    chosen = backends._fastest(found, found, torch.zeros(1), torch.zeros(1))
    assert (chosen.image, chosen.text) == (found["a"].image, found["b"].text)
    assert chosen.name == "a (images), b (texts)"


def test_a_missing_package_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda _name: None)
    with pytest.raises(PipelineError, match=r"pip install 'vlp\[openvino\]'"):
        choose(bundle, "openvino")
    with pytest.raises(PipelineError, match="choose one of"):
        choose(bundle, "tensorflow")


def test_the_engine_runs_what_was_chosen(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "COSINE", 0.995)
    engine = BundleEngine(bundle, Limits(), towers=choose(bundle, "torch-bf16"))
    assert engine.backend == "torch-bf16"
    rows = engine.encode_texts(engine.prepare_texts(["a", "b"]))
    assert rows.shape == (2, bundle.dim)
    assert rows.dtype.name == "float32"
