"""What runs the towers: torch, in bfloat16, compiled, ONNX Runtime with int8 weights, OpenVINO; chosen by measurement.

Every candidate first answers a canary, and its embeddings are compared with those of plain float32 torch: one whose
lowest cosine is below COSINE is refused and said so. Image and text tower are judged and chosen apart.
Suffixes: N items, D embedding width, L text length, C channels, H height, W width.
"""

import copy
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from data_pipelines.errors import PipelineError
from server.graphs import onnx_towers, openvino_towers
from server.settings import BACKENDS
from vlp import infer
from vlp.bundle import Bundle
from vlp.models.lean import LeanModel

log = logging.getLogger(__name__)

COSINE = 0.9998
"""Lowest cosine to float32 torch, over all items of the canary."""
PICTURES, ROUNDS = 4, 3
WARMED = (2, 3, 1)
"""Batches that a compiled tower runs first: the second size makes it take any from two on, one is its own case."""
TEXTS = (
    "a", "a red circle", "a photo of a cat sitting on a wooden table", "canary", "an image of the sea at night",
    "two dogs running over a green field while the sun is setting behind the hills", "3", "a drawing of a house",
)  # fmt: skip

Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Towers:
    """`image`: uint8 pixels_NCHW, `text`: tokens_NL, both to normalised float32 ND on the CPU."""

    image: Encode
    text: Encode
    name: str
    """For people: what was chosen."""


def plain_towers(bundle: Bundle) -> Towers:
    """As evaluation runs them."""
    return Towers(lambda x: infer.encode_pixels(bundle, x), lambda x: infer.encode_tokens(bundle, x), "torch")


def torch_towers(bundle: Bundle) -> Towers:
    """Without what reaches no feature: texts end at their ends, the last block runs for what is pooled alone."""
    lean = LeanModel(bundle.model)
    return _lean(bundle, lean, lean, torch.float32, "torch")


def bfloat16_towers(bundle: Bundle) -> Towers:
    """The same on a copy with its weights cast: autocast would be slower than float32 on a CPU."""
    lean = LeanModel(copy.deepcopy(bundle.model).to(torch.bfloat16))
    return _lean(bundle, lean, lean, torch.bfloat16, "torch-bf16")


def compiled_towers(bundle: Bundle) -> Towers:
    """By torch.compile in bfloat16: a minute or more at the start, for GPUs, which otherwise wait for Python.

    Texts run at their whole length, for every other length would be compiled anew. Batches of three sizes are run
    now, after which any size is known: one alone, and any other as a number that varies.
    """
    model = copy.deepcopy(bundle.model).to(torch.bfloat16)
    towers = _lean(
        bundle,
        LeanModel(model, compiled=True),
        LeanModel(model, trim=False, compiled=True),
        torch.bfloat16,
        "torch-compile",
    )
    pixels_NCHW, tokens_NL = _canary(bundle)
    for size in WARMED:
        towers.image(pixels_NCHW[:size])
        towers.text(tokens_NL[:size])
    return towers


def _lean(bundle: Bundle, images: LeanModel, texts: LeanModel, dtype: torch.dtype, name: str) -> Towers:
    @torch.inference_mode()
    def image(pixels_NCHW: Tensor) -> Tensor:
        parts = [images.encode_image(infer.ready(bundle, chunk).to(dtype)) for chunk in pixels_NCHW.split(infer.BATCH)]
        return _unit(torch.cat(parts))

    @torch.inference_mode()
    def text(tokens_NL: Tensor) -> Tensor:
        parts = [texts.encode_text(chunk.to(bundle.device)) for chunk in tokens_NL.split(infer.BATCH)]
        return _unit(torch.cat(parts))

    return Towers(image, text, name)


def _unit(features_ND: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features_ND.float(), dim=-1).cpu()


def choose(bundle: Bundle, wanted: str) -> Towers:
    """The towers to serve with. Raises PipelineError when the one asked for is missing or fails its canary."""
    pixels_NCHW, tokens_NL = _canary(bundle)
    plain = plain_towers(bundle)
    torch.set_float32_matmul_precision("highest")
    expected = {"images": plain.image(pixels_NCHW), "texts": plain.text(tokens_NL)}
    if bundle.device.type == "cpu":
        # float32 through oneDNN: twice as fast as MKL on AMD, and the canary sees if it means less precision elsewhere
        torch.set_float32_matmul_precision("medium")
    if wanted not in BACKENDS:
        raise PipelineError(f"--backend {wanted}: choose one of {', '.join(BACKENDS)}")
    found: dict[str, dict[str, Towers]] = {"images": {}, "texts": {}}
    for name, make in _candidates(bundle, wanted).items():
        try:
            towers = make(bundle)
            answers = {"images": towers.image(pixels_NCHW), "texts": towers.text(tokens_NL)}
        except Exception as error:
            if wanted != "auto":
                raise PipelineError(f"--backend {name}: does not run this model: {error}") from error
            log.warning("back-end %s does not run this model: %s", name, error)
            continue
        for kind, right_ND in expected.items():
            worst = _cosine(answers[kind], right_ND)
            if worst >= COSINE:
                found[kind][name] = towers
                continue
            message = f"refused for {kind}: cosine {worst:.6f} to float32 torch, at least {COSINE} is right"
            if wanted != "auto":
                raise PipelineError(f"--backend {name} {message}")
            log.warning("back-end %s %s", name, message)
    if not (found["images"] and found["texts"]):
        torch.set_float32_matmul_precision("highest")
        return plain
    return _fastest(found["images"], found["texts"], pixels_NCHW, tokens_NL)


def _candidates(bundle: Bundle, wanted: str) -> Mapping[str, Callable[[Bundle], Towers]]:
    makers: dict[str, Callable[[Bundle], Towers]] = {
        "torch": torch_towers,
        "torch-bf16": bfloat16_towers,
        "torch-compile": compiled_towers,
        "onnx": lambda bundle: Towers(*onnx_towers(bundle), "onnx"),
        "openvino": lambda bundle: Towers(*openvino_towers(bundle), "openvino"),
    }
    packages = {"onnx": ("onnxruntime", "onnx", "onnxscript"), "openvino": ("openvino",)}
    if wanted != "auto":
        missing = [name for name in packages.get(wanted, ()) if find_spec(name) is None]
        if missing:
            raise PipelineError(f"--backend {wanted} needs {', '.join(missing)}: pip install 'vlp[{wanted}]'")
        return {wanted: makers[wanted]}
    if bundle.device.type != "cpu":
        return {name: makers[name] for name in ("torch", "torch-bf16", "torch-compile")}
    usable: dict[str, Callable[[Bundle], Towers]] = {"torch": torch_towers}
    if _fast_bfloat16():
        usable["torch-bf16"] = bfloat16_towers
    for name, needed in packages.items():
        if all(find_spec(package) for package in needed):
            usable[name] = makers[name]
    return usable


def _fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself; otherwise it is emulated, and slow."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as stream:  # noqa: PTH123 - a device
            return any("avx512_bf16" in line or "amx_bf16" in line for line in stream if line.startswith("flags"))
    except OSError:
        return False


def _canary(bundle: Bundle) -> tuple[Tensor, Tensor]:
    """(pixels_NCHW, tokens_NL): noise of different coarseness, and texts of different lengths."""
    side, generator = bundle.image.size, torch.Generator().manual_seed(0)
    pictures = []
    for number in range(PICTURES):
        cells = max(2, side >> (2 * number))
        noise = torch.rand(1, 3, cells, cells, generator=generator)
        pictures.append(torch.nn.functional.interpolate(noise, size=(side, side), mode="bilinear"))
    return (torch.cat(pictures) * 255).round().to(torch.uint8), bundle.tokenizer(list(TEXTS))


def _cosine(found_ND: Tensor, expected_ND: Tensor) -> float:
    """Lowest cosine; NaN when an embedding has one."""
    return float(torch.nn.functional.cosine_similarity(found_ND.double(), expected_ND.double()).min())


def _fastest(
    images: Mapping[str, Towers], texts: Mapping[str, Towers], pixels_NCHW: Tensor, tokens_NL: Tensor
) -> Towers:
    image = _quickest("image", {name: towers.image for name, towers in images.items()}, pixels_NCHW[:1])
    text = _quickest("text", {name: towers.text for name, towers in texts.items()}, tokens_NL)
    name = image if image == text else f"{image} (images), {text} (texts)"
    return Towers(images[image].image, texts[text].text, name)


def _quickest(kind: str, encoders: Mapping[str, Encode], inputs: Tensor) -> str:
    """Name of the fastest; one alone is not timed."""
    if len(encoders) == 1:
        return next(iter(encoders))
    times = {name: _seconds(encode, inputs) for name, encode in encoders.items()}
    log.info("%s tower, ms: %s", kind, ", ".join(f"{name} {1000 * took:.1f}" for name, took in times.items()))
    return min(times, key=times.__getitem__)


def _seconds(encode: Encode, inputs: Tensor) -> float:
    """Least time of some runs; the canary was the warm-up."""
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        encode(inputs)
        times.append(time.perf_counter() - began)
    return min(times)


def lengths_of(bundle: Bundle, tokens_NL: Tensor) -> Tensor:
    """N: everything up to the last token that is not padding; the padding id may also occur as a word."""
    real_NL = tokens_NL != bundle.tokenizer.config.pad_id
    return (real_NL.flip(-1).cumsum(-1) > 0).sum(-1)
