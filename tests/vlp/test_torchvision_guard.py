"""The guard, in fresh interpreters: whether `import torchvision` works is decided once per process."""

import subprocess
import sys

import pytest

BUILD = """
import open_clip, torch
model, _, preprocess = open_clip.create_model_and_transforms("ViT-S-32-alt", pretrained=None)
from PIL import Image
with torch.inference_mode():
    image = model.encode_image(preprocess(Image.new("RGB", (40, 30), "red"))[None])
    text = model.encode_text(open_clip.get_tokenizer("ViT-S-32-alt")(["a red square"]))
assert image.shape == text.shape == (1, 256)
assert torch.isfinite(image).all() and torch.isfinite(text).all()
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def succeeds(code: str) -> str:
    """Run code that must not fail; its standard output."""
    done = run(code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


GUARD = "from vlp.torchvision_guard import compiled_ops_load, ensure_torchvision\n"


@pytest.fixture(scope="module")
def loads() -> str:
    """Whether the compiled operators load on this machine: 'True', 'False' or 'None'."""
    return succeeds(GUARD + "print(compiled_ops_load())")


def test_the_verdict_agrees_with_a_bare_import(loads: str) -> None:
    """Without the guard, torchvision imports exactly where the guard says that its operators load."""
    bare = run("import torchvision")
    assert loads in {"True", "False"}, "torchvision comes with open_clip and must be installed"
    assert (bare.returncode == 0) == (loads == "True"), bare.stderr
    if bare.returncode:
        assert "operator torchvision::nms does not exist" in bare.stderr


def test_open_clip_builds_and_runs_a_model_behind_the_guard() -> None:
    succeeds(GUARD + "ensure_torchvision()" + BUILD)


def test_the_guard_imports_no_part_of_torchvision() -> None:
    code = (
        "ensure_torchvision()\nimport sys\nassert not any(name.split('.')[0] == 'torchvision' for name in sys.modules)"
    )
    succeeds(GUARD + code)


def test_calling_it_again_changes_nothing() -> None:
    """Twice before the import, and once after it."""
    succeeds(GUARD + "ensure_torchvision()\nensure_torchvision()\nimport torchvision\nensure_torchvision()")


def test_it_declares_nothing_beside_operators_that_exist(loads: str) -> None:
    """Operators that are there already are not declared twice: torchvision's own, or stand-ins where it is broken."""
    ours = "import torch\ntorch.library.define('torchvision::nms', '(Tensor a, Tensor b, float c) -> Tensor')\n"
    code = GUARD + "ensure_torchvision()\nimport torch\nprint(torch.ops.torchvision.nms.default._schema)"
    if loads == "True":
        assert "Tensor dets, Tensor scores" in succeeds(code)
    else:
        assert "Tensor a, Tensor b, float c" in succeeds(ours + code)


def test_it_does_nothing_without_torchvision() -> None:
    hide = "import importlib.util\nimportlib.util.find_spec = lambda name: None\n"
    code = "ensure_torchvision()\nimport torch\nprint(compiled_ops_load(), hasattr(torch.ops.torchvision, 'nms'))"
    assert succeeds(GUARD + hide + code) == "None False"
