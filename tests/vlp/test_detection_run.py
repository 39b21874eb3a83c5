"""Detection's parts in the trainer: averaged, saved, resumed bit for bit, handed over, gone on with; memory told."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vlp.train
from data_pipelines.batch import Batch
from data_pipelines.errors import ConfigError
from vlp.bundle import load_bundle
from vlp.checkpoint import load_latest
from vlp.detection.model import parts_of
from vlp.memory import activations, estimate, saved_bytes
from vlp.models import ModelConfig, build_model
from vlp.objectives import base
from vlp.optim import parameter_groups
from vlp.recipe import Recipe, merge, validate
from vlp.run import Run, current_bundle, prepare
from vlp.step import train_step
from vlp.testing import MICRO, MICRO_OPTIONS
from vlp.train import train

Make = Callable[..., Recipe]
OBJECTIVE = {"name": "detection_pretrain", **MICRO_OPTIONS["detection_pretrain"]}


@pytest.fixture(scope="module")
def recipe(micro_recipe: Make) -> Recipe:
    settings = micro_recipe(steps=6, save_every=2).model_dump()
    return validate(merge(settings, {"objective": OBJECTIVE}))


@pytest.fixture(scope="module")
def pretrained(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; read-only."""
    folder = tmp_path_factory.mktemp("runs") / "detection"
    train(recipe, folder, show=False)
    return folder


def state(folder: Path) -> dict[str, torch.Tensor]:
    bundle = load_bundle(folder)
    return {**bundle.model.state_dict(), **{f"parts.{k}": v for k, v in parts_of(bundle).state_dict().items()}}


def test_the_bundle_holds_the_averaged_parts(pretrained: Path) -> None:
    found = load_latest(pretrained / "checkpoints")
    assert found is not None
    tensors, _ = found
    parts = parts_of(load_bundle(pretrained)).state_dict()
    moved = 0
    for name, value in parts.items():
        assert torch.equal(value, tensors["ema_parts"][f"detection.{name}"]), name
        moved += not torch.equal(value, tensors["objective"][f"parts.{name}"])
    assert moved > 5, "the average differs from the last weights"
    assert int(tensors["objective"]["updates"]) == 6


def test_a_resumed_run_ends_where_an_undisturbed_one_does(
    recipe: Recipe, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after three of six steps with a checkpoint after two: boxes, parts and averages come back."""

    class Kill(BaseException):
        """Stands for kill -9."""

    def kill(run: Run, batch: Batch) -> dict[str, float]:
        values = train_step(run, batch)
        if run.step > 3:
            raise Kill
        return values

    monkeypatch.setattr(vlp.train, "train_step", kill)
    with pytest.raises(Kill):
        train(recipe, tmp_path, show=False)
    monkeypatch.setattr(vlp.train, "train_step", train_step)
    train(recipe, tmp_path, resume=True, show=False)
    expected, found = state(pretrained), state(tmp_path)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_next_run_goes_on_with_them_and_plain_clip_leaves_them(
    recipe: Recipe, pretrained: Path, tmp_path: Path
) -> None:
    known = parts_of(load_bundle(pretrained)).state_dict()
    start = {"model": {"name": f"local-dir:{pretrained}", "config": None, "weights": str(pretrained)}}
    further = merge(recipe.model_dump(), {**start, "tokenizer": {"kind": "weights"}, "objective": {"parts": None}})
    run = prepare(validate(further), tmp_path)
    assert all(torch.equal(run.objective.parts.state_dict()[name], value) for name, value in known.items())
    plain = prepare(validate(merge(further, {"objective": {"name": "clip"}})), tmp_path)
    assert current_bundle(plain).parts == {}
    assert plain.ema_parts is None


def test_evaluations_in_the_loop_see_the_parts_of_that_moment(recipe: Recipe, tmp_path: Path) -> None:
    run = prepare(recipe, tmp_path)
    before = parts_of(current_bundle(run)).state_dict()
    batches = iter(run.loader)
    for _ in range(2):
        train_step(run, next(batches))
    bundle = current_bundle(run)
    parts = parts_of(bundle)
    assert not parts.training
    assert run.objective.parts.training
    assert run.ema_parts is not None
    for name, value in parts.state_dict().items():
        assert torch.equal(value, run.ema_parts.shadow[f"detection.{name}"])
    assert any(not torch.equal(value, before[name]) for name, value in parts.state_dict().items())


FROZEN: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"timm_model_name": "test_resnet", "image_size": 32, "timm_pool": "avg", "timm_proj": "linear"},
    "text_cfg": {"context_length": 12, "vocab_size": 320, "width": 32, "heads": 2, "layers": 1},
    "custom_text": True,
}


def test_a_locked_trunk_gives_maps_and_stays_as_it_is(recipe: Recipe, tmp_path: Path) -> None:
    settings = {
        "model": {"config": FROZEN, "lock_image": True},
        "data": {"image": {"size": 32}},
        "objective": {"parts": {"levels": [3, 4]}},
        "run": {"steps": 2},
    }
    train(validate(merge(recipe.model_dump(), settings)), tmp_path, show=False)
    config = ModelConfig(config=FROZEN)
    torch.manual_seed(recipe.run.seed)
    trained = load_bundle(tmp_path)
    fresh, _ = build_model(config, 32, 12, trained.tokenizer.vocab_size)
    own = trained.model.state_dict()
    trunk = [name for name in own if name.startswith("visual.trunk.")]
    assert len(trunk) > 10
    assert not any(name.endswith("running_mean") and own[name].abs().sum() > 0 for name in trunk)
    assert own.keys() == fresh.state_dict().keys()


def test_an_objective_says_how_fast_the_model_learns() -> None:
    model, _ = build_model(ModelConfig(config=MICRO), 16, 12, 320)

    class Slow(nn.Module):
        """Half the rate for the image tower."""

        def rate_scale(self, name: str) -> float:
            return 0.5 if name.startswith("visual.") else 1.0

    config = validate({"data": {"train": "x"}, "run": {"steps": 1}}).optim
    groups = parameter_groups(model, Slow(), config)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert scales[id(parameter)] == (0.5 if name.startswith("visual.") else 1.0), name


def test_activations_by_hand() -> None:
    """Linear 8 -> 16 and its square: kept are the input, 8 floats, and the output, 16 floats, a sample; no weights.

    A learned scale of the input of two samples in one: what does not grow with samples is counted once.
    """
    layer = nn.Linear(8, 16)

    def forward(count: int) -> object:
        return layer(torch.empty(count, 8)).square()

    assert saved_bytes(forward, 5, layer) == 5 * (8 + 16) * 4
    assert saved_bytes(lambda count: (forward(count), layer.weight.exp()), 5, layer) == 5 * 24 * 4 + 8 * 16 * 4


def test_activations_are_those_that_a_real_pass_keeps(recipe: Recipe, tmp_path: Path) -> None:
    """The storages that the real tower, pyramid and heads save for the backward pass on eight pictures."""
    run = prepare(recipe, tmp_path)
    told = activations(run, 8) - activations_of_text(run, 8)
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for module in (run.model, run.objective) for p in module.parameters()}
    run.model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive += run.objective.picture_pass(run.model, torch.randn(8, 3, 16, 16))
    real = sum(size for place, size in kept.items() if place not in own)
    assert told == pytest.approx(real, rel=0.05)


def activations_of_text(run: Run, samples: int) -> int:
    def forward(count: int) -> object:
        return run.model.encode_text(torch.zeros(count, 12, dtype=torch.int64))  # type: ignore[operator]

    return saved_bytes(forward, samples, run.model)


def test_memory_adds_up(recipe: Recipe, tmp_path: Path) -> None:
    run = prepare(recipe, tmp_path)
    count = sum(p.numel() for module in (run.model, run.objective) for p in module.parameters())
    found = estimate(run)
    assert found["weights"] == round(4 * count / 1e9, 3)
    assert found["activations"] > 0
    assert sum(value for name, value in found.items() if name != "sum") == pytest.approx(found["sum"], abs=0.003)
    many = prepare(validate(merge(recipe.model_dump(), {"optim": {"accumulate": 4}})), tmp_path)
    assert activations(many, 8) == activations(run, 8)
    assert estimate(many)["activations"] <= found["activations"]


@pytest.mark.parametrize(("name", "params"), [("ViT-B-16", 86), ("ViT-L-14", 303)])
def test_large_towers_at_1024_px_are_built_and_counted_without_data(name: str, params: int) -> None:
    """On `meta`. ViT-B/16: 64 x 64 tokens, in windows of 16 x 16; windows must save what attention costs.

    By hand for B: 8 of 12 layers see 257 tokens 16 times in place of 4097 once; scores and sums of T tokens cost
    2 x 2 x width x T^2.
    """
    size = 1024 if name == "ViT-B-16" else 896  # a multiple of the patch and of four windows
    module, config = base.load({
        "name": "detection_pretrain", "boxes": 8,
        "parts": {"window": {"windows": 4, "global_layers": 4, "shift": True}},
    })  # fmt: skip
    with torch.device("meta"):
        model, cfg = build_model(ModelConfig(name=name), size, 77, 49408)
        objective = module.build(config, base.Dims(cfg["embed_dim"], 2.0))
        objective.attach(model)
    model.eval().requires_grad_(False)
    tower = model.get_submodule("visual")
    assert sum(p.numel() for p in tower.parameters()) / 1e6 == pytest.approx(params, rel=0.05)
    found = {}
    for windows, shift in ((1, False), (4, False), (4, True)):
        options = {"windows": windows, "shift": shift} | ({"global_layers": 4} if windows > 1 else {})
        window = type(objective.parts.config.window)(**options)
        objective.parts.config = objective.parts.config.model_copy(update={"window": window})
        found[windows, shift] = objective.more_flops(model, size, 3, 3)
    assert found[4, False] < found[1, False] < found[4, True]
    if name == "ViT-B-16":
        width, layers = 768, 8
        scores = 3 * 2 * 2 * width * layers * (4097**2 - 16 * 257**2)
        copies = 3 * 2 * layers * 12 * width**2 * 15  # fifteen more class tokens through each windowed layer
        assert found[1, False] - found[4, False] == scores - copies


def test_a_recipe_for_windows_on_a_cnn_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    settings = {
        "model": {"config": FROZEN},
        "data": {"image": {"size": 32}},
        "objective": {"parts": {"window": {"windows": 2, "global_layers": 1}}},
    }
    with pytest.raises(ConfigError, match="the image tower has no grid of tokens; leave window out"):
        prepare(validate(merge(recipe.model_dump(), settings)), tmp_path)
