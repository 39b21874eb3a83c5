"""The improved baseline against values by hand, and against its paper's code written out once more, with gradients."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.errors import ConfigError, MissingField
from vlp.models import instantiate
from vlp.objectives import base, strong_baseline
from vlp.objectives.base import Dims, Features
from vlp.objectives.strong_baseline import Config, StrongBaseline
from vlp.testing import MICRO, attached, full_batch, network_input

DIMS = Dims(16, math.log(10))
SMALL: dict[str, Any] = {"hidden": 16, "dim": 8}
SSL: dict[str, dict[str, Any]] = {
    "simclr": {"ssl_hidden": 12, "ssl_dim": 6},
    "siamlip": {"ssl_hidden": 12, "ssl_dim": 6},
    "byolip": {"ssl_hidden": 12, "ssl_dim": 6},
    "barlip": {"ssl_hidden": 12, "ssl_dim": 6},
    "swalip": {"smoothing": 0.0},
}


def make(count: int = 6, **options: Any) -> tuple[StrongBaseline, nn.Module, Features]:
    """An objective that has met a model, the model, and what it encodes of a batch."""
    torch.manual_seed(0)
    model = instantiate(MICRO)
    objective: StrongBaseline = attached(strong_baseline.build(Config(**{**SMALL, **options}), DIMS), model)
    return objective, model, objective.encode(model, *network_input(full_batch(count)))  # type: ignore[arg-type]


def test_weights_of_weak_and_strong_pairs_by_hand() -> None:
    """One strong pair, all features on the axes and projectors the identity, no smoothing.

    The weak pair at scale 2 costs log(1 + e^-2) = 0.126928 either way, the strong one at scale 10 log(1 + e^-10) =
    0.0000454. With n = 1 their mean counts: 0.063487.
    """
    objective = strong_baseline.build(Config(views=1, smoothing=0.0), DIMS)
    objective.local.update({"image": nn.Identity(), "text": nn.Identity()})
    objective.local_logit_scale = nn.Parameter(torch.tensor(math.log(10)))
    eye = torch.eye(2)
    output = objective(Features(eye, eye, extra={"image 0": eye, "text 0": eye}), torch.tensor(2.0))
    assert output.loss.item() == pytest.approx((0.126928 + 0.0000454) / 2, abs=1e-6)


def test_cosine_loss_by_hand() -> None:
    """Cosines 1 and 0: 2 - 2 * 0.5 = 1. No gradient reaches the target."""
    predicted = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True)
    target = torch.tensor([[3.0, 0.0], [1.0, 0.0]], requires_grad=True)
    loss = strong_baseline.cosine_loss(predicted, target)
    loss.backward()
    assert loss.item() == pytest.approx(1.0)
    assert target.grad is None
    assert predicted.grad is not None


def test_barlow_loss_by_hand() -> None:
    """Columns (1, -1) and (1, 1) of both: correlations 1 on the diagonal, 0 beside it, so 0. With the second side's
    columns exchanged the diagonal is 0 and the rest 1: 2 * 1 + 0.005 * 2 = 2.01."""
    first = torch.tensor([[1.0, 1.0], [-1.0, 1.0]])
    assert strong_baseline.barlow_loss(first, first).item() == pytest.approx(0.0)
    assert strong_baseline.barlow_loss(first, first.flip(1)).item() == pytest.approx(2.01)


def test_simclr_loss_by_hand() -> None:
    """Two samples on the axes, equal views, temperature 1: each has its partner at 1 and two others at 0.

    -log(e / (e + 2)) = 0.551445.
    """
    eye = torch.eye(2)
    assert strong_baseline.simclr_loss(eye, eye, temperature=1.0).item() == pytest.approx(0.551445, abs=1e-6)


def test_sinkhorn_shares_out() -> None:
    """Both samples are like the first partner, the first one more: each partner gets one of them all the same."""
    shares = strong_baseline.sinkhorn(torch.tensor([[0.9, 0.0], [0.6, 0.0]]))
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(2))
    assert shares[0, 0] > 0.8
    assert shares[1, 1] > 0.8


def slow_sinkhorn(scores: Tensor) -> Tensor:
    """clip-rocket's, in its own words: prototypes in rows."""
    with torch.no_grad():
        q = torch.exp(scores / 0.05).t()
        samples, prototypes = q.shape[1], q.shape[0]
        q /= q.sum()
        for _ in range(3):
            q /= q.sum(dim=1, keepdim=True)
            q /= prototypes
            q /= q.sum(dim=0, keepdim=True)
            q /= samples
        return (q * samples).t()


def slow_loss(objective: StrongBaseline, features: Features, scale: Tensor) -> Tensor:
    """The paper's code, view by view."""
    config, extra = objective.config, features.extra
    targets = torch.arange(len(features.image_BD))
    n = config.views
    h = {
        side: [F.normalize(objective.local[side](extra[f"{side} {k}"]), dim=1) for k in range(n)]
        for side in ("image", "text")
    }
    assert objective.local_logit_scale is not None
    own_scale = objective.local_logit_scale.exp()
    total = torch.zeros(())
    for query, key, here, there in (
        (features.image_BD, features.text_BD, "image", "text"),
        (features.text_BD, features.image_BD, "text", "image"),
    ):
        overall = F.cross_entropy(scale * query @ key.T, targets)
        local = [
            F.cross_entropy(own_scale * a @ b.T, targets, label_smoothing=config.smoothing)
            for a in h[here]
            for b in h[there]
        ]
        total = total + (overall + sum(local, torch.zeros(())) / len(local) * n) / (1 + n) / 2
    if config.ssl == "none":
        return total
    return total + config.term.weight * slow_ssl(objective, extra, h, own_scale)


def slow_ssl(objective: StrongBaseline, extra: Any, h: dict[str, list[Tensor]], scale: Tensor) -> Tensor:
    ssl, n = objective.config.ssl, objective.config.views
    if ssl == "simclr":
        a, b = (F.normalize(objective.projectors["image"](extra[f"image {k}"]), dim=1) for k in (0, 1))
        both, count, terms = torch.cat([a, b]), len(a), []
        for i in range(2 * count):
            logits = {j: both[i] @ both[j] / 0.1 for j in range(2 * count) if j != i}
            terms.append(torch.stack(list(logits.values())).logsumexp(0) - logits[(i + count) % (2 * count)])
        return torch.stack(terms).mean()
    if ssl == "swalip":
        loss = torch.zeros(())
        for i in (0, 1):
            for j in (0, 1):
                for flip in (False, True):
                    own, other = (h["image"][k] @ h["text"][m].T for k, m in ((i, j), (1 - i, 1 - j)))
                    own, other = (own.T, other.T) if flip else (own, other)
                    target = slow_sinkhorn(other.detach())
                    loss = loss - (target * (scale * own).log_softmax(1)).sum(1).mean() / 2
        return loss / n**2
    names = {side: [side, *(f"{side} {k}" for k in range(n))] for side in ("image", "text")}
    v = {name: objective.projectors[side](extra[name]) for side in names for name in names[side]}
    pairs = [("image", "text")] + [(f"image {i}", f"text {j}") for i in range(n) for j in range(n)]
    loss = torch.zeros(())
    if ssl == "barlip":
        for image, text in pairs:
            c = torch.einsum("bi, bj -> ij", v[image], v[text]) / len(v[image])
            difference = (c - torch.eye(len(c))).pow(2)
            loss = loss + difference.diagonal().sum() + 5e-3 * (difference.sum() - difference.diagonal().sum())
        return loss / len(pairs)
    p = {name: objective.predictors[side](v[name]) for side in names for name in names[side]}
    if ssl == "byolip":
        v = {name: objective.copied[side](extra[f"copied {name}"]) for side in names for name in names[side]}
    for image, text in pairs:
        for query, key in ((image, text), (text, image)):
            cosine = (F.normalize(p[query], dim=1) * F.normalize(v[key], dim=1).detach()).sum(1)
            loss = loss + 2 - 2 * cosine.mean()
    return loss / (2 * len(pairs))


@pytest.mark.parametrize("count", [2, 5, 9])
@pytest.mark.parametrize("ssl", ["none", *SSL])
def test_equals_the_papers_code_with_gradients(count: int, ssl: str) -> None:
    objective, _, features = make(count, ssl=ssl, **SSL.get(ssl, {}))
    found = []
    for ours in (True, False):
        leaves = features.map(lambda tensor: tensor.detach().requires_grad_())
        scale = torch.tensor(10.0, requires_grad=True)
        objective.zero_grad(set_to_none=True)
        loss = objective(leaves, scale).loss if ours else slow_loss(objective, leaves, scale)
        loss.backward()
        grads = [tensor.grad for tensor in (scale, *leaves.tensors(), *objective.parameters())]
        found.append((loss.item(), grads))
    (loss_fast, fast), (loss_slow, slow) = found
    assert loss_fast == pytest.approx(loss_slow, rel=1e-5)
    assert [value is None for value in fast] == [value is None for value in slow]
    mine, theirs = (torch.cat([value.flatten() for value in grads if value is not None]) for grads in (fast, slow))
    assert len(mine) > 1000
    assert (mine - theirs).norm() <= 1e-4 * theirs.norm()


def test_weak_and_strong_share_no_projector_and_no_temperature() -> None:
    """The strong views' loss gives the model's projections and scale no gradient."""
    objective, model, features = make()
    scale: Tensor = model.logit_scale.exp()  # type: ignore[operator]
    objective(
        Features(features.image_BD.detach(), features.text_BD.detach(), extra=features.extra), scale
    ).loss.backward()
    named = dict(model.named_parameters())
    assert named["visual.proj"].grad is None
    assert named["text_projection"].grad is None
    assert named["visual.conv1.weight"].grad is not None
    assert named["token_embedding.weight"].grad is not None


def test_equal_captions_are_no_negatives_of_strong_views_either() -> None:
    _, _, masked = make(clip={"mask": "captions"})
    objective, _, plain = make()
    assert masked.phrase_ids_BP is not None
    ids = torch.zeros_like(masked.phrase_ids_BP)
    output = objective(Features(plain.image_BD, plain.text_BD, ids, extra=plain.extra), torch.tensor(10.0))
    assert output.parts["local_image_to_text"].item() == pytest.approx(0.0, abs=1e-6), "no negative is left"


@pytest.mark.parametrize("ssl", ["siamlip", "barlip", "simclr"])
def test_a_term_on_plain_clip(ssl: str) -> None:
    """Without strong views only the weak pair counts, and SimCLR looks at two further pictures all the same."""
    torch.manual_seed(0)
    model = instantiate(MICRO)
    objective: StrongBaseline = attached(strong_baseline.build(Config(views=0, ssl=ssl, **SSL[ssl]), DIMS), model)
    features = objective.encode(model, *network_input(full_batch()))  # type: ignore[arg-type]
    output = objective(features, torch.tensor(10.0))
    weak = base.contrast(features, torch.tensor(10.0))
    expected = 0.5 * sum(weak) + objective.config.term.weight * output.parts[ssl]
    torch.testing.assert_close(output.loss, expected)
    assert not any("local" in name for name in output.parts)


def test_the_momentum_copy_follows_and_is_saved() -> None:
    objective, model, _ = make(ssl="byolip", momentum=0.9, **SSL["byolip"])
    before = objective.copy["model"].visual.conv1.weight.clone()  # type: ignore[union-attr, operator]
    with torch.no_grad():
        model.visual.conv1.weight.add_(1.0)  # type: ignore[union-attr, operator]
    objective.after_step(model)
    after = objective.copy["model"].visual.conv1.weight  # type: ignore[union-attr]
    torch.testing.assert_close(after, before + 0.1)
    assert not any(p.requires_grad for p in [*objective.copy.parameters(), *objective.copied.parameters()])
    names = list(objective.state_dict())
    assert "copy.model.visual.conv1.weight" in names
    assert len(names) == len(set(names))
    assert sum("conv1" in name for name in names) == 1


def test_the_scale_stays_within_its_bounds() -> None:
    objective, model, _ = make()
    assert objective.local_logit_scale is not None
    objective.local_logit_scale.data.fill_(9.0)
    objective.after_step(model)
    assert objective.local_logit_scale.exp().item() == pytest.approx(100.0)


def test_missing_views_and_options_without_effect_are_named() -> None:
    batch = full_batch()
    objective, model, _ = make()
    with pytest.raises(MissingField, match=r"strong_baseline needs 2 .*'views'.*data\.views=3"):
        objective.encode(model, *network_input(Batch(batch.keys, batch.pixels, batch.tokens)))  # type: ignore[arg-type]
    for options, named in (
        ({"views": 0, "hidden": 8}, r"objective\.hidden=8 has no effect without strong views"),
        ({"ssl_weight": 0.5}, r"objective\.ssl_weight=0\.5 has no effect without a self-supervised term"),
        ({"ssl": "siamlip", "momentum": 0.5}, r"objective\.momentum=0\.5 has no effect without objective\.ssl=byolip"),
        ({"ssl": "swalip"}, r"objective\.views=2, objective\.smoothing=0, not 2 and 0\.1"),
    ):
        with pytest.raises(ConfigError, match=named):
            base.load({"name": "strong_baseline", **options})
