"""image.onnx and text.onnx: L2-normalised embeddings, any batch size, checked against torch right after the export.

Inputs and outputs carry the names that runtimes of CLIP exports feed and read (transformers.js, fastembed, Optimum):
`pixel_values` float32 BCHW, normalised with the mean and std of preprocess.json, to `image_embeds`; `input_ids` int64
BL, padded to the context length, to `text_embeds`. Written by torch's present exporter, which needs onnxscript (extra
`onnx`); the one that does not (dynamo=False) is deprecated.
"""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipelines.errors import BundleError, ConfigError
from data_pipelines.preprocess import normalise
from vlp.bundle import Bundle
from vlp.export_hf import PROBES, write_inputs
from vlp.infer import encode_pixels, encode_tokens

LIBRARY = "onnxruntime"
OPSET = 18
TOLERANCE = 1e-4
"""Highest difference of a normalised feature; sums run in another order there."""
PROTOBUF = 1 << 30
"""Bytes of weights above which they go to a file beside the graph: one protobuf holds at most 2 GiB."""
USE = """import onnxruntime
image = onnxruntime.InferenceSession("{folder}/image.onnx")  # pixel_values -> image_embeds
text = onnxruntime.InferenceSession("{folder}/text.onnx")    # input_ids -> text_embeds"""


class _Encode(nn.Module):
    """One tower of a model as a forward pass."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, inputs: Tensor) -> Tensor:
        """To normalised BD."""
        encoded: Tensor = getattr(self.model, self.method)(inputs, normalize=True)
        return encoded


def write(bundle: Bundle, folder: Path, final: Path) -> dict[str, Any]:
    """Both graphs and the files that say what they take. Raises ConfigError without the extra, BundleError."""
    for package in ("onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"--format onnx needs {package}: pip install 'vlp[onnx]'")
    side, generator = bundle.image.size, torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8, generator=generator)
    tokens = bundle.tokenizer(PROBES)
    cases = {
        "image": ("pixel_values", normalise(pixels, bundle.image), encode_pixels(bundle, pixels)),
        "text": ("input_ids", tokens, encode_tokens(bundle, tokens)),
    }
    differences = {}
    for name, (argument, inputs, expected) in cases.items():
        path = folder / f"{name}.onnx"
        _export(_Encode(bundle.model, f"encode_{name}"), inputs, path, argument, f"{name}_embeds")
        differences[name] = _difference(path, argument, inputs, expected)
    if max(differences.values()) > TOLERANCE:
        raise BundleError(
            f"--format onnx: onnxruntime's features differ by {differences}, at most {TOLERANCE} is right"
        )
    write_inputs(bundle, folder)
    return {"use": USE.format(folder=final), "opset": OPSET, "max_abs_difference": differences}


def _export(encode: nn.Module, inputs: Tensor, path: Path, argument: str, output: str) -> None:
    size = sum(parameter.numel() * parameter.element_size() for parameter in encode.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's and onnxscript's own insides
        torch.onnx.export(
            encode.eval(),
            (inputs[:2],),  # a batch of one would be taken for a constant
            path,
            input_names=[argument],
            output_names=[output],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            external_data=size > PROTOBUF,
            verbose=False,
        )


def _difference(path: Path, argument: str, inputs: Tensor, expected_ND: Tensor) -> float:
    """Highest absolute difference to torch over the whole batch and over its first row alone."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = [torch.from_numpy(session.run(None, {argument: part.numpy()})[0]) for part in (inputs, inputs[:1])]
    return float((torch.cat(found) - torch.cat([expected_ND, expected_ND[:1]])).abs().max())
