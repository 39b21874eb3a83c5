"""One update: parts of a batch make the whole, refused steps change nothing, rates and precisions reach the model."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.batch import Batch
from data_pipelines.errors import ConfigError, PipelineError
from vlp.bundle import load_bundle
from vlp.guard import Guard
from vlp.models.locking import set_training
from vlp.recipe import Recipe, validate
from vlp.run import Run, prepare
from vlp.runlog import RunLog
from vlp.step import backward, encode, running_statistics, train_step
from vlp.train import train

Make = Callable[..., Recipe]


def changed(recipe: Recipe, **parts: dict[str, Any]) -> Recipe:
    settings = recipe.model_dump()
    return validate(settings | {name: settings[name] | change for name, change in parts.items()})


def gradients(recipe: Recipe, folder: Path) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of the first batch."""
    run = prepare(recipe, folder)
    set_training(run.model)
    loss = float(backward(run, next(iter(run.loader))).loss.detach())
    return loss, [p.grad for p in run.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("parts", [2, 5, 32])
def test_parts_of_a_batch_give_the_gradients_of_the_whole(micro_recipe: Make, tmp_path: Path, parts: int) -> None:
    loss, whole = gradients(micro_recipe(), tmp_path)
    again, found = gradients(changed(micro_recipe(), optim={"accumulate": parts}), tmp_path)
    assert again == pytest.approx(loss, rel=1e-6)
    assert len(found) == len(whole) > 10
    for one, other in zip(whole, found, strict=True):
        assert (one - other).abs().max() <= 1e-5 * one.abs().max() + 1e-8


@pytest.mark.parametrize("ssl", ["none", "siamlip"])
def test_projectors_see_the_whole_batch_however_it_is_cut(micro_recipe: Make, tmp_path: Path, ssl: str) -> None:
    """Batch norms in the loss; the further views and texts are cut and put together as the first are."""
    sizes = {} if ssl == "none" else {"ssl": ssl, "ssl_hidden": 12, "ssl_dim": 6}
    objective = {"name": "strong_baseline", "hidden": 16, "dim": 8, **sizes}
    recipe = validate({**micro_recipe().model_dump(), "objective": objective})
    recipe = changed(recipe, data={"views": 3, "texts": 3})
    loss, whole = gradients(recipe, tmp_path)
    again, found = gradients(changed(recipe, optim={"accumulate": 4}), tmp_path)
    assert again == pytest.approx(loss, rel=1e-6)
    assert len(found) == len(whole) > 20
    ours, theirs = (torch.cat([gradient.flatten() for gradient in grads]) for grads in (found, whole))
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def dropping(recipe: Recipe) -> Recipe:
    vision = {**recipe.model.config["vision_cfg"], "patch_size": 4}  # type: ignore[index]
    config = {**recipe.model.config, "vision_cfg": vision}  # type: ignore[dict-item]
    return changed(recipe, model={"config": config, "patch_dropout": 0.5})


def test_a_resnet_has_no_patches_to_drop(micro_recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.patch_dropout=0\.5: the image tower is a ResNet"):
        prepare(changed(micro_recipe(), model={"config": None, "name": "RN50", "patch_dropout": 0.5}), tmp_path)


def test_dropped_patches_depend_on_seed_step_and_part_alone(micro_recipe: Make, tmp_path: Path) -> None:
    """So both passes over a part drop the same ones, and a resumed run drops what it would have dropped."""
    run = prepare(dropping(micro_recipe()), tmp_path)
    set_training(run.model)
    batch = next(iter(run.loader))

    def image(step: int, part: int) -> torch.Tensor:
        run.step = step
        torch.rand(3)  # whatever else draws numbers
        return encode(run, batch, part).image_BD.detach()

    assert torch.equal(image(3, 1), image(3, 1))
    assert not torch.equal(image(3, 1), image(3, 2))
    assert not torch.equal(image(3, 1), image(4, 1))


def test_recomputed_activations_give_the_same_gradients(micro_recipe: Make, tmp_path: Path) -> None:
    loss, kept = gradients(micro_recipe(), tmp_path)
    again, recomputed = gradients(micro_recipe(activation_checkpointing=True), tmp_path)
    assert again == pytest.approx(loss, rel=1e-5), "its attention runs in other kernels"
    for one, other in zip(kept, recomputed, strict=True):
        assert (one - other).abs().max() <= 1e-4 * one.abs().max()


def test_pure_bf16_learns_and_leaves_a_float32_bundle(micro_recipe: Make, tmp_path: Path) -> None:
    train(micro_recipe(precision="bf16"), tmp_path / "run", show=False)
    run = prepare(micro_recipe(precision="bf16"), tmp_path / "other")
    assert {p.dtype for name, p in run.model.named_parameters() if name != "logit_scale"} == {torch.bfloat16}
    rows = RunLog(tmp_path / "run").rows("metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {p.dtype for p in load_bundle(tmp_path / "run").model.parameters()} == {torch.float32}


def poison(run: Run, factor: float) -> None:
    """The objective's next losses are multiplied; nan and inf do what they do in practice."""
    forward = run.objective.forward

    def spoiled(*args: Any) -> Any:
        output = forward(*args)
        return type(output)(output.loss * factor, output.parts)

    run.objective.forward = spoiled


@pytest.mark.parametrize("factor", [math.nan, math.inf, 100.0])
def test_a_bad_step_leaves_every_bit_as_it_was(micro_recipe: Make, tmp_path: Path, factor: float) -> None:
    run = prepare(micro_recipe(steps=30), tmp_path)
    set_training(run.model)
    batches = iter(run.loader)
    for _ in range(12):
        train_step(run, next(batches))
    before = [{k: v.clone() for k, v in part.items()} for part in (run.model.state_dict(), run.ema.shadow)]  # type: ignore[union-attr]
    healthy = run.objective.forward
    poison(run, factor)
    bad = next(batches)
    values = train_step(run, bad)
    run.objective.forward = healthy
    for state, old in zip((run.model.state_dict(), run.ema.shadow), before, strict=True):  # type: ignore[union-attr]
        assert all(torch.equal(old[key], value) for key, value in state.items())
    assert values["refused_steps"] == 1
    row = run.log.rows("refused.jsonl")[-1]
    assert row["keys"] == list(bad.keys)
    assert row["reason"] == ("loss_spike" if factor == 100.0 else "loss_not_finite")
    train_step(run, next(batches))
    assert any(not torch.equal(before[0][key], value) for key, value in run.model.state_dict().items())


def test_three_in_a_row_go_back_to_the_last_checkpoint(
    micro_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of step 5, data from step 10 on: the run ends with as many steps as asked, and says what happened."""

    def step(run: Run, batch: Batch) -> dict[str, float]:
        healthy = run.objective.forward
        if run.step in (7, 8, 9):
            poison(run, math.nan)
        values = train_step(run, batch)
        run.objective.forward = healthy
        seen.append((run.step, next(iter(run.model.parameters())).detach().clone()))
        return values

    seen: list[tuple[int, torch.Tensor]] = []
    monkeypatch.setattr("vlp.train.train_step", step)
    summary = train(micro_recipe(save_every=5), tmp_path / "run", show=False)
    weights = dict(seen)
    assert summary["refused_steps"] == 3
    assert summary["steps"] == 12
    assert torch.equal(weights[7], weights[10]), "refused"
    assert not torch.equal(weights[5], weights[7])
    assert not torch.equal(weights[11], weights[12])
    assert [row["step"] for row in RunLog(tmp_path / "run").rows("refused.jsonl")] == [8, 9, 10]


def test_going_back_without_end_is_an_error(
    micro_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(run: Run, batch: Batch) -> dict[str, float]:
        if run.step == 5:
            poison(run, math.nan)
        return train_step(run, batch)

    monkeypatch.setattr("vlp.train.train_step", step)
    with pytest.raises(PipelineError, match="going back 3 times did not help"):
        train(micro_recipe(steps=100, save_every=5), tmp_path / "run", show=False)


def test_the_guard_by_hand() -> None:
    """Mean of ten losses 2.0: 5 x is 10. Below ten, or within 1.0 of the mean, nothing is a spike."""
    guard = Guard(5.0)
    assert [guard.check(loss, 1.0) for loss in [2.0] * 9] == [""] * 9
    assert guard.check(50.0, 1.0) == "", "nine losses say nothing yet"
    guard = Guard(5.0)
    for _ in range(10):
        guard.check(2.0, 1.0)
    assert guard.check(10.1, 1.0) == "loss_spike"
    assert guard.check(9.9, 1.0) == ""
    assert (guard.refused, guard.in_a_row) == (1, 0)
    assert guard.check(2.0, math.inf) == "gradient_not_finite"


def test_a_loss_below_0_is_no_spike() -> None:
    """Mean of ten losses -2.0: as far above it as 10 is above 2, so at 6. Losses of -1 and 1: deviation 1, so at 4."""
    for losses, limit in (([-2.0], 6.0), ([-1.0, 1.0], 4.0)):
        for loss, reason in ((limit - 0.1, ""), (limit + 0.1, "loss_spike")):
            guard = Guard(5.0)
            for recent in losses * 10:
                guard.check(recent, 1.0)
            assert guard.check(loss, 1.0) == reason
    small = Guard(5.0)
    for _ in range(10):
        small.check(0.01, 1.0)
    assert small.check(0.5, 1.0) == ""
    other = Guard(5.0)
    other.load_state_dict(small.state_dict())
    assert other.state_dict() == small.state_dict()
    assert Guard(None).check(1e9, 1.0) == ""


NORMED = {
    "embed_dim": 16, "init_logit_scale": 2.0, "custom_text": True,
    "vision_cfg": {
        "timm_model_name": "test_resnet", "timm_model_args": {"channels": [8, 8, 8, 16]}, "timm_pool": "avg",
        "timm_proj": "linear",
    },
    "text_cfg": {"width": 32, "heads": 2, "layers": 1},
}  # fmt: skip
"""An image tower with batch norms."""


def normed(recipe: Recipe, **optim: Any) -> Recipe:
    return validate(
        {**recipe.model_dump(), "model": {"config": NORMED}, "optim": {**recipe.optim.model_dump(), **optim}}
    )


def test_a_refused_step_leaves_the_running_statistics(micro_recipe: Make, tmp_path: Path) -> None:
    """Its forward pass has moved them; one that is not a number would stay for good, unseen in training."""
    run = prepare(normed(micro_recipe()), tmp_path)
    set_training(run.model)
    batches = iter(run.loader)
    train_step(run, next(batches))
    before = [value.clone() for value in running_statistics(run.model)]
    assert before
    first = run.model.get_parameter("visual.trunk.conv1.0.weight")
    kept = first.detach().clone()
    first.data.fill_(float("nan"))
    train_step(run, next(batches))
    assert run.guard.refused == 1
    for value, other in zip(running_statistics(run.model), before, strict=True):
        assert torch.equal(value, other)
    first.data.copy_(kept)
    train_step(run, next(batches))
    assert any(not torch.equal(a, b) for a, b in zip(running_statistics(run.model), before, strict=True))


def test_every_part_moves_the_running_statistics_once(micro_recipe: Make, tmp_path: Path) -> None:
    """A momentum of 0.1: after two parts of means a and b from 0 they are 0.9 x 0.1 a + 0.1 b."""
    run = prepare(normed(micro_recipe(), accumulate=2), tmp_path)
    set_training(run.model)
    batch = next(iter(run.loader))
    norm = run.model.get_submodule("visual.trunk.conv1.1")
    seen: list[torch.Tensor] = []
    hook = norm.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().mean((0, 2, 3))))
    backward(run, batch)
    hook.remove()
    assert len(seen) == 4, "each part without and with its graph"
    mean = run.model.get_buffer("visual.trunk.conv1.1.running_mean")
    assert torch.allclose(mean, 0.09 * seen[2] + 0.1 * seen[3], atol=1e-6)
