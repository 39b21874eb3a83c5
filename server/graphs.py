"""Towers as graphs of other runtimes: ONNX Runtime with dynamic int8 weights, OpenVINO in the CPU's best precision.

Suffixes: N items, L text length, C channels, H height, W width.
"""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipelines.preprocess import normalise
from vlp.bundle import Bundle

Encode = Callable[[Tensor], Tensor]


def onnx_towers(bundle: Bundle) -> tuple[Encode, Encode]:
    """(image, text) of int8 weights; activations are quantised as they come. Needs onnx, onnxscript, onnxruntime."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from vlp.export_onnx import write

    sessions = {}
    with tempfile.TemporaryDirectory(prefix="vlp-onnx-") as scratch:
        folder = Path(scratch)
        write(bundle, folder, folder)
        for name in ("image", "text"):
            small = folder / f"{name}.int8.onnx"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # advice about other ways to quantise
                quantize_dynamic(
                    folder / f"{name}.onnx", small, weight_type=QuantType.QInt8, per_channel=True,
                    op_types_to_quantize=["MatMul", "Gemm"],
                )  # fmt: skip
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            sessions[name] = onnxruntime.InferenceSession(
                small.read_bytes(), options, providers=["CPUExecutionProvider"]
            )

    def image(pixels_NCHW: Tensor) -> Tensor:
        feed = {"pixel_values": normalise(pixels_NCHW, bundle.image).numpy()}
        return torch.from_numpy(sessions["image"].run(None, feed)[0])

    def text(tokens_NL: Tensor) -> Tensor:
        return torch.from_numpy(sessions["text"].run(None, {"input_ids": tokens_NL.numpy()})[0])

    return image, text


def openvino_towers(bundle: Bundle) -> tuple[Encode, Encode]:
    """(image, text) compiled for this CPU, bfloat16 where it has it. Needs openvino."""
    import openvino

    class Tower(nn.Module):
        """One method of the model, its result normalised."""

        def __init__(self, method: str) -> None:
            super().__init__()
            self.model, self.method = bundle.model, method

        def forward(self, inputs: Tensor) -> Tensor:
            """ND."""
            encoded: Tensor = getattr(self.model, self.method)(inputs, normalize=True)
            return encoded

    side, length = bundle.image.size, bundle.tokenizer.config.context_length
    tokens_NL = bundle.tokenizer(["a", "b c"])
    image = _compiled(openvino, Tower("encode_image"), torch.zeros(2, 3, side, side), [-1, 3, side, side])
    text = _compiled(openvino, Tower("encode_text"), tokens_NL, [-1, length])

    def encode_image(pixels_NCHW: Tensor) -> Tensor:
        return torch.from_numpy(image(normalise(pixels_NCHW, bundle.image).numpy())[0].copy())

    def encode_text(tokens_NL: Tensor) -> Tensor:
        return torch.from_numpy(text(tokens_NL.numpy())[0].copy())

    return encode_image, encode_text


def _compiled(openvino: Any, tower: nn.Module, example: Tensor, shape: list[int]) -> Any:
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # about tracing
        model = openvino.convert_model(tower.eval(), example_input=example, input=shape)
    return openvino.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
