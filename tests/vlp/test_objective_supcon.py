"""Label-guided supervised contrast: values by hand, the definition entry by entry, and labels that are not there."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.errors import ConfigError
from vlp.objectives import base, clip, supcon
from vlp.objectives._kernel import Pairs, Side
from vlp.objectives._labels import Likeness, likeness, with_partner
from vlp.objectives.base import Dims, Features

SETS = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 1], [0, 0, 0]], dtype=torch.uint8)


def features_of(count: int, labels: Tensor, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(count, 5, generator=generator), dim=1).requires_grad_() for _ in range(2))
    return Features(image, text, extra={"labels": labels})


def loss_of(features: Features, scale: float = 4.0, **options: Any) -> base.LossOutput:
    config = supcon.Config(**options)
    output: base.LossOutput = supcon.build(config, Dims(5, 2.0, 3))(features, torch.tensor(scale))
    return output


def gradients(loss: Tensor, features: Features) -> list[Tensor]:
    leaves = (features.image_BD, features.text_BD)
    return list(torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True))


def test_the_three_terms_by_hand() -> None:
    """Pictures and texts on the axes, temperature 1, labels a, a, b.

    Among pictures all other scores are 0: the first two choose their one partner among 2, log 2 each; the third has
    none and counts 0: 2 log 2 / 3 = 0.462098; texts alike. Across, scores are 1 on the diagonal and 0 elsewhere: the
    denominators are e + 2, the mean positive score is 1/2, 1/2 and 1: log(e + 2) - 2/3 = 0.884778.
    """
    features = Features(torch.eye(3), torch.eye(3), extra={"labels": torch.tensor([0, 0, 1])})
    parts = loss_of(features, temperature=1.0).parts
    assert parts["intra_image"].item() == pytest.approx(2 * math.log(2) / 3, abs=1e-6)
    assert parts["intra_text"].item() == pytest.approx(0.462098, abs=1e-6)
    assert parts["inter"].item() == pytest.approx(0.884778, abs=1e-6)
    assert parts["positives"].item() == pytest.approx(2 / 3)


def weight_of(kind: str, a: Tensor, b: Tensor) -> float:
    """Likeness of two samples' labels, straight from the words."""
    if kind == "label":
        return float(a == b and a >= 0)
    own, other = set(a.nonzero()[:, 0].tolist()), set(b.nonzero()[:, 0].tolist())
    if kind == "intersect":
        return float(bool(own & other))
    return len(own & other) / max(1, len(own | other))


def slow_term(rows: Tensor, columns: Tensor, labels: Tensor, kind: str, scale: float, among: bool) -> Tensor:
    """The formula, entry by entry; `among`: one modality, where a sample is no pair with itself."""
    total = torch.zeros(())
    known = [bool(label >= 0) if kind == "label" else bool(label.any()) for label in labels]
    for i in range(len(rows)):
        others = [a for a in range(len(rows)) if known[a] and not (among and a == i)]
        weights = {p: weight_of(kind, labels[i], labels[p]) for p in others}
        if not known[i] or not sum(weights.values()):
            continue
        scores = {a: scale * (rows[i] * columns[a]).sum() for a in others}
        log_z = torch.stack(list(scores.values())).exp().sum().log()
        for p in others:
            total = total - weights[p] / sum(weights.values()) * (scores[p] - log_z)
    return total / len(rows)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("kind", ["label", "intersect", "jaccard"])
def test_terms_equal_the_slow_definition_with_gradients(kind: str, count: int) -> None:
    labels = (torch.tensor([0, 1, 0, -1, 1, 2, -1]) if kind == "label" else SETS)[:count]
    features = features_of(count, labels)
    config = supcon.Config.model_validate({"positives": kind})
    terms = supcon.supcon_terms(features, labels, torch.tensor(4.0), config)
    image, text = features.image_BD, features.text_BD
    scale = 10.0
    expected = {
        "intra_image": slow_term(image, image, labels, kind, scale, among=True),
        "intra_text": slow_term(text, text, labels, kind, scale, among=True),
        "inter": 0.5 * slow_term(image, text, labels, kind, scale, among=False)
        + 0.5 * slow_term(text, image, labels, kind, scale, among=False),
    }
    for name, slow in expected.items():
        torch.testing.assert_close(terms[name], slow, rtol=1e-5, atol=1e-6)
        if slow.requires_grad:
            for ours, theirs in zip(gradients(terms[name], features), gradients(slow, features), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_terms_are_weighted_sums_over_both_directions() -> None:
    features = features_of(7, torch.tensor([0, 1, 0, -1, 1, 2, -1]))
    output = loss_of(features, intra_image=0.3, intra_text=0.2, inter=0.7)
    host = loss_of(features, intra_image=0, intra_text=0, inter=0).loss
    parts = output.parts
    expected = host + 0.3 * parts["intra_image"] + 0.2 * parts["intra_text"] + 1.4 * parts["inter"]
    torch.testing.assert_close(output.loss, expected)


def test_without_a_partner_nothing_is_added_and_the_log_says_so() -> None:
    features = features_of(4, torch.arange(4))
    output = loss_of(features, inter=0)
    assert output.parts["positives"] == 0
    assert output.parts["intra_image"] == output.parts["intra_text"] == 0
    torch.testing.assert_close(output.loss, loss_of(features, intra_image=0, intra_text=0, inter=0).loss)


@pytest.mark.parametrize("kind", ["label", "jaccard"])
def test_unknown_samples_take_no_part_in_the_terms(kind: str) -> None:
    """Neither their loss nor their features move: they are nobody's positive and nobody's negative."""
    labels = torch.tensor([0, 0, -1, 1]) if kind == "label" else SETS[[0, 1, 3, 2]]
    features = features_of(4, labels)
    terms = supcon.supcon_terms(features, labels, torch.tensor(4.0), supcon.Config.model_validate({"positives": kind}))
    for grad in gradients(torch.stack(list(terms.values())).sum(), features):
        assert torch.equal(grad[2], torch.zeros(5))
        assert grad[0].norm() > 0
    unknown = features_of(3, torch.full((3,), -1))
    output = loss_of(unknown)
    assert output.loss == loss_of(unknown, intra_image=0, intra_text=0, inter=0).loss


def test_label_mask_keeps_equal_labels_out_of_the_host_loss() -> None:
    """As clip's mask by captions does where captions are equal exactly when labels are."""
    labels = torch.tensor([0, 1, 0, 2])
    features = features_of(4, labels)
    off = {"intra_image": 0, "intra_text": 0, "inter": 0}
    captions = Features(features.image_BD, features.text_BD, labels[:, None])
    masked = clip.clip_loss(captions, torch.tensor(4.0), clip.Config(mask="captions"))[0]
    assert torch.equal(loss_of(features, **off).loss, masked)
    plain = clip.clip_loss(features, torch.tensor(4.0), clip.Config())[0]
    assert torch.equal(loss_of(features, **off, label_mask=False).loss, plain)
    both = Features(features.image_BD, features.text_BD, torch.tensor([[5], [5], [6], [7]]), extra=features.extra)
    joined = Features(features.image_BD, features.text_BD, torch.tensor([[1, 2], [1, 3], [4, 2], [5, 6]]))
    expected = clip.clip_loss(both, torch.tensor(4.0), clip.Config(), ((joined.phrase_ids_BP,), _share))[0]  # type: ignore[arg-type]
    torch.testing.assert_close(loss_of(both, **off, clip={"mask": "captions"}).loss, expected)


def _share(rows: Side, columns: Side) -> Pairs:
    return Pairs((rows[0][:, None] == columns[0]).any(dim=2))


def test_likeness_by_hand() -> None:
    """{0, 1} and {1}: they share 1 of 2 labels: intersect 1, jaccard 1/2, cosine 1/sqrt(2); an empty set: 0."""
    rows, columns = SETS[:1], SETS[[1, 3]]
    kinds: tuple[Likeness, ...] = ("intersect", "jaccard", "cosine")
    found = [likeness(kind, rows, columns)[0].tolist() for kind in kinds]
    assert [row[0] for row in found] == pytest.approx([1.0, 0.5, 0.707107], abs=1e-6)
    assert [row[1] for row in found] == [0.0, 0.0, 0.0]
    assert with_partner(SETS[:4]).tolist() == [True, True, False, False]
    assert with_partner(torch.tensor([3, -1, 3, -1, 2])).tolist() == [True, False, True, False, False]


def test_options_without_effect_and_missing_labels_are_errors() -> None:
    off = {"intra_image": 0, "intra_text": 0, "inter": 0}
    with pytest.raises(ConfigError, match="temperature=0.5 has no effect"):
        base.load({"name": "supcon", **off, "temperature": 0.5})
    with pytest.raises(ConfigError, match="positives=jaccard has no effect"):
        base.load({"name": "supcon", **off, "label_mask": False, "positives": "jaccard"})
    with pytest.raises(ConfigError, match=r"data\.labels\.names"):
        supcon.build(supcon.Config(), Dims(5, 2.0))
